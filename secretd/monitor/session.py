# SPDX-License-Identifier: LGPL-2.1-or-later
"""One session, in QMP or JSON-RPC: it connects a transport, a codec and a monitor.

Theory of operation. The transport calls `consume` with the bytes that have arrived. The session
finds the requests in them (wire.connection), has the monitor handle each, and collects the replies
in its `Outbox`. It stops when

- the bytes end in the middle of a message: the transport keeps them and calls again with more;
- a command has to wait (``_pending``): without `oob` the transport is paused until the reply is
  sent, so requests are answered in order. With `oob` the session reads on: out-of-band requests run
  at once, and others are queued as bytes in locked memory and parsed again in their turn. So no
  parsed request outlives the buffer that it is a view of;
- its `Turn` is over: other connections come first;
- a JSON-RPC batch has come: its members are queued in the same way;
- an addition waits for a store: further additions are executed meanwhile (monitor.commits).

What can go wrong: an exception in handling ends this connection, and never the daemon. `closed`
releases everything that the session still owns. The session decides nothing about commands (monitor
does); server creates sessions.
"""

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Final

from msgspec import Struct

from secretd.access.peer import Peer, SocketRole
from secretd.errors import LimitReached, LockedMemoryExhausted
from secretd.memory.arena import LockedBuffer
from secretd.monitor.batch import BatchEnd, BatchReply
from secretd.monitor.commits import COMMITS_PER_SESSION, Commits, Stored
from secretd.monitor.core import Core
from secretd.monitor.failures import safely
from secretd.monitor.monitor import Monitor, Reply
from secretd.monitor.outbox import Outbox
from secretd.monitor.refusals import Refusals
from secretd.monitor.tables import Table
from secretd.monitor.throttle import Throttle
from secretd.monitor.waiting import WaitingRequests
from secretd.net.pause import Pause
from secretd.net.receiver import CONSUMED, Locked
from secretd.net.transport import Transport
from secretd.net.turns import Turn
from secretd.wire.jsonrpc import Batch
from secretd.wire.lexer import NeedData
from secretd.wire.messages import Malformed, Request

QUEUED_REQUESTS: Final = 8
"""Requests that may wait behind a running one, where the client has enabled oob; QEMU's
QMP_REQ_QUEUE_LEN_MAX. At this number the connection is not read.
"""


class Session(Refusals):
    """The session of ``peer`` on ``transport``, whose receiver it is.

    ``ended``: called once, at its end.
    """

    def __init__(
        self,
        core: Core,
        transport: Transport,
        peer: Peer,
        table: Table,
        ended: Callable[["Session"], None],
    ) -> None:
        self._core, self._ended, self._trusted = core, ended, peer.trusted
        self.transport, self.peer = transport, peer
        self.monitor = Monitor(core, peer, table, self._negotiated)
        self._wire = table.wire
        self.outbox = Outbox(transport, core.audit, core.tuning.batch_bytes, self._wire.events)
        self._replies, self._audit = self.outbox.replies, core.audit
        self._send, self._sender = transport.send, transport.sender
        self._turn = Turn(
            core.has_one_session, transport.others_ready, transport.yield_turn, core.tuning
        )
        self._table, self.max_bytes, self._codec = table, table.max_bytes, table.codec()
        rpc = table.dialect == "jsonrpc"
        self._next, self._handle = self._codec.next, self._begin if rpc else self.monitor.handle
        self._batch: BatchReply | None = None  # the reply to a batch under way
        self.first_needed, self.shifted = self._codec.first_needed, self._codec.shifted
        self.origin: object = self.monitor
        self.monitor.on_events, self.monitor.is_alone = self._subscribe, self._turn.is_alone
        self.wanted: Collection[str] | None = None
        self.since = self.position = 0
        self.throttle: Throttle | None = None
        self.lose = self.outbox.lose
        self._pending: asyncio.Task[None] | None = None
        self._pending_oob: asyncio.Task[None] | None = None
        self._waiting = WaitingRequests(core.tree.scratch, transport)
        self._queue = self._waiting.queue
        self._commits = Commits(self.outbox, transport)
        transport.start(self)
        if self._wire.GREETS:
            transport.send(self.monitor.greeting())

    def _negotiated(self) -> None:
        self._codec.oob = self.monitor.oob

    def _subscribe(self, wanted: Collection[str] | None) -> None:
        self._unsubscribe()
        self.wanted = wanted
        if wanted is None or wanted:
            self._core.broadcaster.subscribe(self)

    def _unsubscribe(self) -> None:
        self._core.broadcaster.unsubscribe(self)
        if self.throttle is not None:
            self.throttle.close()
            self.throttle = None

    @property
    def receives_shutdown(self) -> bool:
        """True on the control socket after negotiation, or with JSON-RPC after secret-events."""
        asked = self._wire.GREETS or self in self._core.broadcaster.subscribers
        return self.monitor.negotiated and asked and self.peer.role is SocketRole.CONTROL

    def send_events(self, events: bytes, count: int) -> None:
        """Send ``count`` events; during a batch's reply, after it."""
        if self._batch is None:
            self.outbox.send_events(events, count)
        elif not self._batch.defer(events, count):
            self.lose(count)

    def drained(self) -> None:
        """See Receiver."""
        self.outbox.report_lost()
        if self._batch is not None:
            self.transport.later(self._continue_safely)

    @property
    def busy(self) -> bool:
        """True while a received request is not answered yet."""
        return self._pending is not None or self._pending_oob is not None or bool(self._queue)

    # --- requests

    def consume(self, view: memoryview, position: int, end: int) -> int:
        """Execute the requests in the view, in order; see Receiver and the module's docstring."""
        core, audit, outbox, replies = self._core, self._audit, self.outbox, self._replies
        audit.in_turn = outbox.held = True
        turn = self._turn
        turn.began = 0.0
        try:
            while self._pending is None and not self._queue and not core.stopping:
                position, request = self._next(view, position, end)
                if isinstance(request, NeedData):
                    return position
                reply = self._handle(request)
                # Nearly always a read has one request, and its reply is ready.
                if position == end and isinstance(reply, bytes) and isinstance(request, Struct):
                    replies.append(reply)
                    return CONSUMED
                if isinstance(reply, bytes):
                    outbox.add(reply)
                else:
                    self._answer(reply)
                if self.transport.is_closed or self._sender.backlogged or turn.yield_if_due():
                    return position
            if self._pending is not None or self._queue:
                position = self._consume_meanwhile(view, position, end)
            return position
        finally:
            audit.end_turn()  # before the replies
            outbox.held = False
            if len(replies) == 1:
                outbox.size = 0
                self._send(replies.pop())
            elif replies:
                outbox.flush()

    def _consume_meanwhile(self, view: memoryview, position: int, end: int) -> int:
        """While a command is pending: run out-of-band requests at once and queue the others
        (requires `oob`).
        """
        transport = self.transport
        if self._commits and not self._queue:
            position, must_wait = self._add_meanwhile(view, position, end)
            if not must_wait:
                return position
        if not self.monitor.oob:
            transport.pause(Pause.BUSY)
            return position
        while not (transport.is_closed or transport.backlogged or self._core.stopping):
            start = self.first_needed(position)
            if len(self._queue) == QUEUED_REQUESTS:
                transport.pause(Pause.BUSY)
                break
            position, request = self._next(view, position, end)
            if isinstance(request, NeedData):
                break
            if isinstance(request, Request) and request.oob:
                self._answer(self._handle(request))
                if self._pending_oob is not None:
                    transport.pause(Pause.ASIDE)
                    break
                if self._turn.yield_if_due():
                    break
            elif not self._enqueue(request, view[start:position]):
                position = start
                transport.pause(Pause.BUSY)
                break
        return position

    def _add_meanwhile(self, view: memoryview, position: int, end: int) -> tuple[int, bool]:
        """While additions are being written, execute further ones.

        Returns the position after them, and whether the next request has to wait for them.
        """
        while not (self.transport.is_closed or self._sender.backlogged or self._core.stopping):
            start = self.first_needed(position)
            if len(self._commits) == COMMITS_PER_SESSION:
                return start, True
            position, request = self._next(view, position, end)
            if isinstance(request, NeedData):
                return position, False
            if not self.monitor.may_add_meanwhile(request):
                return start, True
            reply = self._handle(request)
            assert isinstance(reply, bytes | Stored)  # it waits for nothing else
            self._commits.add(reply)
            if self._turn.yield_if_due():
                break
        return position, False

    def _answer(self, reply: Reply) -> None:
        """Send a reply soon, together with others, or start to wait for it."""
        if isinstance(reply, Stored):
            assert self._pending is None  # no command that runs out of band changes a store
            self._commits.add(reply)
            self._pending = self._core.start(self._drain())
        elif isinstance(reply, bytes):
            self.outbox.add(self._framed(reply))
        elif isinstance(reply, Locked):
            self.outbox.add_locked(reply)
        elif self._pending is None:
            # Before the flush, so that it is cancelled if the flush finds a closed connection.
            self._pending = self._core.start(self._finish(reply))
            self.outbox.flush()
        else:
            self._pending_oob = self._core.start(self._finish_oob(reply))
            self.outbox.flush()

    def _framed(self, reply: bytes) -> bytes:
        return reply if self._batch is None else self._batch.framed(reply)

    def _begin(self, request: "Request | Malformed | Struct | Batch") -> Reply:
        """Handle a request, or queue the members of a batch; they are executed one by one."""
        if not isinstance(request, Batch):
            return self.monitor.handle(request)
        try:
            self._waiting.add_batch(request)
        except (LockedMemoryExhausted, LimitReached) as error:
            return self._refusal(error)
        self._batch, self.outbox.in_array = BatchReply(), True
        self.transport.later(self._continue_safely)
        return b""

    def _enqueue(self, request: Request | Malformed | Struct, message: memoryview) -> bool:
        """Queue a request; return False if locked memory or the uid's quota is used up."""
        if not isinstance(request, Malformed):
            return self._waiting.add(message)
        reply = self.monitor.handle(request)
        assert isinstance(reply, bytes | Locked)
        self._queue.append(reply)
        return True

    # --- commands that wait

    async def _finish(self, reply: Coroutine[object, object, bytes]) -> None:
        data = self._framed(await reply)
        self._pending = None
        self._audit.end_turn()  # before the reply
        safely(self.transport, lambda: self.transport.send(data))
        if self._queue and not self._trusted:
            self.transport.later(self._continue_safely)
        else:
            self._continue_safely()

    async def _drain(self) -> None:
        await self._commits.drain(self._framed)
        self._pending = None
        self._continue_safely()

    async def _finish_oob(self, reply: Coroutine[object, object, bytes]) -> None:
        data = await reply  # the connection is not read meanwhile
        self._pending_oob = None
        self._audit.end_turn()
        safely(self.transport, lambda: self.transport.send(data))
        safely(self.transport, lambda: self.transport.resume(Pause.ASIDE))

    def _continue_safely(self) -> None:
        safely(self.transport, self._continue)

    def _continue(self) -> None:
        """Execute queued requests until one must wait, then read again.

        A batch and an untrusted peer get one request in each turn; a batch waits for its reader.
        """
        while self._queue and self._pending is None and not self._core.stopping:
            if self._batch is not None and (self._sender.backlogged or self.transport.is_closed):
                break
            queued = self._waiting.next()
            if isinstance(queued, LockedBuffer):
                with queued:
                    codec = self._table.codec(in_batch=self._batch is not None)
                    codec.oob = True
                    request = codec.next(queued.view, 0, len(queued.view))[1]
                    assert not isinstance(request, NeedData)
                    self._answer(self.monitor.handle(request))
            elif isinstance(queued, BatchEnd):
                self._end_batch()
            else:
                self._answer(queued)
            if self._queue and not (self._trusted and self._batch is None):
                self.outbox.flush()
                self.transport.later(self._continue_safely)
                return
        if self._core.stopping and self._pending is None:
            self._waiting.clear()
            if self._batch is not None:
                self._end_batch()
        self.outbox.flush()
        if self._batch is None:
            self.transport.resume(Pause.BUSY)

    def _end_batch(self) -> None:
        assert self._batch is not None
        batch, self._batch, self.outbox.in_array = self._batch, None, False
        self.outbox.add(batch.end)
        if batch.events:
            self.send_events(*batch.deferred())
        self.outbox.report_lost()

    # --- what the transport reports

    def closed(self) -> None:
        """See Receiver: release everything that the session owns."""
        for task in filter(None, (self._pending, self._pending_oob)):
            # Its first step was scheduled earlier, and runs first: in that step it takes over the
            # descriptor or buffer that it has to release.
            asyncio.get_running_loop().call_soon(task.cancel)
        self._waiting.clear()
        self._commits.clear()
        self._ended(self)
        self._core.limits.connections.release(self.peer.uid)
        self._unsubscribe()
        self.monitor.close()
