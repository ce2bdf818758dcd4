# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client for programs without asyncio: blocking calls on a plain socket.

    with SyncClient("/run/secretd/control.sock") as client:
        client.generate("disk0", 32)
        with client.read("disk0") as plaintext:
            use(plaintext.view)

It has the methods of `aio.Client`, and its errors are qemu.qmp's, too. It starts no event loop and
no thread, and imports qemu.qmp only to raise one of these errors. secretctl uses it.

A lost connection is retried for ``retry_seconds``. A command that was not sent yet is then sent. A
command that was sent is repeated only if running it twice does no harm, and a few times at most.
"""

import contextlib
import os
import select
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

from secretd.client import types
from secretd.client.batch import Batch
from secretd.client.channel import Channel, Lost, OnWait, Pump, wait
from secretd.client.commands import SyncCommands
from secretd.client.content import Collected, give_memory
from secretd.client.plans import Ask, Plan, T
from secretd.client.socket_path import default_socket
from secretd.client.sync_connection import (
    RETRY_SECONDS,
    SAFE,
    SyncConnection,
    returned,
)
from secretd.client.types import (
    PLAIN,
    Encoding,
    Event,
    Format,
    OnChange,
    Sealed,
)
from secretd.memory.arena import SCRATCH_WINDOW, Arena, LockedBuffer
from secretd.memory.level import choose_level


class SyncClient(SyncCommands):
    """A connection to secretd. Use it as a context manager, or call `connect` and `close`."""

    def __init__(
        self,
        path: str | None = None,
        *,
        retry_seconds: float = RETRY_SECONDS,
        timeout: float | None = None,
        on_wait: OnWait | None = None,
    ) -> None:
        """Prepare a client; `connect` connects it.

        ``path``: the socket; the default is $SECRETD_SOCKET, else the control or the client socket.
        ``retry_seconds``: the time for which a lost connection is retried; 0 for never.
        ``timeout``: seconds for each answer, None for no limit. ``on_wait``: called with the reason
        of a wait that takes longer than 2 seconds.
        """
        self.path = default_socket() if path is None else path
        self._timeout = timeout
        self._connection = SyncConnection(self.path, retry_seconds, timeout, on_wait)
        self._arena: Arena | None = None

    # --- the connection

    def connect(self, *, retry_seconds: float = 0) -> None:
        """Connect and negotiate. Raises qemu.qmp's ConnectError.

        ``retry_seconds``: the time for which the first connection is retried, for a client that
        starts before the daemon.
        """
        self._connection.open(retry_seconds)

    def close(self) -> None:
        """Disconnect, and wipe the buffers that `read` returned: they read as zeros then."""
        self._connection.close()
        if self._arena is not None:
            arena, self._arena = self._arena, None
            arena.close()

    def __enter__(self) -> Self:
        try:
            self.connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def package(self) -> str:
        """The server's name in its greeting, such as "secretd 0.1.0"; "" while not connected."""
        return self._connection.package

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute any command and return its result. Raises ValueError for text that is not
        UTF-8.
        """
        types.check_text(arguments)
        return self._connection.again(
            lambda channel: returned(channel.exchange(command, arguments)),
            twice=bool(SAFE.fullmatch(command)),
        )

    def carry_out(self, plan: Plan[T]) -> T:
        """See SyncCommands."""
        answer: object = None
        error: Exception | None = None
        while True:
            try:
                ask = plan.send(answer) if error is None else plan.throw(error)
            except StopIteration as stop:
                return cast(T, stop.value)
            error = None
            try:
                answer = self._answer(ask)
            except Exception as raised:  # noqa: BLE001 - the plan decides
                error = raised

    def _answer(self, ask: Ask) -> object:
        if not ask.optional:
            return self.execute(ask.command, ask.arguments)
        types.check_text(ask.arguments)
        reply = self._connection.again(
            lambda channel: channel.exchange(ask.command, ask.arguments),
            twice=bool(SAFE.fullmatch(ask.command)),
        )
        return reply.get("return")

    # --- objects

    def add(
        self, object_id: str, fd: int, encoding: Encoding = PLAIN, *, replace: bool = False
    ) -> None:
        """Add a secret with the content of ``fd`` (borrowed).

        The daemon reads a file or memfd from its start, a pipe or socket to its end. ``replace``:
        an existing secret gets this content instead, in one step. Raises ExecuteError,
        ConnectError, and ExecInterruptedError if the secret may have been added.
        """
        self._add(object_id, fd, encoding, None, replace=replace)

    def add_bytes(
        self,
        object_id: str,
        plaintext: memoryview,
        encoding: Encoding = PLAIN,
        *,
        replace: bool = False,
    ) -> None:
        """Add a secret from memory, through a pipe; raises as `add` does."""
        rest = memoryview(plaintext)
        source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        ends = [source, sink]

        def write() -> bool:
            nonlocal rest
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.writev(sink, [rest]) :] if rest else rest
            if not rest:
                ends.remove(sink)
                os.close(sink)
            return not rest

        try:
            pump = Pump(sink, select.POLLOUT, write)
            self._add(object_id, source, encoding, pump, replace=replace)
        finally:
            for end in ends:
                os.close(end)

    def _add(
        self, object_id: str, fd: int, encoding: Encoding, pump: Pump | None, *, replace: bool
    ) -> None:
        options = {"qom-type": "secret", "id": object_id, **encoding.members()}
        types.check_text(options)
        exists = replace and self.info(object_id) is not None
        command = "secret-replace" if exists else "object-add"

        def once(channel: Channel) -> None:
            added = cast(dict[str, int], returned(channel.exchange("add-fd", None, [fd])))
            numbers = {"fdset-id": added["fdset-id"]}
            file = {"file": f"/dev/fdset/{added['fdset-id']}"}
            # From here on the content may be consumed, even if nothing was added.
            try:
                reply = channel.exchange(command, {**options, **file}, (), pump)
            except Lost as error:
                raise Lost(str(error), sent=error.sent or pump is not None) from None
            with contextlib.suppress(Lost):
                channel.exchange("remove-fd", numbers)
            returned(reply)

        self._connection.again(once, twice=False)

    # --- hand-over

    def read(self, object_id: str, *, format: Format = "raw") -> LockedBuffer:  # noqa: A002
        """Return a secret in locked memory; free it, or use it as a context manager, to wipe it.

        ``format``: "raw" or "base64". Raises ExecuteError, ConnectError, and ExecInterruptedError
        if all repetitions failed.
        """

        def once(channel: Channel) -> LockedBuffer:
            def deliver(sink: int, pump: Pump) -> int:
                return self._deliver(channel, object_id, format, sink, pump)

            return self._collect(deliver, lambda size: size)[0]

        types.check_text(object_id)
        return self._connection.again(once)

    def read_into(self, object_id: str, fd: int, *, format: Format = "raw") -> int:  # noqa: A002
        """Make the daemon write a secret to ``fd`` (borrowed); return its size in bytes.

        ``fd``: the write end of a pipe, an end of a stream socket pair, or a memfd, whose memory is
        allocated here. Raises ExecuteError, ConnectError, and ExecInterruptedError if it may have
        been written.
        """
        types.check_text(object_id)
        give_memory(fd, format)
        return self._connection.again(
            lambda channel: self._deliver(channel, object_id, format, fd, None), twice=False
        )

    def _deliver(
        self, channel: Channel, object_id: str, form: Format, fd: int, pump: Pump | None
    ) -> int:
        name = self._connection.pass_descriptor(channel, fd)
        arguments = {"id": object_id, "fdname": name, "format": form}
        reply = returned(channel.exchange("secret-read", arguments, (), pump))
        return cast(dict[str, int], reply)["size"]

    def backup_store(self, store_id: str, fd: int) -> int:
        """Write a copy of a store's database to ``fd`` (borrowed); return its size in bytes.

        The same keys open the copy. Raises ExecuteError, ConnectError and ExecInterruptedError.
        """

        def once(channel: Channel) -> int:
            name = self._connection.pass_descriptor(channel, fd)
            arguments = {"id": store_id, "fdname": name}
            reply = returned(channel.exchange("secret-store-backup", arguments))
            return cast(dict[str, int], reply)["size"]

        return self._connection.again(once, twice=False)

    def seal(self, object_id: str, keyid: str) -> Sealed:
        """Return a secret encrypted under another, for QEMU's object-add. Raises ExecuteError."""
        types.check_text([object_id, keyid])

        def once(channel: Channel) -> Sealed:
            def deliver(sink: int, pump: Pump) -> dict[str, Any]:
                arguments = {
                    "id": object_id,
                    "keyid": keyid,
                    "fdname": self._connection.pass_descriptor(channel, sink),
                }
                reply = returned(channel.exchange("secret-seal", arguments, (), pump))
                return cast("dict[str, Any]", reply)

            data, reply = self._collect(deliver, lambda reply: int(reply["size"]))
            with data:
                return Sealed(str(data.view, "ascii"), reply["iv"])

        return self._connection.again(once)

    def _collect(
        self, deliver: Callable[[int, Pump], T], size_of: Callable[[T], int]
    ) -> tuple[LockedBuffer, T]:
        """Return the bytes that ``deliver`` makes the daemon write, in locked memory, and its
        result.

        ``size_of``: returns the number of bytes that the result announces.
        """
        source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        ends = [source, sink]
        collected = Collected(self.buffer)
        try:
            result = deliver(sink, Pump(source, select.POLLIN, lambda: collected.fill(source)))
            ends.remove(sink)
            os.close(sink)
            size = size_of(result)
            while not collected.fill(source) and collected.size < size:
                if not wait(source, select.POLLIN, self._timeout):
                    raise TimeoutError(f"The secret did not end within {self._timeout:g} seconds")
            return collected.take(), result
        finally:
            collected.free()
            for end in ends:
                os.close(end)

    # --- many at once

    def batch(self, buffer: LockedBuffer) -> Batch:
        """Return a `Batch` on the present connection, whose lines are built in ``buffer``."""
        return Batch(self._connection.present(), buffer)

    # --- events

    def events(
        self, *, names: Sequence[str] = (), on_change: OnChange | None = None
    ) -> Iterator[Event]:
        """Yield events from now on, until the client is closed; with ``names`` only those.

        Events during a reconnection are missing; SECRET_EVENTS_LOST reports those that secretd
        dropped. ``on_change``: called with False when the connection is lost, and with True once
        there is another one.
        """
        arguments: dict[str, object] = {"enable": True, **({"events": [*names]} if names else {})}
        subscribed: Channel | None = None
        connection = self._connection
        while connection.is_open:
            if connection.channel is None or connection.channel is not subscribed:
                self.execute("secret-events", arguments)
                if subscribed is not None and on_change is not None:
                    on_change(True)
                subscribed = connection.channel
            assert subscribed is not None
            message = subscribed.event()
            if message is None:
                connection.disconnect()
                if on_change is not None:
                    on_change(False)
            else:
                yield types.event_of(message)

    def buffer(self, size: int) -> LockedBuffer:
        """Return locked memory of this process, for plaintext on its way in or out."""
        if self._arena is None:
            self._arena = Arena(choose_level(require=False), window=SCRATCH_WINDOW)
        return self._arena.allocate(size)


__all__ = ["RETRY_SECONDS", "SAFE", "SyncClient", "give_memory"]
