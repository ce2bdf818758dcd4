# SPDX-License-Identifier: LGPL-2.1-or-later
"""One lasting watch of etcd.

It begins with a list at one revision and goes on from the next. After a lost connection it
resumes behind the last *event*: the header of a response says how far the store is, not how far
this watch is (etcd sends a watch that catches up 1,000 revisions at a time). It lists anew after a
compaction, and when the store went back or is another one.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple

from grpclib.client import Stream, StreamStreamMethod
from grpclib.exceptions import GRPCError

from secretd.fleet import messages as m
from secretd.fleet.etcd import (
    CALL_SECONDS,
    LOST,
    METADATA,
    Etcd,
    range_request,
    undamaged,
    words_of,
)

SILENCE_SECONDS: Final = 2.0
"""Seconds of silence after which the watch asks for a sign of life, and for which it waits then."""

STEADY_SECONDS: Final = 5.0
"""Seconds after which a watch is steady, and its loss the first again."""

BACKOFF_SECONDS: Final = 5.0
"""The longest pause before another try; pauses are random, so that hosts do not come together."""


class Snapshot(NamedTuple):
    """All keys of the watch with their values, at one revision."""

    values: Mapping[bytes, bytes]


class Change(NamedTuple):
    """Changed keys in order, with their values; None for a deleted one."""

    values: Sequence[tuple[bytes, bytes | None]]


Range = tuple[bytes, bytes]


class Lost(Exception):
    """The watch has lost its node, and tries another one; the text says why."""


class Watch:
    """A lasting watch of some ranges: each a key, and the key behind the last one, or b"" for one.

    ``listed``: the ranges of a snapshot, the same by default. ``on_state``: called with ""
    when the watch is whole, and with the reason while it is not.
    """

    def __init__(
        self,
        etcd: Etcd,
        ranges: Sequence[Range],
        on_state: Callable[[str], object],
        listed: Sequence[Range] | None = None,
    ) -> None:
        self._etcd, self._ranges, self._on_state = etcd, ranges, on_state
        self._listed = ranges if listed is None else listed
        self._next: list[int] = []  # by range, the revision to go on from
        self._seen = self._cluster = 0

    async def follow(self) -> AsyncGenerator[Snapshot | Change, None]:
        """Yield a snapshot and then changes, for ever."""
        failures = 0
        while True:
            channel, begin = None, time.monotonic()
            try:
                channel = self._etcd.connected()
                if not self._next:
                    yield await self._list()
                async with self._stream() as stream:
                    async for found in self._changes(stream):
                        if found is not None:
                            yield found
            except (Lost, GRPCError, *LOST) as error:
                self._on_state(words_of(error))
            failures = 1 if time.monotonic() - begin > STEADY_SECONDS else failures + 1
            self._etcd.leave(channel)
            pause = min(BACKOFF_SECONDS, 0.1 * 2 ** min(failures, 10))
            await asyncio.sleep(random.uniform(0, pause))  # noqa: S311 - no secret

    async def _list(self) -> Snapshot:
        values: dict[bytes, bytes] = {}
        start = 0
        for key, end in self._listed:
            request = range_request(key, end)
            reply = await self._etcd.once("/etcdserverpb.KV/Range", request, m.RangeResponse)
            values |= {each.key: each.value for each in reply.kvs}
            start = start or reply.header.revision + 1  # what changes between comes as an event
            self._seen, self._cluster = reply.header.revision, reply.header.cluster_id
        self._next = [start] * len(self._ranges)
        return Snapshot(values)

    @asynccontextmanager
    async def _stream(self) -> AsyncIterator[Stream[Any, Any]]:
        path = "/etcdserverpb.Watch/Watch"
        channel = self._etcd.connected()
        method: Any = StreamStreamMethod(channel, path, m.WatchRequest, m.WatchResponse)
        async with method.open(metadata=METADATA) as stream:
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    await stream.send_request()
                    for number, (key, end) in enumerate(self._ranges):
                        create = m.WatchCreate(
                            key=key, watch_id=number + 1, start_revision=self._next[number]
                        )
                        if end:
                            create.range_end = end
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
                if created == len(self._ranges):
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

    async def _next_message(self, stream: Stream[Any, Any]) -> Any:
        with undamaged():
            return await stream.recv_message()

    async def _received(self, stream: Stream[Any, Any]) -> Any:
        """Return the next message; after some silence, ask the node for one."""
        receiving = asyncio.ensure_future(self._next_message(stream))
        try:
            done, _ = await asyncio.wait({receiving}, timeout=SILENCE_SECONDS)
            while not done and _heard_within(stream, SILENCE_SECONDS):  # a long message arrives
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


def _heard_within(stream: Stream[Any, Any], seconds: float) -> bool:
    """Return True if bytes of a message came within some seconds."""
    connection = getattr(getattr(stream, "_stream", None), "connection", None)
    heard_at = getattr(connection, "last_data_received", None)
    return heard_at is not None and time.monotonic() - heard_at < seconds
