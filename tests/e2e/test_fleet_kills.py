# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd and the agent killed at random while records change; and a search for plaintext in all
that etcd and the agent have.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.fleet_hosts import SECRETD_FLEET, Fleet, fleet, wait_for
from tests.support.needs import need_root
from tests.support.scan import parts, scan, secret

__all__ = ["fleet"]

pytestmark = [pytest.mark.xdist_group("etcd"), pytest.mark.slow]

KILLS = int(os.environ.get("SECRETD_FLEET_KILLS", "12"))
"""The long form has 100."""


class Model:
    """What was published: by id, all values in order; None for withdrawn."""

    def __init__(self) -> None:
        self.history: dict[str, list[str | None]] = {}
        self.seen: dict[str, int] = {}

    def current(self) -> dict[str, bytes]:
        """What there is in the end."""
        last = {name: values[-1] for name, values in self.history.items()}
        return {name: value.encode() for name, value in last.items() if value is not None}

    def look(self, has: dict[str, bytes]) -> None:
        """Nothing that a host has may be older than what it had before."""
        for name, values in self.history.items():
            value = has[name].decode() if name in has else None
            if value is None and name not in self.seen:
                continue  # it has not arrived
            where = max(n for n, each in enumerate(values) if each == value)
            assert where >= self.seen.get(name, 0), f"{name} went back to {value}"
            self.seen[name] = where


@pytest.mark.timeout(900)
def test_nothing_is_lost_or_goes_back_over_kills(fleet: Fleet) -> None:
    """Of agent, secretd, publisher and publishing secretd, at any time."""
    rng = random.Random(7)
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    model = Model()
    number = 0
    for _ in range(KILLS):
        for _ in range(3):
            number += 1
            name = f"web.{rng.randrange(6)}"
            values = model.history.setdefault(name, [])
            withdraw = bool(values) and values[-1] is not None and rng.random() < 0.25
            if withdraw:
                pub.publish(name, "--to", "alpha", verb="withdraw")
                values.append(None)
            else:
                if any(each["id"] == name for each in pub.client.secrets()):
                    pub.client.ok("object-del", {"id": name})
                assert pub.client.add(name, data=f"value {number}") == {"return": {}}
                values.append(f"value {number}")  # it may arrive from here on
                pub.publish(name, "--to", "alpha")
            time.sleep(rng.random() * 0.05)
        what = rng.choice(["agent", "secretd", "both", "publisher"])
        if what in ("agent", "both"):
            alpha.kill_agent()
        if what in ("secretd", "both"):
            alpha.kill()
            alpha.start()
        if what in ("agent", "both"):
            alpha.start_agent()
        if what == "publisher":
            pub.kill()
            pub.start()
        if what != "publisher":
            model.look(alpha.has())
    wait_for(lambda: alpha.has() == model.current(), lambda: f"{alpha.has()} {model.current()}")
    model.look(alpha.has())
    assert "Traceback" not in alpha.said()


def test_a_killed_publisher_is_finished_by_the_next(fleet: Fleet) -> None:
    """At any moment of publishing to several hosts."""
    rng = random.Random(7)
    pub = fleet.host("pub", "web.*")
    hosts = [fleet.host(name) for name in ("alpha", "beta")]
    for number in range(max(4, KILLS // 3)):
        pub.process.ctl("add", "web.a", "--replace", "--stdin", input=f"value {number}".encode())
        words = [
            SECRETD_FLEET, "publish", "web.a", "--to", "*a", "--config", str(pub.config),
            "--control", pub.process.control,
        ]  # fmt: skip
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.25 + rng.random() * 0.25)
        process.send_signal(signal.SIGKILL)
        process.wait()
        pub.publish("web.a", "--to", "*a")
        for host in hosts:
            host.wait_until_it_has(web_a=f"value {number}".encode())


def test_etcd_and_the_agent_never_have_plaintext(fleet: Fleet, tmp_path: Path) -> None:
    """Its data and log, a snapshot, and the memory of etcd and of the agent."""
    need_root()
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    for number in range(20):
        pub.client.add(f"web.{number}", data=secret(number))
    pub.publish(*(f"web.{n}" for n in range(20)), "--to", "alpha")
    wait_for(lambda: len(alpha.client.secrets()) == 22, alpha.said)
    assert alpha.client.read("web.7") == secret(7).encode()
    cluster = fleet.cluster
    cluster.ctl("snapshot", "save", str(tmp_path / "snapshot"))
    files = [tmp_path / "snapshot", alpha.log]
    files += [each for each in cluster.directory.rglob("*") if each.is_file()]
    logs = [each for each in files if each.suffix == ".wal"]
    for path in files:
        assert not parts(path.read_bytes()), path
    assert alpha.agent is not None
    assert cluster.processes[0] is not None
    for pid in (alpha.agent.pid, cluster.processes[0].pid):
        assert not scan(pid).outside
    # The same search finds what is there.
    cluster.ctl("put", "/planted", secret(7))
    assert any(parts(path.read_bytes()) for path in logs)
    assert scan(cluster.processes[0].pid).outside
