# SPDX-License-Identifier: LGPL-2.1-or-later
"""A raw QMP client for tests that share their loop with the server."""

import asyncio
import contextlib
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any, Self

from tests.support.grants import check_denial, list_options


class AsyncClient:
    """A QMP client of few words, as `tests.support.qmp.Client`: it sees every byte."""

    greeting: dict

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._buffer = b""
        self.events: list[dict] = []

    @classmethod
    async def connect(
        cls, path: str, *, negotiate: bool = True, sock: socket.socket | None = None
    ) -> Self:
        """Connect, or use a socket that is connected."""
        if sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(path)
        client = cls(sock)
        if negotiate:
            client.greeting = await client.reply()
            assert await client.cmd("qmp_capabilities") == {"return": {}}
        return client

    async def line(self) -> bytes:
        """The next line; b"" at the end."""
        loop = asyncio.get_running_loop()
        while b"\n" not in self._buffer:
            try:
                async with asyncio.timeout(20):
                    data = await loop.sock_recv(self.sock, 1 << 16)
            except ConnectionResetError:  # the end, where the daemon has left something unread
                return b""
            if not data:
                return b""
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"

    async def message(self) -> dict:
        """The next reply or event."""
        line = await self.line()
        assert line.endswith(b"\r\n"), line
        assert line.isascii()
        return json.loads(line)

    async def reply(self) -> dict:
        """The next reply; events about secrets are put aside."""
        while "event" in (message := await self.message()) and message["event"] != "SHUTDOWN":
            self.events.append(message)
        return message

    async def event(self) -> dict:
        """The next event."""
        if not self.events:
            self.events.append(await self.message())
        return self.events.pop(0)

    async def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send bytes, with descriptors."""
        if fds:
            assert socket.send_fds(self.sock, [data], list(fds)) == len(data)
        else:
            await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def ask(self, data: bytes, fds: tuple[int, ...] = ()) -> dict:
        """Send bytes, return the next reply."""
        await self.send(data, fds)
        return await self.reply()

    async def cmd(
        self, command: str, arguments: dict | None = None, fds: tuple[int, ...] = ()
    ) -> dict:
        """Execute a command; return the whole reply."""
        message: dict = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments
        return await self.ask(json.dumps(message).encode() + b"\n", fds)

    async def ok(
        self, command: str, arguments: dict | None = None, fds: tuple[int, ...] = ()
    ) -> Any:
        """Execute a command that succeeds; return what it returns."""
        reply = await self.cmd(command, arguments, fds)
        assert "return" in reply, reply
        return reply["return"]

    async def fail(
        self, command: str, arguments: dict | None = None, fds: tuple[int, ...] = ()
    ) -> str:
        """Execute a command that fails; return the words."""
        reply = await self.cmd(command, arguments, fds)
        assert "error" in reply, reply
        return reply["error"]["desc"]

    async def watch(self, *names: str) -> Self:
        """Turn events on, only those of some names if there are any."""
        arguments: dict = {"enable": True}
        if names:
            arguments["events"] = list(names)
        await self.ok("secret-events", arguments)
        return self

    async def add(self, object_id: str, **options: str) -> dict:
        """Add a secret; return the whole reply."""
        return await self.cmd("object-add", {"qom-type": "secret", "id": object_id, **options})

    async def allow(self, name: str, *identities: str, **more: object) -> None:
        """Add an authz-list that allows some identities."""
        await self.ok("object-add", list_options(name, *identities, **more))

    async def grant(self, name: str, secret: str, authz: str, **more: object) -> None:
        """Add a secret-grant."""
        options = {"qom-type": "secret-grant", "id": name, "secret": secret, "authz": authz}
        await self.ok("object-add", {**options, **more})

    async def secrets(self) -> list[dict]:
        """All of query-secrets."""
        found: list[dict] = []
        while page := await self.ok("query-secrets", {"after": found[-1]["id"]} if found else {}):
            found += page
        return found

    async def read(self, object_id: str, **options: str) -> bytes:
        """Read a secret through a pipe."""
        source, sink = os.pipe()
        try:
            with contextlib.suppress(PermissionError):
                fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, 1 << 20)
            size = (await self.ok("secret-read", {"id": object_id, **options}, (sink,)))["size"]
            os.close(sink)
            sink = -1
            data = await asyncio.to_thread(Path(f"/dev/fd/{source}").read_bytes)
            assert len(data) == size
            return data
        finally:
            os.close(source)
            if sink >= 0:
                os.close(sink)

    async def begin_delivery(self, name: str) -> int:
        """Ask for a secret that does not fit into the pipe; return the read end once it is full."""
        source, sink = os.pipe()
        command = b'{"execute":"secret-read","arguments":{"id":"%s"}}' % name.encode()
        await self.send(command, (sink,))
        os.close(sink)
        assert await asyncio.to_thread(os.read, source, 1)
        return source

    async def denied(self, name: str) -> bool:
        """True if reading is refused; False if it works."""
        source, sink = os.pipe()
        try:
            reply = await self.cmd("secret-read", {"id": name}, (sink,))
        finally:
            os.close(sink)
            data = await asyncio.to_thread(os.read, source, 100)
            os.close(source)
        check_denial(reply, name, data)
        return "error" in reply

    def close(self) -> None:
        """Disconnect."""
        self.sock.close()
