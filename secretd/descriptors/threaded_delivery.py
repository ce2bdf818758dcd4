# SPDX-License-Identifier: LGPL-2.1-or-later
"""A delivery that a thread writes, for a peer whose descriptor can block.

Even a write that asks not to wait may never return (docs/design.md, "Descriptors are hostile"). So
the thread copies the secret piece by piece into a locked buffer of its own and writes from there. A
write that is stuck in the kernel reads that buffer whenever it continues. Withdrawing the secret
wipes the buffer, and nothing else uses it until the write has returned.

There are two locks. ``_copying`` protects the plaintext and the buffer; it is held for a copy,
never during a system call. ``_writing`` is held from the copy until it is written, which may be for
ever, so the loop takes it with a time limit only. `write` runs in the thread, everything else in
the loop.
"""

import asyncio
import contextlib
import os
import select
import threading
from collections.abc import Callable
from typing import Final

from secretd.access.decision import Grant
from secretd.crypto.base64 import encode_base64
from secretd.descriptors.delivery import Delivery
from secretd.descriptors.fd import Fd
from secretd.descriptors.target import Target
from secretd.errors import CommandError
from secretd.memory.arena import Arena, LockedBuffer
from secretd.memory.wipe import wipe

PIECE_BYTES: Final = 16 << 10
"""Bytes of a secret that a thread holds at a time."""


class ThreadedDelivery(Delivery):
    """A delivery by a thread.

    ``scope``: the time limit of the coroutine that waits for the thread.
    """

    def __init__(  # noqa: PLR0917 - as Delivery
        self,
        grant: Grant,
        target: Target,
        fd: Fd,
        undo: Callable[[Grant, str], object],
        base64: bool,
        sealed: bytes | None,
        scratch: Arena,
        write_seconds: float,
    ) -> None:
        super().__init__(grant, target, fd, undo, base64, sealed)
        target.may_block = True
        self.scope: asyncio.Timeout | None = None
        self._scratch = scratch
        self._write_seconds = write_seconds
        self._copying = threading.Lock()
        self._writing = threading.Lock()
        self._closed = False
        self._failure: CommandError | None = None  # known before the last write has returned
        # The thread creates the following: a delivery that waits for a thread holds nothing.
        self._piece: LockedBuffer | None = None
        self._rest = memoryview(b"")  # the unwritten part of the piece
        self._copied = 0  # bytes of plaintext copied so far
        self._bell = -1  # an eventfd(2) that wakes the thread

    def withdraw(self) -> None:
        """See Delivery."""
        if self._closed:
            return
        # Wait for a write that is under way, as long as it takes if nothing holds it up: wiping the
        # buffer in the middle of it would give the client zeros behind what it has, instead of the
        # end.
        idle = not self.withdrawn and self._writing.acquire(timeout=self._write_seconds)
        with self._copying:
            self.withdrawn = True
            if self._piece is not None:
                wipe(self._piece.view)
            self.drop()
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)
        if idle:
            self._writing.release()
        if self.scope is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.scope.reschedule(asyncio.get_running_loop().time())

    def abandon(self, error: CommandError) -> CommandError:
        """Fail while the thread may still be writing; return the error.

        Only the return of the write shows whether the other end has accepted a byte.
        """
        self.withdraw()
        if self._writing.acquire(blocking=False):
            self._writing.release()
            return self.fail(error)
        self._failure = error
        return error

    def close(self) -> None:
        """Release everything: the thread has returned, or never started."""
        self._closed = True
        if self._piece is not None:
            self._piece.free()
        if self._bell >= 0:
            os.close(self._bell)
        super().close()
        if self._failure is not None:
            self.fail(self._failure)

    def write(self) -> OSError | CommandError | None:
        """Write everything, or until it is withdrawn; return the error, None if there is none. Runs
        in the thread.
        """
        position = 0
        try:
            self.target.begin(self.size)
            while True:
                with self._writing:
                    if not self._copy():
                        return None
                    taken = self.target.write(self._rest, position)
                    self._rest = self._rest[taken:]
                    position += taken
                    self.written = position
                if self._rest:
                    self._wait()
        except (OSError, CommandError) as error:
            return error

    def _copy(self) -> bool:
        """Copy the next piece if none is left; return False at the end, or if the secret was
        withdrawn.
        """
        with self._copying:
            if self._rest and not self.withdrawn:
                return True
            # Base64 encodes three bytes as four.
            size = PIECE_BYTES // 4 * 3 if self.base64 else PIECE_BYTES
            source = self.plaintext[self._copied : self._copied + size]
            if self._piece is not None:
                self._piece.free()
                self._piece = None
            if not source:
                return False
            self._copied += len(source)
            if self.base64:
                self._piece = encode_base64(source, self._scratch)
            else:
                self._piece = self._scratch.allocate(len(source))
                self._piece.view[:] = source
            self._rest = self._piece.view
            return True

    def _wait(self) -> None:
        """Wait until the descriptor is writable or the delivery is withdrawn, as it is at its time
        limit.
        """
        with self._copying:
            if self._bell < 0:
                self._bell = os.eventfd(int(self.withdrawn), os.EFD_CLOEXEC)
        poll = select.poll()
        poll.register(self.target.fd, select.POLLOUT)
        poll.register(self._bell, select.POLLIN)
        poll.poll()
