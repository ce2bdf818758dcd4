# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client of etcd against a real cluster of three nodes, with TLS, certificates and roles."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from secretd.fleet import certificates, rights
from secretd.fleet import messages as m
from secretd.fleet.etcd import Endpoint, Etcd, Refused, Unreachable, prefix_end, tls
from secretd.fleet.keyspace import Keyspace
from secretd.fleet.watch import Change, Snapshot, Watch
from tests.support.etcd import FLEET, Cluster
from tests.support.needs import need_program

pytestmark = [pytest.mark.xdist_group("etcd"), pytest.mark.slow]

PREFIX = b"/t/"
RANGES = [(PREFIX, prefix_end(PREFIX))]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes."""
    need_program("etcd", "etcdctl")
    made = Cluster(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(autouse=True)
async def _closed(cluster: Cluster) -> AsyncIterator[None]:
    """Connections end in the turns after they were closed."""
    assert cluster.ports
    yield
    transports = asyncio.get_running_loop()._transports
    async with asyncio.timeout(40):  # TLS waits 30 s for the end of a node that hangs
        while any(each._sock is not None for each in list(transports.values())):
            await asyncio.sleep(0.01)


class Seen:
    """What a watch has yielded: each key's time, and the states that it was in."""

    def __init__(self, etcd: Etcd) -> None:
        self.etcd = etcd
        self.at: dict[bytes, float] = {}
        self.values: dict[bytes, bytes] = {}
        self.order: list[bytes] = []
        self.states: list[tuple[float, str]] = []
        self.snapshots = 0
        self._something = asyncio.Event()
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        watch = Watch(self.etcd, RANGES, self._state)
        async for found in watch.follow():
            if isinstance(found, Snapshot):
                self.snapshots += 1
                self.values = dict(found.values)
            for key, value in dict(found.values).items():
                self.at.setdefault(key, time.monotonic())
                if isinstance(found, Change):
                    self.order.append(key)
                if value is not None:
                    self.values[key] = value
            self._something.set()

    def _state(self, reason: str) -> None:
        self.states.append((time.monotonic(), reason))
        self._something.set()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something is true of what was seen."""
        async with asyncio.timeout(60):
            while not condition():
                self._something.clear()
                await self._something.wait()

    async def close(self) -> None:
        """End the watch."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self.etcd.close()


@contextlib.asynccontextmanager
async def seen(etcd: Etcd) -> AsyncIterator[Seen]:
    """A watch that is whole."""
    made = Seen(etcd)
    try:
        await made.until(lambda: made.states and made.states[-1][1] == "")
        yield made
    finally:
        await made.close()


async def put(etcd: Etcd, key: str, value: bytes = b"v") -> None:
    """Put a key of the watch."""
    await etcd.write({PREFIX + key.encode(): value})


async def test_a_killed_leader_loses_nothing(cluster: Cluster) -> None:
    """Puts go on all the time; each is seen within 4 s of being accepted."""
    etcd = await cluster.ready()
    accepted: dict[bytes, float] = {}

    async def put_always() -> None:
        for number in range(100_000):
            key = PREFIX + b"%d" % number
            with contextlib.suppress(Refused, Unreachable):
                await etcd.write({key: b"v"})
                accepted[key] = time.monotonic()
            await asyncio.sleep(0.01)

    try:
        async with seen(cluster.etcd()) as watch:
            putting = asyncio.create_task(put_always())
            await watch.until(lambda: len(watch.at) > 30)
            cluster.send(await cluster.leader(), signal.SIGKILL)
            before = len(accepted)
            await watch.until(lambda: len(accepted) > before + 30)
            putting.cancel()
            await watch.until(lambda: accepted.keys() <= watch.at.keys())
            worst = max(watch.at[key] - accepted[key] for key in accepted)
            assert worst <= 4.0
    finally:
        etcd.close()


async def test_the_loss_of_the_majority_is_said_within_six_seconds(cluster: Cluster) -> None:
    """The node that is left answers, but has no leader."""
    (await cluster.ready()).close()
    async with seen(cluster.etcd([cluster.endpoints[0]])) as watch:
        cluster.send(1, signal.SIGKILL)
        cluster.send(2, signal.SIGKILL)
        begin = time.monotonic()
        await watch.until(lambda: watch.states[-1][1] != "")
        when, reason = watch.states[-1]
        assert "no leader" in reason
        assert when - begin <= 6.0
        cluster.start(1, 2)
        await watch.until(lambda: watch.states[-1][1] == "")


async def test_a_node_that_hangs_is_left_within_six_seconds(cluster: Cluster) -> None:
    """Its connections stay open; the watch goes on at another node."""
    etcd = await cluster.ready()
    watching = cluster.etcd()
    try:
        async with seen(watching) as watch:
            port = watching.endpoint.port
            hung = cluster.ports.index(port)
            cluster.send(hung, signal.SIGSTOP)
            begin = time.monotonic()
            etcd.close()
            etcd = cluster.etcd([e for e in cluster.endpoints if e.port != port])
            await put(etcd, "after")
            await watch.until(lambda: PREFIX + b"after" in watch.at)
            assert watching.endpoint.port != port
            assert watch.at[PREFIX + b"after"] - begin <= 6.0
            cluster.send(hung, signal.SIGCONT)
    finally:
        etcd.close()


class Relay:
    """Passes connections on to a node, until the test has it cut or refuse them."""

    def __init__(self, to: Endpoint) -> None:
        self._to = to
        self._writers: set[asyncio.StreamWriter] = set()
        self._all: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_open = True
        self.cut_after: int | None = None
        self.passed = 0

    async def start(self) -> Endpoint:
        """Listen; return where."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return Endpoint("127.0.0.1", self._server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_open:
            self._all.append(writer)
            writer.close()
            return
        there, back = await asyncio.open_connection(*self._to)
        self._writers |= {writer, back}
        self._all += [writer, back]
        for source, sink, counted in ((reader, back, False), (there, writer, True)):
            task = asyncio.create_task(self._pass(source, sink, counted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counted: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(4096):
                sink.write(data)
                await sink.drain()
                self.passed += len(data) * counted
                if counted and self.cut_after is not None and self.passed > self.cut_after:
                    self.cut_after = None
                    self.cut()
                    return
        sink.close()

    def cut(self) -> None:
        """Cut all connections."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        """End."""
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            await task
        for writer in self._all:
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def relayed(cluster: Cluster) -> AsyncIterator[tuple[Relay, Etcd]]:
    """A client whose only node is behind a relay."""
    relay = Relay(cluster.endpoints[0])
    try:
        yield relay, cluster.etcd([await relay.start()])
    finally:
        await relay.close()


async def test_3000_revisions_arrive_over_a_cut_connection(cluster: Cluster) -> None:
    """A watch that is behind gets 1,000 revisions at a time, under the present header."""
    etcd = await cluster.ready()
    count = 3000
    try:
        async with relayed(cluster) as (relay, watching), seen(watching) as watch:
            relay.is_open = False
            relay.cut()
            for first in range(0, count, 100):
                await asyncio.gather(*(put(etcd, f"{n:04}") for n in range(first, first + 100)))
            assert not watch.order
            relay.cut_after = relay.passed + 30_000  # a third of them
            relay.is_open = True
            await watch.until(lambda: len(watch.at) == count)
            assert relay.cut_after is None
            assert watch.snapshots == 1
            assert len(set(watch.order)) == count
    finally:
        etcd.close()


async def test_what_was_compacted_is_listed(cluster: Cluster) -> None:
    """The watch cannot go on from there, and its values are whole all the same."""
    etcd = await cluster.ready()
    try:
        async with relayed(cluster) as (relay, watching), seen(watching) as watch:
            relay.is_open = False
            relay.cut()
            for number in range(10):
                await put(etcd, "same", b"%d" % number)
            revision = (await etcd.range(b"x")).header.revision
            cluster.ctl("compact", str(revision))
            relay.is_open = True
            await watch.until(lambda: watch.values.get(PREFIX + b"same") == b"9")
            assert watch.snapshots == 2
            assert any("compacted" in reason for _, reason in watch.states)
            await put(etcd, "later")
            await watch.until(lambda: PREFIX + b"later" in watch.at)
    finally:
        etcd.close()


async def test_a_restored_store_is_listed(cluster: Cluster, tmp_path: Path) -> None:
    """It is another cluster at an earlier revision; etcd would keep silent."""
    etcd = await cluster.ready()
    try:
        await put(etcd, "before")
        async with seen(cluster.etcd()) as watch:
            cluster.ctl("snapshot", "save", str(tmp_path / "snapshot"), node=0)
            for number in range(3):
                await put(etcd, f"lost{number}")
            await watch.until(lambda: PREFIX + b"lost2" in watch.at)
            cluster.restore(tmp_path / "snapshot")
            await watch.until(lambda: watch.snapshots == 2)
            assert set(watch.values) == {PREFIX + b"before"}
            etcd.close()
            etcd = await cluster.ready(protected=False)
            await put(etcd, "after")
            await watch.until(lambda: PREFIX + b"after" in watch.at)
    finally:
        etcd.close()


def user(cluster: Cluster, name: str, directory: Path, days: float = 30) -> Callable[[], None]:
    """Write a certificate for a user; the function writes another one that is good for a month."""
    authority = (
        (cluster.directory / "ca.crt").read_bytes(), (cluster.directory / "ca.key").read_bytes(),
    )  # fmt: skip

    def write(days: float = 30) -> None:
        certificate, key = certificates.issue(authority, name, days=days)
        (directory / "user.crt").write_bytes(certificate)
        (directory / "user.key").write_bytes(key)

    write(days)
    return write


def as_user(cluster: Cluster, directory: Path) -> Etcd:
    """A client with that certificate."""
    files = [cluster.directory / "ca.crt", directory / "user.crt", directory / "user.key"]
    return Etcd(cluster.endpoints, lambda: tls(*map(str, files)))


async def test_a_host_reads_its_own_prefix_and_writes_its_ack(
    cluster: Cluster, tmp_path: Path
) -> None:
    """And nothing else; nobody has a password."""
    etcd = await cluster.ready()
    keys = Keyspace(FLEET)
    user(cluster, "alpha", tmp_path)
    alpha = as_user(cluster, tmp_path)
    try:
        await rights.allow(etcd, keys, "alpha", publishes=False)
        own_roster = keys.host_roster("alpha")
        await etcd.write({own_roster: b"r", keys.roster: b"all", keys.manifest("alpha", "p"): b"m"})
        assert (await alpha.get(own_roster))[0] == b"r"
        own = keys.host("alpha")
        assert len((await alpha.range(own, prefix_end(own))).kvs) == 2
        await alpha.write({keys.ack("alpha"): b"a"})
        other = keys.host("beta")
        for refused in (
            alpha.range(other, prefix_end(other)), alpha.get(keys.ack("beta")),
            alpha.get(keys.roster),
            alpha.write({keys.roster: b""}), alpha.write({keys.manifest("alpha", "p"): b""}),
            alpha.write({keys.ack("beta"): b""}), alpha.range(b"\0", b"\0"),
            rights.allow(alpha, keys, "alpha", publishes=True),
        ):  # fmt: skip
            with pytest.raises(Refused, match="permission denied"):
                await refused
        await rights.allow(etcd, keys, "alpha", publishes=True)
        await alpha.write({keys.manifest("beta", "alpha"): b"m"})
        with pytest.raises(Refused, match="permission denied"):
            await alpha.write({keys.roster: b""})
    finally:
        etcd.close()
        alpha.close()


async def test_a_deleted_user_is_refused_and_its_open_watch_is_not_cut(
    cluster: Cluster, tmp_path: Path
) -> None:
    """So what was for it must be deleted: revoking at etcd is not enough."""
    etcd = await cluster.ready()
    keys = Keyspace(FLEET)
    user(cluster, "alpha", tmp_path)
    alpha = as_user(cluster, tmp_path)
    own = keys.host("alpha")
    states: list[str] = []
    try:
        await rights.allow(etcd, keys, "alpha", publishes=False)
        following = Watch(alpha, [(own, prefix_end(own))], states.append).follow()
        assert await anext(following) == Snapshot({})
        change = asyncio.ensure_future(anext(following))
        while not states:
            await asyncio.sleep(0.01)
        await rights.forbid(etcd, "alpha")
        await etcd.write({keys.manifest("alpha", "p"): b"m"})
        assert await change == Change([(keys.manifest("alpha", "p"), b"m")])
        with pytest.raises(Refused):
            await alpha.get(keys.host_roster("alpha"))
        change = asyncio.ensure_future(anext(following))
        alpha.close()
        async with asyncio.timeout(30):
            while "permission" not in states[-1] and "user" not in states[-1]:
                await asyncio.sleep(0.01)
        change.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await change
        await following.aclose()
    finally:
        etcd.close()
        alpha.close()


async def test_an_ended_certificate_is_refused_until_its_renewal(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The file is read again for each connection."""
    etcd = await cluster.ready()
    keys = Keyspace(FLEET)
    await rights.allow(etcd, keys, "alpha", publishes=False)
    etcd.close()
    renew = user(cluster, "alpha", tmp_path, days=-1 / 86400)
    alpha = as_user(cluster, tmp_path)
    try:
        assert certificates.ends_at(str(tmp_path / "user.crt")) < time.time()
        with pytest.raises(Unreachable):
            await alpha.get(keys.host_roster("alpha"))
        renew()
        assert await alpha.get(keys.host_roster("alpha")) == (None, 0)
    finally:
        alpha.close()


async def test_of_eight_at_once_one_changes_a_key(cluster: Cluster) -> None:
    """Publishing is compare-and-set."""
    etcd = await cluster.ready()
    clients = [cluster.etcd() for _ in range(8)]
    try:
        await put(etcd, "same", b"first")
        _, revision = await etcd.get(PREFIX + b"same")
        won = await asyncio.gather(*(
            client.transact(
                [m.Operation(put=m.PutRequest(key=PREFIX + b"same", value=b"%d" % number))],
                {PREFIX + b"same": revision},
            )
            for number, client in enumerate(clients)
        ))  # fmt: skip
        assert sum(won) == 1
        assert (await etcd.get(PREFIX + b"same"))[0] == b"%d" % won.index(True)
    finally:
        for client in (etcd, *clients):
            client.close()


async def test_reads_go_on_while_others_are_enrolled(cluster: Cluster, tmp_path: Path) -> None:
    """While its store of rights is renewed, etcd refuses some; the client asks again."""
    etcd = await cluster.ready()
    keys = Keyspace(FLEET)
    user(cluster, "alpha", tmp_path)
    alpha = as_user(cluster, tmp_path)
    try:
        await rights.allow(etcd, keys, "alpha", publishes=False)

        async def enrol() -> None:
            for number in range(20):
                await rights.allow(etcd, keys, f"host{number}", publishes=False)

        enrolling = asyncio.create_task(enrol())
        reads = 0
        while not enrolling.done():
            await alpha.get(keys.host_roster("alpha"))
            reads += 1
        await enrolling
        assert reads > 20
    finally:
        etcd.close()
        alpha.close()


@pytest.mark.parametrize("size", [512, 1024, 1400])
async def test_a_value_of_a_megabyte_is_taken(cluster: Cluster, size: int) -> None:
    """A roster may have as much."""
    etcd = await cluster.ready()
    value = os.urandom(size * 1024)
    try:
        async with seen(cluster.etcd()) as watch:
            await put(etcd, "large", value)
            await watch.until(lambda: watch.values.get(PREFIX + b"large") == value)
        assert (await etcd.get(PREFIX + b"large"))[0] == value
    finally:
        etcd.close()


async def test_too_large_a_value_is_refused_in_etcds_words(cluster: Cluster) -> None:
    """With no more tries."""
    etcd = await cluster.ready()
    try:
        with pytest.raises(Refused, match="request is too large"):
            await put(etcd, "large", bytes(1_700_000))
    finally:
        etcd.close()
