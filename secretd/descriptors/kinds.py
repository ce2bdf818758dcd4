# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kind of a descriptor, determined by calls that cannot block.

A peer may serve the object behind it (FUSE) or lock it (a socket, a pipe's mutex), so fstat(2) and
getsockname(2) are not usable (docs/design.md, "Descriptors are hostile"). target and source call
this module.
"""

import errno
import fcntl
import os
import socket
import stat
from enum import Enum
from functools import lru_cache
from typing import Final

from secretd.linux.sockopt import domain
from secretd.linux.statx import device, type_and_links

_F_GET_SEALS: Final = 1034
_O_PATH: Final = 0o10000000
_WRITE_SEALS: Final = 0x0002 | 0x0004 | 0x0008 | 0x0010  # shrink, grow, write, future write


class Kind(Enum):
    """The kind of a descriptor, for delivering to it and reading from it."""

    PIPE = "a pipe"
    SOCKET = "a stream socket of a pair"
    MEMFD = "a memfd"
    FILE = "a regular file"
    OTHER = "something else"


def classify(fd: int) -> Kind:
    """Return the kind of a borrowed descriptor. Never waits."""
    return kind_and_flags(fd)[0]


def kind_and_flags(fd: int) -> tuple[Kind, int]:
    """Return the kind, and the flags with which it was opened (F_GETFL). Never waits."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    return Kind.OTHER if flags & _O_PATH else _kind(fd), flags


def _kind(fd: int) -> Kind:
    try:
        mode, links = type_and_links(fd)
    except OSError:  # FUSE refuses other users
        return Kind.OTHER
    if stat.S_ISFIFO(mode):
        return Kind.PIPE
    if stat.S_ISSOCK(mode):
        return Kind.SOCKET if _is_socketpair_end(fd) else Kind.OTHER
    if stat.S_ISREG(mode):
        try:
            fcntl.fcntl(fd, _F_GET_SEALS)
        except OSError:
            return Kind.FILE
        return Kind.MEMFD if links == 0 and device(fd) == _memfd_device() else Kind.FILE
    return Kind.OTHER


@lru_cache(1)
def _memfd_device() -> tuple[int, int]:
    """Return the device of the kernel's own tmpfs, where memfds lie. An unlinked file on another
    tmpfs resembles a memfd, but its file system may be full.
    """
    fd = os.memfd_create("secretd-device", os.MFD_CLOEXEC)
    try:
        return device(fd)
    finally:
        os.close(fd)


def _is_socketpair_end(fd: int) -> bool:
    """Return True for a connected AF_UNIX stream whose ends have no names.

    To any other socket the daemon would lend its own credentials.
    """
    if domain(fd) != socket.AF_UNIX:
        # First: a Python socket asks for its name, which waits for the lock of a TCP socket.
        return False
    borrowed = socket.socket(fileno=os.dup(fd))
    try:
        return (
            borrowed.type == socket.SOCK_STREAM
            and not borrowed.getsockname()
            and not borrowed.getpeername()
        )
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return False
    finally:
        borrowed.close()


def is_readable(fd: int) -> bool:
    """Return True if the descriptor was opened for reading."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    return not flags & _O_PATH and flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)


def is_sealed(fd: int) -> bool:
    """Return True if a memfd's seals forbid resizing or writing it."""
    return bool(fcntl.fcntl(fd, _F_GET_SEALS) & _WRITE_SEALS)
