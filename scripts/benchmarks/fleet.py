# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows about the fleet, with three nodes of etcd: how soon what is published can be read on a
host, and what 1,000 hosts cost.

As a program: fleet.py watchers DIRECTORY COUNT PORT... is the agents' watches of COUNT hosts, each
with a connection of its own. It prints "ready" and how often a watch was lost, and then the time of
each host's changes. fleet.py reads SOCKET and fleet.py lines print when something came.
"""

import asyncio
import contextlib
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from rig import Machine, Row

from secretd.client.record_client import RecordClient
from secretd.crypto.host_keys import PublicKeys
from secretd.fleet import config, directory
from secretd.fleet.etcd import Endpoint, Etcd, prefix_end, tls
from secretd.fleet.keyspace import Keyspace
from secretd.fleet.preparing import Wanted
from secretd.fleet.publishing import Publishing
from secretd.fleet.watch import Change, Watch
from tests.e2e.fleet_hosts import FLEET, Fleet, FleetHost, fleet_of
from tests.support.etcd import Cluster
from tests.support.qmp import Client

KEYS = Keyspace(FLEET)


def reaching(machine: Machine) -> Iterator[Row]:
    """All rows."""
    quick = machine.rounds <= 1
    with tempfile.TemporaryDirectory() as where, fleet_of(Path(where), 3) as fleet:
        yield from _one_host(fleet, 50 if quick else 300)
        yield from _many_hosts(fleet, 200 if quick else 1000)


class Observer:
    """A process that notes when lines come: this one has other work, and one lock for all."""

    def __init__(self, *words: str, stdin: IO[bytes] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *words], stdin=stdin, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if stdin is None:
            assert self._process.stdout.readline() == "ready\n"

    def lines(self) -> list[tuple[float, str]]:
        """End it; return each line's time, and the line."""
        self._process.terminate()
        assert self._process.stdout is not None
        found = [line.rstrip("\n").partition(" ") for line in self._process.stdout]
        self._process.wait()
        return [(float(when), line) for when, _, line in found]


@contextlib.contextmanager
def _etcdctl_watch(cluster: Cluster) -> Iterator[Observer]:
    """etcdctl watch of a host's prefix: when it has printed each change."""
    endpoints = ",".join(map(str, cluster.endpoints))
    process = subprocess.Popen(
        ["etcdctl", f"--endpoints={endpoints}", f"--cacert={cluster.directory}/ca.crt",
         f"--cert={cluster.directory}/operator.crt", f"--key={cluster.directory}/operator.key",
         "watch", "--prefix", KEYS.host("alpha").decode()],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={"ETCDCTL_API": "3", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    try:
        yield Observer("lines", stdin=process.stdout)
    finally:
        process.kill()
        process.wait()


class Put(NamedTuple):
    """When a put was begun, its record, and the value."""

    at: float
    digest: str
    value: str


async def _published(publishing: Publishing, pub: FleetHost, count: int) -> list[Put]:
    """Publish a secret with another value again and again."""
    begun = []
    for number in range(count):
        value = f"{number:064}"
        pub.client.ok("object-del", {"id": "web.a"})
        pub.client.add("web.a", data=value)
        revision, manifest, there = await publishing.known("alpha")
        prepared, signed = publishing.preparing.prepared(
            "alpha", Wanted(["web.a"]), revision, manifest, there
        )
        (key,) = prepared.records
        begun.append(Put(time.monotonic(), KEYS.digest_of("alpha", key), value))
        assert not await publishing.put([(prepared, signed)], {})
        await asyncio.sleep(random.uniform(0.03, 0.08))
    return begun


def _one_host(fleet: Fleet, count: int) -> Iterator[Row]:
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    pub.client.add("web.a", data="x" * 64)
    pub.publish("web.a", "--to", "alpha")
    alpha.wait_until_it_has(web_a=b"x" * 64)

    async def run() -> list[Put]:
        known = config.read(str(pub.config))
        etcd = known.etcd()
        with RecordClient(pub.process.control) as client:
            publishing = Publishing(known, client, etcd)
            await publishing.hosts(["alpha"])
            try:
                await _published(publishing, pub, 5)
                await asyncio.sleep(1)
                return await _published(publishing, pub, count)
            finally:
                etcd.close()

    readable = Observer("reads", alpha.process.control)
    with _etcdctl_watch(fleet.cluster) as etcdctl:
        begun = asyncio.run(run())
        time.sleep(2)
        # A record is put, and deleted when the next one has replaced it.
        lines = reversed(etcdctl.lines())
        printed = {line.rpartition("/record/")[2]: when for when, line in lines}
    # The first ones, to warm up, had the same values.
    read = {value: when for when, value in readable.lines()}
    ours = [(read[each.value] - each.at) * 1000 for each in begun]
    theirs = [(printed[each.digest] - each.at) * 1000 for each in begun if each.digest in printed]
    p50, p99 = _percentiles(ours)
    their_p50, their_p99 = _percentiles(theirs)
    note = f"{count} puts, of which etcdctl watch shows {len(theirs)}, p50 {their_p50:.1f} ms"
    yield Row("put to readable in secretd, p50", p50, None, p50, 20.0, False, "ms", "", note)
    yield Row("the same, p99", p99, their_p99, p99 / their_p99, 1.5, False, "ms", "etcdctl watch")


def _percentiles(times: list[float]) -> tuple[float, float]:
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


def _many_hosts(fleet: Fleet, count: int) -> Iterator[Row]:
    pub, cluster = fleet.hosts["pub"], fleet.cluster
    names = [f"h{number:04}" for number in range(count)]
    _add_to_roster(cluster, names)
    before = _memory(cluster)
    with _watchers(cluster, count) as (watchers, _):
        per_host = (_memory(cluster) - before) / count / 1024

        async def run() -> float:
            known = config.read(str(pub.config))
            etcd = known.etcd()
            with RecordClient(pub.process.control) as client:
                publishing = Publishing(known, client, etcd)
                try:
                    await publishing.hosts(["h*"])
                    batch = []
                    for name in names:
                        state = await publishing.known(name)
                        batch.append(publishing.preparing.prepared(name, Wanted(["web.a"]), *state))
                    first = time.monotonic()
                    assert not await publishing.put(batch, {})
                    return first
                finally:
                    etcd.close()

        first = asyncio.run(run())
        assert watchers.stdout is not None
        last = max(float(watchers.stdout.readline()) for _ in range(count))
    note = "one process has all watches; each host has a record of its own, and a manifest"
    took = last - first
    yield Row(f"{count} hosts have a rotation after", took, None, took, 1.0, False, "s", "", note)
    yield Row("etcd's memory for each host", per_host, None, per_host, 70.0, False, "KiB", "",
              "three nodes together")  # fmt: skip
    with _watchers(cluster, count) as (_, ready):
        pass
    lost = ready[1]
    yield Row(f"watches that were lost as {count} start anew", lost, None, lost, 0.0, False, "", "",
              f"all within 5 s, with jitter; ready after {ready[0]:.1f} s")  # fmt: skip


class _watchers:  # noqa: N801 - a context manager
    """The watches of all hosts, in a process of their own, once they are ready."""

    def __init__(self, cluster: Cluster, count: int) -> None:
        begin = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "watchers", str(cluster.directory), str(count),
             *map(str, cluster.ports)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        _, lost = self._process.stdout.readline().split()
        self._ready = (time.monotonic() - begin, int(lost))

    def __enter__(self) -> tuple["subprocess.Popen[str]", tuple[float, int]]:
        return self._process, self._ready

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()


def _add_to_roster(cluster: Cluster, names: list[str]) -> None:
    with directory.opened(str(cluster.directory)) as opened:
        roster, _ = opened.roster()
        keys = roster.hosts["alpha"]
        more = {name: PublicKeys(keys.receiving, keys.signing) for name in names}
        data = opened.save_roster(roster._replace(hosts={**roster.hosts, **more}))

    async def put() -> None:
        etcd = cluster.etcd()
        await etcd.write({KEYS.roster: data})
        etcd.close()

    asyncio.run(put())


def _memory(cluster: Cluster) -> int:
    total = 0
    for process in cluster.processes:
        assert process is not None
        status = Path(f"/proc/{process.pid}/status").read_text()
        total += next(
            int(line.split()[1]) * 1024 for line in status.splitlines() if "VmRSS" in line
        )
    return total


async def watchers_main(where: str, count: int, ports: list[int]) -> None:
    """Watch for all hosts, as their agents do."""
    files = [f"{where}/{name}" for name in ("ca.crt", "operator.crt", "operator.key")]
    context = tls(*files)
    endpoints = [Endpoint("127.0.0.1", port) for port in ports]
    ready = itertools.count(1)
    losses = 0
    is_ready = asyncio.Event()

    async def follow(number: int) -> None:
        await asyncio.sleep(random.uniform(0, 5))
        etcd = Etcd(endpoints, lambda: context)
        own = KEYS.host(f"h{number:04}")
        roster = KEYS.host_roster(f"h{number:04}")
        manifests = KEYS.manifests(f"h{number:04}")

        def state(reason: str) -> None:
            nonlocal losses
            if reason:
                losses += 1
            elif next(ready) == count:
                is_ready.set()

        watch = Watch(
            etcd, [(own, prefix_end(own))], state,
            listed=[(roster, b""), (manifests, prefix_end(manifests))],
        )  # fmt: skip
        async for found in watch.follow():
            if isinstance(found, Change) and any(key.startswith(own) for key, _ in found.values):
                print(time.monotonic(), flush=True)

    tasks = [asyncio.create_task(follow(number)) for number in range(count)]
    await is_ready.wait()
    print("ready", losses, flush=True)
    await asyncio.gather(*tasks)


def reads_main(path: str) -> None:
    """Read a secret again and again; print when its value is another one, and the value."""
    with contextlib.closing(Client(path)) as client:
        known = client.read("web.a")
        print("ready", flush=True)
        while True:
            time.sleep(0.0005)
            value = client.read("web.a")
            if value != known:
                known = value
                print(time.monotonic(), value.decode(), flush=True)


def lines_main() -> None:
    """Print when each key of a record came, with the key."""
    for line in sys.stdin.buffer:
        if b"/record/" in line:
            print(time.monotonic(), line.strip().decode(errors="replace"), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "watchers":
        ports_ = [int(each) for each in sys.argv[4:]]
        asyncio.run(watchers_main(sys.argv[2], int(sys.argv[3]), ports_))
    elif sys.argv[1] == "reads":
        reads_main(sys.argv[2])
    else:
        lines_main()
