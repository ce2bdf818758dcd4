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
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar, cast

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    QMPClient,
    QMPError,
    StateError,
)

from secretd import paths
from secretd.fds import Fd
from secretd.memory import SCRATCH_WINDOW, Arena, LockedBuffer, choose_level

R = TypeVar("R")

RETRY_SECONDS: Final = 30.0
"""Seconds for which a connection that was lost is made anew before that is an error."""

_RETRY_EACH: Final = 0.05
_SAFE: Final = re.compile("query-.*|qom-(list|get).*|secret-(seal|explain|expire)")
"""Commands that may be carried out twice."""

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
        self._retry_seconds = retry_seconds
        self._qmp = QMPClient("secretd")
        # Of all events it keeps a list that nobody reads.
        self._qmp.events.event_filter = lambda _event: False
        self._connecting = asyncio.Lock()
        self._connection = 0  # how often it was made anew
        self._closed = asyncio.Event()
        self._passing = asyncio.Lock()
        self._names = 0
        self._arena: Arena | None = None

    async def connect(self) -> None:
        """Connect and negotiate. Raises qemu.qmp's ConnectError; the first time nothing is tried again."""
        self._closed.clear()
        await self._qmp.connect(self.path)

    async def close(self) -> None:
        """Disconnect, and wipe what `read` returned: it reads as zeros then."""
        self._closed.set()
        try:
            async with self._connecting:  # which ends soon now
                await self._disconnect()
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
            added = await self._again(lambda: self._pass(fd, "add-fd"))
            # On another connection there is no such set.
            set_id = cast(dict[str, int], added)["fdset-id"]
            file = {"file": f"/dev/fdset/{set_id}"}
            try:
                await self._qmp.execute(
                    "object-add", {"qom-type": "secret", "id": object_id, **file, **options}
                )
            finally:
                with contextlib.suppress(StateError, ExecInterruptedError):
                    await self._qmp.execute("remove-fd", {"fdset-id": set_id})

        await self._again(once, twice=False)

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
        await self._execute("secret-generate", {"id": object_id, "size": size})

    async def delete(self, object_id: str) -> None:
        """Remove an object; its plaintext is wiped when this returns."""
        await self._execute("object-del", {"id": object_id})

    async def expire(self, object_id: str, seconds: int) -> None:
        """Have a secret wiped after so many seconds from now."""
        await self._execute("secret-expire", {"id": object_id, "after": seconds})

    async def explain(self, object_id: str, identities: "list[str]") -> dict[str, object]:
        """Return secret-explain's answer: may a client with these identities read a secret, and why?"""
        arguments = {"id": object_id, "peer": identities}
        return cast(dict[str, object], await self._execute("secret-explain", arguments))

    async def stat(self, name: str) -> int:
        """Return one figure of query-secret-stats; KeyError if there is none of that name."""
        parts = cast(
            "list[dict[str, list[dict[str, Any]]]]", await self._execute("query-secret-stats")
        )
        return {s["name"]: int(s["value"]) for part in parts for s in part["stats"]}[name]

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute any command; return what it returns."""
        return await self._execute(command, arguments)

    async def list(self) -> list[SecretInfo]:
        """Return the secrets this connection may know of."""
        found: list[SecretInfo] = []
        while True:
            after: dict[str, object] = {"after": found[-1].id} if found else {}
            secrets = cast("list[dict[str, Any]]", await self._execute("query-secrets", after))
            if not secrets:
                return found
            found += [
                SecretInfo(s["id"], s["qom-type"], s["size"], s["memory"], s.get("expires-in"))
                for s in secrets
            ]

    async def version(self) -> str:
        """Return the daemon's own version, such as "secretd 0.1.0"."""
        return cast(dict[str, str], await self._execute("query-version"))["package"]

    # --- hand-over

    async def read(self, object_id: str, *, format: Format = "raw") -> LockedBuffer:  # noqa: A002
        """Return a secret in locked memory; free it, or use it as a context manager, to wipe it."""
        return await self._again(lambda: self._read(object_id, format))

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
        name = await self._again(lambda: self._named(fd))
        return await self._deliver(object_id, name, format)

    async def _read_into(self, object_id: str, fd: int, format: Format) -> int:  # noqa: A002
        return await self._deliver(object_id, await self._named(fd), format)

    async def _named(self, fd: int) -> str:
        """Have a descriptor named; return the name."""
        self._names += 1
        name = f"secretd-client-{self._names}"
        await self._pass(fd, "getfd", {"fdname": name})
        return name

    async def _deliver(self, object_id: str, name: str, format: Format) -> int:  # noqa: A002
        arguments = {"id": object_id, "fdname": name, "format": format}
        return cast(dict[str, int], await self._qmp.execute("secret-read", arguments))["size"]

    async def seal(self, object_id: str, keyid: str) -> Sealed:
        """Return a secret encrypted under another, for QEMU's object-add."""
        arguments = {"id": object_id, "keyid": keyid}
        reply = cast(dict[str, str], await self._execute("secret-seal", arguments))
        return Sealed(reply["data"], reply["iv"])

    # --- events

    async def events(self) -> AsyncIterator[Event]:
        """Return the events as they come, from now on, until the client is closed. What happened while
        the connection was made anew is missing; SECRET_EVENTS_LOST tells of what secretd has dropped.
        """
        with self._qmp.listener() as listener:
            while not self._closed.is_set():
                coming = asyncio.ensure_future(listener.get())
                ending = asyncio.ensure_future(self._qmp.runstate_changed())
                try:
                    await asyncio.wait({coming, ending}, return_when="FIRST_COMPLETED")
                    if coming.done():
                        yield _event(coming.result())
                        continue
                finally:
                    coming.cancel()
                    ending.cancel()
                if not self._closed.is_set():
                    await self._execute("query-version")  # which connects again, or says why not

    # --- inside

    async def _execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        return await self._again(
            lambda: self._qmp.execute(command, arguments), twice=bool(_SAFE.fullmatch(command))
        )

    async def _pass(
        self, fd: int, command: str, arguments: Mapping[str, object] | None = None
    ) -> object:
        """Pass a descriptor with a command."""
        async with self._passing:
            self._qmp.send_fd_scm(fd)
            return await self._qmp.execute(command, arguments)

    async def _again(self, once: Callable[[], Awaitable[R]], *, twice: bool = True) -> R:
        """Return what ``once`` returns, after connecting again if need be. ``twice``: it may be done
        twice.
        """
        loop = asyncio.get_running_loop()
        deadline: float | None = None
        while True:
            connection = self._connection
            try:
                return await once()
            except (StateError, ExecInterruptedError, ConnectionError) as error:
                if deadline is None:
                    deadline = loop.time() + self._retry_seconds
                sent = isinstance(error, ExecInterruptedError)
                if self._closed.is_set() or loop.time() >= deadline or (sent and not twice):
                    raise
                await self._reconnect(connection, deadline)

    async def _reconnect(self, connection: int, deadline: float) -> None:
        """Make the connection anew, unless somebody has by then; raises ConnectError."""
        async with self._connecting:
            while connection == self._connection:
                await self._disconnect()
                try:
                    # A socket of systemd's takes connections that nobody answers yet.
                    await self._unless_closed(self._qmp.connect(self.path), deadline)
                    self._connection += 1
                except ConnectError:
                    closed = self._closed.wait()
                    with contextlib.suppress(ConnectError):
                        await self._unless_closed(closed, self._loop_time() + _RETRY_EACH)
                    if self._closed.is_set() or self._loop_time() >= deadline:
                        raise

    async def _unless_closed(self, waited: Coroutine[Any, Any, object], deadline: float) -> None:
        """Wait for something until the deadline, or until the client is closed; raises ConnectError
        then.
        """
        task = asyncio.ensure_future(waited)
        closed = asyncio.ensure_future(self._closed.wait())
        try:
            seconds = max(0.0, deadline - self._loop_time())
            await asyncio.wait({task, closed}, timeout=seconds, return_when="FIRST_COMPLETED")
            if not task.done():
                raise ConnectError("no answer", TimeoutError())
            task.result()
        finally:
            for each in (task, closed):
                each.cancel()
            await asyncio.gather(task, closed, return_exceptions=True)

    @staticmethod
    def _loop_time() -> float:
        return asyncio.get_running_loop().time()

    async def _disconnect(self) -> None:
        # What ended the connection comes out here; that it has ended is known.
        with contextlib.suppress(EOFError, OSError, QMPError):
            await self._qmp.disconnect()

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


def default_socket() -> str:
    """Return $SECRETD_SOCKET, else the control socket's default path if this user may use it, else
    the client socket's.
    """
    given = os.environ.get("SECRETD_SOCKET")
    if given:
        return given
    control = paths.control_path()
    for path in (control, paths.client_path(), "/run/secretd/client.sock"):
        if os.access(path, os.W_OK) and paths.is_trusted(os.path.dirname(path)):
            return path
    return control
