# SPDX-License-Identifier: LGPL-2.1-or-later
"""The units of the fleet in a real systemd: the agent's user has no files, and brings what was
signed as the unit that it is.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.box import Box, installed
from tests.support.needs import need_program

__all__ = ["installed"]

pytestmark = pytest.mark.slow

FILES = "/etc/secretd/fleet"


@pytest.fixture
def box(installed: Path) -> Iterator[Box]:
    """A machine with a store, and with etcd."""
    need_program("etcd")
    made = Box(f"secretd-fleet-{os.getpid()}", installed)
    try:
        made.run("systemd-sysusers")
        made.write("/run/key", "k" * 32)
        made.run("install", "-d", "-o", "secretd", "-m", "700", "/var/lib/secretd")
        made.run("chown", "secretd", "/run/key")
        objects = (
            "--object=secret,id=store.key,file=/run/key "
            "--object=secret-store,id=store,path=/var/lib/secretd/store,keyid=store.key,create=on"
        )
        made.write(
            "/etc/systemd/system/secretd.service.d/test.conf",
            f'[Service]\nEnvironment="SECRETD_ARGS={objects}"\n',
        )
        made.run("systemctl", "daemon-reload")
        made.run("systemctl", "start", "secretd-control.socket", "secretd-client.socket")
        yield made
    finally:
        made.close()


def test_the_units_bring_a_fleet_to_a_machine(box: Box) -> None:
    """By 'secretctl host init', 'secretd-fleet enrol', and two units."""
    box.run("secretd-fleet", "init", "/srv/trial", "--name", "trial", "--node",
            "https://127.0.0.1:2379")  # fmt: skip
    box.run("systemd-run", "--unit=etcd-trial", "etcd", "--config-file",
            "/srv/trial/etcd/node1.yml")  # fmt: skip
    box.wait("secretd-fleet", "enrol", "/srv/trial", "alpha", "--publisher", "web.*",
             "--ssh", "sh -c")  # fmt: skip
    assert box.run("stat", "-c", "%a %U", f"{FILES}/host.key").stdout == "600 root\n"
    box.run("systemctl", "start", "secretd-fleet.service")
    box.wait("sh", "-c", "systemctl show -P StatusText secretd-fleet | grep -qx live")
    (fleet,) = box.qmp().ok("query-secret-fleet")
    assert fleet["roster"]["publishers"] == 1
    user = box.run("systemctl", "show", "-P", "User", "secretd-fleet.service").stdout.strip()
    assert user == "secretd-fleet"
    (pid,) = box.processes("secretd-fleet.service")
    uid = os.stat(f"/proc/{pid}").st_uid
    assert uid != 0
    # The rest of the machine cannot do what the unit may.
    words = ["setpriv", "--reuid=4711", "--clear-groups", "socat", "-"]
    requests = (
        {"execute": "qmp_capabilities"},
        {"execute": "secret-fleet-accept", "arguments": {"data": "eA=="}},
    )
    asked = "".join(json.dumps(each) + "\n" for each in requests)
    said = box.run(*words, "UNIX:/run/secretd/client.sock", input=asked, check=False).stdout
    assert "Only uid 0, the daemon's own uid, and those whom the 'carrier'" in said
    # A publisher's timer renews what hosts have.
    box.run("secretctl", "add", "web.a", "--stdin", input="value")
    box.run("secretctl", "grant", "web.*", "--to", "host:*")
    box.run("systemctl", "start", "secretd-fleet-renew.timer")
    box.run("systemctl", "start", "secretd-fleet-renew.service")
    # A pattern does not mean the publisher itself, and there is no other host.
    assert "renewed 0 manifests" in box.journal("secretd-fleet-renew")
    found = json.loads(box.run("secretd-fleet", "status", "--json").stdout)
    assert [each["host"] for each in found] == ["alpha"]
    # Enrolling again brings another certificate, and leaves what was added to the file by hand.
    before = box.run("cat", f"{FILES}/host.crt").stdout
    box.run("sh", "-c", f"echo 'metrics = \"/run/figures.prom\"' >> {FILES}/fleet.toml")
    for _ in range(2):
        box.run("secretd-fleet", "enrol", "/srv/trial", "alpha", "--ssh", "sh -c")
    assert box.run("cat", f"{FILES}/host.crt").stdout != before
    assert box.run("cat", f"{FILES}/fleet.toml").stdout.count("metrics = ") == 1


def test_nothing_is_wrong_with_the_units(box: Box) -> None:
    """By systemd's own words; and the agent is exposed by its network, and little else."""
    units = box.run("sh", "-c", "ls -d /usr/lib/systemd/system/secretd-fleet*").stdout.split()
    assert len(units) == 3
    done = box.run("systemd-analyze", "verify", *units, check=False)
    assert [line for line in (done.stdout + done.stderr).splitlines() if "secretd" in line] == []
    for unit, most in (("secretd-fleet.service", 1.5), ("secretd.service", 0.5)):
        out = box.run("systemd-analyze", "security", "--no-pager", unit).stdout
        match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", out)
        assert match is not None
        print(f"\n{unit}: exposure {match[1]}")
        assert float(match[1]) <= most
