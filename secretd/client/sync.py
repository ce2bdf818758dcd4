# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client for programs without asyncio: each method waits until it is done.

    with SyncClient("/run/secretd/control.sock") as client:
        client.generate("disk0", 32)
        with client.read("disk0") as plaintext:
            use(plaintext.view)

It is `aio.Client` on an event loop of its own, which runs only while a method does; so it belongs to one
thread, and cannot be used inside of a running event loop (use `Client` there).
"""

import asyncio
from collections.abc import Iterator, Mapping
from typing import Self

from secretd.client.aio import (
    PLAIN,
    Client,
    Encoding,
    Event,
    Format,
    Sealed,
    SecretInfo,
)
from secretd.client.connection import RETRY_SECONDS
from secretd.memory import LockedBuffer


class SyncClient:
    """A connection to secretd. Use it as a context manager, or call `connect` and `close`.

    All errors are those of `aio.Client`, which tells more of each method.
    """

    def __init__(self, path: str | None = None, *, retry_seconds: float = RETRY_SECONDS) -> None:
        """``path``: the socket; default $SECRETD_SOCKET, else the control or the client socket.
        ``retry_seconds``: for how long a connection that was lost is made anew; 0 for not at all.
        """
        self._runner = asyncio.Runner()
        self._closed = False
        self._client = Client(path, retry_seconds=retry_seconds)

    @property
    def path(self) -> str:
        """The socket."""
        return self._client.path

    def connect(self) -> None:
        """Connect and negotiate. Raises ConnectError."""
        self._runner.run(self._client.connect())

    def close(self) -> None:
        """Disconnect, and wipe what `read` returned: it reads as zeros then. It cannot be used again."""
        if self._closed:
            return
        self._closed = True
        try:
            self._runner.run(self._client.close())
        finally:
            self._runner.close()

    def __enter__(self) -> Self:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add(self, object_id: str, fd: int, encoding: Encoding = PLAIN) -> None:
        """Add a secret whose content the daemon reads from ``fd`` (borrowed)."""
        self._runner.run(self._client.add(object_id, fd, encoding))

    def add_bytes(self, object_id: str, plaintext: memoryview, encoding: Encoding = PLAIN) -> None:
        """Add a secret from memory, through a pipe."""
        self._runner.run(self._client.add_bytes(object_id, plaintext, encoding))

    def generate(self, object_id: str, size: int = 32) -> None:
        """Add a secret of ``size`` random bytes."""
        self._runner.run(self._client.generate(object_id, size))

    def delete(self, object_id: str) -> None:
        """Remove an object; its plaintext is wiped when this returns."""
        self._runner.run(self._client.delete(object_id))

    def expire(self, object_id: str, seconds: int) -> None:
        """Have a secret wiped after so many seconds from now."""
        self._runner.run(self._client.expire(object_id, seconds))

    def explain(self, object_id: str, identities: "list[str]") -> dict[str, object]:
        """Return secret-explain's answer: may a client with these identities read a secret, and why?"""
        return self._runner.run(self._client.explain(object_id, identities))

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute any command; return what it returns."""
        return self._runner.run(self._client.execute(command, arguments))

    def list(self) -> list[SecretInfo]:
        """Return the secrets this connection may know of."""
        return self._runner.run(self._client.list())

    def version(self) -> str:
        """Return the daemon's own version, such as "secretd 0.1.0"."""
        return self._runner.run(self._client.version())

    def read(self, object_id: str, *, format: Format = "raw") -> LockedBuffer:  # noqa: A002
        """Return a secret in locked memory; free it, or use it as a context manager, to wipe it."""
        return self._runner.run(self._client.read(object_id, format=format))

    def read_into(self, object_id: str, fd: int, *, format: Format = "raw") -> int:  # noqa: A002
        """Have the daemon write a secret to ``fd`` (borrowed); return its size in bytes."""
        return self._runner.run(self._client.read_into(object_id, fd, format=format))

    def seal(self, object_id: str, keyid: str) -> Sealed:
        """Return a secret encrypted under another, for QEMU's object-add."""
        return self._runner.run(self._client.seal(object_id, keyid))

    def events(self) -> Iterator[Event]:
        """Return the events as they come; waits for each. Those of before are not among them."""
        events = self._client.events()

        async def following() -> Event | None:
            return await anext(events, None)

        while not self._closed and (event := self._runner.run(following())) is not None:
            yield event

    def buffer(self, size: int) -> LockedBuffer:
        """Return locked memory of this process, for plaintext on its way in or out."""
        return self._client.buffer(size)
