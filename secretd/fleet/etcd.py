# SPDX-License-Identifier: LGPL-2.1-or-later
"""A thin client of etcd's API v3 over grpclib: ranges, transactions, and one lasting watch.

Every call has TLS, a time limit and `hasleader`, so that a node without a leader says so instead of
hanging. Users are known by their client certificate. A node is not trusted: what matters is signed.

The watch begins with a list at one revision and goes on from the next. After a lost connection it
resumes behind the last *event*: the header of a response says how far the store is, not how far
this watch is (etcd sends a watch that catches up 1,000 revisions at a time). It lists anew after a
compaction, and when the store went back or is another one.
"""

import asyncio
import random
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from grpclib.client import Channel, Stream, StreamStreamMethod, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from secretd.fleet import messages as m

CALL_SECONDS: Final = 5.0
"""Seconds for a call to one node."""

SILENCE_SECONDS: Final = 2.0
"""Seconds of silence after which the watch asks for a sign of life, and for which it waits then."""

BACKOFF_SECONDS: Final = 5.0
"""The longest pause before another try; pauses are random, so that hosts do not come together."""

REQUEST_BYTES, REQUEST_OPERATIONS = 1_000_000, 100
"""Bytes and operations of a transaction: etcd's limits are 1.5 MiB and 128."""

_METADATA: Final = {"hasleader": "true"}


class Refused(Exception):
    """etcd refuses a call, and would refuse it again; the text is etcd's."""


class Unreachable(Exception):
    """No node of etcd has answered; the text says what the last one did."""


class Endpoint(NamedTuple):
    """A node."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"https://{self.host}:{self.port}"


def endpoint(text: str) -> Endpoint:
    """Return the endpoint in ``https://HOST[:PORT]``. Raises ValueError."""
    parts = urlsplit(text)
    if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError(f"'{text}' is no endpoint such as https://127.0.0.1:2379")
    return Endpoint(parts.hostname, parts.port or 2379)


def tls(ca: str, certificate: str, key: str) -> ssl.SSLContext:
    """Return TLS with a certificate of our own; the files are read now."""
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    return context


def prefix_end(prefix: bytes) -> bytes:
    """Return the key behind all keys with a prefix, as etcd's range_end takes it."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


class Snapshot(NamedTuple):
    """All keys of the watch with their values, at one revision."""

    values: Mapping[bytes, bytes]


class Change(NamedTuple):
    """Changed keys in order, with their values; None for a deleted one."""

    values: Sequence[tuple[bytes, bytes | None]]


_LOST: Final = (OSError, asyncio.TimeoutError, StreamTerminatedError, ssl.SSLError)
_AGAIN: Final = (
    Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.CANCELLED, Status.UNKNOWN,
    Status.INTERNAL, Status.RESOURCE_EXHAUSTED,
)  # fmt: skip


def _is_passing(error: GRPCError) -> bool:
    """Return True if another try, or another node, may succeed."""
    words = error.message or ""
    # Enrolling others renews the store of rights; reads of anyone are refused for a moment.
    return error.status in _AGAIN or "auth store is old" in words


def _words(error: BaseException) -> str:
    if isinstance(error, GRPCError):
        return error.message or error.status.name.lower()
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__


class Etcd:
    """A cluster's client.

    ``endpoints``: its nodes. ``make_tls``: returns the TLS context for a new connection: a renewed
    certificate counts from then on.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], make_tls: Callable[[], ssl.SSLContext]
    ) -> None:
        self._endpoints = list(endpoints)
        random.shuffle(self._endpoints)
        self._make_tls = make_tls
        self._channel: Channel | None = None

    @property
    def endpoint(self) -> Endpoint:
        """The node in use."""
        return self._endpoints[0]

    def close(self) -> None:
        """End the connection."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def next_node(self) -> None:
        """Go on to another node."""
        self.close()
        self._endpoints.append(self._endpoints.pop(0))

    def _connected(self) -> Channel:
        if self._channel is None:
            host, port = self.endpoint
            self._channel = Channel(host, port, ssl=self._make_tls())
        return self._channel

    async def once(self, path: str, request: Any, reply: Any) -> Any:
        """Call the node in use. Raises GRPCError and what a lost connection raises."""
        method: Any = UnaryUnaryMethod(self._connected(), path, type(request), reply)
        return await method(request, timeout=CALL_SECONDS, metadata=_METADATA)

    async def call(self, path: str, request: Any, reply: Any, *, again: bool = True) -> Any:
        """Call any node; each is tried twice. Raises Refused and Unreachable.

        ``again``: the request may be executed twice.
        """
        last = ""
        for attempt in range(2 * len(self._endpoints)):
            try:
                return await self.once(path, request, reply)
            except GRPCError as error:
                last = _words(error)
                if not _is_passing(error):
                    raise Refused(last) from None
                if not again and error.status is not Status.UNAVAILABLE:
                    break
            except _LOST as error:
                last = _words(error)
                if not again and not isinstance(error, OSError):
                    break
            self.next_node()
            if attempt >= len(self._endpoints) - 1:
                await asyncio.sleep(random.uniform(0, 0.5))  # noqa: S311 - no secret
        raise Unreachable(last)

    async def range(self, key: bytes, end: bytes = b"", *, keys_only: bool = False) -> Any:
        """Return the response of a linearizable range. Raises Refused and Unreachable."""
        request = m.RangeRequest(key=key, range_end=end, keys_only=keys_only)
        return await self.call("/etcdserverpb.KV/Range", request, m.RangeResponse)

    async def get(self, key: bytes) -> tuple[bytes | None, int]:
        """Return a key's value, None if there is none, and the revision of its last change."""
        found = (await self.range(key)).kvs
        return (found[0].value, found[0].mod_revision) if found else (None, 0)

    async def transact(
        self, operations: Sequence[Any], compare: Mapping[bytes, int] | None = None
    ) -> bool:
        """Execute operations at once, if the last changes of some keys are still these; return
        whether they were. Raises Refused and Unreachable.
        """
        request = m.TxnRequest(success=operations)
        for key, revision in (compare or {}).items():
            request.compare.append(
                m.Compare(result=m.EQUAL, target=m.MOD, key=key, mod_revision=revision)
            )
        reply = await self.call("/etcdserverpb.KV/Txn", request, m.TxnResponse, again=not compare)
        return bool(reply.succeeded)

    async def write(self, puts: Mapping[bytes, bytes], deletes: Sequence[bytes] = ()) -> None:
        """Put and delete any number of keys, in transactions that etcd takes."""
        operations = [m.Operation(put=m.PutRequest(key=k, value=v)) for k, v in puts.items()]
        operations += [m.Operation(delete=m.DeleteRequest(key=key)) for key in deletes]
        batch: list[Any] = []
        size = 0
        for each in operations:
            if batch and (
                len(batch) == REQUEST_OPERATIONS or size + each.ByteSize() > REQUEST_BYTES
            ):
                await self.transact(batch)
                batch, size = [], 0
            batch.append(each)
            size += each.ByteSize()
        if batch:
            await self.transact(batch)


class Lost(Exception):
    """The watch has lost its node, and tries another one; the text says why."""


class Watch:
    """A lasting watch of some prefixes.

    ``on_state``: called with "" when the watch is whole, and with the reason while it is not.
    """

    def __init__(
        self, etcd: Etcd, prefixes: Sequence[bytes], on_state: Callable[[str], object]
    ) -> None:
        self._etcd, self._prefixes, self._on_state = etcd, prefixes, on_state
        self._next: list[int] = []  # by prefix, the revision to go on from
        self._seen = self._cluster = 0

    async def follow(self) -> AsyncIterator[Snapshot | Change]:
        """Yield a snapshot and then changes, for ever."""
        failures = 0
        while True:
            try:
                if not self._next:
                    yield await self._list()
                async with self._stream() as stream:
                    async for found in self._changes(stream):
                        failures = 0
                        if found is not None:
                            yield found
            except (Lost, GRPCError, *_LOST) as error:
                self._on_state(_words(error))
                failures += 1
            self._etcd.next_node()
            pause = min(BACKOFF_SECONDS, 0.1 * 2 ** min(failures, 10))
            await asyncio.sleep(random.uniform(0, pause))  # noqa: S311 - no secret

    async def _list(self) -> Snapshot:
        values: dict[bytes, bytes] = {}
        starts = []
        for prefix in self._prefixes:
            request = m.RangeRequest(key=prefix, range_end=prefix_end(prefix))
            reply = await self._etcd.once("/etcdserverpb.KV/Range", request, m.RangeResponse)
            values |= {each.key: each.value for each in reply.kvs}
            starts.append(reply.header.revision + 1)
            self._seen, self._cluster = reply.header.revision, reply.header.cluster_id
        self._next = starts
        return Snapshot(values)

    @asynccontextmanager
    async def _stream(self) -> AsyncIterator[Stream[Any, Any]]:
        path = "/etcdserverpb.Watch/Watch"
        channel = self._etcd._connected()  # noqa: SLF001 - the other half of this module
        method: Any = StreamStreamMethod(channel, path, m.WatchRequest, m.WatchResponse)
        async with method.open(metadata=_METADATA) as stream:
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    await stream.send_request()
                    for number, prefix in enumerate(self._prefixes):
                        create = m.WatchCreate(
                            key=prefix, range_end=prefix_end(prefix), watch_id=number + 1,
                            start_revision=self._next[number],
                        )  # fmt: skip
                        await stream.send_message(m.WatchRequest(create=create))
                yield stream
            finally:
                with suppress(Exception):
                    await stream.reset()

    async def _changes(self, stream: Stream[Any, Any]) -> AsyncIterator[Change | None]:
        """Yield what comes; None for a sign of life. Raises Lost, and what a lost node raises."""
        created = 0
        while True:
            reply = await self._received(stream)
            if reply is None:
                raise Lost("the node has ended the watch")
            self._check(reply)
            if reply.created:
                created += 1
                if created == len(self._prefixes):
                    self._on_state("")
            if reply.events:
                yield self._change(reply)
            else:
                yield None

    def _check(self, reply: Any) -> None:
        """Raise Lost for a watch that cannot go on like this."""
        if reply.canceled:
            if reply.compact_revision:
                self._next = []
                raise Lost(f"what follows was compacted, up to {reply.compact_revision}")
            raise Lost(reply.cancel_reason or "the watch was cancelled")
        if reply.header.cluster_id != self._cluster:
            self._next = []
            raise Lost("this is another cluster, or one that was restored")
        if reply.header.revision < self._seen:
            self._next = []
            raise Lost(f"the store went back from {self._seen} to {reply.header.revision}")
        self._seen = reply.header.revision

    def _change(self, reply: Any) -> Change:
        number = reply.watch_id - 1
        if not 0 <= number < len(self._next):
            raise Lost("the node speaks of another watch")
        for event in reply.events:
            self._next[number] = max(self._next[number], event.kv.mod_revision + 1)
        return Change([
            (each.kv.key, None if each.type == m.DELETED else each.kv.value)
            for each in reply.events
        ])  # fmt: skip

    async def _received(self, stream: Stream[Any, Any]) -> Any:
        """Return the next message; after some silence, ask the node for one."""
        receiving = asyncio.ensure_future(stream.recv_message())
        try:
            done, _ = await asyncio.wait({receiving}, timeout=SILENCE_SECONDS)
            if not done:
                async with asyncio.timeout(SILENCE_SECONDS):
                    await stream.send_message(m.WatchRequest(progress=m.WatchProgress()))
                    return await asyncio.shield(receiving)
            return receiving.result()
        finally:
            if not receiving.done():
                receiving.cancel()
                with suppress(BaseException):
                    await receiving
