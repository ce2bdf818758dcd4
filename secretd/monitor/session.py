# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection: a Transport, a codec and a Monitor tied together.

A `Session` hands on what comes, answers in order, and keeps what must wait its turn. It decides nothing about
commands (monitor does) and opens nothing; server makes sessions and knows them all.
"""

import asyncio
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from typing import Final, Protocol

from msgspec import Struct

from secretd.access.peer import Door, Peer
from secretd.errors import LimitReached, LockedMemoryExhausted
from secretd.memory.arena import LockedBuffer
from secretd.monitor.core import Core, wire_event
from secretd.monitor.monitor import Monitor, Reply, log_internal
from secretd.monitor.throttle import Throttle
from secretd.net.receive_space import ReceiveSpace
from secretd.net.transport import (
    ALL,
    UNFINISHED_SECONDS,
    Locked,
    Transport,
)
from secretd.wire import messages as wire
from secretd.wire.connection import Connection
from secretd.wire.lexer import NeedData
from secretd.wire.messages import Malformed, Request

TURN_SECONDS: Final = 0.005
"""Seconds after which a connection that sends one request after the other lets the loop go on."""

SHARED_TURN_SECONDS: Final = 0.000_5
"""The same where there are other connections: those that gave way themselves are not seen by looking."""

LOOK_SECONDS: Final = 0.000_025
"""Seconds after which it looks whether others wait, and then lets them go on: about what one request
takes, so that they hardly notice.
"""

QUEUED_REQUESTS: Final = 8
"""Requests that may wait behind one that is being carried out, where the client has enabled oob; QEMU's
QMP_REQ_QUEUE_LEN_MAX. Then the connection is not read."""

BATCH_BYTES: Final = 32 << 10
"""Bytes of replies that are collected before they are sent together."""

_BRACE: Final = re.compile(rb"{")


class Owner(Protocol):
    """What a session asks of the server that made it."""

    core: Core
    space: ReceiveSpace
    stopping: bool
    sessions: "set[Session]"

    def start(self, coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run what a session waits for."""

    def forget(self, session: "Session") -> None:
        """A session has ended."""


class Session:
    """One connection; the Receiver of its Transport."""

    def __init__(self, server: Owner, sock: socket.socket, peer: Peer) -> None:
        self._server = server
        self._audit = server.core.audit
        self.monitor = Monitor(server.core, peer, self._negotiated)
        table = self.monitor.table
        self.max_bytes = table.max_bytes
        self._codec = Connection(table.decode, table.max_bytes, table.max_tokens)
        self._next, self._handle = self._codec.next, self.monitor.handle
        self.kept_from = self._codec.kept_from
        self.moved = self._codec.moved
        self.origin: object = self.monitor
        self.monitor.on_events = self._subscribe
        self.peer = peer
        self._trusted = peer.trusted
        self.wanted: Collection[str] | None = None
        self.since = self.position = 0
        self.throttle: Throttle | None = None
        self._out: list[bytes] = []
        self._out_size = 0
        self._began = self._looked = 0.0
        self._consuming = False
        self._lost = 0
        self._task: asyncio.Task[None] | None = None
        self._aside: asyncio.Task[None] | None = None  # what was asked for out of band meanwhile
        self._queue: deque[LockedBuffer | bytes | Locked] = deque()
        limits = server.core.limits
        share = None if peer.door is Door.CONTROL else (limits.unfinished, peer.uid)
        self.transport = Transport(
            sock, server.space, self, self.monitor.close_connection, share,
            uid=None if peer.trusted else peer.uid,
        )  # fmt: skip
        self.transport.send(self.monitor.greeting())

    def _negotiated(self) -> None:
        self._codec.oob = self.monitor.oob

    def _subscribe(self, wanted: Collection[str] | None) -> None:
        """Get these events from now on, all if None; none if there are none."""
        self._unsubscribe()
        self.wanted = wanted
        if wanted is None or wanted:
            self._server.core.broadcaster.subscribe(self)

    def _unsubscribe(self) -> None:
        self._server.core.broadcaster.unsubscribe(self)
        if self.throttle is not None:
            self.throttle.close()
            self.throttle = None

    @property
    def listening(self) -> bool:
        """True once negotiation is over."""
        return self.monitor.negotiated

    @property
    def busy(self) -> bool:
        """True while requests that were read are not answered yet."""
        return self._task is not None or self._aside is not None or bool(self._queue)

    def consume(self, view: memoryview, position: int, end: int) -> int:
        """Carry out the requests in the view, in order, until one must be waited for.

        If the client has enabled oob, what comes meanwhile is read on: out-of-band commands are
        carried out at once, others queued.
        """
        audit = self._audit
        audit.in_turn = self._consuming = True
        out, self._began = self._out, 0.0
        try:
            while self._task is None and not self._queue and not self._server.stopping:
                position, request = self._next(view, position, end)
                if isinstance(request, NeedData):
                    return position
                reply = self._handle(request)
                if position == end and isinstance(reply, bytes) and isinstance(request, Struct):
                    out.append(reply)
                    return ALL
                self._answer(reply)
                if self.transport.is_closed or self.transport.backlogged or self._is_over():
                    return position
            if self._task is not None or self._queue:
                position = self._consume_meanwhile(view, position, end)
            return position
        finally:
            audit.end_turn()  # before the replies
            self._consuming = False
            if len(out) == 1:
                self._out_size = 0
                self.transport.send(out.pop())
            elif out:
                self._flush()

    def _is_over(self) -> bool:
        """True if this connection's turn is over, since it has lasted long or others wait."""
        now = time.monotonic()
        if not self._began:
            self._began = self._looked = now
        elif now - self._looked > LOOK_SECONDS:
            self._looked = now
            alone = len(self._server.sessions) == 1
            turn = TURN_SECONDS if alone else SHARED_TURN_SECONDS
            if now - self._began > turn or (not alone and self.transport.others_wait()):
                self.transport.give_way()
                return True
        return False

    def _consume_meanwhile(self, view: memoryview, position: int, end: int) -> int:
        """Where the client has enabled oob, carry out what is and queue the rest, while a request is waited
        for.
        """
        transport = self.transport
        if not self.monitor.oob:
            transport.pause("busy")
            return position
        while not (transport.is_closed or transport.backlogged or self._server.stopping):
            start = self.kept_from(position)
            if len(self._queue) == QUEUED_REQUESTS:
                transport.pause("busy")
                break
            position, request = self._next(view, position, end)
            if isinstance(request, NeedData):
                break
            if isinstance(request, Request) and request.oob:
                self._answer(self._handle(request))
                if self._aside is not None:
                    transport.pause("aside")
                    break
                if self._is_over():
                    break
            elif not self._enqueue(request, view[start:position]):
                position = start
                transport.pause("busy")
                break
        return position

    def _answer(self, reply: Reply) -> None:
        """Send a reply with others soon, or start to wait for it."""
        if isinstance(reply, bytes):
            self._out.append(reply)
            self._out_size += len(reply)
            if self._out_size >= BATCH_BYTES:
                self._flush()
        elif isinstance(reply, Locked):
            self._flush()
            self.transport.send(reply)
        elif self._task is None:
            # First, so that it is cancelled if the flush finds that the client has gone.
            self._task = self._server.start(self._finish(reply))
            self._flush()
        else:
            self._aside = self._server.start(self._finish_aside(reply))
            self._flush()

    def _enqueue(self, request: Request | Malformed | Struct, message: memoryview) -> bool:
        """Keep a request for when its turn comes; False if there is no locked memory for it."""
        if isinstance(request, Malformed):
            # The words are ready; only a reply can come of it.
            reply = self.monitor.handle(request)
            assert isinstance(reply, bytes | Locked)
            self._queue.append(reply)
            return True
        # Before its brace there may be what the parser skipped after an error.
        match = _BRACE.search(message)
        assert match is not None
        message = message[match.start() :]
        share = self.transport.share
        try:
            if share is not None:
                share[0].check(share[1], len(message))
            kept = self.monitor.scratch.allocate(len(message))
        except (LockedMemoryExhausted, LimitReached):
            return False
        if share is not None:
            share[0].count(share[1], len(message))
        kept.view[:] = message
        self._queue.append(kept)
        return True

    async def _finish(self, reply: Coroutine[object, object, bytes]) -> None:
        data = await reply
        self._task = None
        self._audit.end_turn()  # before the reply
        self._safely(lambda: self.transport.send(data))
        if self._queue and not self._trusted:
            self.transport.later(self._go_on_safely)
        else:
            self._go_on_safely()

    async def _finish_aside(self, reply: Coroutine[object, object, bytes]) -> None:
        """Wait for a command that was asked for out of band; the connection is not read meanwhile."""
        data = await reply
        self._aside = None
        self._audit.end_turn()
        self._safely(lambda: self.transport.send(data))
        self._safely(lambda: self.transport.resume("aside"))

    def _go_on_safely(self) -> None:
        self._safely(self._go_on)

    def _safely(self, step: Callable[[], object]) -> None:
        """Take a step whose failure ends this connection, and not the daemon."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 - a reload must not end the daemon
            log_internal(error)
            try:
                self.transport.close()
            except Exception as again:  # noqa: BLE001 - it is closed as far as it can be
                log_internal(again)

    def _go_on(self) -> None:
        """Carry out what was queued, until one must be waited for; then read again. For a peer that is not
        trusted, one request in each turn.
        """
        while self._queue and self._task is None and not self._server.stopping:
            kept = self._queue.popleft()
            if isinstance(kept, LockedBuffer):
                with kept:
                    self._give(kept)
                    table = self.monitor.table
                    codec = Connection(table.decode, table.max_bytes, table.max_tokens)
                    codec.oob = True
                    request = codec.next(kept.view, 0, len(kept.view))[1]
                    assert not isinstance(request, NeedData)
                    self._answer(self.monitor.handle(request))
            else:
                self._answer(kept)
            if self._queue and not self._trusted:
                self._flush()
                self.transport.later(self._go_on_safely)
                return
        self._flush()
        self.transport.resume("busy")

    def _give(self, kept: LockedBuffer) -> None:
        share = self.transport.share
        if share is not None:
            share[0].release(share[1], len(kept))

    def _flush(self) -> None:
        out = self._out
        if out:
            self._audit.end_turn()  # what is told was recorded
            self._audit.in_turn = self._consuming
            data = b"".join(out)
            out.clear()
            self._out_size = 0
            self.transport.send(data)

    def send_events(self, events: bytes, count: int) -> None:
        """Send so many events, after the replies that are due. A client that does not read loses them,
        and is told when it reads again.
        """
        if self.transport.backlogged:
            self._lost += count
            return
        self._out.append(events)
        if not self._consuming:
            self._flush()

    def lose(self, count: int) -> None:
        """Tell the client, when there is something to tell, that it did not get so many events."""
        self._lost += count
        asyncio.get_running_loop().call_soon(self.drained)

    def drained(self) -> None:
        """The client reads again: tell it how many events it has lost."""
        if self._lost and not self.transport.backlogged and not self.transport.is_closed:
            lost, self._lost = self._lost, 0
            self.send_events(wire_event("SECRET_EVENTS_LOST", f'{{"count": {lost}}}'), 1)

    def has_room(self) -> bool:
        """True if the peer may pass a descriptor."""
        return self.monitor.descriptors_fault() is None

    def too_many_descriptors(self) -> None:
        """Say which limit descriptors would go beyond, which lie in the connection."""
        fault = self.monitor.descriptors_fault()
        assert fault is not None
        self._refuse(fault)

    def descriptors(self, numbers: list[int]) -> bool:
        """Take over what came with a message; False if the connection is to be closed."""
        try:
            self.monitor.receive(numbers)
        except LimitReached as error:
            self._refuse(error)
            return False
        return True

    def _refuse(self, error: LimitReached | LockedMemoryExhausted) -> None:
        if isinstance(error, LimitReached):
            self._server.core.limits.note_hit(error.limit)
        self.transport.send(wire.failure("GenericError", error.desc, None))

    def too_slow(self) -> None:
        """A message was begun and not finished in time."""
        self._server.core.limits.note_hit("unfinished-seconds")
        self.transport.send(
            wire.failure(
                "GenericError",
                f"No end of the message within {UNFINISHED_SECONDS:g} seconds; connection closed",
                None,
            )
        )

    def no_memory(self, error: LockedMemoryExhausted | LimitReached) -> None:
        """There is no locked memory for an unfinished message."""
        self._refuse(error)

    def closed(self) -> None:
        """Forget the session."""
        for task in filter(None, (self._task, self._aside)):
            # Not before its first step, which was scheduled before: only then does what it owns
            # (a descriptor, a buffer) have someone to release it.
            asyncio.get_running_loop().call_soon(task.cancel)
        while self._queue:
            kept = self._queue.popleft()
            if isinstance(kept, Locked):
                kept.buffer.free()
            elif isinstance(kept, LockedBuffer):
                self._give(kept)
                kept.free()
        self._server.forget(self)
        self._server.core.limits.connections.release(self.monitor.peer.uid)
        self._unsubscribe()
        self.monitor.close()
