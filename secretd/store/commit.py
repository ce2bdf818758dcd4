# SPDX-License-Identifier: LGPL-2.1-or-later
"""A change that waits for the disk.

The store finishes it once fdatasync(2) has returned. Its callbacks run in the order in which they
were added, whether or not the connection that asked for the change still exists.
"""

import asyncio
import logging
from collections.abc import Callable, Generator

from secretd.errors import INTERNAL_ERROR, CommandError

log = logging.getLogger("secretd")


class Commit:
    """The outcome of a change, None before it; awaiting it raises the error.

    ``done``: True once the outcome is known. ``error``: why the change was not written. ``size``:
    bytes of plaintext of the object that is written.
    """

    __slots__ = ("_callbacks", "done", "error", "size")

    def __init__(self, size: int = 0) -> None:
        self.done = False
        self.size = size
        self.error: CommandError | None = None
        self._callbacks: list[Callable[[CommandError | None], object]] = []

    def then(self, callback: Callable[[CommandError | None], object]) -> None:
        """Call ``callback`` with the error, or None, at the end; at once if that has passed."""
        if self.done:
            callback(self.error)
        else:
            self._callbacks.append(callback)

    def finish(self, error: CommandError | None) -> None:
        """Set the outcome. A callback may replace the error by its own (`fail`)."""
        self.error = error
        for callback in self._callbacks:
            try:
                callback(self.error)
            except Exception as failure:  # noqa: BLE001 - the others of the transaction follow
                log.error("internal error: %s", type(failure).__name__)
                self.error = CommandError(INTERNAL_ERROR)
        self.done = True
        self._callbacks.clear()

    def fail(self, error: CommandError) -> None:
        """Make the change a failed one, from a callback: what follows the write has failed."""
        self.error = error

    def __await__(self) -> Generator[object, None, None]:
        if not self.done:
            waiter = asyncio.get_running_loop().create_future()
            self._callbacks.append(lambda _error: _wake(waiter))
            yield from waiter.__await__()
        if self.error is not None:
            raise self.error


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
