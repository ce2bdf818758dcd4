# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors in control messages: SCM_RIGHTS (unix(7), cmsg(3)). transport calls this module."""

import socket
import struct
from typing import Final

from secretd.linux.sockopt import peek
from secretd.memory.wipe import wipe

SCM_MAX_FD: Final = 253
"""The maximum number of descriptors in one message (SCM_MAX_FD, include/net/scm.h)."""

_SOL_SOCKET: Final = socket.SOL_SOCKET
_SCM_RIGHTS: Final = socket.SCM_RIGHTS
_INT_BYTES: Final = struct.calcsize("i")

# A plain number: an IntFlag would be converted for each call.
RECEIVE_FLAGS: Final = int(socket.MSG_CMSG_CLOEXEC)

ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_INT_BYTES * SCM_MAX_FD)
"""Room for all descriptors of a message, so that the kernel never discards (closes) one itself."""


def received(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors in recvmsg(2)'s ancillary data; the caller owns them."""
    numbers: list[int] = []
    for level, kind, data in ancillary:
        if level == _SOL_SOCKET and kind == _SCM_RIGHTS:
            numbers += struct.unpack_from(f"{len(data) // _INT_BYTES}i", data)
    return numbers


def peek_and_wipe(sock: socket.socket, free: memoryview) -> tuple[int | None, bool]:
    """Return the number of bytes that recvmsg(2) into ``free`` would receive, and whether
    descriptors come too.

    The number is None if there is nothing to receive. Raises OSError.
    """
    try:
        count, descriptors = peek(sock, free)
    except (BlockingIOError, InterruptedError):
        return None, False
    wipe(free[:count])
    return count, descriptors
