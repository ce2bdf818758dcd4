# SPDX-License-Identifier: LGPL-2.1-or-later
"""statx(2), which Python lacks, through ctypes: questions about a descriptor that never wait.

fstat(2) on a file of FUSE or a network file system asks the server and waits. With
AT_STATX_DONT_SYNC the kernel answers from its own knowledge. descriptors.kinds and
descriptors.target call this module.
"""

import ctypes
import os
import struct
import threading
from typing import Final

_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_TYPE: Final = 0x1
_STATX_NLINK: Final = 0x4
_STATX_BLOCKS: Final = 0x400
_STATX_BYTES: Final = 256
_FLAGS: Final = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
_MASK: Final = _STATX_TYPE | _STATX_NLINK
_HEAD: Final = struct.Struct("=IIQIIIHH")  # mask, blksize, attributes, nlink, uid, gid, mode, spare
_BLOCKS: Final = struct.Struct("=48xQ")
_DEVICE: Final = struct.Struct("=136xII")
_BLOCK_BYTES: Final = 512

_statx = ctypes.CDLL(None, use_errno=True).statx
_statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]


class _Answer(threading.local):
    """The buffer that the kernel writes to, one for each thread."""

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(_STATX_BYTES)


_answer: Final = _Answer()


def type_and_links(fd: int) -> tuple[int, int]:
    """Return a file's mode, of which only the type counts, and its number of links. Raises OSError.
    Never waits.
    """
    _, _, _, links, _, _, mode, _ = _HEAD.unpack_from(_ask(fd, _MASK))
    return mode, links


def device(fd: int) -> tuple[int, int]:
    """Return the major and minor number of a file's file system. Raises OSError. Never waits."""
    major, minor = _DEVICE.unpack_from(_ask(fd, 0))
    return major, minor


def allocated_bytes(fd: int) -> int:
    """Return the bytes of storage that a file has. Raises OSError. Never waits."""
    (blocks,) = _BLOCKS.unpack_from(_ask(fd, _STATX_BLOCKS))
    return int(blocks) * _BLOCK_BYTES


def _ask(fd: int, mask: int) -> "ctypes.Array[ctypes.c_char]":
    answer = _answer.buffer
    if _statx(fd, b"", _FLAGS, mask, answer):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return answer
