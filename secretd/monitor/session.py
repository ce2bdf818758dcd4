# SPDX-License-Identifier: LGPL-2.1-or-later
"""One QMP session: it connects a transport, a codec and a monitor.

Theory of operation. The transport calls `consume` with the bytes that have arrived. The session
finds the requests in them (wire.connection), has the monitor handle each, and collects the replies
in its `Outbox`. It stops when

- the bytes end in the middle of a message: the transport keeps them and calls again with more;
- a command has to wait (``_pending``): without `oob` the transport is paused until the reply is
  sent, so requests are answered in order. With `oob` the session reads on: out-of-band requests run
  at once, and others are queued as bytes in locked memory and parsed again in their turn. So no
  parsed request outlives the buffer that it is a view of;
- its `Turn` is over: other connections come first.

What can go wrong: an exception in handling ends this connection, and never the daemon. `closed`
releases everything that the session still owns. The session decides nothing about commands (monitor
does); server creates sessions.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from typing import Final

from msgspec import Struct

from secretd.access.peer import Peer, SocketRole
from secretd.errors import LimitReached, LockedMemoryExhausted
from secretd.memory.arena import LockedBuffer
from secretd.monitor.core import Core
from secretd.monitor.monitor import Monitor, Reply, log_internal
from secretd.monitor.outbox import Outbox
from secretd.monitor.throttle import Throttle
from secretd.net.pause import Pause
from secretd.net.receiver import CONSUMED, Locked
from secretd.net.transport import Transport
from secretd.net.turns import Turn
from secretd.wire import messages as wire
from secretd.wire.connection import Connection
from secretd.wire.lexer import NeedData
from secretd.wire.messages import Malformed, Request

QUEUED_REQUESTS: Final = 8
"""Requests that may wait behind a running one, where the client has enabled oob; QEMU's
QMP_REQ_QUEUE_LEN_MAX. At this number the connection is not read.
"""

_BRACE: Final = re.compile(rb"{")


class Session:
    """The session of ``peer`` on ``transport``, whose receiver it is.

    ``ended``: called once, at its end.
    """

    def __init__(
        self, core: Core, transport: Transport, peer: Peer, ended: Callable[["Session"], None]
    ) -> None:
        self._core = core
        self.transport = transport
        self.peer = peer
        self._ended = ended
        self._trusted = peer.trusted
        self.monitor = Monitor(core, peer, self._negotiated)
        self.outbox = Outbox(transport, core.audit, core.tuning.batch_bytes)
        self._replies = self.outbox.replies
        self._audit, self._send = core.audit, transport.send
        self._sender = transport.sender
        self._turn = Turn(
            core.has_one_session, transport.others_ready, transport.yield_turn, core.tuning
        )
        table = self.monitor.table
        self.max_bytes = table.max_bytes
        self._codec = Connection(table.decode, table.max_bytes, table.max_tokens)
        self._next, self._handle = self._codec.next, self.monitor.handle
        self.first_needed = self._codec.first_needed
        self.shifted = self._codec.shifted
        self.drained = self.outbox.report_lost
        # Its part as a subscriber of events.
        self.origin: object = self.monitor
        self.monitor.on_events = self._subscribe
        self.wanted: Collection[str] | None = None
        self.since = self.position = 0
        self.throttle: Throttle | None = None
        self.send_events, self.lose = self.outbox.send_events, self.outbox.lose
        # Waiting commands, and the requests behind them.
        self._pending: asyncio.Task[None] | None = None
        self._pending_oob: asyncio.Task[None] | None = None
        self._queue: deque[LockedBuffer | bytes | Locked] = deque()
        transport.start(self)
        transport.send(self.monitor.greeting())

    def _negotiated(self) -> None:
        self._codec.oob = self.monitor.oob

    def _subscribe(self, wanted: Collection[str] | None) -> None:
        """Subscribe to these events from now on; None for all, an empty collection for none."""
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
        """True once negotiation is over, on the control socket."""
        return self.monitor.negotiated and self.peer.role is SocketRole.CONTROL

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

    def _answer(self, reply: Reply) -> None:
        """Send a reply soon, together with others, or start to wait for it."""
        if isinstance(reply, bytes):
            self.outbox.add(reply)
        elif isinstance(reply, Locked):
            self.outbox.add_locked(reply)
        elif self._pending is None:
            # Before the flush, so that it is cancelled if the flush finds a closed connection.
            self._pending = self._core.start(self._finish(reply))
            self.outbox.flush()
        else:
            self._pending_oob = self._core.start(self._finish_oob(reply))
            self.outbox.flush()

    def _enqueue(self, request: Request | Malformed | Struct, message: memoryview) -> bool:
        """Queue a request; return False if locked memory or the uid's quota is used up."""
        if isinstance(request, Malformed):
            # Its reply is ready.
            reply = self.monitor.handle(request)
            assert isinstance(reply, bytes | Locked)
            self._queue.append(reply)
            return True
        # Bytes that the parser skipped after an error may precede its brace.
        match = _BRACE.search(message)
        assert match is not None
        message = message[match.start() :]
        account = self.transport.account
        try:
            if account is not None:
                account.quota.check(account.uid, len(message))
            kept = self.monitor.scratch.allocate(len(message))
        except (LockedMemoryExhausted, LimitReached):
            return False
        if account is not None:
            account.quota.count(account.uid, len(message))
        kept.view[:] = message
        self._queue.append(kept)
        return True

    # --- commands that wait

    async def _finish(self, reply: Coroutine[object, object, bytes]) -> None:
        data = await reply
        self._pending = None
        self._audit.end_turn()  # before the reply
        self._safely(lambda: self.transport.send(data))
        if self._queue and not self._trusted:
            self.transport.later(self._continue_safely)
        else:
            self._continue_safely()

    async def _finish_oob(self, reply: Coroutine[object, object, bytes]) -> None:
        """Wait for an out-of-band command; the connection is not read meanwhile."""
        data = await reply
        self._pending_oob = None
        self._audit.end_turn()
        self._safely(lambda: self.transport.send(data))
        self._safely(lambda: self.transport.resume(Pause.ASIDE))

    def _continue_safely(self) -> None:
        self._safely(self._continue)

    def _safely(self, step: Callable[[], object]) -> None:
        """Take a step whose failure ends this connection, and not the daemon."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 - see above
            log_internal(error)
            try:
                self.transport.close()
            except Exception as again:  # noqa: BLE001 - closing has gone as far as possible
                log_internal(again)

    def _continue(self) -> None:
        """Execute queued requests until one must wait, then read again.

        An untrusted peer gets one request in each of its turns.
        """
        while self._queue and self._pending is None and not self._core.stopping:
            queued = self._queue.popleft()
            if isinstance(queued, LockedBuffer):
                with queued:
                    self._release(queued)
                    table = self.monitor.table
                    codec = Connection(table.decode, table.max_bytes, table.max_tokens)
                    codec.oob = True
                    request = codec.next(queued.view, 0, len(queued.view))[1]
                    assert not isinstance(request, NeedData)
                    self._answer(self.monitor.handle(request))
            else:
                self._answer(queued)
            if self._queue and not self._trusted:
                self.outbox.flush()
                self.transport.later(self._continue_safely)
                return
        self.outbox.flush()
        self.transport.resume(Pause.BUSY)

    def _release(self, queued: LockedBuffer) -> None:
        account = self.transport.account
        if account is not None:
            account.quota.release(account.uid, len(queued))

    # --- what the transport reports

    def accepts_descriptors(self) -> bool:
        """See Receiver."""
        return self.monitor.descriptors_fault() is None

    def too_many_descriptors(self) -> None:
        """See Receiver."""
        fault = self.monitor.descriptors_fault()
        assert fault is not None
        self._refuse(fault)

    def descriptors(self, numbers: list[int]) -> bool:
        """See Receiver."""
        try:
            self.monitor.receive(numbers)
        except LimitReached as error:
            self._refuse(error)
            return False
        return True

    def no_memory(self, error: LockedMemoryExhausted | LimitReached) -> None:
        """See Receiver."""
        self._refuse(error)

    def message_timed_out(self) -> None:
        """See Receiver."""
        seconds = self._core.tuning.unfinished_seconds
        words = f"No end of the message within {seconds:g} seconds; connection closed"
        self._refuse(LimitReached("unfinished-seconds", words))

    def _refuse(self, error: LimitReached | LockedMemoryExhausted) -> None:
        if isinstance(error, LimitReached):
            self._core.limits.note_hit(error.limit)
        self.transport.send(wire.failure("GenericError", error.desc, None))

    def closed(self) -> None:
        """See Receiver: release everything that the session owns."""
        for task in filter(None, (self._pending, self._pending_oob)):
            # Its first step was scheduled earlier, and runs first: in that step it takes over the
            # descriptor or buffer that it has to release.
            asyncio.get_running_loop().call_soon(task.cancel)
        while self._queue:
            queued = self._queue.popleft()
            if isinstance(queued, Locked):
                queued.buffer.free()
            elif isinstance(queued, LockedBuffer):
                self._release(queued)
                queued.free()
        self._ended(self)
        self._core.limits.connections.release(self.peer.uid)
        self._unsubscribe()
        self.monitor.close()
