# SPDX-License-Identifier: LGPL-2.1-or-later
"""The targets of secrets: pipes, ends of stream socket pairs, and memfds.

A target is written without changing the flags or the offset of the client's open file description.
Opening a target never waits; writing may, where a client holds what the kernel needs for it.
deliveries and server.credentials call this module.
"""

import errno
import fcntl
import os
import select
import socket
import stat
from abc import abstractmethod
from typing import Final

from secretd.descriptors.kinds import Kind, is_sealed, kind_and_flags
from secretd.errors import CommandError
from secretd.linux.statx import allocated_bytes, type_and_links

_RWF_NOWAIT: Final = 0x8
_SEND: Final = int(socket.MSG_DONTWAIT) | int(socket.MSG_NOSIGNAL)
_SPLICE_BYTES: Final = 64 << 10
_TAKES = "secret-read takes the write end of a pipe, an end of a stream socket pair, or a memfd"


class Target:
    """A target of a secret; its descriptor is borrowed.

    ``may_block``: a thread writes, and a peer may block it; plaintext must then never lie where it
    cannot be wiped.
    """

    may_block = False

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def begin(self, size: int) -> None:
        """Prepare for ``size`` bytes. Raises OSError or CommandError."""

    def write(self, data: memoryview, position: int) -> int:
        """Write ``data``, which starts ``position`` bytes after the start of the secret.

        Returns the number of bytes accepted without waiting, which may be 0. Raises OSError.
        """
        taken, size = 0, len(data)
        while taken < size:
            try:
                taken += self._write_some(data[taken:] if taken else data, position + taken)
            except OSError as error:
                # Bytes accepted before an error count: the next call meets the error again.
                if not taken and not isinstance(error, BlockingIOError):
                    raise
                break
        return taken

    @abstractmethod
    def _write_some(self, data: memoryview, position: int) -> int:
        """Write a part of ``data``; raise BlockingIOError if nothing is accepted without
        waiting.
        """

    def close(self) -> None:
        """Release the target's own resources, but not the descriptor."""


class PipeTarget(Target):
    """The write end of a pipe or FIFO."""

    _own: tuple[int, int] | None = None  # a pipe of our own to splice from

    def _write_some(self, data: memoryview, position: int) -> int:  # noqa: ARG002 - a pipe has none
        if self._own is None:
            try:
                return os.pwritev(self.fd, [data], -1, _RWF_NOWAIT)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
        return self._write_if_ready(data) if self.may_block else self._splice(data)

    def _write_if_ready(self, data: memoryview) -> int:
        """Write at most one page, which a writable pipe accepts (pipe(7)); spliced bytes would wait
        in the kernel.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        if not poll.poll(0):
            raise BlockingIOError
        return os.writev(self.fd, [data[: select.PIPE_BUF]])

    def _splice(self, data: memoryview) -> int:
        """Write through a pipe of our own: a FIFO in a file system does not support RWF_NOWAIT."""
        if self._own is None:
            self._own = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        source, sink = self._own
        size = os.writev(sink, [data[:_SPLICE_BYTES]])
        moved = 0
        try:
            while moved < size:
                moved += os.splice(source, self.fd, size - moved, flags=os.SPLICE_F_NONBLOCK)
        except OSError:
            # Unaccepted bytes must not stay: closing the pipe frees them unread.
            self.close()
            if not moved:
                raise
        return moved

    def close(self) -> None:
        """See Target."""
        if self._own is not None:
            own, self._own = self._own, None
            for fd in own:
                os.close(fd)


class SocketTarget(Target):
    """One end of a stream socket pair."""

    def _write_some(self, data: memoryview, _position: int) -> int:
        borrowed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, self.fd)
        try:
            return borrowed.send(data, _SEND)
        finally:
            borrowed.detach()


class MemfdTarget(Target):
    """A memfd: it gets the secret's size, and is filled from its start."""

    def begin(self, size: int) -> None:
        """See Target. An untrusted peer must supply the memory: pages that the daemon's write
        allocates are charged to the daemon's cgroup for as long as the peer keeps the memfd.
        """
        if self.may_block and (own := allocated_bytes(self.fd)) < size:
            raise CommandError(
                f"The memfd has {own} bytes of memory and the secret has {size}; "
                "call fallocate(2) on it first"
            )
        os.ftruncate(self.fd, size)

    def _write_some(self, data: memoryview, position: int) -> int:
        return os.pwritev(self.fd, [data], position)


def open_target(fd: int) -> Target:
    """Return the target of a borrowed descriptor. Never waits. Raises CommandError for an unusable
    one.
    """
    kind, flags = kind_and_flags(fd)
    writable = flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)
    if kind is Kind.PIPE and writable:
        return PipeTarget(fd)
    if kind in (Kind.OTHER, Kind.FILE):
        raise CommandError(f"The descriptor is {_name(fd)}; {_TAKES}")
    if not writable:
        raise CommandError(f"The descriptor is {kind.value} not open for writing; {_TAKES}")
    if kind is Kind.MEMFD:
        if is_sealed(fd):
            raise CommandError(f"The descriptor is a sealed memfd; {_TAKES}")
        return MemfdTarget(fd)
    return SocketTarget(fd)


def open_trusted_target(fd: int) -> Target:
    """Return the target of a descriptor of a trusted peer, a pipe in less time.

    F_GETPIPE_SZ answers for pipes only (fcntl(2)). It waits for the pipe's lock, which another peer
    could hold for ever.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    except OSError:
        return open_target(fd)
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        return open_target(fd)  # it refuses
    return PipeTarget(fd)


def _name(fd: int) -> str:
    """Return words for a descriptor that cannot be a target."""
    try:
        mode, _ = type_and_links(fd)
    except OSError:  # FUSE refuses other users
        return "a file that is closed to the daemon"
    for test, name in (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISSOCK, "a socket that is no end of a stream pair"),
        (stat.S_ISFIFO, "a pipe opened with O_PATH"),
    ):
        if test(mode):
            return name
    return "of a kind that cannot be written to"
