# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handing a secret's plaintext to a descriptor that the client passed.

Takes a `Grant` (access.check made it) and a descriptor; writes from locked memory into the pipe,
socket pair or memfd without changing the flags or the offset of the client's open file description.
What is full is waited for, with a time limit, by a coroutine; nobody else waits. commands calls it.

For peers who are not trusted even these calls may block (docs/design.md, "Descriptors are
hostile"): no Grant is made for them before deliver runs them in fds.Offload.
"""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Coroutine
from typing import Final

from secretd.access import Grant
from secretd.errors import CommandError
from secretd.fds import Fd, Kind, classify, is_sealed, is_writable

DELIVERY_SECONDS: Final = 10.0
"""Seconds within which the other end must have taken the whole secret."""

_RWF_NOWAIT: Final = 0x8
_SPLICE_BYTES: Final = 64 << 10
_TAKES = "secret-read takes the write end of a pipe, an end of a stream socket pair, or a memfd"


class _Waiting:
    """A delivery whose other end is full."""

    def __init__(self) -> None:
        self.withdrawn = False
        self._woken: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Go on with the delivery, or end it if it is withdrawn."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def writable(self, fd: int) -> None:
        """Wait until something may be written, or the delivery is withdrawn."""
        if self.withdrawn:
            return
        loop = asyncio.get_running_loop()
        self._woken = loop.create_future()
        loop.add_writer(fd, self.wake)
        try:
            await self._woken
        finally:
            loop.remove_writer(fd)


class Deliveries:
    """The deliveries that wait for their reader."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[_Waiting]] = {}

    def withdraw(self, object_id: str) -> None:
        """End the running deliveries of a secret: none touches its plaintext after this returns."""
        for waiting in self._waiting.pop(object_id, ()):
            waiting.withdrawn = True
            waiting.wake()

    def deliver(
        self, grant: Grant, plaintext: memoryview, fd: Fd
    ) -> Coroutine[object, object, None] | None:
        """Write ``plaintext`` to ``fd`` and close it. Raises CommandError.

        Returns a coroutine if the other end cannot take all of it now.
        """
        target = None
        try:
            target = _open_target(fd.fileno())
            position = target.write(plaintext)
        except BaseException as error:
            _release(target, fd)
            if isinstance(error, OSError):
                raise _failed(error) from None
            raise
        if position < len(plaintext):
            # Known to `withdraw` from now on, not only when the coroutine first runs.
            waiting = _Waiting()
            self._waiting.setdefault(grant.object_id, set()).add(waiting)
            return self._go_on(grant.object_id, plaintext[position:], fd, target, waiting)
        _release(target, fd)
        return None

    async def _go_on(
        self, object_id: str, rest: memoryview, fd: Fd, target: "_Target", waiting: _Waiting
    ) -> None:
        try:
            async with asyncio.timeout(DELIVERY_SECONDS):
                while rest:
                    await waiting.writable(fd.fileno())
                    if waiting.withdrawn:
                        raise CommandError(f"Secret '{object_id}' was withdrawn")
                    rest = rest[target.write(rest) :]
        except TimeoutError:
            raise CommandError(
                f"The descriptor did not take the secret within {DELIVERY_SECONDS:g} seconds"
            ) from None
        except OSError as error:
            raise _failed(error) from None
        finally:
            waiters = self._waiting.get(object_id, set())
            waiters.discard(waiting)
            if not waiters:
                self._waiting.pop(object_id, None)
            _release(target, fd)


def _release(target: "_Target | None", fd: Fd) -> None:
    if target is not None:
        target.close()
    fd.close()


def _failed(error: OSError) -> CommandError:
    return CommandError(f"Unable to write the secret: {os.strerror(error.errno or 0)}")


class _Target:
    """A pipe. `write` takes what can be taken without waiting and returns how much that was."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._own: tuple[int, int] | None = None

    def write(self, data: memoryview) -> int:
        """Write from the start of ``data``; return the bytes taken, which may be none."""
        position = 0
        while position < len(data):
            try:
                position += self._write_some(data[position:])
            except BlockingIOError:
                break
        return position

    def _write_some(self, data: memoryview) -> int:
        if self._own is None:
            try:
                return os.pwritev(self._fd, [data], -1, _RWF_NOWAIT)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
        return self._splice(data)

    def _splice(self, data: memoryview) -> int:
        """A FIFO in a file system knows no RWF_NOWAIT: go through a pipe of our own."""
        if self._own is None:
            self._own = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        source, sink = self._own
        size = os.writev(sink, [data[:_SPLICE_BYTES]])
        moved = 0
        try:
            while moved < size:
                moved += os.splice(source, self._fd, size - moved, flags=os.SPLICE_F_NONBLOCK)
        except OSError:
            # What was not taken must not stay: closing the pipe frees it without reading it back.
            self.close()
            if not moved:
                raise
        return moved

    def close(self) -> None:
        """Release what the target needed besides the descriptor."""
        own, self._own = self._own, None
        for fd in own or ():
            os.close(fd)


class _SocketPair(_Target):
    """One end of a stream socket pair."""

    def _write_some(self, data: memoryview) -> int:
        borrowed = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, self._fd)
        try:
            return borrowed.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        finally:
            borrowed.detach()


class _Memfd(_Target):
    """A memfd: given the secret's size, then filled from its start."""

    def write(self, data: memoryview) -> int:
        os.ftruncate(self._fd, len(data))
        position = 0
        while position < len(data):
            position += os.pwritev(self._fd, [data[position:]], position)
        return position


def _open_target(fd: int) -> _Target:
    kind = classify(fd)
    if kind in (Kind.OTHER, Kind.FILE):
        raise CommandError(f"The descriptor is {_name(fd)}; {_TAKES}")
    if not is_writable(fd):
        raise CommandError(f"The descriptor is {kind.value} not open for writing; {_TAKES}")
    if kind is Kind.MEMFD:
        if is_sealed(fd):
            raise CommandError(f"The descriptor is a sealed memfd; {_TAKES}")
        return _Memfd(fd)
    if kind is Kind.SOCKET:
        return _SocketPair(fd)
    return _Target(fd)


def _name(fd: int) -> str:
    """Say what a descriptor is that cannot be taken."""
    mode = os.fstat(fd).st_mode
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
