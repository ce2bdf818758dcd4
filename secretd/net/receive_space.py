# SPDX-License-Identifier: LGPL-2.1-or-later
"""Receive space: the locked memory that connections receive into, and how they share it.

It reads nothing and knows no message; each connection's Transport asks for room and gives it back
(docs/design.md, "Fairness").
"""

import asyncio
from collections import Counter
from typing import Final, Protocol

from secretd.errors import LockedMemoryExhausted
from secretd.limits import Quota
from secretd.memory.arena import Arena, LockedBuffer
from secretd.wire.lexer import MAX_MESSAGE_BYTES

RECEIVE_BYTES: Final = 64 << 10
"""Bytes of the receive buffer that all connections share: what one recvmsg(2) takes at most."""

ROOMY_BYTES: Final = 256 << 10
"""Bytes of scratch memory that must be spare for a connection to take that much at once. With less it
takes no more than always finds room, should some of it have to wait."""

FIRST_TAIL_BYTES: Final = 2 << 10
"""Bytes of a connection's own buffer at first; it grows fourfold. Small, so that many clients that
stop half-way through a message leave receive space for the others."""

LARGEST_TAIL_BYTES: Final = MAX_MESSAGE_BYTES + RECEIVE_BYTES
"""Bytes one connection's unfinished message may take."""

SMALL_TAIL_BYTES: Final = 8 << 10
"""Bytes of an unfinished message up to which there is nearly always room."""

LARGE_TAILS_BYTES: Final = 1 << 20
"""Bytes that all unfinished messages above SMALL_TAIL_BYTES may take together. One connection at a time
may go beyond, so that those that have used it up do not all wait for each other."""

TIGHT_BYTES: Final = LARGE_TAILS_BYTES // 2
"""Bytes of unfinished messages above which a connection takes less at once, as ROOMY_BYTES says."""

TAILS_BYTES: Final = LARGE_TAILS_BYTES + LARGEST_TAIL_BYTES + (512 << 10)
"""Bytes that all unfinished messages may take together: also 64 to 256 small ones."""


class Holder(Protocol):
    """A connection that may hold a buffer of its own."""

    @property
    def share(self) -> "tuple[Quota, int] | None":
        """What the buffer is counted in, and for which uid; None if it is not."""

    def fed(self) -> None:
        """There may be room again."""


class ReceiveSpace:
    """The locked memory that connections receive into, shared by all.

    ``large`` is the buffer that they share, ``small`` less of it: for one whose messages are all small, and
    for any while there is little room for what connections leave unread or unfinished: TIGHT_BYTES,
    ROOMY_BYTES.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.shared = arena.allocate(RECEIVE_BYTES)
        self.large = self.shared.view
        self.small = self.large[: SMALL_TAIL_BYTES - 1]
        self.held = 0  # bytes of connections' own buffers
        self.starved: set[Holder] = set()
        self.unhandled: Counter[int] = Counter()
        """By uid: connections whose own buffer waits for their uid's turn, to be handled or to be filled."""
        self._beyond: Holder | None = None  # who may go beyond LARGE_TAILS_BYTES

    def allocate(self, size: int, owner: Holder) -> LockedBuffer:
        """Return a connection's buffer, or raise LockedMemoryExhausted; LimitReached if its uid has
        enough.
        """
        small = size <= SMALL_TAIL_BYTES
        limit = TAILS_BYTES if small else LARGE_TAILS_BYTES
        beyond = self.held + size > limit
        if beyond and (small or self._beyond not in (None, owner)):
            raise LockedMemoryExhausted(
                f"Unfinished messages take {self.held} of {limit} bytes; try again later"
            )
        if owner.share is not None:
            owner.share[0].check(owner.share[1], size)
        buffer = self.arena.allocate(size)
        self.held += size
        if owner.share is not None:
            owner.share[0].acquire(owner.share[1], size)
        if beyond:
            self._beyond = owner
        return buffer

    def done(self, buffer: LockedBuffer, owner: Holder) -> None:
        """Give back the buffer of a connection that needs none any more."""
        if self._beyond is owner:
            self._beyond = None
        self.free(buffer, owner)

    def free(self, buffer: LockedBuffer, owner: Holder) -> None:
        """Give back a connection's buffer, and let those that wait for room try again."""
        self.held -= buffer.size
        if owner.share is not None:
            owner.share[0].release(owner.share[1], buffer.size)
        buffer.free()
        loop = asyncio.get_running_loop()
        while self.starved:
            loop.call_soon(self.starved.pop().fed)

    def close(self) -> None:
        """Wipe and give back the shared buffer."""
        self.shared.free()
