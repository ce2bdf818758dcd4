# SPDX-License-Identifier: LGPL-2.1-or-later
"""The asyncio client: secretd's commands over qemu.qmp's QMPClient, and plaintext through pipes.

Plaintext never appears in JSON: `add` passes a descriptor that the daemon reads, and `read` one
that it writes, into locked memory of this process. Errors are qemu.qmp's: `ConnectError`,
`ExecuteError`, `ExecInterruptedError`, `StateError`.

    async with Client("/run/secretd/control.sock") as client:
        await client.generate("disk0", 32)
        with await client.read("disk0") as plaintext:
            use(plaintext.view)

When the daemon restarts, the client reconnects by itself. A command that was not sent yet is then
sent. A command that was sent without an answer is repeated if running it twice does no harm
(reading, listing, sealing, expire), and raises ExecInterruptedError otherwise, since it may have
run. A repeated read uses up two reads of a grant with max-reads.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from io import FileIO
from typing import Self, cast

from qemu.qmp import ExecInterruptedError, ExecuteError, StateError

from secretd.client import types
from secretd.client.commands import AsyncCommands
from secretd.client.connection import Connection
from secretd.client.content import Collected, give_memory
from secretd.client.plans import Plan, T
from secretd.client.readiness import readable, ready
from secretd.client.socket_path import default_socket
from secretd.client.sync_connection import RETRY_SECONDS
from secretd.client.types import (
    PLAIN,
    Encoding,
    Event,
    Format,
    OnChange,
    Sealed,
)
from secretd.memory.arena import (
    SCRATCH_WINDOW,
    Arena,
    LockedBuffer,
)
from secretd.memory.level import choose_level


class Client(AsyncCommands):
    """A connection to secretd.

    Use it as an async context manager, or call `connect` and `close`.
    """

    def __init__(self, path: str | None = None, *, retry_seconds: float = RETRY_SECONDS) -> None:
        """Prepare a client; `connect` connects it.

        ``path``: the socket; the default is $SECRETD_SOCKET, else the control or the client socket.
        ``retry_seconds``: the time for which a lost connection is retried; 0 for never.
        """
        self.path = default_socket() if path is None else path
        self._connection = Connection(self.path, retry_seconds)
        self._names = 0
        self._arena: Arena | None = None

    async def connect(self, *, retry_seconds: float = 0) -> None:
        """Connect and negotiate. Raises qemu.qmp's ConnectError.

        ``retry_seconds``: the time for which the first connection is retried, for a client that
        starts before the daemon.
        """
        await self._connection.connect(retry_seconds)

    async def close(self) -> None:
        """Disconnect, and wipe the buffers that `read` returned: they read as zeros then."""
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

    async def carry_out(self, plan: Plan[T]) -> T:
        """See AsyncCommands."""
        answer: object = None
        error: Exception | None = None
        while True:
            try:
                ask = plan.send(answer) if error is None else plan.throw(error)
            except StopIteration as stop:
                return cast(T, stop.value)
            error = None
            try:
                answer = await self._connection.execute(ask.command, ask.arguments)
            except ExecuteError as refused:
                answer, error = None, None if ask.optional else refused
            except Exception as raised:  # noqa: BLE001 - the plan decides
                error = raised

    # --- objects

    async def add(
        self, object_id: str, fd: int, encoding: Encoding = PLAIN, *, replace: bool = False
    ) -> None:
        """Add a secret with the content of ``fd`` (borrowed).

        The daemon reads a file or memfd from its start, a pipe or socket to its end. ``replace``:
        an existing secret gets this content instead, in one step. Raises ExecuteError,
        ConnectError, and ExecInterruptedError if the secret may have been added.
        """
        options = {"id": object_id, **encoding.members()}
        types.check_text(options)
        exists = replace and await self.info(object_id) is not None
        command = "secret-replace" if exists else "object-add"

        async def once() -> None:
            added = await self._connection.again(lambda: self._connection.pass_fd(fd, "add-fd"))
            # Another connection does not have this set.
            set_id = cast(dict[str, int], added)["fdset-id"]
            file = {"file": f"/dev/fdset/{set_id}"}
            try:
                await self._connection.qmp.execute(
                    command, {"qom-type": "secret", **file, **options}
                )
            finally:
                with contextlib.suppress(StateError, ExecInterruptedError):
                    await self._connection.qmp.execute("remove-fd", {"fdset-id": set_id})

        await self._connection.again(once, twice=False)

    async def add_bytes(
        self,
        object_id: str,
        plaintext: memoryview,
        encoding: Encoding = PLAIN,
        *,
        replace: bool = False,
    ) -> None:
        """Add a secret from memory, through a pipe; raises as `add` does."""
        content = memoryview(plaintext)
        source, number = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        sink = FileIO(number, "wb")  # closed below, or after the last byte
        writing = asyncio.ensure_future(_write_all(sink, content))
        try:
            await self.add(object_id, source, encoding, replace=replace)
        finally:
            os.close(source)
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
            sink.close()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute any command and return its result. Raises ValueError for text that is not
        UTF-8.
        """
        return await self._connection.execute(command, arguments)

    # --- hand-over

    async def read(self, object_id: str, *, format: Format = "raw") -> LockedBuffer:  # noqa: A002
        """Return a secret in locked memory; free it, or use it as a context manager, to wipe it.

        ``format``: "raw" or "base64". Raises ExecuteError, ConnectError, StateError, and
        ExecInterruptedError if all repetitions failed.
        """
        types.check_text(object_id)
        return await self._connection.again(
            lambda: self._collect(lambda sink: self._read_into(object_id, sink, format))
        )

    async def _collect(self, deliver: Callable[[int], Awaitable[object]]) -> LockedBuffer:
        """Return the bytes that secretd writes to the descriptor given to ``deliver``."""
        source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        reading = asyncio.ensure_future(self._read_all(source))
        try:
            try:
                await deliver(sink)
            finally:
                os.close(sink)
            return await reading
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
        """Make the daemon write a secret to ``fd`` (borrowed); return its size in bytes.

        ``fd``: the write end of a pipe, an end of a stream socket pair, or a memfd, whose memory is
        allocated here. Raises ExecuteError, ConnectError, StateError, and ExecInterruptedError if
        it may have been written.
        """
        types.check_text(object_id)
        give_memory(fd, format)
        name = await self._connection.again(lambda: self._named(fd))
        return await self._deliver(object_id, name, format)

    async def _read_into(self, object_id: str, fd: int, format: Format) -> int:  # noqa: A002
        return await self._deliver(object_id, await self._named(fd), format)

    async def _named(self, fd: int) -> str:
        """Name a descriptor on the connection; return the name."""
        self._names += 1
        name = f"secretd-client-{self._names}"
        await self._connection.pass_fd(fd, "getfd", {"fdname": name})
        return name

    async def _deliver(self, object_id: str, name: str, format: Format) -> int:  # noqa: A002
        arguments = {"id": object_id, "fdname": name, "format": format}
        return cast(dict[str, int], await self._connection.qmp.execute("secret-read", arguments))[
            "size"
        ]

    async def backup_store(self, store_id: str, fd: int) -> int:
        """Write a copy of a store's database to ``fd`` (borrowed); return its size in bytes.

        The same keys open the copy. Raises ExecuteError, ConnectError and StateError.
        """
        name = await self._connection.again(lambda: self._named(fd))
        arguments = {"id": store_id, "fdname": name}
        copied = await self._connection.qmp.execute("secret-store-backup", arguments)
        return cast(dict[str, int], copied)["size"]

    async def seal(self, object_id: str, keyid: str) -> Sealed:
        """Return a secret encrypted under another, for QEMU's object-add. Raises ExecuteError."""
        types.check_text([object_id, keyid])

        async def once() -> Sealed:
            replies: list[dict[str, str]] = []

            async def deliver(sink: int) -> None:
                name = await self._named(sink)
                arguments = {"id": object_id, "keyid": keyid, "fdname": name}
                reply = await self._connection.qmp.execute("secret-seal", arguments)
                replies.append(cast(dict[str, str], reply))

            with await self._collect(deliver) as data:
                return Sealed(str(data.view, "ascii"), replies[0]["iv"])

        return await self._connection.again(once)

    # --- events

    async def events(
        self, *, names: Sequence[str] = (), on_change: OnChange | None = None
    ) -> AsyncIterator[Event]:
        """Yield events from now on, until the client is closed; with ``names`` only those.

        Events during a reconnection are missing; SECRET_EVENTS_LOST reports those that secretd
        dropped. ``on_change``: called with False when the connection is lost, and with True once
        there is another one.
        """
        arguments: dict[str, object] = {"enable": True, **({"events": [*names]} if names else {})}
        changed = on_change or (lambda _connected: None)
        subscribed, lost = -1, False
        with self._connection.qmp.listener() as listener:
            while not self._connection.is_closed:
                if subscribed != self._connection.number:
                    # This reconnects, or raises the reason.
                    await self._connection.execute("secret-events", arguments)
                    subscribed = self._connection.number
                    if lost:
                        changed(True)
                    lost = False
                coming = asyncio.ensure_future(listener.get())
                ending = asyncio.ensure_future(self._connection.qmp.runstate_changed())
                try:
                    await asyncio.wait({coming, ending}, return_when="FIRST_COMPLETED")
                    if coming.done():
                        yield types.event_of(coming.result())
                        continue
                finally:
                    coming.cancel()
                    ending.cancel()
                subscribed, lost = -1, True
                changed(False)

    # --- inside

    def buffer(self, size: int) -> LockedBuffer:
        """Return locked memory of this process, for plaintext on its way in or out."""
        if self._arena is None:
            self._arena = Arena(choose_level(require=False), window=SCRATCH_WINDOW)
        return self._arena.allocate(size)

    async def _read_all(self, fd: int) -> LockedBuffer:
        collected = Collected(self.buffer)
        try:
            while not collected.fill(fd):
                await readable(fd)
            return collected.take()
        finally:
            collected.free()


async def _write_all(sink: FileIO, data: memoryview) -> None:
    loop = asyncio.get_running_loop()
    while data:
        try:
            data = data[os.writev(sink.fileno(), [data]) :]
        except BlockingIOError:
            await ready(sink.fileno(), loop.add_writer, loop.remove_writer)
    sink.close()
