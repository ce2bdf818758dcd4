# SPDX-License-Identifier: LGPL-2.1-or-later
"""One QMP connection for programs without an event loop: connect, exchange messages, pass
descriptors.

A `Channel` connects once and is lost once; sync_connection makes another one. It also speaks to
QEMU, since it knows no command but qmp_capabilities. While it waits it calls ``on_wait``, so that a
person learns the reason, and it waits at most ``timeout`` seconds.
"""

import array
import contextlib
import json
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

PATIENCE_SECONDS: Final = 2.0
"""Seconds after which a person should learn the reason of a wait."""

_SEND: Final = int(socket.MSG_NOSIGNAL) | int(socket.MSG_DONTWAIT)

_SERVER_ERROR: Final = -32000
"""JSON-RPC's code of errors that are not about the form of a request."""

_EVENTS: Final = 1 << 16
"""Events that wait to be asked for; earlier ones are dropped."""

_LINE_BYTES: Final = 64 << 20
"""Bytes of the longest line that a server may send."""

_SUCCESS: Final = b'{"return": {}}'  # nearly all replies to many commands at once

Message = dict[str, Any]
OnWait = Callable[[str], object]


class Refused(Exception):
    """The server refused this client in its first line; the text is the server's."""


class Lost(Exception):
    """The connection has ended.

    ``sent``: the command had been sent, and may have been carried out.
    """

    def __init__(self, words: str, *, sent: bool) -> None:
        super().__init__(words)
        self.sent = sent


class Pump:
    """A descriptor that must be served during the wait for a reply: read from, or written to.

    ``events``: poll(2)'s. ``step``: reads or writes some bytes and returns True when it is done.
    """

    def __init__(self, fd: int, events: int, step: Callable[[], bool]) -> None:
        self.fd = fd
        self.events = events
        self.step = step


class Channel:
    """A connection to ``path``.

    ``timeout``: seconds for each answer, None for no limit. ``on_wait``: called with the reason of
    a wait after ``patience`` seconds. ``sock``: a connected socket to use, which is taken over.
    ``greeting``: the server's; ``events``: those between replies.
    """

    def __init__(
        self,
        path: str,
        timeout: float | None,
        on_wait: OnWait | None = None,
        sock: socket.socket | None = None,
    ) -> None:
        self.path = path
        self._timeout = timeout
        self.on_wait = on_wait
        self.patience = PATIENCE_SECONDS
        self._buffer = bytearray()
        self.events: deque[Message] = deque(maxlen=_EVENTS)
        self.greeting: Message = {}
        self._sock = sock or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._sock.setblocking(False)
            if sock is None:
                self._connect()
            self._negotiate()
        except BaseException:
            self.close()
            raise

    @property
    def sock(self) -> socket.socket:
        """The connected socket, borrowed."""
        return self._sock

    @property
    def package(self) -> str:
        """The server's name, such as "secretd 0.1.0"; QEMU has another text."""
        version = self.greeting.get("QMP", {}).get("version", {})
        return str(version.get("package", ""))

    def close(self) -> None:
        """Disconnect."""
        self._sock.close()

    # --- connecting

    def _connect(self) -> None:
        until = _Deadline(
            self._timeout, self.on_wait, self.patience, f"a place in the queue of {self.path}"
        )
        while True:
            try:
                self._sock.connect(self.path)
            except BlockingIOError:  # the backlog is full (unix(7)), and poll(2) does not help
                until.sleep()
            else:
                return

    def _negotiate(self) -> None:
        # Before the greeting: a server of another language would wait for a request for ever.
        with contextlib.suppress(Lost):
            self._send(b'{"execute": "qmp_capabilities"}\n', ())
        greeting = None
        with contextlib.suppress(ConnectionResetError):  # it was closed, and has not read this
            greeting = self._line(f"an answer on {self.path}")
        if greeting is None:
            raise ConnectionResetError("The connection was closed without a greeting")
        if "QMP" not in greeting:
            error = greeting.get("error")
            error = error if isinstance(error, dict) else {}
            if error.get("code", _SERVER_ERROR) != _SERVER_ERROR:
                # The answer to a command that it does not understand.
                raise Refused("This is a JSON-RPC socket; QMP has a socket of its own")
            words = error.get("desc") or error.get("message")
            raise Refused(str(words) if words else "This is not a QMP server")
        self.greeting = greeting
        reply = self.reply("qmp_capabilities")
        if "error" in reply:
            raise Refused(str(reply["error"].get("desc", "")))

    # --- exchanging

    def exchange(
        self,
        command: str,
        arguments: object,
        fds: Sequence[int] = (),
        pump: Pump | None = None,
    ) -> Message:
        """Execute a command and return the whole reply.

        ``fds`` are passed with it, and ``pump`` is served meanwhile. Raises Lost or TimeoutError.
        """
        message = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments  # type: ignore[assignment]
        self.send(json.dumps(message).encode() + b"\n", fds)
        return self.reply(command, pump)

    def send(self, lines: bytes | memoryview, fds: Sequence[int] = ()) -> None:
        """Send one command or several; `reply` returns each one's reply. Raises Lost or
        TimeoutError.
        """
        self.notice_end()
        self._send(lines, fds)

    def reply(self, command: str, pump: Pump | None = None) -> Message:
        """Return the next reply, which is that to ``command``; see `exchange`."""
        try:
            while True:
                reply = self._line(f"the reply to {command}", pump)
                if reply is None:
                    raise Lost("The connection was closed", sent=True)
                if "event" not in reply:
                    return reply
                self.events.append(reply)
        except ConnectionError as error:
            raise Lost(os.strerror(error.errno or 0), sent=True) from None

    def notice_end(self) -> None:
        """Raise Lost if the server has closed the connection; otherwise receive what it has
        sent.
        """
        try:
            while self._receive():
                pass
        except BlockingIOError:
            return
        except ConnectionError:
            pass
        raise Lost("The connection was closed", sent=False)

    def event(self, timeout: float | None = None) -> Message | None:
        """Return the next event; None at the end of the connection, or after ``timeout``
        seconds.
        """
        if self.events:
            return self.events.popleft()
        try:
            while True:
                message = self._next()
                if message is not None:
                    if "event" in message:
                        return message
                    continue
                if not wait(self._sock.fileno(), select.POLLIN, timeout) or not self._receive():
                    return None
        except ConnectionError:
            return None

    def _send(self, data: bytes | memoryview, fds: Sequence[int]) -> None:
        until = _Deadline(
            self._timeout, self.on_wait, self.patience, f"room to send to {self.path}"
        )
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        view = memoryview(data)
        sent = 0
        while sent < len(view):
            try:
                sent += self._sock.sendmsg([view[sent:]], rights, _SEND)
                rights = []
            except BlockingIOError:
                until.wait(self._sock.fileno(), select.POLLOUT)
            except OSError as error:
                # The server does not execute an incomplete line.
                raise Lost(os.strerror(error.errno or 0), sent=False) from None

    def _line(self, what: str, pump: Pump | None = None) -> Message | None:
        """Return the next message, None at the end of the connection."""
        until = _Deadline(self._timeout, self.on_wait, self.patience, what)
        while (message := self._next()) is None:
            if pump is None:
                until.wait(self._sock.fileno(), select.POLLIN)
            elif not until.wait_for(self._sock.fileno(), pump):
                if pump.step():
                    pump = None
                continue
            with contextlib.suppress(BlockingIOError):
                if not self._receive():
                    return None
        # The rest of a pipe can be read after the reply without waiting for the server.
        return message

    def _next(self) -> Message | None:
        line = b""
        while not line:
            end = self._buffer.find(b"\n")
            if end < 0:
                return None
            line = bytes(self._buffer[:end]).strip()
            del self._buffer[: end + 1]
        if line == _SUCCESS:
            return {"return": {}}
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if isinstance(message, dict):
            return message
        return {"error": {"class": "GenericError", "desc": "This is not QMP"}}

    def _receive(self) -> int:
        data = self._sock.recv(1 << 16)
        self._buffer += data
        if len(self._buffer) > _LINE_BYTES:
            raise Lost("The server sent a line without an end", sent=True)
        return len(data)


class _Deadline:
    """The deadline of a wait, and the callback before it."""

    def __init__(
        self, timeout: float | None, on_wait: OnWait | None, patience: float, what: str
    ) -> None:
        self._begin = time.monotonic()
        self._timeout = timeout
        self._on_wait = on_wait
        self._patience = patience
        self._what = what

    def _left(self) -> float | None:
        """Return the seconds until the next action. Raises TimeoutError."""
        passed = time.monotonic() - self._begin
        if self._timeout is not None and passed >= self._timeout:
            raise TimeoutError(
                f"No answer within {self._timeout:g} seconds: waited for {self._what}"
            )
        left = None if self._timeout is None else self._timeout - passed
        if self._on_wait is None:
            return left
        if passed >= self._patience:
            self._on_wait(self._what)
            self._on_wait = None
            return left
        patience = self._patience - passed
        return patience if left is None else min(patience, left)

    def wait(self, fd: int, events: int) -> None:
        """Wait for a descriptor."""
        while not wait(fd, events, self._left()):
            pass

    def wait_for(self, sock: int, pump: Pump) -> bool:
        """Wait for the socket or a pump; return True if the socket is ready."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(pump.fd, pump.events)
        while True:
            left = self._left()
            ready = dict(poll.poll(None if left is None else left * 1000))
            if pump.fd in ready:
                return False
            if ready:
                return True

    def sleep(self) -> None:
        """Wait for a short time."""
        left = self._left()
        time.sleep(0.05 if left is None else min(0.05, left))


def wait(fd: int, events: int, timeout: float | None) -> bool:
    """Wait for a descriptor for ``timeout`` seconds, None for any time; return False if it is not
    ready then.
    """
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(None if timeout is None else timeout * 1000))
