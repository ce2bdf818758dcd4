# SPDX-License-Identifier: LGPL-2.1-or-later
"""asyncio over AF_UNIX streams: bytes and descriptors in, bytes out, with back-pressure both ways.

A `Transport` receives straight into locked memory, keeps an unfinished message in a `Tail`, and
wipes consumed bytes. Its `Receiver` (monitor.session) finds the messages. asyncio's own transports
copy into the heap and carry no descriptors.

Theory of operation. A connection is in one of three states:

    state    known by       reads           answers         next
    OPEN     _left == -1    everything      everything      ENDING: the client has shut down its
                                                            side, or `finish` was called
    ENDING   _left >= 0     _left bytes     read requests   CLOSED: all is answered and sent
    CLOSED   is_closed      nothing         nothing         -

`close` enters CLOSED from every state. The connection is read while no `Pause` is in force; each
pause has one owner, which resumes it. Requests that arrived before a pause lie in the tail, and are
handled before new bytes are read. An untrusted connection is read and handled only in its uid's
turns. A request usually costs epoll_wait, recvmsg and send, and no allocation but the reply.
"""

import contextlib
import socket
from collections.abc import Callable
from functools import partial

from secretd.errors import LimitReached, LockedMemoryExhausted
from secretd.limits import Tuning
from secretd.linux.sockopt import unread_bytes
from secretd.memory.wipe import wipe
from secretd.net.control_messages import ANCILLARY_BYTES, RECEIVE_FLAGS, peek_and_wipe, received
from secretd.net.loop import running_loop
from secretd.net.pause import BACKLOG, CLOCK_STOPPED, STARVED, TURN, Pause
from secretd.net.receive_space import (
    ROOMY_BYTES,
    SMALL_TAIL_BYTES,
    TIGHT_BYTES,
    Account,
    ReceiveSpace,
    Tail,
)
from secretd.net.receiver import CONSUMED, Receiver
from secretd.net.sender import Sender


class Transport:
    """One connection.

    ``closer``: closes the socket, which may block for some peers. ``account``: the quota of its
    unfinished message. ``uid``: that of an untrusted peer; then the receiver is asked for room for
    descriptors before each recvmsg(2). ``others_ready()``: True if other work waits.
    """

    def __init__(
        self,
        sock: socket.socket,
        space: ReceiveSpace,
        closer: Callable[[socket.socket], object],
        tuning: Tuning,
        account: Account | None = None,
        *,
        uid: int | None = None,
    ) -> None:
        loop = self._loop = running_loop()
        self._watch, self._unwatch = loop.watch, loop.unwatch
        self._sock, self._fd = sock, sock.fileno()
        self.others_ready = partial(loop.others_ready, self._fd)
        self._receive = sock.recvmsg_into
        self._space, self._closer, self.account = space, closer, account
        self._in_turn = None if uid is None else partial(loop.turns.add, uid)
        self._on_readable = self._readable if self._in_turn is None else self._wait_for_turn
        self._tail = Tail(space, account, tuning, self._on_room, self._timed_out)
        self.sender = Sender(sock, self.close, self._sender_changed)
        self.send = self.sender.send
        self.is_closed = False
        self._left = -1  # bytes still to read, in ENDING; -1 for no limit
        self._paused = 0  # Pause
        self._watching = False  # the loop reports when the socket is readable

    def start(self, receiver: Receiver) -> None:
        """Start reading, for this receiver."""
        self._receiver = receiver
        self._small = receiver.max_bytes < SMALL_TAIL_BYTES
        self._update_watching()

    # --- pauses and turns

    def pause(self, reason: Pause) -> None:
        """Stop reading and handling until `resume` is called for the same reason."""
        self._paused |= reason._value_
        self._update_watching()

    def resume(self, reason: Pause) -> None:
        """End a `pause`; handle the requests that had arrived by then."""
        if self.is_closed or (reason == Pause.BACKLOG and self.backlogged):
            return
        self._paused &= ~reason._value_
        if reason == Pause.BACKLOG:
            self._receiver.drained()
        if self._paused:
            return
        tail = self._tail
        if tail.buffer is not None and tail.position < tail.fill:
            if self._in_turn is not None and reason != Pause.TURN:
                self.yield_turn()
                return
            self._advance(tail.buffer.view, tail.fill)
        self._start_timer()
        self._make_room()
        self._close_if_done()
        self._update_watching()

    def yield_turn(self) -> None:
        """Stop until all others have had their turn."""
        self.pause(Pause.TURN)
        self._tail.count_as_unhandled(waiting=True)
        self.later(self._next_turn)

    def later(self, work: Callable[[], None]) -> None:
        """Do a piece of work for this connection in its next turn."""
        if self._in_turn is None:
            self._loop.call_soon(work)
        else:
            self._in_turn(work)

    def _next_turn(self) -> None:
        self._tail.count_as_unhandled(waiting=False)
        self.resume(Pause.TURN)

    # --- in

    def _update_watching(self) -> None:
        if self.is_closed:
            return
        wanted = not self._paused and self._left != 0
        if wanted and not self._watching:
            self._watch(self._fd, self._on_readable)
        elif self._watching and not wanted:
            self._unwatch(self._fd)
        self._watching = wanted

    def _wait_for_turn(self) -> None:
        # Until then epoll must not report it: each report would delay those of others.
        self._unwatch(self._fd)
        if self._tail.buffer is not None:
            self._tail.count_as_unhandled(waiting=True)
        self.later(self._readable_in_turn)

    def _readable_in_turn(self) -> None:
        if not self._paused & TURN:
            self._tail.count_as_unhandled(waiting=False)
        if not self._watching:  # it was paused meanwhile
            return
        self._watch(self._fd, self._on_readable)
        account = self.account
        if (
            self._tail.buffer is None
            and account is not None
            and self._space.unhandled[account.uid]
            and account.quota.held(account.uid) + SMALL_TAIL_BYTES > account.quota.limit
        ):
            # The uid's next turns finish or handle what fills its room: receive later.
            self._wait_for_turn()
            return
        self._readable()

    def _readable(self) -> None:
        # 1. Choose the buffer: behind the unfinished message, or the shared one.
        tail, space, left = self._tail, self._space, self._left
        start = tail.fill
        if start:
            view = tail.buffer.view  # type: ignore[union-attr]  # what is there lies in it
            free = view[start:]
        elif self._small or space.held > TIGHT_BYTES or space.arena.spare < ROOMY_BYTES:
            view = free = space.small
        else:
            view = free = space.large
        if left >= 0:
            free = free[:left]
        # 2. A peer without room for descriptors may not pass any.
        if self._in_turn is not None and not self._receiver.accepts_descriptors():
            allowed = self._without_descriptors(free)
            if allowed is None:
                return
            free = allowed
        # 3. Receive.
        try:
            count, ancillary, _, _ = self._receive((free,), ANCILLARY_BYTES, RECEIVE_FLAGS)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if ancillary:
            numbers = received(ancillary)
            if numbers and not self._receiver.descriptors(numbers):
                wipe(view[start : start + count])
                self.close()
                return
        # 4. Handle it.
        if left >= 0 or not count:
            self._end(max(0, left - count))
        if count:
            self._advance(view, start + count)
        if self._left >= 0:
            self._close_if_done()

    def _without_descriptors(self, free: memoryview) -> memoryview | None:
        """Return the room for bytes that come without descriptors, None if there are none.

        If descriptors come next, the connection is closed.
        """
        try:
            count, descriptors = peek_and_wipe(self._sock, free)
        except OSError:
            self.close()
            return None
        if descriptors:
            self._receiver.too_many_descriptors()
            self.close()
            return None
        return None if count is None else free[: max(count, 1)]

    def _advance(self, view: memoryview, end: int) -> None:
        # 1. Let the receiver handle it; it nearly always consumes the whole shared buffer.
        tail = self._tail
        shared = not tail.fill
        try:
            position = self._receiver.consume(view, tail.position, end)
        except BaseException:
            # The connection's own buffer was wiped and freed when it closed.
            if shared or not self.is_closed:
                wipe(view[:end])
            self.close()
            raise
        if shared and (position == CONSUMED or self.is_closed):
            view[:end] = bytes(end)
            return
        if self.is_closed:
            return
        # 2. Keep the rest, at the start of the connection's own buffer.
        if position == CONSUMED:
            position = end
        first = self._receiver.first_needed(position)
        rest = end - first
        if first:
            tail.stop_clock()
        if rest == 0:
            wipe(view[:end])
            tail.drop()
        elif tail.buffer is None:
            try:
                tail.hold(view[first:end])
            except (LockedMemoryExhausted, LimitReached) as error:
                self._receiver.no_memory(error)
                self.close()
                wipe(view[:end])
                return
            wipe(view[:end])
            self._receiver.shifted(first)
        elif first:
            view[:rest] = view[first:end]
            wipe(view[rest:end])
            self._receiver.shifted(first)
        tail.fill = rest
        tail.position = position - first
        # 3. The message must be finished in time, and find room.
        if rest:
            self._start_timer()
            self._make_room()

    def _make_room(self) -> None:
        """If an unfinished message fills its buffer, get a larger one or wait."""
        if not self._paused and self._tail.is_full and not self._tail.grow():
            self._tail.wait_for_room()
            self.pause(Pause.STARVED)

    def _on_room(self) -> None:
        """Try again to find room for an unfinished message."""
        if self.is_closed or not self._paused & STARVED:
            return
        if self._tail.grow():
            self.resume(Pause.STARVED)
        else:
            self._tail.wait_for_room()

    def _start_timer(self) -> None:
        if not self._paused & CLOCK_STOPPED:
            self._tail.start_clock()

    def _timed_out(self) -> None:
        if not self._paused & CLOCK_STOPPED:
            self._receiver.message_timed_out()
            self.close()

    # --- out

    @property
    def backlogged(self) -> bool:
        """True while the client has too many unread replies, or one in locked memory."""
        return self.sender.backlogged

    def _sender_changed(self) -> None:
        if self.backlogged:
            self.pause(Pause.BACKLOG)
        elif self._paused & BACKLOG or (self._left >= 0 and not self.sender.waiting):
            # Later: the caller of `send` may be in the middle of handling requests.
            self._loop.call_soon(self.resume, Pause.BACKLOG)

    # --- end

    def finish(self, *, read: bool) -> None:
        """Close once all read requests are answered; with ``read`` also those that have arrived by
        now.
        """
        if self._paused & STARVED:  # it holds half a message without room
            self.close()
            return
        self._end(unread_bytes(self._fd) if read and self._left else 0)
        self._close_if_done()

    def _end(self, left: int) -> None:
        self._left = left
        self._update_watching()

    def _close_if_done(self) -> None:
        # Requests before the end are answered, as in QEMU; half a message is dropped.
        if self._left or self._paused or self.is_closed:
            return
        if not (self.sender.waiting or self._receiver.busy):
            self.close()

    def close(self) -> None:
        """End the connection now; wipe and drop unsent and unread bytes."""
        if self.is_closed:
            return
        self.is_closed = True
        self._watching = False
        self._unwatch(self._fd)
        self.sender.close()
        self._tail.close()
        # The client sees the end now, even if close(2) waits for its turn, and sends no more.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        try:
            self._closer(self._sock)
        finally:
            self._receiver.closed()
