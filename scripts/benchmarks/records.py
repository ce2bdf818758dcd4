# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows about records: how long 10,000 of them take from one host to another, and what other
clients notice.

As a program: records.py probe SOCKET, a client that asks one thing each 2 ms until its standard
input ends, then prints the median in µs; records.py accept SOCKET, which accepts the records of
its standard input, a line for each.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from rig import SECRETD, Machine, Row, ratio_row, wait_for

from tests.support.qmp import Client

WINDOW = 64
PAUSE_SECONDS = 0.002


def line(command: str, **arguments: Any) -> bytes:
    """A request."""
    return json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"


def windowed(client: Client, lines: Sequence[bytes]) -> Iterator[Any]:
    """The results of requests, of which a window is under way."""
    sent = received = 0
    while received < len(lines):
        if sent < len(lines) and sent - received <= WINDOW - 8:
            client.sock.sendall(b"".join(lines[sent : sent + 8]))
            sent += 8
            continue
        received += 1
        yield client.reply()["return"]


class Pair:
    """Two daemons that know each other; ``alpha`` may give to ``beta``."""

    def __init__(self, machine: Machine, count: int) -> None:
        self.paths = [machine.path(), machine.path()]
        self.daemons = [
            subprocess.Popen(
                [SECRETD, "--control", path, f"--audit={machine.path('audit')}"],
                stderr=subprocess.DEVNULL,
            )
            for path in self.paths
        ]
        for path in self.paths:
            wait_for(path)
        self.alpha, self.beta = (Client(path) for path in self.paths)
        public = {}
        for name, client in (("alpha", self.alpha), ("beta", self.beta)):
            client.ok("secret-generate", {"id": "host.key", "size": 32})
            host = {"qom-type": "secret-host", "id": "host", "name": name, "keyid": "host.key"}
            client.ok("object-add", host)
            public[name] = client.ok("query-secret-host")[0]["public"]
        for name, client in (("beta", self.alpha), ("alpha", self.beta)):
            peer = {"qom-type": "secret-peer", "id": "peer", "name": name, "public": public[name]}
            client.ok("object-add", peer)
        rules = [{"match": "host:beta", "policy": "allow"}]
        self.alpha.ok("object-add", {"qom-type": "authz-list", "id": "who", "rules": rules})
        grant = {"qom-type": "secret-grant", "id": "grant", "secret": "s*", "authz": "who"}
        self.alpha.ok("object-add", grant)
        ids = [f"s{number}" for number in range(count)]
        adding = [line("object-add", **{"qom-type": "secret", "id": i, "data": "x" * 64})
                  for i in ids]  # fmt: skip
        assert all(reply == {} for reply in windowed(self.alpha, adding))
        asking = [line("secret-offer", **{"from": "alpha", "id": i}) for i in ids]
        offers = [reply["offer"] for reply in windowed(self.beta, asking)]
        self.wrapping = [line("secret-wrap", id=i, offer=o) for i, o in zip(ids, offers,
                                                                          strict=True)]  # fmt: skip

    def close(self) -> None:
        """End both."""
        for client in (self.alpha, self.beta):
            client.sock.close()
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()


@contextlib.contextmanager
def helper(*words: str) -> Iterator["subprocess.Popen[bytes]"]:
    """This program as another process."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, __file__, *words], **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def finished(process: "subprocess.Popen[bytes]") -> float:
    """Let a helper end, and return the number that it prints."""
    out, _ = process.communicate()
    return float(out)


def carrying(machine: Machine) -> Iterator[Row]:
    """All rows."""
    count = 10_000 if machine.rounds > 1 else 2_000
    pair = Pair(machine, count)
    try:
        began = time.monotonic()
        with helper("accept", pair.paths[1]) as acceptor:
            assert acceptor.stdin is not None
            for reply in windowed(pair.alpha, pair.wrapping):
                acceptor.stdin.write(reply["record"].encode() + b"\n")
            finished(acceptor)
        took = (time.monotonic() - began) * 10_000 / count
    finally:
        pair.close()
    note = "one program carries them, one record at a time; both hosts and it share the processors"
    yield Row("10,000 records wrapped and accepted", took, None, took, 10.0, False, "s", "", note)
    yield from _beside(machine, count // 2)


def _beside(machine: Machine, count: int) -> Iterator[Row]:
    """What another client notices, on either host."""
    pair = Pair(machine, count)
    try:
        alone = []
        for path in pair.paths:
            with helper("probe", path) as probe:
                time.sleep(2 * machine.seconds)
                alone.append(finished(probe))
        with helper("probe", pair.paths[0]) as probe:
            records = [reply["record"] for reply in windowed(pair.alpha, pair.wrapping)]
            wrapping = finished(probe)
        with helper("probe", pair.paths[1]) as probe:
            lines = [line("secret-accept", record=each) for each in records]
            assert len(list(windowed(pair.beta, lines))) == count
            accepting = finished(probe)
    finally:
        pair.close()
    for name, mine, before in (
        ("p50 of another client while records are wrapped", wrapping, alone[0]),
        ("the same while they are accepted", accepting, alone[1]),
    ):
        yield ratio_row(name, mine, before, 2.0, "µs", "alone", at_least=False)


def probe_main(path: str) -> None:
    """Ask one thing each 2 ms until standard input ends."""
    import select

    times = []
    with contextlib.closing(Client(path)) as client:
        while not select.select([0], [], [], PAUSE_SECONDS)[0]:
            began = time.perf_counter()
            client.ok("query-name")
            times.append((time.perf_counter() - began) * 1e6)
    print(statistics.median(times))


def accept_main(path: str, stdin: IO[bytes]) -> None:
    """Accept what comes, a window at a time."""
    accepted = under_way = 0
    with contextlib.closing(Client(path)) as client:

        def take() -> None:
            nonlocal accepted, under_way
            assert "return" in client.reply()
            accepted, under_way = accepted + 1, under_way - 1

        for each in stdin:
            client.sock.sendall(line("secret-accept", record=each.decode().strip()))
            under_way += 1
            if under_way == WINDOW:
                take()
        while under_way:
            take()
    print(accepted)


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        probe_main(sys.argv[2])
    else:
        accept_main(sys.argv[2], sys.stdin.buffer)
