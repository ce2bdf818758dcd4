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
from collections.abc import Callable, Coroutine, Iterable
from typing import Final

from secretd.audit import Audit, Who
from secretd.credentials import Credentials, Store
from secretd.errors import AccessDenied, LimitReached, PeerUnknown, UsageError
from secretd.monitor import close_connection
from secretd.offload import Offload
from secretd.peer import Door, Peer, identify
from secretd.qom.object import ObjectTree
from secretd.receive import ReceiveSpace
from secretd.schema import Command
from secretd.session import Session
from secretd.shared import Daemon, wire_event
from secretd.sockopt import keep_urgent_inline, permit_descriptors
from secretd.wire import message as wire

LISTEN_BACKLOG: Final = 128
"""Connections that may wait to be accepted."""

ACCEPTS_PER_TURN: Final = 32
"""Connections accepted before others get their turn."""

RETRY_ACCEPT_SECONDS: Final = 0.5
"""Seconds until the next try when the process has no descriptor left for a connection."""

STOP_SECONDS: Final = 12.0
"""Seconds that requests which were sent before a stop have to be answered: more than a source or a delivery
may take."""

PATH_BYTES: Final = 107
"""Bytes of a socket's path (unix(7): sun_path with its NUL)."""


class Listener:
    """A listening socket. ``authz``: the id of the object that says who else may use a control door.
    ``owned``: its file is removed at the end; the service manager's is not.
    """

    def __init__(
        self,
        sock: socket.socket,
        door: Door,
        path: str,
        authz: str | None = None,
        *,
        owned: bool = True,
    ) -> None:
        self.sock = sock
        self.door = door
        self.authz = authz
        self.path = path
        self.owned = owned
        if door is not Door.CONTROL or authz is not None or _is_open_to_others(path):
            # Until a peer is admitted its descriptors could only be closed, and that may never return.
            permit_descriptors(sock, permit=False)
        self._inode = os.stat(path).st_ino if owned else -1

    def close(self, offload: Offload | None = None) -> None:
        """Stop listening; remove the socket's file if it is still ours.

        Descriptors may lie in connections that were not accepted, and closing those may never return:
        ``offload`` has a thread for it.
        """
        if offload is None:
            self.sock.close()
        else:
            offload.close(os.getuid(), self.sock.detach())
        if not self.owned:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)


def _is_open_to_others(path: str) -> bool:
    try:
        return bool(os.stat(path).st_mode & 0o077)
    except OSError:  # of a socket without a file
        return True


def listen(path: str, door: Door, mode: int, gid: int = -1, authz: str | None = None) -> Listener:
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
    return Listener(sock, door, path, authz)


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
    """All doors and sessions of a process. ``store``: what the service manager keeps, if there is one."""

    def __init__(
        self,
        tree: ObjectTree,
        commands: Iterable[Command],
        package: str,
        audit: Audit | None = None,
        store: Store | None = None,
    ) -> None:
        self.daemon = Daemon(tree, commands, package, audit or Audit(), self)
        self.space = ReceiveSpace(tree.scratch)
        self.sessions: set[Session] = set()
        self._store = store
        self.credentials = Credentials(self.daemon, self.start, self._check_idle, store)
        self.stopping = False  # requests that were not begun are not answered any more
        self._stopped = asyncio.Event()
        self._idle = asyncio.Event()
        self._listeners: list[Listener] = []
        self._tasks = asyncio.TaskGroup()

    def add(self, listener: Listener) -> None:
        """Accept on a listener from now on."""
        self._listeners.append(listener)
        self._watch(listener)

    def _watch(self, listener: Listener) -> None:
        if not self._stopped.is_set():
            loop = asyncio.get_running_loop()
            loop.add_reader(listener.sock.fileno(), self._accept, listener)

    def _accept(self, listener: Listener) -> None:
        daemon = self.daemon
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = listener.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                self._pause(listener)
                return
            sock.setblocking(False)
            keep_urgent_inline(sock)
            if listener.door is Door.CREDENTIALS:
                self.credentials.accept(sock)
            else:
                self._greet(sock, listener)

    def _pause(self, listener: Listener) -> None:
        """Accept again a little later."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener.sock.fileno())
        loop.call_later(RETRY_ACCEPT_SECONDS, self._watch, listener)

    def _greet(self, sock: socket.socket, listener: Listener) -> None:
        daemon, door = self.daemon, listener.door
        peer = Peer(-1, -1, -1, door)
        try:
            peer = identify(sock, door, listener.authz)
            if not daemon.access.admits(peer):
                raise AccessDenied(
                    f"uid {peer.uid} may not use the control socket; connect to the client socket"
                )
            if not peer.trusted:
                daemon.limits.check_descriptors(daemon.offload.closing_of_others)
                daemon.limits.descriptors.check(peer.uid, 1, daemon.offload.closing(peer.uid))
            daemon.limits.connections.take(peer.uid)
            permit_descriptors(sock, permit=True)
        except (AccessDenied, LimitReached, PeerUnknown) as error:
            if isinstance(error, PeerUnknown):
                peer = peer._replace(uid=error.uid)
            self._turn_away(sock, peer, error)
            return
        session = Session(self, sock, peer)
        if not session.transport.is_closed:
            self.sessions.add(session)
            if door is Door.CONTROL:
                session.monitor.note_connection()

    def _turn_away(self, sock: socket.socket, peer: Peer, error: Exception) -> None:
        """Say in one line why not, and close."""
        words = str(error)
        if isinstance(error, LimitReached):
            self.daemon.limits.hit(error.limit)
        elif isinstance(error, PeerUnknown):
            words = f"It cannot be told in full who has connected: {error}; connection refused"
        with contextlib.suppress(OSError):
            sock.send(wire.failure("GenericError", words, None))
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        who = Who(peer.door.value, peer.info if peer.pid >= 0 else None)
        self.daemon.audit.refuse("connect", peer.uid, who, reason=words)
        close_connection(self.daemon, peer, sock)

    def start(self, coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run what a session waits for; it ends with the server at the latest."""
        return self._tasks.create_task(coroutine)

    def forget(self, session: Session) -> None:
        """A session has ended."""
        self.sessions.discard(session)
        self._check_idle()

    def quit(self, data: str) -> None:
        """Send what happened so far, then SHUTDOWN, to all on the control door; end `run`."""
        self.daemon.broadcaster.flush()
        event = wire_event("SHUTDOWN", data)
        for session in list(self.sessions):
            if session.listening and session.peer.door is Door.CONTROL:
                session.send_events(event, 1)
        if self._store is not None:
            self._store.give_up()  # before the reply, after which they must not come back
        self.stopping = True
        self._stopped.set()

    def stop(self) -> None:
        """End `run` when everything is answered that clients have sent; the second time, at once."""
        if self._stopped.is_set():
            self._idle.set()
        self._stopped.set()

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve until `stop` or `quit`; then close everything. ``ready`` is called once all is open."""
        lifetimes = self.daemon.tree.lifetimes
        async with self._tasks:
            lifetimes.start(self.daemon.expire)
            ready()
            await self._stopped.wait()
            self.daemon.broadcaster.flush()
            loop = asyncio.get_running_loop()
            for listener in self._listeners:
                loop.remove_reader(listener.sock.fileno())
                listener.close(self.daemon.offload)
            await self._finish()
            lifetimes.stop()
            self.daemon.broadcaster.flush()
            for session in list(self.sessions):
                session.transport.close()
            self.credentials.stop()
        self.space.close()

    async def _finish(self) -> None:
        """Wait until everything is answered; what waits for somebody else has its time limit."""
        for session in list(self.sessions):
            session.transport.finish(read=not self.stopping)
        self._check_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await self._idle.wait()

    def _check_idle(self) -> None:
        if self._stopped.is_set() and not self.sessions and not self.credentials.busy:
            self._idle.set()
