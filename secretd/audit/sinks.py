# SPDX-License-Identifier: LGPL-2.1-or-later
"""The targets of audit lines: a file, a pipe, a socket, or a thread for targets that may block.

Writing to a `Sink` never waits. It does not know what the lines say; audit.log and daemon.log use
it.
"""

import contextlib
import errno
import fcntl
import os
import queue
import re
import socket
import stat
import threading
from typing import Final, Protocol

from secretd.errors import UsageError

_CLOSE_SECONDS: Final = 1.0
_THREAD_BATCHES: Final = 64
_RWF_NOWAIT: Final = 0x8
_REMOTE: Final = re.compile(r"fuse.*|nfs.*|cifs|smb.*|9p|ceph|afs|virtiofs|lustre|ocfs2|gfs2|coda")


class Sink(Protocol):
    """A target of lines. ``certain``: accepted bytes are written, not only queued."""

    certain: bool

    def write(self, data: bytes) -> int:
        """Write as much as possible without waiting; return the number of bytes accepted. Raises
        OSError.
        """

    def status(self) -> os.stat_result:
        """Return its fstat(2) result."""

    def close(self) -> None:
        """Close the descriptor if it is owned, after at most a second for queued lines."""


class FileSink:
    """A regular file on a local file system, or something else that never blocks."""

    certain = True

    def __init__(self, fd: int, *, owned: bool) -> None:
        self._fd = fd
        self._owned = owned

    def write(self, data: bytes) -> int:
        """See Sink."""
        return os.write(self._fd, data)

    def status(self) -> os.stat_result:
        """See Sink."""
        return os.fstat(self._fd)

    def close(self) -> None:
        """See Sink."""
        if self._owned:
            os.close(self._fd)


class PipeSink(FileSink):
    """A pipe that other processes may share: its flags stay as they are."""

    def write(self, data: bytes) -> int:
        """See Sink."""
        return os.pwritev(self._fd, [data], -1, _RWF_NOWAIT)


class SocketSink(FileSink):
    """A stream socket, such as the one that systemd gives services as stderr."""

    def write(self, data: bytes) -> int:
        """See Sink."""
        borrowed = socket.socket(fileno=self._fd)
        try:
            return borrowed.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        finally:
            borrowed.detach()


class ThreadSink(FileSink):
    """A target that may block at any time, such as a terminal or a remote file. A thread writes to
    it.
    """

    certain = False

    def __init__(self, fd: int, *, owned: bool) -> None:
        super().__init__(fd, owned=owned)
        self._queue: queue.Queue[bytes | None] = queue.Queue(_THREAD_BATCHES)
        # A daemon thread: a stuck one must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="audit", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> int:
        """See Sink."""
        try:
            self._queue.put_nowait(data)
        except queue.Full:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        return len(data)

    def _work(self) -> None:
        while (data := self._queue.get()) is not None:
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(self._fd, data) :]
        if self._owned:
            os.close(self._fd)

    def close(self) -> None:
        """See Sink."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
            self._thread.join(_CLOSE_SECONDS)


def open_sink(target: str) -> Sink:
    """Open the target of ``--audit``: a path, or - for stderr. Raises UsageError."""
    if target == "-":
        return _sink(2, owned=False)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        fd = os.open(target, flags, 0o600)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _sink(fd, owned=True)
        except BaseException:
            os.close(fd)
            raise
    except BlockingIOError:
        raise UsageError(f"--audit={target}: another process writes its audit there") from None
    except OSError as error:
        raise UsageError(f"--audit={target}: {os.strerror(error.errno or 0)}") from None


def _sink(fd: int, *, owned: bool) -> Sink:
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise UsageError(f"--audit=-: stderr: {os.strerror(error.errno or 0)}") from None
    if stat.S_ISREG(status.st_mode):
        return (ThreadSink if _is_remote(status.st_dev) else FileSink)(fd, owned=owned)
    if stat.S_ISSOCK(status.st_mode):
        return SocketSink(fd, owned=owned)
    if stat.S_ISFIFO(status.st_mode):
        if owned:
            return FileSink(fd, owned=True)  # opened with O_NONBLOCK
        # A FIFO in a file system does not support RWF_NOWAIT.
        return (PipeSink if _is_pipe(status) else ThreadSink)(fd, owned=False)
    if status.st_rdev == os.makedev(1, 3):  # /dev/null
        return FileSink(fd, owned=owned)
    return ThreadSink(fd, owned=owned)


def _is_pipe(status: os.stat_result) -> bool:
    fds = os.pipe2(os.O_CLOEXEC)
    try:
        return os.fstat(fds[0]).st_dev == status.st_dev
    finally:
        for fd in fds:
            os.close(fd)


def _is_remote(device: int) -> bool:
    """Return True if a file system depends on another machine or process
    (proc_pid_mountinfo(5)).
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] == number:
                return bool(_REMOTE.fullmatch(fields[fields.index("-") + 1]))
    return False
