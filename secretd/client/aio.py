# SPDX-License-Identifier: LGPL-2.1-or-later
"""An asyncio client: secretd's commands over qemu.qmp's QMPClient, and plaintext through pipes.

Plaintext never stands in JSON: `add` passes a descriptor that the daemon reads, `read` one that it
writes, into locked memory of this process. Errors are qemu.qmp's: `ConnectError`, `ExecuteError`,
`ExecInterruptedError`, `StateError`. Used by ctl, and by programs that keep their secrets in secretd.

    async with Client("/run/secretd/control.sock") as client:
        await client.generate("disk0", 32)
        with await client.read("disk0") as plaintext:
            use(plaintext.view)

When the daemon goes away, as it does for a restart or an upgrade, the client connects again by itself.
What was not sent yet is sent then; what was sent without an answer is done again where doing it twice is
as good as once (reading, listing, sealing, expire), and is an ExecInterruptedError otherwise: it may have
been done. (Of a grant with max-reads a read that is done again uses up two.)
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, Self, cast

from qemu.qmp import ExecInterruptedError, StateError

from secretd.client.connection import RETRY_SECONDS, Connection, default_socket
from secretd.fds import Fd
from secretd.memory import SCRATCH_WINDOW, Arena, LockedBuffer, choose_level

Format = Literal["raw", "base64"]

_CHUNK_BYTES: Final = 64 << 10


class SecretInfo(NamedTuple):
    """One line of query-secrets. ``size`` is bytes, ``memory`` secretmem, mlock or none; ``expires_in`` the
    seconds that are left, None where time is not limited.
    """

    id: str
    qom_type: str
    size: int
    memory: str
    expires_in: int | None = None


class Sealed(NamedTuple):
    """What secret-seal returns: AES-256-CBC ciphertext and its IV, both in base64."""

    data: str
    iv: str


class Event(NamedTuple):
    """Something that happened (docs/protocol.md, "Events"). ``id``: of the secret, "" where it is about
    none; ``peer``: who did it, as uid, gid, pid and unit, None if nobody did or it is not told;
    ``time``: seconds since the epoch.
    """

    name: str
    id: str
    peer: dict[str, object] | None
    time: float
    data: dict[str, object]


class Encoding(NamedTuple):
    """How the content of a secret to be added is encoded: base64 or not, encrypted under ``keyid`` or
    not. ``iv`` is base64.
    """

    format: Format = "raw"
    keyid: str | None = None
    iv: str | None = None


PLAIN: Final = Encoding()


class Client:
    """A connection to secretd. Use it as an async context manager, or call `connect` and `close`."""

    def __init__(self, path: str | None = None, *, retry_seconds: float = RETRY_SECONDS) -> None:
        """``path``: the socket; default $SECRETD_SOCKET, else the control or the client socket.
        ``retry_seconds``: for how long a connection that was lost is made anew; 0 for not at all.
        """
        self.path = path or default_socket()
        self._connection = Connection(self.path, retry_seconds)
        self._names = 0
        self._arena: Arena | None = None

    async def connect(self) -> None:
        """Connect and negotiate. Raises qemu.qmp's ConnectError; the first time nothing is tried again."""
        await self._connection.connect()

    async def close(self) -> None:
        """Disconnect, and wipe what `read` returned: it reads as zeros then."""
        try:
            await self._connection.close()
        finally:
            if self._arena is not None:
                arena, self._arena = self._arena, None
                arena.close()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # --- objects

    async def add(self, object_id: str, fd: int, encoding: Encoding = PLAIN) -> None:
        """Add a secret whose content the daemon reads from ``fd`` (borrowed): a file or memfd from its
        start, a pipe or socket to its end.
        """
        options = {n: value for n, value in encoding._asdict().items() if value is not None}

        async def once() -> None:
            added = await self._connection.again(lambda: self._connection.pass_fd(fd, "add-fd"))
            # On another connection there is no such set.
            set_id = cast(dict[str, int], added)["fdset-id"]
            file = {"file": f"/dev/fdset/{set_id}"}
            try:
                await self._connection.qmp.execute(
                    "object-add", {"qom-type": "secret", "id": object_id, **file, **options}
                )
            finally:
                with contextlib.suppress(StateError, ExecInterruptedError):
                    await self._connection.qmp.execute("remove-fd", {"fdset-id": set_id})

        await self._connection.again(once, twice=False)

    async def add_bytes(
        self, object_id: str, plaintext: memoryview, encoding: Encoding = PLAIN
    ) -> None:
        """Add a secret from memory, through a pipe."""
        source, number = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        sink = Fd(number)
        writing = asyncio.ensure_future(_write_all(sink, plaintext))
        try:
            await self.add(object_id, source, encoding)
        finally:
            os.close(source)
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            sink.close()

    async def generate(self, object_id: str, size: int = 32) -> None:
        """Add a secret of ``size`` random bytes."""
        await self._connection.execute("secret-generate", {"id": object_id, "size": size})

    async def delete(self, object_id: str) -> None:
        """Remove an object; its plaintext is wiped when this returns."""
        await self._connection.execute("object-del", {"id": object_id})

    async def expire(self, object_id: str, seconds: int) -> None:
        """Have a secret wiped after so many seconds from now."""
        await self._connection.execute("secret-expire", {"id": object_id, "after": seconds})

    async def explain(self, object_id: str, identities: "list[str]") -> dict[str, object]:
        """Return secret-explain's answer: may a client with these identities read a secret, and why?"""
        arguments = {"id": object_id, "peer": identities}
        return cast(dict[str, object], await self._connection.execute("secret-explain", arguments))

    async def stat(self, name: str) -> int:
        """Return one figure of query-secret-stats; KeyError if there is none of that name."""
        parts = cast(
            "list[dict[str, list[dict[str, Any]]]]",
            await self._connection.execute("query-secret-stats"),
        )
        return {s["name"]: int(s["value"]) for part in parts for s in part["stats"]}[name]

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute any command; return what it returns."""
        return await self._connection.execute(command, arguments)

    async def list(self) -> list[SecretInfo]:
        """Return the secrets this connection may know of."""
        found: list[SecretInfo] = []
        while True:
            after: dict[str, object] = {"after": found[-1].id} if found else {}
            secrets = cast(
                "list[dict[str, Any]]", await self._connection.execute("query-secrets", after)
            )
            if not secrets:
                return found
            found += [
                SecretInfo(s["id"], s["qom-type"], s["size"], s["memory"], s.get("expires-in"))
                for s in secrets
            ]

    async def version(self) -> str:
        """Return the daemon's own version, such as "secretd 0.1.0"."""
        return cast(dict[str, str], await self._connection.execute("query-version"))["package"]

    # --- hand-over

    async def read(self, object_id: str, *, format: Format = "raw") -> LockedBuffer:  # noqa: A002
        """Return a secret in locked memory; free it, or use it as a context manager, to wipe it."""
        return await self._connection.again(lambda: self._read(object_id, format))

    async def _read(self, object_id: str, format: Format) -> LockedBuffer:  # noqa: A002
        source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        reading = asyncio.ensure_future(self._read_all(source))
        try:
            try:
                size = await self._read_into(object_id, sink, format)
            finally:
                os.close(sink)
            buffer = await reading
            assert buffer.size == size
            return buffer
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            os.close(source)

    async def read_into(
        self,
        object_id: str,
        fd: int,
        *,
        format: Format = "raw",  # noqa: A002 - QEMU's word
    ) -> int:
        """Have the daemon write a secret to ``fd`` (borrowed): the write end of a pipe, an end of a
        stream socket pair, or a memfd. Returns its size in bytes.
        """
        name = await self._connection.again(lambda: self._named(fd))
        return await self._deliver(object_id, name, format)

    async def _read_into(self, object_id: str, fd: int, format: Format) -> int:  # noqa: A002
        return await self._deliver(object_id, await self._named(fd), format)

    async def _named(self, fd: int) -> str:
        """Have a descriptor named; return the name."""
        self._names += 1
        name = f"secretd-client-{self._names}"
        await self._connection.pass_fd(fd, "getfd", {"fdname": name})
        return name

    async def _deliver(self, object_id: str, name: str, format: Format) -> int:  # noqa: A002
        arguments = {"id": object_id, "fdname": name, "format": format}
        return cast(dict[str, int], await self._connection.qmp.execute("secret-read", arguments))[
            "size"
        ]

    async def seal(self, object_id: str, keyid: str) -> Sealed:
        """Return a secret encrypted under another, for QEMU's object-add."""
        arguments = {"id": object_id, "keyid": keyid}
        reply = cast(dict[str, str], await self._connection.execute("secret-seal", arguments))
        return Sealed(reply["data"], reply["iv"])

    # --- events

    async def events(self) -> AsyncIterator[Event]:
        """Return the events as they come, from now on, until the client is closed. What happened while
        the connection was made anew is missing; SECRET_EVENTS_LOST tells of what secretd has dropped.
        """
        with self._connection.qmp.listener() as listener:
            while not self._connection.is_closed:
                coming = asyncio.ensure_future(listener.get())
                ending = asyncio.ensure_future(self._connection.qmp.runstate_changed())
                try:
                    await asyncio.wait({coming, ending}, return_when="FIRST_COMPLETED")
                    if coming.done():
                        yield _event(coming.result())
                        continue
                finally:
                    coming.cancel()
                    ending.cancel()
                if not self._connection.is_closed:
                    await self._connection.execute(
                        "query-version"
                    )  # which connects again, or says why not

    # --- inside

    def buffer(self, size: int) -> LockedBuffer:
        """Return locked memory of this process, for plaintext on its way in or out."""
        if self._arena is None:
            self._arena = Arena(choose_level(require=False), window=SCRATCH_WINDOW)
        return self._arena.allocate(size)

    async def _read_all(self, fd: int) -> LockedBuffer:
        buffer = self.buffer(_CHUNK_BYTES)
        fill = 0
        try:
            while True:
                if fill == buffer.size:
                    larger = self.buffer(4 * fill)
                    larger.view[:fill] = buffer.view
                    buffer.free()
                    buffer = larger
                try:
                    count = os.readv(fd, [buffer.view[fill:]])
                except BlockingIOError:
                    await readable(fd)
                    continue
                if count == 0:
                    exact = self.buffer(fill)
                    exact.view[:] = buffer.view[:fill]
                    return exact
                fill += count
        finally:
            buffer.free()


def _event(message: Mapping[str, object]) -> Event:
    data = cast("dict[str, Any]", message.get("data", {}))
    stamp = cast("dict[str, int]", message["timestamp"])
    seconds = stamp["seconds"] + stamp["microseconds"] / 1e6
    return Event(str(message["event"]), str(data.get("id", "")), data.get("peer"), seconds, data)


async def _write_all(sink: Fd, data: memoryview) -> None:
    loop = asyncio.get_running_loop()
    while data:
        try:
            data = data[os.writev(sink.fileno(), [data]) :]
        except BlockingIOError:
            await _ready(sink.fileno(), loop.add_writer, loop.remove_writer)
    sink.close()


async def readable(fd: int) -> None:
    """Wait until a pipe, socket or terminal has something to read."""
    loop = asyncio.get_running_loop()
    await _ready(fd, loop.add_reader, loop.remove_reader)


async def _ready(
    fd: int,
    add: Callable[..., object],
    remove: Callable[[int], object],
) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    add(fd, _settle, future)
    try:
        await future
    finally:
        remove(fd)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
