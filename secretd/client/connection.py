# SPDX-License-Identifier: LGPL-2.1-or-later
"""The asyncio client's connection over qemu.qmp's QMPClient, which reconnects after a restart.

It knows which commands may run twice; aio knows what they mean.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, TypeVar

from qemu.qmp import ConnectError, ExecInterruptedError, QMPClient, QMPError, StateError
from qemu.qmp.qmp_client import GreetingError

from secretd.client import types
from secretd.client.channel import PATIENCE_SECONDS, Channel, Lost, Refused
from secretd.client.sync_connection import SAFE, SAME_FAILURES

R = TypeVar("R")

_RETRY_EACH: Final = 0.05
_REFUSAL_SECONDS: Final = 2.0


class Connection:
    """A connection to a socket.

    ``retry_seconds``: the time for which a lost connection is retried.
    """

    def __init__(self, path: str, retry_seconds: float) -> None:
        self.path = path
        self._retry_seconds = retry_seconds
        self.qmp = QMPClient("secretd")
        # Otherwise qemu.qmp would collect all events in a list without a reader.
        self.qmp.events.event_filter = lambda _event: False
        self._connecting = asyncio.Lock()
        self._number = 0  # of reconnections
        self._closed = asyncio.Event()
        self._passing = asyncio.Lock()

    @property
    def is_closed(self) -> bool:
        """True from `close` to `connect`."""
        return self._closed.is_set()

    async def connect(self, retry_seconds: float = 0) -> None:
        """Connect and negotiate; retry for ``retry_seconds``. Raises qemu.qmp's ConnectError."""
        self._closed.clear()
        deadline = self._loop_time() + retry_seconds
        while True:
            try:
                await self._connect()
            except ConnectError as error:
                if isinstance(error.exc, Refused) or self._loop_time() >= deadline:
                    raise
                await asyncio.sleep(_RETRY_EACH)
            else:
                return

    async def _connect(self) -> None:
        connecting = asyncio.ensure_future(self.qmp.connect(self.path))
        try:
            await asyncio.wait({connecting}, timeout=PATIENCE_SECONDS)
            if not connecting.done() and (words := await asyncio.to_thread(_refusal, self.path)):
                # A server of another language, which waits for a request.
                raise ConnectError(f"Refused by the server at {self.path}", Refused(words))
            await connecting
        except ConnectError as error:
            if isinstance(error.exc, Refused):
                raise
            words = None
            if isinstance(error.exc, GreetingError):
                words = await asyncio.to_thread(_refusal, self.path)
            if words is None:
                raise ConnectError(
                    f"Failed to establish connection to {self.path}", error.exc
                ) from None
            raise ConnectError(f"Refused by the server at {self.path}", Refused(words)) from None
        finally:
            if not connecting.done():
                connecting.cancel()
                await asyncio.gather(connecting, return_exceptions=True)

    @property
    def number(self) -> int:
        """The number of reconnections."""
        return self._number

    async def close(self) -> None:
        """Disconnect."""
        self._closed.set()
        async with self._connecting:  # an attempt ends soon now
            await self._disconnect()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute a command, reconnecting if necessary; return its result."""
        types.check_text(arguments)
        return await self.again(
            lambda: self.qmp.execute(command, arguments), twice=bool(SAFE.fullmatch(command))
        )

    async def pass_fd(
        self, fd: int, command: str, arguments: Mapping[str, object] | None = None
    ) -> object:
        """Pass a descriptor with a command, on the present connection; return the result."""
        async with self._passing:
            self.qmp.send_fd_scm(fd)
            return await self.qmp.execute(command, arguments)

    async def again(self, once: Callable[[], Awaitable[R]], *, twice: bool = True) -> R:
        """Return the result of ``once``, reconnecting if necessary. ``twice``: it may run twice."""
        loop = asyncio.get_running_loop()
        deadline: float | None = None
        failures = 0
        while True:
            number = self._number
            try:
                return await once()
            except (StateError, ExecInterruptedError, ConnectionError) as error:
                if deadline is None:
                    deadline = loop.time() + self._retry_seconds
                sent = isinstance(error, ExecInterruptedError)
                failures += sent
                given_up = self.is_closed or loop.time() >= deadline or failures >= SAME_FAILURES
                if sent and (given_up or not twice):
                    words = f"{self.path}: {error}; the command may have run"
                    raise ExecInterruptedError(words) from None
                if given_up:
                    raise
                if failures > 1:
                    await asyncio.sleep(_RETRY_EACH * failures)
                await self._reconnect(number, deadline)

    async def _reconnect(self, number: int, deadline: float) -> None:
        """Reconnect, unless another caller has done so since connection ``number``. Raises
        ConnectError.
        """
        async with self._connecting:
            while number == self._number:
                await self._disconnect()
                try:
                    # systemd's socket accepts connections before a daemon answers.
                    await self._unless_closed(self._connect(), deadline)
                    self._number += 1
                except ConnectError as error:
                    if isinstance(error.exc, Refused):
                        raise
                    closed = self._closed.wait()
                    with contextlib.suppress(ConnectError):
                        await self._unless_closed(closed, self._loop_time() + _RETRY_EACH)
                    if self.is_closed or self._loop_time() >= deadline:
                        raise

    async def _unless_closed(self, waited: Coroutine[Any, Any, object], deadline: float) -> None:
        """Await ``waited``. Raises ConnectError if the deadline passes, or the client is closed,
        first.
        """
        task = asyncio.ensure_future(waited)
        closed = asyncio.ensure_future(self._closed.wait())
        try:
            seconds = max(0.0, deadline - self._loop_time())
            await asyncio.wait({task, closed}, timeout=seconds, return_when="FIRST_COMPLETED")
            if not task.done():
                raise ConnectError(f"No answer from {self.path}", TimeoutError())
            task.result()
        finally:
            for each in (task, closed):
                each.cancel()
            await asyncio.gather(task, closed, return_exceptions=True)

    @staticmethod
    def _loop_time() -> float:
        return asyncio.get_running_loop().time()

    async def _disconnect(self) -> None:
        # The reason of the end is raised here; the end itself is known.
        with contextlib.suppress(EOFError, OSError, QMPError):
            await self.qmp.disconnect()


def _refusal(path: str) -> str | None:
    """Return the words of a server that sends an error instead of a greeting, None if it does not.

    qemu.qmp drops such a line, so the server is asked once more.
    """
    try:
        Channel(path, _REFUSAL_SECONDS).close()
    except Refused as error:
        return str(error)
    except (OSError, Lost):
        return None
    return None
