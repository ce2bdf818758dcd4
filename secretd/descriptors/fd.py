# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors that clients pass: who owns them, what they are, and what may be done with them.

They are hostile (docs/design.md, "Descriptors are hostile"): a client can make writing, reading and
even close() block for ever. So for a peer of another uid the loop only asks what a descriptor is
(`classify`), and all else runs in the threads of offload.Offload. Names and sets are as in QEMU's
monitor/fds.c, but belong to one connection. monitor and deliver call this module; it does not send
or receive.
"""

import errno
import fcntl
import os
import socket
import stat
import struct
import warnings
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Final, NotRequired, TypedDict

from secretd.errors import CommandError
from secretd.linux.sockopt import domain
from secretd.linux.statx import device, type_and_links

SCM_MAX_FD: Final = 253
"""Descriptors the kernel lets one message carry (SCM_MAX_FD, include/net/scm.h)."""

DESCRIPTORS_PER_CONNECTION: Final = 64
"""Descriptors one connection may hold by name and in sets together. QEMU has no limit."""

_SOL_SOCKET: Final = socket.SOL_SOCKET
_SCM_RIGHTS: Final = socket.SCM_RIGHTS
_INT_BYTES: Final = struct.calcsize("i")
_F_GET_SEALS: Final = 1034
_O_PATH: Final = 0o10000000
_WRITE_SEALS: Final = 0x0002 | 0x0004 | 0x0008 | 0x0010  # shrink, grow, write, future write


class Fd:
    """Owns one descriptor until `take` or `close`; then it is -1, before the number can be reused.

    ``closer`` carries out close(2), which may block where a client holds the other end.
    """

    __slots__ = ("_closer", "_fd")

    def __init__(self, fd: int, closer: Callable[[int], object] = os.close) -> None:
        self._fd = fd
        self._closer = closer

    def fileno(self) -> int:
        """The descriptor, borrowed; -1 once closed."""
        return self._fd

    def take(self) -> int:
        """Give the descriptor away; the caller closes it."""
        fd, self._fd = self._fd, -1
        return fd

    def close(self) -> None:
        """Close it. Does nothing the second time."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._closer(fd)

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"unclosed descriptor {self._fd}", ResourceWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<Fd {self._fd}>"


class PendingFd:
    """The descriptor that waits on a connection until a command takes it.

    QEMU keeps those of the latest message and only ever uses the first (chardev/char-socket.c).
    """

    def __init__(self) -> None:
        self._waiting: Fd | None = None

    def receive(self, fds: list[Fd]) -> None:
        """Keep the first of a message's descriptors instead of the one that waited; close the rest."""
        if self._waiting is not None:
            self.close()
        self._waiting = fds[0]
        for fd in fds[1:]:
            fd.close()

    def take(self) -> Fd:
        """Return the waiting descriptor, or raise CommandError as monitor_get_fd()'s callers do."""
        fd, self._waiting = self._waiting, None
        if fd is None:
            raise CommandError("No file descriptor supplied via SCM_RIGHTS")
        return fd

    def close(self) -> None:
        """Close what waits."""
        fd, self._waiting = self._waiting, None
        if fd is not None:
            fd.close()


class NamedFds:
    """The descriptors that getfd named (monitor/fds.c)."""

    def __init__(self) -> None:
        self._by_name: dict[str, Fd] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, name: str, fd: Fd) -> None:
        """Name a descriptor, closing what had the name. The descriptor is consumed in any case."""
        if name[:1].isascii() and name[:1].isdigit():
            fd.close()
            raise CommandError("Parameter 'fdname' expects a name not starting with a digit")
        previous = self._by_name.get(name)
        self._by_name[name] = fd
        if previous is not None:
            previous.close()

    def take(self, name: str) -> Fd:
        """Return and forget the descriptor of that name."""
        fd = self._by_name.pop(name, None)
        if fd is None:
            raise CommandError(f"File descriptor named '{name}' not found")
        return fd

    def close(self) -> None:
        """Close and forget all."""
        while self._by_name:
            self._by_name.popitem()[1].close()


AddfdInfo = TypedDict("AddfdInfo", {"fdset-id": int, "fd": int})
"""What add-fd returns (qapi/misc.json)."""


class FdsetFdInfo(TypedDict):
    """A descriptor of a set, as query-fdsets lists it."""

    fd: int
    opaque: NotRequired[str]


FdsetInfo = TypedDict("FdsetInfo", {"fdset-id": int, "fds": list[FdsetFdInfo]})
"""A set, as query-fdsets lists it."""


FIRST_NUMBER: Final = 10
"""What add-fd returns first on each connection, clear of 0 to 9."""


class FdSets:
    """The numbered sets of add-fd, remove-fd and query-fdsets (monitor/fds.c).

    A descriptor is known by a number of the connection's own: the process's would tell what others do.
    """

    def __init__(self) -> None:
        self._sets: dict[
            int, list[tuple[int, Fd, str | None]]
        ] = {}  # with the number it is known by
        self._number = FIRST_NUMBER

    def __len__(self) -> int:
        return sum(map(len, self._sets.values()))

    def add(self, fd: Fd, set_id: int | None, opaque: str | None) -> AddfdInfo:
        """Put a descriptor into a set, the lowest free one without ``set_id``; return AddfdInfo."""
        if set_id is None:
            set_id = next(i for i in range(len(self._sets) + 1) if i not in self._sets)
        elif set_id < 0:
            fd.close()
            raise CommandError("Parameter 'fdset-id' expects a non-negative value")
        number, self._number = self._number, self._number + 1
        self._sets.setdefault(set_id, []).append((number, fd, opaque))
        return {"fd": number, "fdset-id": set_id}

    def remove(self, set_id: int, number: int | None) -> None:
        """Close one descriptor of a set, or all; an empty set is gone."""
        members = self._sets.get(set_id, [])
        doomed = [m for m in members if number is None or m[0] == number]
        if not doomed:
            detail = "" if number is None else f", fd:{number}"
            raise CommandError(f"File descriptor named 'fdset-id:{set_id}{detail}' not found")
        kept = [m for m in members if m not in doomed]
        if kept:
            self._sets[set_id] = kept
        else:
            del self._sets[set_id]
        for _, fd, _ in doomed:
            fd.close()

    def query(self) -> list[FdsetInfo]:
        """Return the FdsetInfo list: sets by descending id, descriptors in the order added."""
        listed = []
        for set_id in sorted(self._sets, reverse=True):
            fds = []
            for number, _, opaque in self._sets[set_id]:
                info: FdsetFdInfo = {"fd": number}
                if opaque is not None:
                    info["opaque"] = opaque
                fds.append(info)
            listed.append(FdsetInfo({"fdset-id": set_id, "fds": fds}))
        return listed

    def in_set(self, set_id: int) -> list[int]:
        """Return the descriptors of a set, borrowed; empty if there is no such set."""
        return [fd.fileno() for _, fd, _ in self._sets.get(set_id, [])]

    def numbered(self, number: int) -> int | None:
        """Return the descriptor that add-fd gave this number, borrowed; None if there is none."""
        members = (member for each in self._sets.values() for member in each)
        return next((fd.fileno() for known, fd, _ in members if known == number), None)

    def close(self) -> None:
        """Close and forget all."""
        for set_id in list(self._sets):
            self.remove(set_id, None)


class Kind(Enum):
    """What a descriptor is, for delivering to it and reading from it."""

    PIPE = "a pipe"
    SOCKET = "a stream socket of a pair"
    MEMFD = "a memfd"
    FILE = "a regular file"
    OTHER = "something else"


def classify(fd: int) -> Kind:
    """Find out what a borrowed descriptor is, with calls that cannot block."""
    return kind_and_flags(fd)[0]


def kind_and_flags(fd: int) -> tuple[Kind, int]:
    """Return the same, and the flags that it was opened with (F_GETFL)."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    return Kind.OTHER if flags & _O_PATH else _kind(fd), flags


def _kind(fd: int) -> Kind:
    try:
        mode, links = type_and_links(fd)
    except OSError:  # FUSE tells nothing to other users
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
    """Return the device of the kernel's own tmpfs. An unlinked file of any other may be on one that is
    full.
    """
    fd = os.memfd_create("secretd-device", os.MFD_CLOEXEC)
    try:
        return device(fd)
    finally:
        os.close(fd)


def _is_socketpair_end(fd: int) -> bool:
    """True for a connected AF_UNIX stream whose ends have no names.

    Elsewhere the daemon would lend its own credentials to the bytes it sends.
    """
    if domain(fd) != socket.AF_UNIX:
        return False  # before a Python socket asks for its name, which waits for the lock of a TCP socket
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
    """True if the descriptor was opened for reading."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    return not flags & _O_PATH and flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR)


def is_sealed(fd: int) -> bool:
    """True if a memfd's seals forbid to size and fill it."""
    return bool(fcntl.fcntl(fd, _F_GET_SEALS) & _WRITE_SEALS)


def received(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors in what recvmsg(2) gave as ancillary data; the caller owns them."""
    numbers: list[int] = []
    for level, kind, data in ancillary:
        if level == _SOL_SOCKET and kind == _SCM_RIGHTS:
            numbers += struct.unpack_from(f"{len(data) // _INT_BYTES}i", data)
    return numbers
