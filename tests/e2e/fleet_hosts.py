# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts of a fleet: for each a real secretd with a store, and a real agent."""

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import BIN, Process
from tests.support.etcd import FLEET, Cluster
from tests.support.needs import need_program
from tests.support.qmp import Client

SECRETD_FLEET = str(BIN / "secretd-fleet")


def run(*words: str, status: int = 0) -> str:
    """Run secretd-fleet; return what it prints."""
    done = subprocess.run(
        [SECRETD_FLEET, *words], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def wait_for(condition: Callable[[], Any], why: Callable[[], object] = str) -> Any:
    """Wait until something is true; return it."""
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end, why()
        time.sleep(0.01)
    return found


class FleetHost:
    """A host. ``config``: the file of its agent; ``log``: of all its agents."""

    def __init__(self, cluster: Cluster, where: Path, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.directory = where / name
        self.directory.mkdir()
        (self.directory / "key").write_bytes(name.encode().ljust(32, b"."))
        self.config = cluster.directory / "hosts" / name / "fleet.toml"
        self.log = self.directory / "agent.log"
        self.agent: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None
        self.start()

    def start(self) -> None:
        """Start secretd; after the first time it finds its store."""
        store = f"secret-store,id=store,path={self.directory}/store,keyid=store.key,create=on"
        self.process = Process(
            self.directory, "--client", str(self.directory / "client.sock"), "--audit",
            str(self.directory / "audit"), "--object",
            f"secret,id=store.key,file={self.directory}/key", "--object", store,
        )  # fmt: skip
        self._client = None

    @property
    def client(self) -> Client:
        """On the control socket."""
        if self._client is None:
            self._client = self.process.connect()
        return self._client

    def enrol(
        self, publisher: str | None = None, *, join: bool = True, status: int = 0, **options: str
    ) -> str:
        """Name it, if it has no name, and take it into the fleet."""
        if not self.client.ok("query-secret-host"):
            self.process.ctl("host", "init", self.name)
        (known,) = self.client.ok("query-secret-host")
        words = ["--publisher", publisher] if publisher is not None else []
        words += [each for name, value in options.items() for each in (f"--{name}", value) if each]
        words = ["enrol", str(self.cluster.directory), self.name, known["public"], *words]
        said = run(*words, status=status)
        if "metrics" not in self.config.read_text():  # what is added by hand stays there
            with open(self.config, "a") as file:
                file.write(f'socket = "{self.directory}/client.sock"\n')
                file.write(f'metrics = "{self.directory}/metrics.prom"\n')
        if join and not self.client.ok("query-secret-fleet"):
            self.join()
        return said

    def join(self, *options: str) -> None:
        """Let its secretd know the fleet."""
        run("join", "--config", str(self.config), "--control", self.process.control, *options)

    def start_agent(self, endpoint: object = None) -> "FleetHost":
        """Start its agent; it may have another node to talk to."""
        config = self.config
        if endpoint is not None:
            config = self.directory / "fleet.toml"
            text = re.sub(r"endpoints = .*", f'endpoints = ["{endpoint}"]', self.config.read_text())
            for name in ("ca.crt", "host.crt", "host.key"):
                text = text.replace(f'"{name}"', f'"{self.config.parent}/{name}"')
            config.write_text(text)
        with open(self.log, "ab") as log:
            self.agent = subprocess.Popen(
                [SECRETD_FLEET, "agent", "--config", str(config)], stderr=log
            )
        return self

    def kill_agent(self, what: signal.Signals = signal.SIGKILL) -> None:
        """End its agent."""
        assert self.agent is not None
        self.agent.send_signal(what)
        self.agent.wait(20)
        self.agent = None

    def kill(self) -> None:
        """Kill its secretd."""
        self.client.close()
        self.process.popen.kill()
        self.process.popen.wait()
        assert self.process.popen.stderr is not None
        self.process.popen.stderr.close()
        self._client = None

    def publish(self, *words: str, verb: str = "publish", status: int = 0) -> str:
        """Publish from this host."""
        return run(
            verb, *words, "--config", str(self.config), "--control", self.process.control,
            status=status,
        )  # fmt: skip

    def has(self) -> dict[str, bytes]:
        """The secrets of the fleet that it has, with their values."""
        own = {"store.key", "host.key"}
        ids = [each["id"] for each in self.client.secrets() if each["id"] not in own]
        return {each: self.client.read(each) for each in ids}

    def wait_until_it_has(self, **secrets: bytes) -> None:
        """Wait until it has exactly these; "_" in a name stands for "."."""
        wanted = {name.replace("_", "."): value for name, value in secrets.items()}
        wait_for(lambda: self.has() == wanted, lambda: f"{self.has()} {self.state()} {self.said()}")

    def state(self) -> dict:
        """What its secretd says of its fleet."""
        (found,) = self.client.ok("query-secret-fleet")
        return found

    def said(self) -> str:
        """What its agents have logged."""
        return self.log.read_text() if self.log.exists() else ""

    def wait_for_words(self, *words: str) -> None:
        """Wait until its agent has logged some words."""
        wait_for(lambda: all(each in self.said() for each in words), self.said)

    def audit(self) -> list[dict]:
        """Its secretd's audit."""
        return [json.loads(line) for line in (self.directory / "audit").read_text().splitlines()]

    def close(self) -> None:
        """End everything."""
        if self.agent is not None:
            self.kill_agent()
        if self._client is not None:
            self._client.close()
        if self.process.popen.poll() is None:
            self.process.popen.kill()
        self.process.popen.wait()
        if not self.process.popen.stderr.closed:
            self.process.popen.stderr.close()
        for client in self.process._clients:
            client.close()


class Fleet:
    """A cluster, and hosts by name."""

    def __init__(self, cluster: Cluster, where: Path) -> None:
        self.cluster, self._where = cluster, where
        self.hosts: dict[str, FleetHost] = {}

    def host(self, name: str, publisher: str | None = None) -> FleetHost:
        """Make a host with everything running."""
        made = self.hosts[name] = FleetHost(self.cluster, self._where, name)
        made.enrol(publisher)
        if publisher:
            made.process.ctl("grant", "*", "--to", "host:*")
        return made.start_agent()

    def status(self, publisher: FleetHost) -> dict[str, dict]:
        """What `secretd-fleet status` shows."""
        found = json.loads(run("status", "--json", "--config", str(publisher.config)))
        return {each["host"]: each for each in found}

    def close(self) -> None:
        """End everything."""
        for host in self.hosts.values():
            host.close()
        self.cluster.stop()


@contextlib.contextmanager
def fleet_of(where: Path, size: int) -> Iterator[Fleet]:
    """A fleet with a cluster of some nodes."""
    cluster = Cluster(where, size)
    fleet = Fleet(cluster, where)
    try:
        cluster.start()
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """With one node of etcd."""
    need_program("etcd", "etcdctl")
    with fleet_of(tmp_path, 1) as made:
        yield made


__all__ = ["FLEET", "Fleet", "FleetHost", "fleet", "fleet_of", "run", "wait_for"]
