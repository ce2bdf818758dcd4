# SPDX-License-Identifier: LGPL-2.1-or-later
"""A raw QMP client."""

import contextlib
import fcntl
import json
import os
import socket
from typing import Any


class Client:
    """A QMP client of few words: blocking, sees every byte."""

    def __init__(
        self, path: str, *, negotiate: bool = True, sock: socket.socket | None = None
    ) -> None:
        self.sock = sock or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        try:
            if sock is None:
                self.sock.connect(path)
        except OSError:
            self.sock.close()
            raise
        self._buffer = b""
        self.events: list[dict] = []
        if negotiate:
            self.greeting = self.reply()
            assert self.cmd("qmp_capabilities") == {"return": {}}

    def line(self) -> bytes:
        """The next line; b"" at the end."""
        while b"\n" not in self._buffer:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:  # the end, where the daemon has left something unread
                return b""
            if not data:
                return b""
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"

    def message(self) -> dict:
        """The next reply or event."""
        line = self.line()
        assert line.endswith(b"\r\n"), line
        assert line.isascii()
        return json.loads(line)

    def reply(self) -> dict:
        """The next reply; events about secrets are put aside."""
        while "event" in (message := self.message()) and message["event"] != "SHUTDOWN":
            self.events.append(message)
        return message

    def event(self) -> dict:
        """The next event."""
        if not self.events:
            self.events.append(self.message())
        return self.events.pop(0)

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send bytes, with descriptors."""
        if fds:
            assert socket.send_fds(self.sock, [data], list(fds)) == len(data)
        else:
            self.sock.sendall(data)

    def ask(self, data: bytes, fds: tuple[int, ...] = ()) -> dict:
        """Send bytes, return the next reply."""
        self.send(data, fds)
        return self.reply()

    def cmd(self, command: str, arguments: dict | None = None, fds: tuple[int, ...] = ()) -> dict:
        """Execute a command; return the whole reply."""
        message: dict = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments
        return self.ask(json.dumps(message).encode() + b"\n", fds)

    def ok(self, command: str, arguments: dict | None = None, fds: tuple[int, ...] = ()) -> Any:
        """Execute a command that succeeds; return what it returns."""
        reply = self.cmd(command, arguments, fds)
        assert "return" in reply, reply
        return reply["return"]

    def fail(self, command: str, arguments: dict | None = None, fds: tuple[int, ...] = ()) -> str:
        """Execute a command that fails; return the words."""
        reply = self.cmd(command, arguments, fds)
        assert "error" in reply, reply
        return reply["error"]["desc"]

    def watch(self, *names: str) -> "Client":
        """Turn events on, only those of some names if there are any."""
        arguments: dict = {"enable": True}
        if names:
            arguments["events"] = list(names)
        self.ok("secret-events", arguments)
        return self

    def add(self, object_id: str, **options: str) -> dict:
        """Add a secret; return the whole reply."""
        return self.cmd("object-add", {"qom-type": "secret", "id": object_id, **options})

    def secrets(self) -> list[dict]:
        """All of query-secrets."""
        found: list[dict] = []
        while page := self.ok("query-secrets", {"after": found[-1]["id"]} if found else {}):
            found += page
        return found

    def read(self, object_id: str, **options: str) -> bytes:
        """Read a secret through a pipe."""
        source, sink = os.pipe()
        try:
            with contextlib.suppress(PermissionError):
                fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, 1 << 20)
            size = self.ok("secret-read", {"id": object_id, **options}, (sink,))["size"]
            os.close(sink)
            sink = -1
            with open(source, "rb", closefd=False) as pipe:
                data = pipe.read()
            assert len(data) == size
            return data
        finally:
            os.close(source)
            if sink >= 0:
                os.close(sink)

    def close(self) -> None:
        """Disconnect."""
        self.sock.close()
