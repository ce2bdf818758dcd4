# SPDX-License-Identifier: LGPL-2.1-or-later
"""The content of secrets on its way through the client: memory for memfds, and bytes from pipes."""

import contextlib
import fcntl
import os
from collections.abc import Callable
from typing import Final

from secretd.client.types import Format
from secretd.memory.arena import LockedBuffer

LARGEST_CONTENT: Final = 1 << 20
"""Bytes that a memfd gets before it is passed; base64 needs a third more."""

_CHUNK_BYTES: Final = 64 << 10
_F_GET_SEALS: Final = 1034


class Collected:
    """Bytes from a pipe, in locked memory that grows.

    ``allocate``: returns a locked buffer of so many bytes.
    """

    def __init__(self, allocate: Callable[[int], LockedBuffer]) -> None:
        self._allocate = allocate
        self._buffer = allocate(_CHUNK_BYTES)
        self._fill = 0

    def fill(self, fd: int) -> bool:
        """Read the available bytes; return True at the end."""
        while True:
            if self._fill == self._buffer.size:
                larger = self._allocate(4 * self._fill)
                larger.view[: self._fill] = self._buffer.view
                self._buffer.free()
                self._buffer = larger
            try:
                count = os.readv(fd, [self._buffer.view[self._fill :]])
            except BlockingIOError:
                return False
            if not count:
                return True
            self._fill += count

    @property
    def size(self) -> int:
        """Number of bytes so far."""
        return self._fill

    def take(self) -> LockedBuffer:
        """Return a buffer of exactly the size; the caller owns it."""
        exact = self._allocate(self._fill)
        exact.view[:] = self._buffer.view[: self._fill]
        return exact

    def free(self) -> None:
        """Wipe the bytes."""
        self._buffer.free()


def give_memory(fd: int, form: Format) -> None:
    """Allocate a memfd's pages, so that they belong to this process.

    secretd does not allocate them for untrusted peers. Does nothing to other descriptors, and
    ignores errors: the daemon reports missing memory.
    """
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, _F_GET_SEALS)
        os.posix_fallocate(
            fd, 0, LARGEST_CONTENT if form == "raw" else LARGEST_CONTENT // 3 * 4 + 4
        )
