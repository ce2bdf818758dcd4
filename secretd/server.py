# SPDX-License-Identifier: LGPL-2.1-or-later
"""Doors, all their sessions, and the orderly stop.

A `Listener` accepts on one socket; each connection becomes a `session.Session`. daemon builds the `Server`
and runs it.
"""

import asyncio
import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Final

from secretd.access import Door, admits, identify
from secretd.errors import UsageError
from secretd.monitor import Daemon, Monitor, close_for
from secretd.qom.object import ObjectTree
from secretd.receive import ReceiveSpace
from secretd.schema import Command
from secretd.session import BATCH_BYTES, Session
from secretd.wire import message as wire

LISTEN_BACKLOG: Final = 128
"""Connections that may wait to be accepted."""

ACCEPTS_PER_TURN: Final = 32
"""Connections accepted before others get their turn."""

RETRY_ACCEPT_SECONDS: Final = 0.5
"""Seconds until the next try when the process has no descriptor left for a connection."""

EVENTS_SECONDS: Final = 0.02
"""Seconds for which events are collected: with many connections, sending each of them to each would
take longer than what it tells of."""

PATH_BYTES: Final = 107
"""Bytes of a socket's path (unix(7): sun_path with its NUL)."""


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
