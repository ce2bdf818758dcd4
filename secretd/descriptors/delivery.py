# SPDX-License-Identifier: LGPL-2.1-or-later
"""The delivery of one secret to one descriptor.

Theory of operation. A `Delivery` owns a target, the descriptor under it, and a view of the bytes to
write. It ends in exactly one of three ways:

- everything was written: the owner calls `close`;
- writing failed, or took too long: `fail` takes the reason, and the owner calls `close`. If the
  other end accepted no byte, the read is undone: the audit says `withheld`, and a limited grant
  gets its read back;
- the secret was deleted or the grant withdrawn: `withdraw` returns only when the delivery no longer
  touches plaintext. The owner wakes up, sees `withdrawn`, and ends the delivery as a failure.

What can go wrong: the other end blocks for ever. So the event loop writes a `LoopDelivery` for
trusted peers only; threaded_delivery writes to the descriptors of others. deliveries starts both
and keeps track of them.
"""

import asyncio
import os
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from typing import Final

from secretd.access.decision import Grant
from secretd.crypto.base64 import encode_base64
from secretd.descriptors.fd import Fd
from secretd.descriptors.target import Target
from secretd.errors import CommandError
from secretd.memory.arena import Arena, LockedBuffer

_EMPTY: Final = memoryview(b"")


class Delivery:
    """A delivery to ``target``, which borrows ``fd``; the delivery owns both.

    It writes the plaintext of ``grant``, its base64, or ``sealed`` instead. ``size``: the number of
    bytes to write; ``written``: the number that the other end has accepted. ``undo``: called with
    the grant and the reason if the delivery ends before the other end has accepted a byte.
    ``rest``: a coroutine that writes the bytes which could not be written at once, and raises
    CommandError.
    """

    rest: Coroutine[object, object, None] | None = None
    withdrawn = False
    written = 0
    _encoded: LockedBuffer | None = None

    def __init__(  # noqa: PLR0917 - keywords would cost a dictionary for each read
        self,
        grant: Grant,
        target: Target,
        fd: Fd,
        undo: Callable[[Grant, str], object],
        base64: bool,
        sealed: bytes | None,
    ) -> None:
        self.grant = grant
        self.target = target
        self.fd = fd
        self.base64 = base64
        self.plaintext = grant.plaintext if sealed is None else memoryview(sealed)
        self.size = -(-len(self.plaintext) // 3) * 4 if base64 else len(self.plaintext)
        self.view = self.plaintext
        self._undo = undo

    def encode(self, scratch: Arena) -> None:
        """Set ``view`` to the base64 of the plaintext. Raises LockedMemoryExhausted."""
        self._encoded = encode_base64(self.plaintext, scratch)
        self.view = self._encoded.view

    @abstractmethod
    def withdraw(self) -> None:
        """End the delivery: it touches no plaintext after this returns."""

    def fail(self, error: CommandError) -> CommandError:
        """End the delivery with an error, and undo a read that delivered nothing; return the error
        to raise.
        """
        if not self.written:
            self._undo(self.grant, error.desc)
        return error

    def fail_system(self, error: OSError) -> CommandError:
        """Do the same for an error of a system call."""
        words = f"Unable to write the secret: {os.strerror(error.errno or 0)}"
        return self.fail(CommandError(words))

    def withdrawal(self) -> CommandError:
        """Return the error of a withdrawn delivery."""
        return CommandError(f"Secret '{self.grant.object_id}' was withdrawn")

    def drop(self) -> None:
        """Release the plaintext, and wipe its base64."""
        self.view = self.plaintext = _EMPTY
        encoded, self._encoded = self._encoded, None
        if encoded is not None:
            encoded.free()

    def close(self) -> None:
        """Release the plaintext, the target and the descriptor."""
        self.drop()
        self.target.close()
        self.fd.close()


class LoopDelivery(Delivery):
    """A delivery that the event loop writes."""

    _woken: asyncio.Future[None] | None = None

    def write(self) -> bool:
        """Write as much as possible without waiting; return True once everything is written. Raises
        OSError.
        """
        written = self.written
        self.written += self.target.write(self.view[written:] if written else self.view, written)
        return self.written >= self.size

    def withdraw(self) -> None:
        """See Delivery."""
        self.withdrawn = True
        self.drop()
        self._wake()

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def wait(self) -> None:
        """Wait until the descriptor is writable or the delivery is withdrawn."""
        if self.withdrawn:
            return
        loop = asyncio.get_running_loop()
        self._woken = loop.create_future()
        number = self.fd.fileno()
        loop.add_writer(number, self._wake)
        try:
            await self._woken
        finally:
            loop.remove_writer(number)
