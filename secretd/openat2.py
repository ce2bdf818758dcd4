# SPDX-License-Identifier: LGPL-2.1-or-later
"""openat2(2) through ctypes, for its RESOLVE_NO_MAGICLINKS: Python has no wrapper for it."""

import ctypes
import os
import struct
from typing import Final

_SYS_OPENAT2: Final = 437
_AT_FDCWD: Final = -100
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_HOW = struct.Struct("=QQQ")  # struct open_how: flags, mode, resolve

_libc = ctypes.CDLL(None, use_errno=True)


def open_without_magic_links(path: bytes, flags: int) -> int:
    """Open ``path``, refusing (ELOOP) links like /proc/self/fd/N that lead to open descriptors.

    Raises OSError.
    """
    how = ctypes.create_string_buffer(_HOW.pack(flags, 0, _RESOLVE_NO_MAGICLINKS), _HOW.size)
    fd: int = _libc.syscall(_SYS_OPENAT2, _AT_FDCWD, ctypes.c_char_p(path), how, _HOW.size)
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return fd
