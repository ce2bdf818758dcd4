# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a Transport calls: the receiver of one connection's bytes, and what it sends back."""

from typing import Final, NamedTuple, Protocol

from secretd.errors import LimitReached, LockedMemoryExhausted
from secretd.memory.arena import LockedBuffer

CONSUMED: Final = -1
"""What `Receiver.consume` returns if it needs none of the bytes any more."""


class Locked(NamedTuple):
    """Bytes to send that lie in locked memory and are wiped once sent."""

    buffer: LockedBuffer
    length: int


class Receiver(Protocol):
    """The receiver of a connection. Positions are offsets into the view of that call.

    ``max_bytes``: of one message, as the receiver limits it.
    """

    max_bytes: int

    @property
    def busy(self) -> bool:
        """True while something that was read is not answered yet."""

    def consume(self, view: memoryview, position: int, end: int) -> int:
        """Handle the bytes from ``position`` to ``end``; return how far they were read, or
        CONSUMED.
        """

    def first_needed(self, position: int) -> int:
        """Return the first byte that is still needed when reading got to ``position``."""

    def shifted(self, distance: int) -> None:
        """The bytes still needed lie ``distance`` lower from now on."""

    def accepts_descriptors(self) -> bool:
        """True if the peer may pass a descriptor."""

    def too_many_descriptors(self) -> None:
        """Report that there is no room for descriptors in the connection, which is closed then."""

    def descriptors(self, numbers: list[int]) -> bool:
        """Take ownership of the descriptors of a message; False to close the connection."""

    def message_timed_out(self) -> None:
        """Report that a message was not finished in time; the connection is closed then."""

    def no_memory(self, error: LockedMemoryExhausted | LimitReached) -> None:
        """Report that there is no room for an unfinished message; the connection is closed then."""

    def drained(self) -> None:
        """The client has read the replies it was behind with."""

    def closed(self) -> None:
        """The connection has ended. Called once."""
