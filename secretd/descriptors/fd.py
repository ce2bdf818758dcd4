# SPDX-License-Identifier: LGPL-2.1-or-later
"""`Fd`, the owner of one descriptor.

A descriptor that a peer passed can block in close(2), so the owner has its own closing function.
"""

import os
import warnings
from collections.abc import Callable


class Fd:
    """Owns one descriptor until `take` or `close`; then it is -1, before the number can be reused.

    ``closer``: the function that calls close(2), which may block where a client holds the other
    end. ``released``: called in the loop when the owner gives the descriptor up to be closed.
    """

    __slots__ = ("_closer", "_fd", "released")

    def __init__(
        self,
        fd: int,
        closer: Callable[[int], object] = os.close,
        released: Callable[[], object] | None = None,
    ) -> None:
        self._fd = fd
        self._closer = closer
        self.released = released

    def fileno(self) -> int:
        """The descriptor, borrowed; -1 once closed."""
        return self._fd

    def take(self) -> int:
        """Give the descriptor to the caller, which closes it."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Close the descriptor. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if self.released is not None:
                self.released()
            self._closer(fd)

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"unclosed descriptor {self._fd}", ResourceWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<Fd {self._fd}>"
