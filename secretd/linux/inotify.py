# SPDX-License-Identifier: LGPL-2.1-or-later
"""inotify(7), which Python lacks, through ctypes: notice removed files without polling.

server uses it for the files of its sockets.
"""

import ctypes
import os
from typing import Final

_IN_MOVED_FROM: Final = 0x40
_IN_MOVED_TO: Final = 0x80
_IN_DELETE: Final = 0x200
_IN_ONLYDIR: Final = 0x1000000
_MASK: Final = _IN_MOVED_FROM | _IN_MOVED_TO | _IN_DELETE | _IN_ONLYDIR
_EVENTS_BYTES: Final = 64 << 10

_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """A descriptor that is readable after files of a watched directory were removed or replaced."""

    def __init__(self) -> None:
        self._fd: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def fileno(self) -> int:
        """The descriptor, borrowed."""
        return self._fd

    def add(self, directory: str) -> None:
        """Watch one more directory; one that cannot be watched is ignored."""
        _libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK)

    def clear(self) -> None:
        """Discard all pending notifications."""
        try:
            while True:
                os.read(self._fd, _EVENTS_BYTES)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Stop watching."""
        os.close(self._fd)
