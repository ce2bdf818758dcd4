# SPDX-License-Identifier: LGPL-2.1-or-later
"""asyncio over AF_UNIX streams: bytes and descriptors in, bytes out, with backpressure both ways.

A `Transport` receives straight into locked memory, keeps what is unfinished in a buffer of its own, and
wipes what has been consumed. It cuts no messages: its `Receiver` (server.Session) says how far it
got. asyncio's own transports copy into the heap and carry no descriptors, hence this one.

Costs of a request on the usual path: epoll_wait, recvmsg, send; no allocation but the reply.
"""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from secretd.errors import LimitReached, LockedMemoryExhausted
from secretd.limits import Quota
from secretd.linux.sockopt import peek, unread_bytes
from secretd.memory.arena import LockedBuffer
from secretd.memory.wipe import wipe
from secretd.net.loop import crowded, readers, turns
from secretd.net.receive_space import (
    FIRST_TAIL_BYTES,
    LARGEST_TAIL_BYTES,
    ROOMY_BYTES,
    SMALL_TAIL_BYTES,
    TIGHT_BYTES,
    ReceiveSpace,
)

SCM_MAX_FD: Final = 253
"""Descriptors the kernel lets one message carry (SCM_MAX_FD, include/net/scm.h)."""

_SOL_SOCKET: Final = socket.SOL_SOCKET
_SCM_RIGHTS: Final = socket.SCM_RIGHTS
_INT_BYTES: Final = struct.calcsize("i")

UNFINISHED_SECONDS: Final = 60.0
"""Seconds within which a message that was begun must be finished. QEMU waits for ever."""

BACKLOG_BYTES: Final = 64 << 10
"""Bytes of replies that may wait for a client that does not read; then we stop reading from it."""

RETRY_ROOM_SECONDS: Final = 1.0
"""Seconds until a connection without room tries again: room may also come from deleted secrets."""

_CLIENTS_TURN: Final = frozenset({"starved", "backlog"})
"""Pauses during which a connection's time runs: what it holds, it holds at its own pace."""

# As plain numbers: joining two flags of an IntFlag takes longer than the bytes they send.
_SEND: Final = int(socket.MSG_DONTWAIT) | int(socket.MSG_NOSIGNAL)
_RECEIVE: Final = int(socket.MSG_CMSG_CLOEXEC)

_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(4 * SCM_MAX_FD)
"""Room for all descriptors of a message, so that the kernel never discards (closes) one itself."""

ALL: Final = -1
"""What `Receiver.consume` returns if nothing of what it was given is needed any more."""


class Locked(NamedTuple):
    """Bytes to send that lie in locked memory and are wiped once sent."""

    buffer: LockedBuffer
    length: int


class Receiver(Protocol):
    """What a Transport calls. Positions are offsets into the view of that call.

    ``max_bytes``: of one message, as the receiver limits it.
    """

    max_bytes: int

    @property
    def busy(self) -> bool:
        """True while something that was read is not answered yet."""

    def consume(self, view: memoryview, position: int, end: int) -> int:
        """Handle what stands from ``position``; return how far it was read, or ALL."""

    def kept_from(self, position: int) -> int:
        """Return the first byte still needed where reading got to ``position``."""

    def moved(self, distance: int) -> None:
        """The bytes still needed lie ``distance`` lower from now on."""

    def has_room(self) -> bool:
        """True if the peer may pass a descriptor."""

    def too_many_descriptors(self) -> None:
        """Descriptors lie in the connection for which there is no room: say so; it is closed."""

    def descriptors(self, numbers: list[int]) -> bool:
        """Take ownership of the descriptors that came with a message; False to end the connection."""

    def too_slow(self) -> None:
        """A message is unfinished after UNFINISHED_SECONDS: say so; the connection is closed."""

    def no_memory(self, error: LockedMemoryExhausted | LimitReached) -> None:
        """There is no room for an unfinished message: say so; the connection is closed."""

    def drained(self) -> None:
        """The client has read what it was behind with."""

    def closed(self) -> None:
        """The connection has ended. Called once."""


class Transport:
    """One connection. ``closer`` closes the socket, which may block for some peers.
    ``share``: what its unfinished message is counted in, and for which uid. ``uid``: of a peer that is not
    trusted. Such a connection is read and handled in its uid's turns, and the receiver is asked whether there
    is room for descriptors before each recvmsg(2).
    """

    def __init__(
        self,
        sock: socket.socket,
        space: ReceiveSpace,
        receiver: Receiver,
        closer: Callable[[socket.socket], object],
        share: tuple[Quota, int] | None = None,
        *,
        uid: int | None = None,
    ) -> None:
        loop = self._loop = asyncio.get_running_loop()
        self._watch, self._unwatch = readers(loop)
        self._crowded = crowded(loop)
        self._sock = sock
        self._receive, self._send = sock.recvmsg_into, sock.send
        self._space = space
        self._receiver = receiver
        self._closer = closer
        self.share = share
        self._in_turn = None if uid is None else turns(loop, uid)
        self._on_readable = self._readable if self._in_turn is None else self._wait_for_turn
        self._tail: LockedBuffer | None = None
        self._fill = 0  # bytes in the tail
        self._position = 0  # how far of them was read
        self._paused: set[str] = set()
        self._reading = False
        self._unhandled = False
        self._ended = False  # the client will send no more
        self._finishing = False  # what was sent until now is answered, and no more
        self._left = 0  # bytes of that which were not received yet
        self._out: deque[tuple[memoryview, LockedBuffer | None]] = deque()
        self._backlog = 0
        self._locked_out = 0  # replies in locked memory that wait to be sent
        self.backlogged = False
        """True while the client has too many replies to read, or one that holds locked memory."""
        self._small = receiver.max_bytes < SMALL_TAIL_BYTES
        self._timer: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self.is_closed = False
        self._update_reading()

    # --- in

    def pause(self, reason: str) -> None:
        """Stop reading and handling until `resume` is called for the same reason."""
        self._paused.add(reason)
        self._update_reading()

    def give_way(self) -> None:
        """Stop until all others have had their turn."""
        self.pause("turn")
        self._note_unhandled(waiting=True)
        self.later(self._next_turn)

    def later(self, work: Callable[[], None]) -> None:
        """Do something for this connection when its turn comes."""
        if self._in_turn is None:
            self._loop.call_soon(work)
        else:
            self._in_turn(work)

    def _next_turn(self) -> None:
        self._note_unhandled(waiting=False)
        self.resume("turn")

    def _note_unhandled(self, *, waiting: bool) -> None:
        if self.share is not None and waiting != self._unhandled:
            self._unhandled = waiting
            self._space.unhandled[self.share[1]] += 1 if waiting else -1

    def others_wait(self) -> bool:
        """True if there is something else to do than to handle what this connection has sent."""
        return self._crowded(self._sock.fileno())

    def resume(self, reason: str) -> None:
        """Take back a `pause`; handle at once what had arrived by then."""
        if self.is_closed or (reason == "backlog" and self.backlogged):
            return
        self._paused.discard(reason)
        if reason == "backlog":
            self._receiver.drained()
        if self._paused:
            return
        if self._tail is not None and self._position < self._fill:
            if self._in_turn is not None and reason != "turn":
                self.give_way()
                return
            self._advance(self._tail.view, self._fill)
        self._start_timer()
        self._make_room()
        self._finish_if_ended()
        self._update_reading()

    def fed(self) -> None:
        """There may be room again for an unfinished message that had to wait."""
        if self.is_closed or "starved" not in self._paused:
            return
        self._space.starved.discard(self)
        if self._grow():
            self.resume("starved")
        else:
            self._starve()

    def _update_reading(self) -> None:
        if self.is_closed:
            return
        wanted = not (self._paused or self._ended)
        if wanted and not self._reading:
            self._watch(self._sock.fileno(), self._on_readable)
        elif self._reading and not wanted:
            self._unwatch(self._sock.fileno())
        self._reading = wanted

    def _wait_for_turn(self) -> None:
        # Until then epoll must not report it again and again: others would be reported later for it.
        self._unwatch(self._sock.fileno())
        if self._tail is not None:
            self._note_unhandled(waiting=True)
        self.later(self._readable_in_turn)

    def _readable_in_turn(self) -> None:
        if "turn" not in self._paused:
            self._note_unhandled(waiting=False)
        if not self._reading:  # any more
            return
        self._watch(self._sock.fileno(), self._on_readable)
        if self._tail is None and self.share is not None and self._space.unhandled[self.share[1]]:
            share, uid = self.share
            if share.held(uid) + SMALL_TAIL_BYTES > share.limit:
                # What fills the uid's room is finished or handled in its next turns: receive later.
                self._wait_for_turn()
                return
        self._readable()

    def _readable(self) -> None:
        tail, space, start = self._tail, self._space, self._fill
        if tail is not None:
            view = tail.view
            free = view[start:]
        elif self._small or space.held > TIGHT_BYTES or space.arena.spare < ROOMY_BYTES:
            view = free = space.small
        else:
            view = free = space.large
        if self._finishing:
            free = free[: self._left]
        if self._in_turn is not None and not self._receiver.has_room():
            allowed = self._without_descriptors(free)
            if allowed is None:
                return
            free = allowed
        try:
            count, ancillary, _, _ = self._receive((free,), _ANCILLARY_BYTES, _RECEIVE)
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
        if self._finishing:
            self._left -= count
            self._ended = self._ended or self._left <= 0
        if count:
            self._advance(view, start + count)
        else:
            self._ended = True
            self._update_reading()
        if self._ended or self._finishing:
            self._finish_if_ended()

    def _without_descriptors(self, free: memoryview) -> memoryview | None:
        """Return what of the room may be received into, as no descriptors come with so much; None if nothing
        may be: then the connection is closed, or there is nothing to receive.
        """
        try:
            count, descriptors = peek(self._sock, free)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            self.close()
            return None
        wipe(free[:count])
        if descriptors:
            self._receiver.too_many_descriptors()
            self.close()
            return None
        return free[: max(count, 1)]

    def finish(self, *, read: bool) -> None:
        """Close the connection as soon as everything is answered that was read, or, with ``read``, that the
        client has sent until now.
        """
        if "starved" in self._paused:  # what there is no room for is half a message
            self.close()
            return
        self._finishing = True
        self._left = unread_bytes(self._sock.fileno()) if read and not self._ended else 0
        self._ended = self._ended or not self._left
        self._update_reading()
        self._finish_if_ended()

    def _finish_if_ended(self) -> None:
        # What was sent before the end is answered (as in QEMU); half a message is dropped.
        if not (self._ended or self._finishing) or self.is_closed:
            return
        if self._paused or self._out or self._receiver.busy:
            return
        if self._ended:
            self.close()

    def _advance(self, view: memoryview, end: int) -> None:
        shared = self._tail is None
        try:
            position = self._receiver.consume(view, self._position, end)
        except BaseException:
            # Once closed, the connection's own buffer is wiped and no longer there.
            if shared or not self.is_closed:
                wipe(view[:end])
            self.close()
            raise
        if shared and (position == ALL or self.is_closed):  # as nearly always
            view[:end] = bytes(end)
            return
        if self.is_closed:
            return
        if position == ALL:
            position = end
        kept = self._receiver.kept_from(position)
        rest = end - kept
        if kept and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if rest == 0:
            wipe(view[:end])
            if self._tail is not None:
                tail, self._tail = self._tail, None
                self._space.done(tail, self)
        elif self._tail is None:
            if not self._move_to_tail(view[kept:end]):
                wipe(view[:end])
                return
            wipe(view[:end])
            self._receiver.moved(kept)
        elif kept:
            view[:rest] = view[kept:end]
            wipe(view[rest:end])
            self._receiver.moved(kept)
        self._fill = rest
        self._position = position - kept
        if rest == 0:
            return
        self._start_timer()
        self._make_room()

    def _make_room(self) -> None:
        """Where all was read and an unfinished message fills its buffer, get a larger one or wait."""
        if self._paused or self._tail is None or self._fill < self._tail.size:
            return
        if not self._grow():
            self._starve()
            self.pause("starved")

    def _starve(self) -> None:
        self._space.starved.add(self)
        if self._retry is None:
            self._retry = self._loop.call_later(RETRY_ROOM_SECONDS, self._retry_room)

    def _retry_room(self) -> None:
        self._retry = None
        self.fed()

    def _move_to_tail(self, rest: memoryview) -> bool:
        size = FIRST_TAIL_BYTES
        while size <= len(rest):
            size *= 4
        allocate = self._space.allocate
        try:
            try:
                self._tail = allocate(size, self)
            except LockedMemoryExhausted:
                self._tail = allocate(len(rest), self)  # no room to grow: it will have to wait
        except (LockedMemoryExhausted, LimitReached) as error:
            self._receiver.no_memory(error)
            self.close()
            return False
        self._tail.view[: len(rest)] = rest
        return True

    def _grow(self) -> bool:
        """Move the unfinished message to a larger buffer; False if there is no room now."""
        tail = self._tail
        assert tail is not None
        size = 4 * tail.size
        if 4 * size > LARGEST_TAIL_BYTES:
            size = LARGEST_TAIL_BYTES
        try:
            larger = self._space.allocate(size, self)
        except (LockedMemoryExhausted, LimitReached):
            return False
        larger.view[: self._fill] = tail.view[: self._fill]
        self._tail = larger
        self._space.free(tail, self)
        return True

    def _start_timer(self) -> None:
        if self._tail is not None and self._timer is None and not self._paused - _CLIENTS_TURN:
            self._timer = self._loop.call_later(UNFINISHED_SECONDS, self._too_slow)

    def _too_slow(self) -> None:
        self._timer = None
        if not self._paused - _CLIENTS_TURN:
            self._receiver.too_slow()
            self.close()

    # --- out

    def send(self, data: bytes | Locked) -> None:
        """Send, or queue what the client does not take now. What is locked is wiped once sent."""
        if self.is_closed:
            if isinstance(data, Locked):
                data.buffer.free()
            return
        if isinstance(data, Locked):
            self._out.append((data.buffer.view[: data.length], data.buffer))
            self._backlog += data.length
            self._locked_out += 1
        else:
            sent, size = 0, len(data)
            if not self._out:
                try:
                    sent = self._send(data, _SEND)
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError:
                    self.close()
                    return
                if sent == size:
                    return
            self._out.append((memoryview(data)[sent:], None))
            self._backlog += size - sent
        self._flush()

    def _try(self, data: bytes | memoryview) -> int:
        try:
            return self._send(data, _SEND)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self.close()
            return 0

    def _flush(self) -> None:
        while self._out:
            view, owner = self._out[0]
            sent = self._try(view)
            if self.is_closed:
                return
            self._backlog -= sent
            if sent < len(view):
                self._out[0] = (view[sent:], owner)
                break
            self._out.popleft()
            if owner is not None:
                self._locked_out -= 1
                owner.free()
        self.backlogged = self._backlog > BACKLOG_BYTES or self._locked_out > 0
        if self._out:
            self._loop.add_writer(self._sock.fileno(), self._flush)
        else:
            self._loop.remove_writer(self._sock.fileno())
        if self.backlogged:
            self.pause("backlog")
        elif "backlog" in self._paused or ((self._ended or self._finishing) and not self._out):
            # Not from here: whoever sends may be in the middle of handling requests.
            self._loop.call_soon(self.resume, "backlog")

    # --- end

    def close(self) -> None:
        """End the connection now; wipe and drop what was not sent or not read."""
        if self.is_closed:
            return
        self.is_closed = True
        self._reading = False
        self._note_unhandled(waiting=False)
        self._space.starved.discard(self)
        for timer in (self._timer, self._retry):
            if timer is not None:
                timer.cancel()
        self._unwatch(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        for _, owner in self._out:
            if owner is not None:
                owner.free()
        self._out.clear()
        if self._tail is not None:
            tail, self._tail = self._tail, None
            self._space.done(tail, self)
        # The client sees the end now, even if close(2) has to wait for its turn; and sends no more.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        try:
            self._closer(self._sock)
        finally:
            self._receiver.closed()


def received(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors in what recvmsg(2) gave as ancillary data; the caller owns them."""
    numbers: list[int] = []
    for level, kind, data in ancillary:
        if level == _SOL_SOCKET and kind == _SCM_RIGHTS:
            numbers += struct.unpack_from(f"{len(data) // _INT_BYTES}i", data)
    return numbers
