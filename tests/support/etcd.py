# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real cluster of etcd on this machine, as `secretd-fleet init` configures it."""

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

from secretd.fleet import enrolment, rights
from secretd.fleet import messages as m
from secretd.fleet.etcd import Endpoint, Etcd, tls

FLEET = "trial"


def free_ports(count: int) -> list[int]:
    """Ports of which the next one is free, too."""
    found: list[int] = []
    held: list[socket.socket] = []
    try:
        while len(found) < count:
            first, second = socket.socket(), socket.socket()
            held += [first, second]
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            found.append(port)
    finally:
        for each in held:
            each.close()
    return found


class Cluster:
    """Nodes of etcd with TLS and users; ``directory`` is the fleet's, ``ports`` those of nodes."""

    def __init__(self, where: Path, size: int = 3) -> None:
        self.directory = where / FLEET
        self.ports = free_ports(size)
        nodes = {f"node{n + 1}": Endpoint("127.0.0.1", port) for n, port in enumerate(self.ports)}
        enrolment.init(str(self.directory), FLEET, nodes, 0)
        self.processes: list[subprocess.Popen[bytes] | None] = [None] * size

    @property
    def endpoints(self) -> list[Endpoint]:
        """For clients."""
        return [Endpoint("127.0.0.1", port) for port in self.ports]

    def start(self, *numbers: int) -> None:
        """Start some nodes, or all."""
        for number in numbers or range(len(self.ports)):
            config = self.directory / "etcd" / f"node{number + 1}.yml"
            with open(self.directory / f"node{number + 1}.log", "ab") as log:
                self.processes[number] = subprocess.Popen(
                    ["etcd", "--config-file", str(config)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip

    def log(self, number: int) -> str:
        """What a node has printed."""
        return (self.directory / f"node{number + 1}.log").read_text(errors="replace")

    def send(self, number: int, what: signal.Signals) -> None:
        """Send a node a signal; wait for the end of one that was killed."""
        process = self.processes[number]
        assert process is not None
        process.send_signal(what)
        if what in (signal.SIGKILL, signal.SIGTERM):
            process.wait()
            self.processes[number] = None

    def stop(self) -> None:
        """Stop all nodes."""
        for number, process in enumerate(self.processes):
            if process is not None:
                process.send_signal(signal.SIGCONT)
                self.send(number, signal.SIGKILL)

    def context(self) -> ssl.SSLContext:
        """With all rights."""
        files = [str(self.directory / each) for each in ("ca.crt", "operator.crt", "operator.key")]
        return tls(*files)

    def etcd(self, endpoints: Sequence[Endpoint] | None = None) -> Etcd:
        """A client with all rights."""
        return Etcd(endpoints or self.endpoints, self.context)

    async def ready(self, *, protected: bool = True) -> Etcd:
        """Wait until the cluster has a leader; return a client."""
        etcd = self.etcd()
        while True:
            try:
                await etcd.range(b"x")
            except Exception:
                for number, process in enumerate(self.processes):
                    assert process is None or process.poll() is None, self.log(number)
                await asyncio.sleep(0.05)
            else:
                break
        if protected:
            await rights.protect(etcd)
        return etcd

    async def leader(self) -> int:
        """The number of the leader."""
        leaders: set[int] = set()
        members: dict[int, int] = {}
        for number, endpoint in enumerate(self.endpoints):
            if self.processes[number] is None:
                continue
            etcd = self.etcd([endpoint])
            try:
                reply = await etcd.call(
                    "/etcdserverpb.Maintenance/Status", m.StatusRequest(), m.StatusResponse
                )
            finally:
                etcd.close()
            members[reply.header.member_id] = number
            leaders.add(reply.leader)
        (leader,) = leaders
        return members[leader]

    def ctl(self, *words: str, node: int | None = None) -> str:
        """Run etcdctl."""
        endpoints = self.endpoints if node is None else [self.endpoints[node]]
        done = subprocess.run(
            ["etcdctl", f"--endpoints={','.join(map(str, endpoints))}",
             f"--cacert={self.directory}/ca.crt", f"--cert={self.directory}/operator.crt",
             f"--key={self.directory}/operator.key", *words],
            check=True, capture_output=True, text=True, env={**os.environ, "ETCDCTL_API": "3"},
        )  # fmt: skip
        return done.stdout

    def restore(self, snapshot: Path) -> None:
        """Stop all nodes, and start them with what a snapshot has."""
        self.stop()
        peers = ",".join(
            f"node{n + 1}=https://127.0.0.1:{port + 1}" for n, port in enumerate(self.ports)
        )
        for number, port in enumerate(self.ports):
            data = self.directory / "etcd" / f"node{number + 1}.etcd"
            shutil.rmtree(data)
            self.ctl(
                "snapshot", "restore", str(snapshot), "--name", f"node{number + 1}",
                "--initial-cluster", peers, "--initial-cluster-token", "restored",
                "--initial-advertise-peer-urls", f"https://127.0.0.1:{port + 1}",
                "--data-dir", str(data),
            )  # fmt: skip
        self.start()


async def closed(etcd: Etcd) -> None:
    """Close a client, and wait until its connection has ended."""
    etcd.close()
    transports = asyncio.get_running_loop()._transports
    while any(each._sock is not None for each in list(transports.values())):
        await asyncio.sleep(0.01)
