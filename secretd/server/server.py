# SPDX-License-Identifier: LGPL-2.1-or-later
"""Doors, all their sessions, and the orderly stop.

A `Listener` accepts on one socket; each connection becomes a `session.Session`. daemon builds the `Server`
and runs it.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Callable, Coroutine, Iterable
from typing import Final

from secretd.access.peer import (
    UIDS,
    Door,
    Peer,
    identify,
)
from secretd.audit.log import Audit, Who
from secretd.descriptors.threads import Offload
from secretd.errors import AccessDenied, LimitReached, PeerUnknown, UsageError
from secretd.linux.inotify import DirectoryWatch
from secretd.linux.sockopt import keep_urgent_inline, permit_descriptors
from secretd.monitor.core import Daemon, wire_event
from secretd.monitor.monitor import close_connection
from secretd.monitor.session import Session
from secretd.net.receive_space import ReceiveSpace
from secretd.qapi.command import Command
from secretd.qom.tree import ObjectTree
from secretd.server.credentials import Credentials, Store
from secretd.wire import messages as wire

log = logging.getLogger("secretd")

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
        self.mode = stat.S_IMODE(os.stat(path).st_mode) if owned else 0
        self.gid = -1

    @property
    def is_reachable(self) -> bool:
        """True while the socket's file is there and is the one that was made."""
        if not self.owned:
            return True
        try:
            return os.lstat(self.path).st_ino == self._inode
        except OSError:
            return False

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
    if path.startswith("@"):
        raise UsageError(f"{path}: abstract sockets have no mode that protects them; give a path")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        check_directory(os.path.dirname(os.path.abspath(path)))
        _remove_stale(path)
        # The mode comes with the file: chmod(2) later would follow a link that was put in its place.
        umask = os.umask(0o777 & ~mode)
        try:
            sock.bind(path)
        finally:
            os.umask(umask)
        if gid != -1:
            os.chown(path, -1, gid, follow_symlinks=False)
        if door is not Door.CONTROL or authz is not None or mode & 0o077:
            permit_descriptors(sock, permit=False)
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        raise UsageError(f"{path}: {os.strerror(error.errno or 0)}") from None
    except BaseException:
        sock.close()
        raise
    listener = Listener(sock, door, path, authz)
    listener.gid = gid
    return listener


def check_directory(directory: str) -> None:
    """Raise UsageError if other users can replace files in a directory, or the directory itself.

    Those that only the owner of a file can replace it in, such as /tmp, are taken (chmod(2), sticky bit).
    """
    # In a user namespace root's own directories may belong to an id that is not mapped.
    own = (0, os.getuid(), UIDS.overflow)
    while True:
        status = os.stat(directory)
        others = stat.S_IWOTH | (0 if status.st_gid in (0, os.getgid()) else stat.S_IWGRP)
        if status.st_uid not in own or (
            status.st_mode & others and not status.st_mode & stat.S_ISVTX
        ):
            raise UsageError(
                f"{directory}: other users can replace what is in it (uid {status.st_uid}, mode "
                f"{stat.S_IMODE(status.st_mode):04o}); choose a directory of root's or your own"
            )
        parent = os.path.dirname(directory)
        if parent == directory:
            return
        directory = parent


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
        self._files: DirectoryWatch | None = None
        with contextlib.suppress(OSError):  # too many are watched already; a reload looks, too
            self._files = DirectoryWatch()

    def add(self, listener: Listener) -> None:
        """Accept on a listener from now on."""
        self._listeners.append(listener)
        self._watch(listener)
        if listener.owned and self._files is not None:
            self._files.add(os.path.dirname(os.path.abspath(listener.path)))

    def make_again(self) -> None:
        """Make the files of sockets again that were removed: nobody can reach the daemon without."""
        for number, listener in enumerate(self._listeners):
            if listener.is_reachable or self._stopped.is_set():
                continue
            try:
                fresh = listen(
                    listener.path, listener.door, listener.mode, listener.gid, listener.authz
                )
            except (UsageError, OSError) as error:
                log.error("the file of a socket is gone and cannot be made again: %s", error)
                continue
            asyncio.get_running_loop().remove_reader(listener.sock.fileno())
            listener.close(self.daemon.offload)
            self._listeners[number] = fresh
            self._watch(fresh)
            log.warning("%s was removed, and is made again", listener.path)

    def _files_changed(self, files: DirectoryWatch) -> None:
        files.clear()
        self.make_again()

    def _watch(self, listener: Listener) -> None:
        # After a pause it may have been replaced, and its descriptor may be another's.
        if not self._stopped.is_set() and any(listener is known for known in self._listeners):
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
            loop = asyncio.get_running_loop()
            if self._files is not None:
                loop.add_reader(self._files.fileno(), self._files_changed, self._files)
            ready()
            await self._stopped.wait()
            self.daemon.broadcaster.flush()
            if self._files is not None:
                loop.remove_reader(self._files.fileno())
                self._files.close()
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
