# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client for programs without asyncio: blocking calls on a plain socket.

    with SyncClient("/run/secretd/control.sock") as client:
        client.generate("disk0", 32)
        with client.read("disk0") as plaintext:
            use(plaintext.view)

It has the methods of `aio.Client`, and its errors are qemu.qmp's, too. It starts no event loop and
no thread, and imports qemu.qmp only when it raises one of these errors. secretctl is made with it.

A connection that was lost is made anew for ``retry_seconds``. A command that had not been sent is
sent then; one that had been sent is sent again only where carrying it out twice does no harm, and a
few times at most.
"""

import contextlib
import fcntl
import os
import re
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, Self, TypeVar, cast

from secretd.client import types
from secretd.client.channel import Channel, Lost, Message, OnWait, Pump, Refused, wait
from secretd.client.socket_path import default_socket
from secretd.client.types import PLAIN, Encoding, Event, Format, Sealed, SecretInfo
from secretd.memory.arena import (
    SCRATCH_WINDOW,
    Arena,
    LockedBuffer,
)
from secretd.memory.level import choose_level

T = TypeVar("T")

RETRY_SECONDS: Final = 30.0
"""Seconds for which a connection that was lost is made anew before that is an error."""

SAME_FAILURES: Final = 4
"""How often a command may end a fresh connection before that is an error."""

LARGEST_CONTENT: Final = 1 << 20
"""Bytes that a memfd is given before it is passed; in base64 a third more."""

SAFE: Final = re.compile("query-.*|qom-(list|get).*|secret-(seal|explain|expire|events)")
"""Commands that may be carried out twice."""

_RETRY_EACH: Final = 0.05
_CHUNK_BYTES: Final = 64 << 10
_F_GET_SEALS: Final = 1034


class SyncClient:
    """A connection to secretd. Use it as a context manager, or call `connect` and `close`."""

    def __init__(
        self,
        path: str | None = None,
        *,
        retry_seconds: float = RETRY_SECONDS,
        timeout: float | None = None,
        on_wait: OnWait | None = None,
    ) -> None:
        """``path``: the socket; default $SECRETD_SOCKET, else the control or the client socket.
        ``retry_seconds``: for how long a connection that was lost is made anew; 0 for not at all.
        ``timeout``: seconds that each answer may take, None for any time. ``on_wait`` is called
        with what is waited for once that takes longer than 2 seconds.
        """
        self.path = default_socket() if path is None else path
        self._retry_seconds = retry_seconds
        self._timeout = timeout
        self._on_wait = on_wait
        self._channel: Channel | None = None
        self._open = False
        self._names = 0
        self._arena: Arena | None = None

    # --- the connection

    def connect(self) -> None:
        """Connect and negotiate. Raises ConnectError; the first time nothing is tried again."""
        self._open = True
        try:
            self._connect()
        except _UnreachableError as error:
            _connect_error(error)

    def _connect(self) -> Channel:
        self._disconnect()
        try:
            self._channel = Channel(self.path, self._timeout, self._on_wait)
        except Refused as error:
            raise _UnreachableError("Refused by the server", error) from None
        except (OSError, Lost) as error:
            raise _UnreachableError("Failed to establish connection", error) from None
        return self._channel

    def _disconnect(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def close(self) -> None:
        """Disconnect, and wipe what `read` returned: it reads as zeros then."""
        self._open = False
        self._disconnect()
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
        """What the server calls itself in its greeting, such as "secretd 0.1.0"; "" while not
        connected.
        """
        return self._channel.package if self._channel is not None else ""

    def _again(self, once: Callable[[Channel], T], *, twice: bool = True) -> T:
        """Return what ``once`` returns, after connecting again if need be. ``twice``: it may be
        carried out twice.
        """
        deadline: float | None = None
        failures = 0
        while True:
            if not self._open:
                _state_error()
            lost: Lost | _UnreachableError
            try:
                channel = self._channel or self._connect()
                return once(channel)
            except Lost as error:
                self._disconnect()
                lost = error
                if error.sent:
                    failures += 1
                    if not twice or failures >= SAME_FAILURES:
                        _interrupted(error)
            except _UnreachableError as error:
                lost = error
                if isinstance(error.cause, Refused | TimeoutError):
                    _connect_error(error)
            except TimeoutError as error:
                self._disconnect()  # the reply would be taken for the next command's
                _connect_error(_UnreachableError("No answer", error))
            now = time.monotonic()
            if deadline is None:
                deadline = now + self._retry_seconds
            if now >= deadline:
                if isinstance(lost, _UnreachableError):
                    _connect_error(lost)
                _interrupted(lost)
            if isinstance(lost, _UnreachableError) or failures:
                time.sleep(_RETRY_EACH * (1 + failures))

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Execute any command; return what it returns.

        Raises ValueError for text that is not UTF-8.
        """
        types.check_text(arguments)
        return self._again(
            lambda channel: _returned(channel.exchange(command, arguments)),
            twice=bool(SAFE.fullmatch(command)),
        )

    # --- objects

    def add(self, object_id: str, fd: int, encoding: Encoding = PLAIN) -> None:
        """Add a secret whose content the daemon reads from ``fd`` (borrowed): a file or memfd from
        its start, a pipe or socket to its end.
        """
        self._add(object_id, fd, encoding, None)

    def add_bytes(self, object_id: str, plaintext: memoryview, encoding: Encoding = PLAIN) -> None:
        """Add a secret from memory, through a pipe."""
        rest = memoryview(plaintext)
        source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        ends = [source, sink]

        def write() -> bool:
            nonlocal rest
            with contextlib.suppress(BlockingIOError):
                try:
                    rest = rest[os.writev(sink, [rest]) :] if rest else rest
                except BrokenPipeError:  # the daemon does not want it, and its reply says why
                    rest = rest[:0]
            if not rest:
                ends.remove(sink)
                os.close(sink)
            return not rest

        try:
            self._add(object_id, source, encoding, Pump(sink, select.POLLOUT, write))
        finally:
            for end in ends:
                os.close(end)

    def _add(self, object_id: str, fd: int, encoding: Encoding, pump: Pump | None) -> None:
        options = {"qom-type": "secret", "id": object_id, **encoding.members()}
        types.check_text(options)

        def once(channel: Channel) -> None:
            added = cast(dict[str, int], _returned(channel.exchange("add-fd", None, [fd])))
            numbers = {"fdset-id": added["fdset-id"]}
            file = {"file": f"/dev/fdset/{added['fdset-id']}"}
            # From here on the content may be gone, even if nothing was added.
            try:
                reply = channel.exchange("object-add", {**options, **file}, (), pump)
            except Lost as error:
                raise Lost(str(error), sent=error.sent or pump is not None) from None
            with contextlib.suppress(Lost):
                channel.exchange("remove-fd", numbers)
            _returned(reply)

        self._again(once, twice=False)

    def generate(self, object_id: str, size: int = 32) -> None:
        """Add a secret of ``size`` random bytes."""
        self.execute("secret-generate", {"id": object_id, "size": size})

    def delete(self, object_id: str) -> None:
        """Remove an object; its plaintext is wiped when this returns."""
        self.execute("object-del", {"id": object_id})

    def expire(self, object_id: str, seconds: int | None) -> None:
        """Have a secret wiped after so many seconds from now; None for never."""
        lifetime: dict[str, object] = {} if seconds is None else {"after": seconds}
        self.execute("secret-expire", {"id": object_id, **lifetime})

    def explain(self, object_id: str, identities: "list[str]") -> dict[str, object]:
        """Return secret-explain's answer: may a client with these identities read a secret, and
        why?
        """
        found = self.execute("secret-explain", {"id": object_id, "peer": identities})
        return cast(dict[str, object], found)

    def stat(self, name: str) -> int:
        """Return one figure of query-secret-stats; KeyError if there is none of that name."""
        return types.figures(self.execute("query-secret-stats"))[name]

    def list(self) -> list[SecretInfo]:
        """Return the secrets this connection may know of."""
        found: list[SecretInfo] = []
        while True:
            after: dict[str, object] = {"after": found[-1].id} if found else {}
            page = types.secret_infos(self.execute("query-secrets", after))
            if not page:
                return found
            found += page

    def info(self, object_id: str) -> SecretInfo | None:
        """Return one entry of `list`, None if this connection may know of no such secret."""
        page = types.secret_infos(self.execute("query-secrets", {"after": types.before(object_id)}))
        return next((secret for secret in page if secret.id == object_id), None)

    def version(self) -> str:
        """Return the daemon's own version, such as "secretd 0.1.0"."""
        return cast(dict[str, str], self.execute("query-version"))["package"]

    # --- hand-over

    def read(self, object_id: str, *, format: Format = "raw") -> LockedBuffer:  # noqa: A002
        """Return a secret in locked memory; free it, or use it as a context manager, to wipe it."""

        def once(channel: Channel) -> LockedBuffer:
            def deliver(sink: int, pump: Pump) -> int:
                return self._deliver(channel, object_id, format, sink, pump)

            return self._collect(deliver, lambda size: size)[0]

        types.check_text(object_id)
        return self._again(once)

    def read_into(self, object_id: str, fd: int, *, format: Format = "raw") -> int:  # noqa: A002
        """Have the daemon write a secret to ``fd`` (borrowed): the write end of a pipe, an end of a
        stream socket pair, or a memfd, which is given its memory here. Returns the secret's size in
        bytes.
        """
        types.check_text(object_id)
        give_memory(fd, format)
        return self._again(
            lambda channel: self._deliver(channel, object_id, format, fd, None), twice=False
        )

    def _deliver(
        self, channel: Channel, object_id: str, form: Format, fd: int, pump: Pump | None
    ) -> int:
        name = self._pass(channel, fd)
        arguments = {"id": object_id, "fdname": name, "format": form}
        reply = _returned(channel.exchange("secret-read", arguments, (), pump))
        return cast(dict[str, int], reply)["size"]

    def _pass(self, channel: Channel, fd: int) -> str:
        """Pass a descriptor; return the name that it has in this connection."""
        self._names += 1
        name = f"secretd-client-{self._names}"
        _returned(channel.exchange("getfd", {"fdname": name}, [fd]))
        return name

    def seal(self, object_id: str, keyid: str) -> Sealed:
        """Return a secret encrypted under another, for QEMU's object-add."""
        types.check_text([object_id, keyid])

        def once(channel: Channel) -> Sealed:
            def deliver(sink: int, pump: Pump) -> dict[str, Any]:
                arguments = {"id": object_id, "keyid": keyid, "fdname": self._pass(channel, sink)}
                reply = _returned(channel.exchange("secret-seal", arguments, (), pump))
                return cast("dict[str, Any]", reply)

            data, reply = self._collect(deliver, lambda reply: int(reply["size"]))
            with data:
                return Sealed(str(data.view, "ascii"), reply["iv"])

        return self._again(once)

    def _collect(
        self, deliver: Callable[[int, Pump], T], size_of: Callable[[T], int]
    ) -> tuple[LockedBuffer, T]:
        """Return what ``deliver`` has written to the descriptor it is given, in locked memory, and
        what it returns, of which ``size_of`` is the number of bytes.
        """
        source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        ends = [source, sink]
        collected = _Collected(self.buffer)
        try:
            result = deliver(sink, Pump(source, select.POLLIN, lambda: collected.fill(source)))
            ends.remove(sink)
            os.close(sink)
            size = size_of(result)
            while not collected.fill(source) and collected.size < size:
                if not wait(source, select.POLLIN, self._timeout):
                    raise TimeoutError(f"No end of the secret within {self._timeout:g} seconds")
            return collected.take(), result
        finally:
            collected.free()
            for end in ends:
                os.close(end)

    # --- events

    def events(self, *, names: Sequence[str] = ()) -> Iterator[Event]:
        """Return the events from now on as they come, until the client is closed; with ``names``
        only those. What happened while the connection was made anew is missing; SECRET_EVENTS_LOST
        tells of what secretd has dropped.
        """
        arguments: dict[str, object] = {"enable": True, **({"events": [*names]} if names else {})}
        subscribed: Channel | None = None
        while self._open:
            if self._channel is None or self._channel is not subscribed:
                self.execute("secret-events", arguments)
                subscribed = self._channel
            assert subscribed is not None
            message = subscribed.event()
            if message is None:
                self._disconnect()
            else:
                yield types.event_of(message)

    def buffer(self, size: int) -> LockedBuffer:
        """Return locked memory of this process, for plaintext on its way in or out."""
        if self._arena is None:
            self._arena = Arena(choose_level(require=False), window=SCRATCH_WINDOW)
        return self._arena.allocate(size)


class _Collected:
    """What came through a pipe, in locked memory that grows."""

    def __init__(self, allocate: Callable[[int], LockedBuffer]) -> None:
        self._allocate = allocate
        self._buffer = allocate(_CHUNK_BYTES)
        self._fill = 0

    def fill(self, fd: int) -> bool:
        """Read what there is; True at the end."""
        while True:
            if self._fill == self._buffer.size:
                larger = self._allocate(4 * self._fill)
                larger.view[: self._fill] = self._buffer.view
                self._buffer.free()
                self._buffer = larger
            try:
                count = os.readv(fd, [self._buffer.view[self._fill :]])
            except BlockingIOError:
                return False
            if not count:
                return True
            self._fill += count

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._fill

    def take(self) -> LockedBuffer:
        """Return a buffer of just the size."""
        exact = self._allocate(self._fill)
        exact.view[:] = self._buffer.view[: self._fill]
        return exact

    def free(self) -> None:
        """Wipe it."""
        self._buffer.free()


def give_memory(fd: int, form: Format) -> None:
    """Allocate a memfd's pages, so that they are this process's: secretd refuses to allocate them
    for peers that it does not trust. Does nothing to other descriptors.
    """
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, _F_GET_SEALS)
        os.posix_fallocate(
            fd, 0, LARGEST_CONTENT if form == "raw" else LARGEST_CONTENT // 3 * 4 + 4
        )


def _returned(reply: Message) -> object:
    """Return what a command returned, or raise ExecuteError."""
    if "return" in reply:
        return reply["return"]
    from qemu.qmp import ExecuteError
    from qemu.qmp import Message as QMPMessage
    from qemu.qmp.models import ErrorResponse

    raise ExecuteError(ErrorResponse(reply), QMPMessage(), QMPMessage(reply))


class _UnreachableError(Exception):
    """No connection could be made; becomes a ConnectError."""

    def __init__(self, words: str, cause: Exception) -> None:
        super().__init__(words)
        self.cause = cause


def _connect_error(error: _UnreachableError) -> NoReturn:
    from qemu.qmp import ConnectError

    raise ConnectError(str(error), error.cause) from None


def _interrupted(error: Lost) -> NoReturn:
    from qemu.qmp import ExecInterruptedError

    raise ExecInterruptedError(str(error)) from None


def _state_error() -> NoReturn:
    from qemu.qmp import Runstate, StateError

    raise StateError("The client is not connected", Runstate.IDLE, Runstate.RUNNING)


__all__ = ["RETRY_SECONDS", "SAFE", "SyncClient", "give_memory"]
