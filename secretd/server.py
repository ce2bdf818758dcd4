# SPDX-License-Identifier: LGPL-2.1-or-later
"""Doors, sessions and the orderly stop.

A `Listener` accepts on one socket; a `Session` ties a Transport, a codec and a Monitor together and has
no behaviour beside that. daemon builds the `Server` and runs it.
"""

import asyncio
import contextlib
import errno
import os
import re
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Final

from msgspec import Struct

from secretd.access import Door, Peer, admits, identify
from secretd.errors import LockedMemoryExhausted, UsageError
from secretd.memory import LockedBuffer
from secretd.monitor import Daemon, Monitor, Reply, close_for, log_internal
from secretd.qom.object import ObjectTree
from secretd.receive import ReceiveSpace
from secretd.schema import Command
from secretd.transport import UNFINISHED_SECONDS, Locked, Transport
from secretd.wire import message as wire
from secretd.wire.message import Malformed, Request
from secretd.wire.qjson import NeedData
from secretd.wire.qmp import Connection

LISTEN_BACKLOG: Final = 128
"""Connections that may wait to be accepted."""

ACCEPTS_PER_TURN: Final = 32
"""Connections accepted before others get their turn."""

RETRY_ACCEPT_SECONDS: Final = 0.5
"""Seconds until the next try when the process has no descriptor left for a connection."""

TURN_SECONDS: Final = 0.005
"""Seconds after which a connection that sends one request after the other lets the others go on."""

QUEUED_REQUESTS: Final = 8
"""Requests that may wait behind one that is being carried out, where the client has enabled oob; QEMU's
QMP_REQ_QUEUE_LEN_MAX. Then the connection is not read."""

EVENTS_SECONDS: Final = 0.02
"""Seconds for which events are collected: with many connections, sending each of them to each would
take longer than what it tells of."""

BATCH_BYTES: Final = 32 << 10
"""Bytes of replies that are collected before they are sent together."""

_BRACE: Final = re.compile(rb"{")

PATH_BYTES: Final = 107
"""Bytes of a socket's path (unix(7): sun_path with its NUL)."""


class Session:
    """One connection; the Receiver of its Transport."""

    def __init__(self, server: "Server", sock: socket.socket, peer: Peer) -> None:
        self._server = server
        self.monitor = Monitor(server.daemon, peer, self._negotiated)
        table = self.monitor.table
        self.max_bytes = table.max_bytes
        self._codec = Connection(table.decode, table.max_bytes)
        self.kept_from = self._codec.kept_from
        self.moved = self._codec.moved
        self.descriptors = self.monitor.receive
        self._out: list[bytes] = []
        self._out_size = 0
        self._consuming = False
        self._lost = 0
        self._task: asyncio.Task[None] | None = None
        self._queue: deque[LockedBuffer | bytes | Locked] = deque()
        self.transport = Transport(sock, server.space, self, self.monitor.closer)
        self.transport.send(self.monitor.greeting())

    def _negotiated(self) -> None:
        # What happened before is not this session's.
        self._server.send_events()
        self._codec.oob = self.monitor.oob

    @property
    def busy(self) -> bool:
        """True while requests that were read are not answered yet."""
        return self._task is not None

    def consume(self, view: memoryview, position: int, end: int) -> int:
        """Carry out the requests in the view, in order, until one must be waited for.

        If the client has enabled oob, what comes meanwhile is read on: out-of-band commands are
        carried out at once, others queued.
        """
        codec_next, handle = self._codec.next, self.monitor.handle
        transport = self.transport
        self._consuming = True
        turn_ends = time.monotonic() + TURN_SECONDS
        while not (transport.is_closed or transport.backlogged or self._server.stopping):
            if self._task is None:
                start = position
            elif len(self._queue) == QUEUED_REQUESTS:
                transport.pause("busy")
                break
            else:
                start = self.kept_from(position)
            position, request = codec_next(view, position, end)
            if isinstance(request, NeedData):
                break
            if self._task is not None and not (isinstance(request, Request) and request.oob):
                if not self._enqueue(request, view[start:position]):
                    position = start
                    transport.pause("busy")
                    break
                continue
            self._answer(handle(request))
            if self._task is not None and not self.monitor.oob:
                transport.pause("busy")
                break
            if time.monotonic() > turn_ends:
                transport.pause("turn")
                asyncio.get_running_loop().call_soon(transport.resume, "turn")
                break
        self._consuming = False
        self._flush()
        return position

    def _answer(self, reply: Reply) -> None:
        """Send a reply with others soon, or start to wait for it."""
        if isinstance(reply, bytes):
            self._out.append(reply)
            self._out_size += len(reply)
            if self._out_size >= BATCH_BYTES:
                self._flush()
        elif isinstance(reply, Locked):
            self._flush()
            self.transport.send(reply)
        else:
            # First, so that it is cancelled if the flush finds that the client has gone.
            self._task = self._server.start(self._finish(reply))
            self._flush()

    def _enqueue(self, request: Request | Malformed | Struct, message: memoryview) -> bool:
        """Keep a request for when its turn comes; False if there is no locked memory for it."""
        if isinstance(request, Malformed):
            # The words are ready; only a reply can come of it.
            reply = self.monitor.handle(request)
            assert isinstance(reply, bytes | Locked)
            self._queue.append(reply)
            return True
        # Before its brace there may be what the parser skipped after an error.
        match = _BRACE.search(message)
        assert match is not None
        message = message[match.start() :]
        try:
            kept = self.monitor.scratch.allocate(len(message))
        except LockedMemoryExhausted:
            return False
        kept.view[:] = message
        self._queue.append(kept)
        return True

    async def _finish(self, reply: Coroutine[object, object, bytes]) -> None:
        data = await reply
        self._task = None
        self.transport.send(data)
        try:
            self._go_on()
        except Exception as error:  # noqa: BLE001 - it ends this connection, not the daemon
            log_internal(error)
            self.transport.close()

    def _go_on(self) -> None:
        """Carry out what was queued, until one must be waited for; then read again."""
        while self._queue and self._task is None and not self._server.stopping:
            kept = self._queue.popleft()
            if isinstance(kept, LockedBuffer):
                with kept:
                    codec = Connection(self.monitor.table.decode, self.max_bytes)
                    codec.oob = True
                    request = codec.next(kept.view, 0, len(kept.view))[1]
                    assert not isinstance(request, NeedData)
                    self._answer(self.monitor.handle(request))
            else:
                self._answer(kept)
        self._flush()
        self.transport.resume("busy")

    def _flush(self) -> None:
        if self._out:
            data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
            self._out.clear()
            self._out_size = 0
            self.transport.send(data)

    def send_events(self, events: bytes, count: int) -> None:
        """Send so many events, after the replies that are due. A client that does not read loses them,
        and is told when it reads again.
        """
        if self.transport.backlogged:
            self._lost += count
            return
        self._out.append(events)
        if not self._consuming:
            self._flush()

    def drained(self) -> None:
        """The client reads again: tell it how many events it has lost."""
        if self._lost:
            lost, self._lost = self._lost, 0
            self.send_events(self._server.event("SECRET_EVENTS_LOST", f'{{"count": {lost}}}'), 1)

    def too_slow(self) -> None:
        """A message was begun and not finished in time."""
        self.transport.send(
            wire.failure(
                "GenericError",
                f"No end of the message within {UNFINISHED_SECONDS:g} seconds; connection closed",
                None,
            )
        )

    def no_memory(self, error: LockedMemoryExhausted) -> None:
        """There is no locked memory for an unfinished message."""
        self.transport.send(wire.failure("GenericError", error.desc, None))

    def closed(self) -> None:
        """Forget the session."""
        if self._task is not None:
            # Not before its first step, which was scheduled before: only then does what it owns
            # (a descriptor, a buffer) have someone to release it.
            asyncio.get_running_loop().call_soon(self._task.cancel)
        while self._queue:
            kept = self._queue.popleft()
            if isinstance(kept, Locked):
                kept.buffer.free()
            elif isinstance(kept, LockedBuffer):
                kept.free()
        self._server.sessions.discard(self)
        self.monitor.close()


class Listener:
    """A listening socket; its file is removed at the end."""

    def __init__(self, sock: socket.socket, door: Door, path: str) -> None:
        self.sock = sock
        self.door = door
        self.path = path
        self._inode = os.stat(path).st_ino

    def close(self) -> None:
        """Stop listening; remove the socket's file if it is still ours."""
        self.sock.close()
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)


def listen(path: str, door: Door, mode: int, gid: int = -1) -> Listener:
    """Bind and listen. A stale socket is replaced; a live one, or another file, is a UsageError."""
    if len(os.fsencode(path)) > PATH_BYTES:
        raise UsageError(f"{path}: the path of a socket may have {PATH_BYTES} bytes at most")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _remove_stale(path)
        umask = os.umask(0o777)
        try:
            sock.bind(path)
        finally:
            os.umask(umask)
        os.chown(path, -1, gid)
        os.chmod(path, mode)
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        raise UsageError(f"{path}: {os.strerror(error.errno or 0)}") from None
    except BaseException:
        sock.close()
        raise
    return Listener(sock, door, path)


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(
                f"{path}: exists and is not a socket; remove it or choose another path"
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise UsageError(f"{path}: another process is listening there; stop it or choose another path")


class Server:
    """All doors and sessions of a process."""

    def __init__(self, tree: ObjectTree, commands: Iterable[Command], package: str) -> None:
        self.daemon = Daemon(tree, commands, package, self.stop, self._emit)
        self.space = ReceiveSpace(tree.scratch)
        self.sessions: set[Session] = set()
        self._events: list[tuple[bytes, Monitor | None]] = []  # not sent yet, and whose they are
        self._events_size = 0
        self.stopping = False
        self._stopped = asyncio.Event()
        self._listeners: list[Listener] = []
        self._tasks = asyncio.TaskGroup()

    def add(self, listener: Listener) -> None:
        """Accept on a listener from now on."""
        self._listeners.append(listener)
        self._watch(listener)

    def _watch(self, listener: Listener) -> None:
        if not self.stopping:
            loop = asyncio.get_running_loop()
            loop.add_reader(listener.sock.fileno(), self._accept, listener)

    def _accept(self, listener: Listener) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = listener.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener.sock.fileno())
                loop.call_later(RETRY_ACCEPT_SECONDS, self._watch, listener)
                return
            self._greet(sock, listener.door)

    def _greet(self, sock: socket.socket, door: Door) -> None:
        try:
            peer = identify(sock, door)
        except OSError:
            sock.close()
            return
        sock.setblocking(False)
        if self.daemon.offload.busy(peer.uid):
            refusal = f"uid {peer.uid} has too many descriptors that block when they are closed"
        elif admits(peer):
            session = Session(self, sock, peer)
            if not session.transport.is_closed:
                self.sessions.add(session)
            return
        else:
            refusal = f"uid {peer.uid} may not use the control socket; connect to the client socket"
        with contextlib.suppress(OSError):
            sock.send(wire.failure("GenericError", refusal, None))
        close_for(self.daemon, peer, sock.detach())

    def start(self, coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run what a session waits for; it ends with the server at the latest."""
        return self._tasks.create_task(coroutine)

    def event(self, name: str, data: str) -> bytes:
        """Return an event of now, its data as JSON text."""
        now = time.time_ns() // 1000
        return wire.event(name, data, now // 1_000_000, now % 1_000_000)

    def _emit(self, name: str, data: str, but: Monitor | None) -> None:
        if len(self.sessions) == 1 and next(iter(self.sessions)).monitor is but:
            return
        event = self.event(name, data)
        if not self._events:
            asyncio.get_running_loop().call_later(EVENTS_SECONDS, self.send_events)
        self._events.append((event, but))
        self._events_size += len(event)
        if self._events_size >= BATCH_BYTES or but is None:
            self.send_events()

    def send_events(self) -> None:
        """Send what happened, to each session but what it did itself."""
        if not self._events:
            return
        events, self._events, self._events_size = self._events, [], 0
        together = b"".join(event for event, _ in events)
        actors = {but for _, but in events}
        for session in list(self.sessions):
            monitor = session.monitor
            if not monitor.negotiated or monitor.peer.door is not Door.CONTROL:
                continue
            if monitor not in actors:
                session.send_events(together, len(events))
            elif others := [event for event, but in events if but is not monitor]:
                session.send_events(b"".join(others), len(others))

    def stop(self) -> None:
        """End `run`. Requests not yet begun are not answered."""
        self.stopping = True
        self._stopped.set()

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve until `stop`; then close everything. ``ready`` is called once all is open."""
        async with self._tasks:
            ready()
            await self._stopped.wait()
            self.send_events()
            loop = asyncio.get_running_loop()
            for listener in self._listeners:
                loop.remove_reader(listener.sock.fileno())
                listener.close()
            for session in list(self.sessions):
                session.transport.close()
        self.space.close()
