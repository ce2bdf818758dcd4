# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading the source of ``file=`` into locked memory: a path or a descriptor that the client
passed.

Every read may block (a FIFO without a writer, a network file system), so over QMP it runs in a
thread with a time limit; for the command line it is called directly. qom.secret and qom.authz
ask for a source by name, and `ConnectionSources` knows which descriptors a name can mean.
"""

import asyncio
import errno
import os
import re
import select
import stat
import time
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

from secretd.descriptors.fd import Fd
from secretd.descriptors.kinds import Kind, classify, is_readable
from secretd.descriptors.passed import FdSets
from secretd.descriptors.threads import BlockingCalls
from secretd.errors import AccessDenied, SourceError
from secretd.limits import Tuning
from secretd.linux import keyctl
from secretd.linux.openat2 import open_without_magic_links
from secretd.memory.arena import Arena, LockedBuffer

R = TypeVar("R")

SOURCE_BYTES: Final = 2 << 20
"""Bytes of a source: the largest secret in base64 with newlines. QEMU has no limit."""

_FIRST_BYTES: Final = 4096 - 2
_FDSET: Final = re.compile(r"/dev/fdset/([0-9]{1,10})")
_DEV_FD: Final = re.compile(r"/dev/fd/([0-9]{1,10})")


class CommandLineSources:
    """The sources of ``--object``: any file or key, read at once. See
    `qom.loading.SourceReader`.
    """

    def __init__(self, scratch: Arena) -> None:
        self._scratch = scratch
        self.uid = os.getuid()

    def file(self, name: str) -> LockedBuffer:
        """Read a file, also through magic links."""
        return read_path(name, self._scratch, Tuning.source_seconds, magic_links=True)

    def key(self, serial: int) -> LockedBuffer:
        """Read a key of the kernel's keyrings."""
        return read_key(serial, self._scratch)


class ConnectionSources:
    """The sources of one connection's objects: its own descriptors, and paths and keys for trusted
    peers.

    See `qom.loading.SourceReader`.
    """

    def __init__(
        self,
        fdsets: FdSets,
        scratch: Arena,
        threads: BlockingCalls,
        uid: int,
        seconds: float,
        *,
        trusted: bool,
    ) -> None:
        self._fdsets = fdsets
        self._scratch = scratch
        self._threads = threads
        self.uid = uid
        self._seconds = seconds
        self._trusted = trusted

    async def file(self, name: str) -> LockedBuffer:
        """Return the content with room for a quote on each side.

        Raises SourceError, and AccessDenied if an untrusted peer names a path.
        """
        fd = self._descriptor(name)
        if fd is not None:
            # A duplicate, so that the connection cannot close the number meanwhile.
            copy = Fd(os.dup(fd))
            return await self._run(
                partial(_read_and_close, copy, self._scratch, self._seconds), copy.close
            )
        if not self._trusted:
            raise AccessDenied("Only uid 0 and the daemon's own uid may name a file")
        return await self._run(
            partial(read_path, name, self._scratch, self._seconds, magic_links=False)
        )

    async def key(self, serial: int) -> LockedBuffer:
        """Return a key's payload in the same form. The kernel may wait for the key's creator.

        Raises SourceError, and AccessDenied for an untrusted peer.
        """
        if not self._trusted:
            raise AccessDenied("Only uid 0 and the daemon's own uid may name a key")
        return await self._run(partial(read_key, serial, self._scratch))

    async def _run(
        self, call: Callable[[], LockedBuffer], unused: Callable[[], object] | None = None
    ) -> LockedBuffer:
        try:
            return await asyncio.wait_for(
                self._threads.run(self.uid, LockedBuffer.free, call, unused), self._seconds
            )
        except TimeoutError:
            raise _timed_out(self._seconds) from None

    def _descriptor(self, name: str) -> int | None:
        """Return the passed descriptor that a name means, None for a path."""
        match = _DEV_FD.fullmatch(name)
        if match:
            found = self._fdsets.numbered(int(match[1]))
            if found is None:
                raise _not_opened(name, "No such file or directory")
            return found
        match = _FDSET.fullmatch(name)
        if match:
            numbers = self._fdsets.in_set(int(match[1]))
            if not numbers:
                raise _not_opened(name, "No such file or directory")
            return next(filter(is_readable, numbers), numbers[0])
        return None


def read_path(name: str, scratch: Arena, seconds: float, *, magic_links: bool) -> LockedBuffer:
    """Open and read a file to its end; blocks. Raises SourceError.

    ``seconds``: the time limit. ``magic_links``: follow /proc/self/fd/N and the like, as process
    substitution needs.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        opener = os.open if magic_links else open_without_magic_links
        fd = opener(_bytes(name), flags)
    except OSError as error:
        raise _not_opened(name, os.strerror(error.errno or 0)) from None
    try:
        return _read(fd, name, scratch, seconds, seekable=stat.S_ISREG(os.fstat(fd).st_mode))
    finally:
        os.close(fd)


def read_key(serial: int, scratch: Arena) -> LockedBuffer:
    """Read the payload of a key (keyctl(2), KEYCTL_READ); may block. Raises SourceError.

    The kernel has no payload over 1 MiB.
    """
    while True:
        size = _key_size(serial, None)
        buffer = scratch.allocate(size + 2)
        try:
            now = _key_size(serial, buffer.view[1:-1])
            if now <= size:
                return _cut(buffer, now, scratch)
        except BaseException:
            buffer.free()
            raise
        buffer.free()  # another process updated the key


def _key_size(serial: int, into: memoryview | None) -> int:
    try:
        size = keyctl.read(serial, into)
    except OSError as error:
        raise SourceError(os.strerror(error.errno or 0)) from None
    if size == 0:
        raise SourceError(os.strerror(errno.ENODATA))
    return size


def _read_and_close(owned: Fd, scratch: Arena, seconds: float) -> LockedBuffer:
    fd = owned.fileno()
    try:
        if not is_readable(fd):
            raise SourceError("the descriptor is not open for reading")
        kind = classify(fd)
        if kind is Kind.OTHER:
            raise SourceError("the descriptor is not a pipe, socket pair, memfd or file")
        return _read(fd, "", scratch, seconds, seekable=kind in (Kind.MEMFD, Kind.FILE))
    finally:
        owned.close()


def _read(fd: int, name: str, scratch: Arena, seconds: float, *, seekable: bool) -> LockedBuffer:
    """Read to the end: from offset 0 where possible, without moving the owner's offset."""
    # 1. A buffer of the expected size, with a spare byte on each side.
    deadline = time.monotonic() + seconds
    expected = os.fstat(fd).st_size + 1 if seekable else _FIRST_BYTES
    buffer = scratch.allocate(min(max(expected, _FIRST_BYTES), SOURCE_BYTES + 1) + 2)
    fill = 0
    try:
        while True:
            # 2. Fill it, or continue in a larger one.
            room = buffer.view[1 + fill : -1]
            if not room:
                if fill > SOURCE_BYTES:
                    raise SourceError(
                        f"larger than the limit of {SOURCE_BYTES} bytes", "source-bytes"
                    )
                buffer = _grown(buffer, fill, scratch)
                continue
            try:
                if seekable:
                    count = os.preadv(fd, [room], fill)
                else:
                    _wait(fd, deadline, seconds)
                    count = os.readv(fd, [room])
            except BlockingIOError:
                continue
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                raise SourceError(f"Error reading file “{_displayed(name)}”: {reason}") from None
            if count == 0:
                return _cut(buffer, fill, scratch)
            fill += count
    except BaseException:
        buffer.free()
        raise


def _wait(fd: int, deadline: float, seconds: float) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise _timed_out(seconds)


def _grown(buffer: LockedBuffer, fill: int, scratch: Arena) -> LockedBuffer:
    larger = scratch.allocate(min(4 * fill, SOURCE_BYTES + 1) + 2)
    larger.view[1 : 1 + fill] = buffer.view[1 : 1 + fill]
    buffer.free()
    return larger


def _cut(buffer: LockedBuffer, fill: int, scratch: Arena) -> LockedBuffer:
    """Return the content in a buffer of its own size, between two double quotes."""
    exact = scratch.allocate(fill + 2)
    exact.view[1 : 1 + fill] = buffer.view[1 : 1 + fill]
    exact.view[0] = exact.view[fill + 1] = 0x22
    buffer.free()
    return exact


def _bytes(name: str) -> bytes:
    """Return the file name as QEMU holds it: NUL as C0 80, undecodable bytes as they were."""
    return os.fsencode(name).replace(b"\0", b"\xc0\x80")


def _displayed(name: str) -> str:
    """g_filename_display_name(): show each byte that is not UTF-8 as U+FFFD."""
    return _bytes(name).decode(errors="replace")


def _not_opened(name: str, reason: str) -> SourceError:
    return SourceError(f"Failed to open file “{_displayed(name)}”: {reason}")


def _timed_out(seconds: float) -> SourceError:
    return SourceError(f"no end of data within {seconds:g} seconds", "source-seconds")
