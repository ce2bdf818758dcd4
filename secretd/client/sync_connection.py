# SPDX-License-Identifier: LGPL-2.1-or-later
"""The blocking client's connection, which reconnects where that is safe, and raises qemu.qmp's
errors.

A lost connection is retried for ``retry_seconds``. A command that was not sent yet is then sent. A
command that was sent is repeated if running it twice does no harm, and raises ExecInterruptedError
otherwise.
"""

import re
import time
from collections.abc import Callable
from typing import Final, NoReturn

from secretd.client.channel import Channel, Lost, Message, OnWait, Refused
from secretd.client.plans import T

RETRY_SECONDS: Final = 30.0
"""Seconds for which a lost connection is retried before that is an error."""

SAME_FAILURES: Final = 4
"""Lost connections, each after the same command was sent, that are an error."""

SAFE: Final = re.compile("query-.*|qom-(list|get).*|secret-(seal|explain|expire|events)")
"""Commands that may run twice."""

_RETRY_EACH: Final = 0.05


class SyncConnection:
    """The connection of a `SyncClient`, whose docstring describes the arguments.

    ``channel``: None while not connected. ``is_open``: True between `open` and `close`.
    """

    def __init__(
        self, path: str, retry_seconds: float, timeout: float | None, on_wait: OnWait | None
    ) -> None:
        self._path = path
        self._retry_seconds = retry_seconds
        self._timeout = timeout
        self._on_wait = on_wait
        self.channel: Channel | None = None
        self.is_open = False
        self._names = 0

    @property
    def package(self) -> str:
        """The server's name; "" while not connected."""
        return self.channel.package if self.channel is not None else ""

    def open(self, retry_seconds: float = 0) -> None:
        """Connect and negotiate; retry for ``retry_seconds``. Raises ConnectError."""
        self.is_open = True
        deadline = time.monotonic() + retry_seconds
        while True:
            try:
                self._connect()
            except _UnreachableError as error:
                if isinstance(error.cause, Refused) or time.monotonic() >= deadline:
                    _connect_error(error)
                time.sleep(_RETRY_EACH)
            else:
                return

    def close(self) -> None:
        """Disconnect."""
        self.is_open = False
        self.disconnect()

    def _connect(self) -> Channel:
        self.disconnect()
        try:
            self.channel = Channel(self._path, self._timeout, self._on_wait)
        except Refused as error:
            raise _UnreachableError(f"Refused by the server at {self._path}", error) from None
        except (OSError, Lost) as error:
            raise _UnreachableError(
                f"Failed to establish connection to {self._path}", error
            ) from None
        return self.channel

    def present(self) -> Channel:
        """Return the present connection, a new one if it was lost. Raises ConnectError."""
        try:
            return self.channel or self._connect()
        except _UnreachableError as error:
            _connect_error(error)

    def disconnect(self) -> None:
        """Disconnect; the next command reconnects."""
        channel, self.channel = self.channel, None
        if channel is not None:
            channel.close()

    def again(self, once: Callable[[Channel], T], *, twice: bool = True) -> T:
        """Return the result of ``once``, reconnecting if necessary. ``twice``: it may run twice."""
        deadline: float | None = None
        failures = 0
        while True:
            if not self.is_open:
                _state_error()
            # 1. Try, and give up at once where a retry is unsafe or pointless.
            lost: Lost | _UnreachableError
            try:
                channel = self.channel or self._connect()
                return once(channel)
            except Lost as error:
                self.disconnect()
                lost = error
                if error.sent:
                    failures += 1
                    if not twice or failures >= SAME_FAILURES:
                        self._interrupted(error)
            except _UnreachableError as error:
                lost = error
                if isinstance(error.cause, Refused | TimeoutError):
                    _connect_error(error)
            except TimeoutError as error:
                self.disconnect()  # a late reply would be taken for the next command's
                _connect_error(_UnreachableError(f"No answer from {self._path}", error))
            # 2. Retry until the time is over.
            now = time.monotonic()
            if deadline is None:
                deadline = now + self._retry_seconds
            if now >= deadline:
                if isinstance(lost, _UnreachableError):
                    _connect_error(lost)
                self._interrupted(lost)
            if isinstance(lost, _UnreachableError) or failures:
                time.sleep(_RETRY_EACH * (1 + failures))

    def _interrupted(self, error: Lost) -> NoReturn:
        from qemu.qmp import ExecInterruptedError

        may = "may have run" if error.sent else "was not sent"
        raise ExecInterruptedError(f"{self._path}: {error}; the command {may}") from None

    def pass_descriptor(self, channel: Channel, fd: int) -> str:
        """Pass a descriptor; return the name that it has in this connection."""
        self._names += 1
        name = f"secretd-client-{self._names}"
        returned(channel.exchange("getfd", {"fdname": name}, [fd]))
        return name


def returned(reply: Message) -> object:
    """Return the result in a reply, or raise ExecuteError."""
    if "return" in reply:
        return reply["return"]
    from qemu.qmp import ExecuteError
    from qemu.qmp import Message as QMPMessage
    from qemu.qmp.models import ErrorResponse

    raise ExecuteError(ErrorResponse(reply), QMPMessage(), QMPMessage(reply))


class _UnreachableError(Exception):
    """No connection could be made; it becomes a ConnectError."""

    def __init__(self, words: str, cause: Exception) -> None:
        super().__init__(words)
        self.cause = cause


def _connect_error(error: _UnreachableError) -> NoReturn:
    from qemu.qmp import ConnectError

    raise ConnectError(str(error), error.cause) from None


def _state_error() -> NoReturn:
    from qemu.qmp import Runstate, StateError

    raise StateError("The client is not connected", Runstate.IDLE, Runstate.RUNNING)
