# SPDX-License-Identifier: LGPL-2.1-or-later
"""Receive space: the locked memory into which connections receive, and how they share it.

All connections receive into one buffer. The rest of a read, an unfinished message, moves to a
buffer of the connection's own, its `Tail`. This module reads nothing and knows no messages
(docs/design.md, "Fairness"); transport calls it.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final, NamedTuple

from secretd.errors import LimitReached, LockedMemoryExhausted
from secretd.limits import Quota, Tuning
from secretd.memory.arena import Arena, LockedBuffer
from secretd.wire.lexer import MAX_MESSAGE_BYTES

RECEIVE_BYTES: Final = 64 << 10
"""Bytes of the receive buffer that all connections share: the most that one recvmsg(2) receives."""

ROOMY_BYTES: Final = 256 << 10
"""Below this many spare bytes of scratch memory, a connection reads only as much as the reserved
small-message space can hold.
"""

FIRST_TAIL_BYTES: Final = 2 << 10
"""Bytes of a connection's own buffer at first; it grows fourfold. It is small, so that many clients
that stop half-way through a message leave receive space for the others.
"""

LARGEST_TAIL_BYTES: Final = MAX_MESSAGE_BYTES + RECEIVE_BYTES
"""Bytes of one connection's unfinished message."""

SMALL_TAIL_BYTES: Final = 8 << 10
"""Bytes of an unfinished message up to which there is nearly always room."""

LARGE_TAILS_BYTES: Final = 1 << 20
"""Bytes of all unfinished messages up to which one may get more than SMALL_TAIL_BYTES. One
connection at a time may exceed it, so that those that have filled it do not all wait for each
other.
"""

TIGHT_BYTES: Final = LARGE_TAILS_BYTES // 2
"""Bytes of unfinished messages above which a connection reads less at once, as with ROOMY_BYTES."""

TAILS_BYTES: Final = LARGE_TAILS_BYTES + LARGEST_TAIL_BYTES + (512 << 10)
"""Bytes of all unfinished messages together, including 64 to 256 small ones."""


class Account(NamedTuple):
    """The quota in which a connection's unfinished message counts, and the uid."""

    quota: Quota
    uid: int


class ReceiveSpace:
    """The locked memory into which connections receive, shared by all.

    ``large``: the shared buffer. ``small``: a part of it, for connections whose messages are all
    small, and for all connections while little room is left (TIGHT_BYTES, ROOMY_BYTES).
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.shared = arena.allocate(RECEIVE_BYTES)
        self.large = self.shared.view
        self.small = self.large[: SMALL_TAIL_BYTES - 1]
        self.held = 0  # bytes of connections' own buffers
        self.starved: set[Tail] = set()  # those that wait for room
        self.unhandled: Counter[int] = Counter()
        """By uid: connections whose own buffer waits for their uid's turn, to be handled or to be
        filled.
        """
        self._beyond: Tail | None = None  # the one that may exceed LARGE_TAILS_BYTES

    def allocate(self, size: int, tail: "Tail") -> LockedBuffer:
        """Return a buffer of ``size`` bytes. Raises LockedMemoryExhausted, or LimitReached if the
        uid's quota is used up.
        """
        small = size <= SMALL_TAIL_BYTES
        limit = TAILS_BYTES if small else LARGE_TAILS_BYTES
        beyond = self.held + size > limit
        if beyond and (small or self._beyond not in (None, tail)):
            raise LockedMemoryExhausted(
                f"Unfinished messages take {self.held} of {limit} bytes; try again later"
            )
        account = tail.account
        if account is not None:
            account.quota.check(account.uid, size)
        buffer = self.arena.allocate(size)
        self.held += size
        if account is not None:
            account.quota.count(account.uid, size)
        if beyond:
            self._beyond = tail
        return buffer

    def free(self, buffer: LockedBuffer, tail: "Tail") -> None:
        """Free a buffer, and let the connections that wait for room try again."""
        self.held -= buffer.size
        account = tail.account
        if account is not None:
            account.quota.release(account.uid, buffer.size)
        buffer.free()
        if self.starved:
            while self.starved:
                self.starved.pop().offer_room()

    def done(self, tail: "Tail") -> None:
        """Let another connection exceed LARGE_TAILS_BYTES, if this one did."""
        if self._beyond is tail:
            self._beyond = None

    def close(self) -> None:
        """Wipe and free the shared buffer."""
        self.shared.free()


class Tail:
    """The unfinished message of one connection, in a buffer of its own.

    ``fill``: bytes in the buffer; ``position``: how many of them were read. ``on_room``: called
    when there may be room again for a message that has filled its buffer. ``on_timeout``: called
    when its time is over.
    """

    def __init__(
        self,
        space: ReceiveSpace,
        account: Account | None,
        tuning: Tuning,
        on_room: Callable[[], None],
        on_timeout: Callable[[], None],
    ) -> None:
        self._space = space
        self._loop = asyncio.get_running_loop()
        self.account = account
        self._tuning = tuning
        self._on_room = on_room
        self._on_timeout = on_timeout
        self._clock: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._unhandled = False
        self.buffer: LockedBuffer | None = None
        self.fill = 0
        self.position = 0

    def hold(self, rest: memoryview) -> None:
        """Copy the beginning of a message into a new buffer.

        Raises LockedMemoryExhausted or LimitReached.
        """
        size = FIRST_TAIL_BYTES
        while size <= len(rest):
            size *= 4
        try:
            self.buffer = self._space.allocate(size, self)
        except LockedMemoryExhausted:
            self.buffer = self._space.allocate(
                len(rest), self
            )  # without room to grow: it will wait
        self.buffer.view[: len(rest)] = rest

    @property
    def is_full(self) -> bool:
        """True if the message fills its buffer."""
        return self.buffer is not None and self.fill >= self.buffer.size

    def grow(self) -> bool:
        """Move the message to a larger buffer; return False if there is no room now."""
        before = self.buffer
        assert before is not None
        size = 4 * before.size
        if 4 * size > LARGEST_TAIL_BYTES:
            size = LARGEST_TAIL_BYTES
        try:
            larger = self._space.allocate(size, self)
        except (LockedMemoryExhausted, LimitReached):
            return False
        larger.view[: self.fill] = before.view[: self.fill]
        self.buffer = larger
        self._space.free(before, self)
        return True

    def wait_for_room(self) -> None:
        """Call ``on_room`` once: when another connection frees room, or after a while."""
        self._space.starved.add(self)
        if self._retry is None:
            self._retry = self._loop.call_later(self._tuning.retry_room_seconds, self._room)

    def offer_room(self) -> None:
        """Report that there may be room again."""
        self._loop.call_soon(self._room)

    def _room(self) -> None:
        self._space.starved.discard(self)
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._on_room()

    def start_clock(self) -> None:
        """Start the clock of the message, if there is one and its clock does not run."""
        if self.buffer is not None and self._clock is None:
            self._clock = self._loop.call_later(self._tuning.unfinished_seconds, self._time_over)

    def stop_clock(self) -> None:
        """Stop the clock: the message is finished, or is another one."""
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _time_over(self) -> None:
        self._clock = None
        self._on_timeout()

    def count_as_unhandled(self, *, waiting: bool) -> None:
        """Count whether the buffer waits for its uid's turn."""
        if self.account is not None and waiting != self._unhandled:
            self._unhandled = waiting
            self._space.unhandled[self.account.uid] += 1 if waiting else -1

    def close(self) -> None:
        """Release everything; no callback is called any longer."""
        self.count_as_unhandled(waiting=False)
        self._space.starved.discard(self)
        self.stop_clock()
        if self._retry is not None:
            self._retry.cancel()
        self.drop()

    def drop(self) -> None:
        """Wipe and free the buffer."""
        buffer, self.buffer = self.buffer, None
        self.fill = self.position = 0
        if buffer is not None:
            self._space.done(self)
            self._space.free(buffer, self)
