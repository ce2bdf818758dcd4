# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel reports about the process at the other end of an AF_UNIX socket.

SO_PEERCRED and SO_PEERGROUPS (unix(7)), SO_PEERPIDFD (Linux 6.5) and PIDFD_GET_INFO (Linux 6.13).
Python's getsockopt returns 1024 bytes at most, too few for all groups of some peers. All functions
raise OSError; access.peer and access.units interpret the answers.
"""

import array
import ctypes
import errno
import fcntl
import os
import socket
import struct
from typing import Final, NamedTuple

SO_PEERGROUPS: Final = 59
SO_PEERPIDFD: Final = 77
PIDFD_GET_INFO: Final = 0xC040FF0B

_UCRED: Final = struct.Struct("=iII")
_PIDFD_INFO: Final = struct.Struct("=QQII")  # mask, cgroupid, pid, tgid
_PIDFD_INFO_BYTES: Final = 64
_INFO_PID: Final = 1
_INFO_CGROUPID: Final = 4
_SHORT_BYTES: Final = 1024  # the maximum of Python's getsockopt()

_libc = ctypes.CDLL(None, use_errno=True)


class Credentials(NamedTuple):
    """SO_PEERCRED: the peer's ids at the time it connected."""

    pid: int
    uid: int
    gid: int


def credentials(sock: socket.socket) -> Credentials:
    """Return the peer's pid, uid and gid (SO_PEERCRED). Raises OSError."""
    return Credentials(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


def groups(sock: socket.socket, most: int) -> "array.array[int]":
    """Return the peer's supplementary gids (SO_PEERGROUPS).

    Raises OSError, with ERANGE if there are more than ``most``.
    """
    found = array.array("I")
    try:
        found.frombytes(sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _SHORT_BYTES))
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        room = (ctypes.c_uint32 * most)()
        size = ctypes.c_uint32(ctypes.sizeof(room))
        if _libc.getsockopt(
            sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, room, ctypes.byref(size)
        ):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno())) from None
        found.extend(room[: size.value // 4])
    return found


def pidfd(sock: socket.socket) -> int:
    """Return a pidfd of the peer (SO_PEERPIDFD), which the caller closes. Raises OSError;
    ENOPROTOOPT on kernels that lack it.
    """
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4), "little")


def pid_and_cgroup(process: int) -> tuple[int, int] | None:
    """Return the pid and the cgroup's inode number of a process (PIDFD_GET_INFO), None if it has
    ended.

    ``process`` is a borrowed pidfd. Raises OSError; ENOTTY on kernels that lack it.
    """
    info = bytearray(_PIDFD_INFO_BYTES)
    _PIDFD_INFO.pack_into(info, 0, _INFO_PID | _INFO_CGROUPID, 0, 0, 0)
    fcntl.ioctl(process, PIDFD_GET_INFO, info)
    mask, number, pid, _ = _PIDFD_INFO.unpack_from(info)
    return (pid, number) if mask & _INFO_PID and mask & _INFO_CGROUPID and pid else None
