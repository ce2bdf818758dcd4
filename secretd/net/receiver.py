# SPDX-License-Identifier: LGPL-2.1-or-later
"""The receiver of one connection's bytes, as a Transport calls it, and what it sends back."""

from typing import Final, NamedTuple, Protocol

from secretd.errors import LimitReached, LockedMemoryExhausted
from secretd.memory.arena import LockedBuffer

CONSUMED: Final = -1
"""The result of `Receiver.consume` if none of the bytes are needed any longer."""


class Locked(NamedTuple):
    """Bytes to send from locked memory, which are wiped once sent."""

    buffer: LockedBuffer
    length: int


class Receiver(Protocol):
    """The receiver of a connection. Positions are offsets into the view of that call.

    ``max_bytes``: the receiver's limit of one message.
    """

    max_bytes: int

    @property
    def busy(self) -> bool:
        """True while a received request is not answered yet."""

    def consume(self, view: memoryview, position: int, end: int) -> int:
        """Handle the bytes from ``position`` to ``end``; return the position reached, or
        CONSUMED.
        """

    def first_needed(self, position: int) -> int:
        """Return the first byte that is still needed, once reading has reached ``position``."""

    def shifted(self, distance: int) -> None:
        """Note that the needed bytes now lie ``distance`` bytes lower."""

    def accepts_descriptors(self) -> bool:
        """Return True if the peer may pass a descriptor."""

    def too_many_descriptors(self) -> None:
        """Report that the peer has no room for the descriptors that it passes; the connection is
        then closed.
        """

    def descriptors(self, numbers: list[int]) -> bool:
        """Take ownership of the descriptors of a message; return False to close the connection."""

    def message_timed_out(self) -> None:
        """Report a message that was not finished in time; the connection is then closed."""

    def no_memory(self, error: LockedMemoryExhausted | LimitReached) -> None:
        """Report that there is no room for an unfinished message; the connection is then closed."""

    def drained(self) -> None:
        """Note that the client has read its backlog of replies."""

    def closed(self) -> None:
        """Note that the connection has ended. Called once."""
