# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sockets, all their sessions, and the orderly stop.

The `Server` accepts on each Listener. A connection becomes a monitor.session.Session, or goes to
server.credentials. daemon builds the `Server` and runs it.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Iterable
from typing import Final

from secretd.access.peer import Peer, SocketRole, identify
from secretd.audit.log import Audit
from secretd.audit.records import Subject
from secretd.descriptors.threads import close_connection
from secretd.errors import AccessDenied, LimitReached, PeerUnknown, UsageError
from secretd.limits import Tuning
from secretd.linux.inotify import DirectoryWatch
from secretd.linux.sockopt import keep_urgent_inline, permit_descriptors
from secretd.monitor.core import Core, wire_event
from secretd.monitor.session import Session
from secretd.net.listener import Dialect, Listener, listen
from secretd.net.receive_space import Account, ReceiveSpace
from secretd.net.transport import Transport
from secretd.qapi.command import Command
from secretd.qom.tree import ObjectTree
from secretd.server.credentials import Credentials
from secretd.systemd.notify import KeptDescriptors

log = logging.getLogger("secretd")

ACCEPTS_PER_TURN: Final = 32
"""Connections that are accepted before others get their turn."""


class Server:
    """All sockets and sessions of a process.

    ``store``: the service manager's descriptor store, None without one.
    """

    def __init__(
        self,
        tree: ObjectTree,
        commands: Iterable[Command],
        package: str,
        audit: Audit | None = None,
        store: KeptDescriptors | None = None,
        *,
        tuning: Tuning = Tuning(),  # noqa: B008 - it cannot be changed
    ) -> None:
        self.core = Core(tree, commands, package, audit or Audit(), self.quit, self.start, tuning)
        self.core.has_one_session = lambda: len(self.sessions) == 1
        self.space = ReceiveSpace(tree.scratch)
        self.sessions: set[Session] = set()
        self._store = store
        self.credentials = Credentials(self.core, self.start, self._check_idle, store)
        self._stopped = asyncio.Event()
        self._idle = asyncio.Event()
        self._listeners: list[Listener] = []
        self._tasks = asyncio.TaskGroup()
        self._files: DirectoryWatch | None = None
        with contextlib.suppress(OSError):  # too many watches; SIGHUP also checks the files
            self._files = DirectoryWatch()

    def add(self, listener: Listener) -> None:
        """Accept on a listener from now on."""
        self._listeners.append(listener)
        self._watch(listener)
        if listener.owned and self._files is not None:
            self._files.add(os.path.dirname(os.path.abspath(listener.path)))

    def make_again(self) -> None:
        """Restore the socket files that were removed; without them the daemon cannot be reached."""
        for number, listener in enumerate(self._listeners):
            if listener.is_reachable or self._stopped.is_set():
                continue
            try:
                fresh = listen(
                    listener.path, listener.role, listener.mode, listener.gid, listener.authz,
                    listener.dialect,
                )  # fmt: skip
            except (UsageError, OSError) as error:
                log.error("the file of a socket was removed and cannot be restored: %s", error)
                continue
            asyncio.get_running_loop().remove_reader(listener.sock.fileno())
            listener.close(self.core.threads)
            self._listeners[number] = fresh
            self._watch(fresh)
            log.warning("%s was removed, and is restored", listener.path)

    def _files_changed(self, files: DirectoryWatch) -> None:
        files.clear()
        self.make_again()

    def _watch(self, listener: Listener) -> None:
        # During a pause the listener may have been replaced, and its descriptor reused.
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
            if listener.role is SocketRole.CREDENTIALS:
                self.credentials.accept(sock)
            else:
                self._greet(sock, listener)

    def _pause(self, listener: Listener) -> None:
        """Accept again a little later."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener.sock.fileno())
        loop.call_later(self.core.tuning.retry_accept_seconds, self._watch, listener)

    def _greet(self, sock: socket.socket, listener: Listener) -> None:
        core, role = self.core, listener.role
        peer = Peer(-1, -1, -1, role)
        try:
            peer = identify(sock, role, listener.authz)
            if not core.access.admits(peer):
                raise AccessDenied(
                    f"uid {peer.uid} may not use the control socket; connect to the client socket"
                )
            if not peer.trusted:
                core.limits.check_descriptors(core.threads.closing_of_others)
                core.limits.descriptors.check(peer.uid, 1, core.threads.closing(peer.uid))
            core.limits.connections.acquire(peer.uid)
            permit_descriptors(sock, permit=True)
        except (AccessDenied, LimitReached, PeerUnknown) as error:
            if isinstance(error, PeerUnknown):
                peer = peer._replace(uid=error.uid)
            self._turn_away(sock, peer, listener.dialect, error)
            return
        self._open_session(sock, peer, listener.dialect)

    def _open_session(self, sock: socket.socket, peer: Peer, dialect: Dialect) -> None:
        core = self.core
        account = None
        if peer.role is not SocketRole.CONTROL:
            account = Account(core.limits.unfinished, peer.uid)

        def close(sock: socket.socket) -> None:
            close_connection(sock, peer, core.threads, core.tree.scratch)

        uid = None if peer.trusted else peer.uid
        transport = Transport(sock, self.space, close, core.tuning, account, uid=uid)
        table = core.tables[peer.role, dialect]
        session = Session(core, transport, peer, table, self._forget)
        if not transport.is_closed:
            self.sessions.add(session)
            if peer.role is SocketRole.CONTROL:
                session.monitor.note_connection()

    def _turn_away(
        self, sock: socket.socket, peer: Peer, dialect: Dialect, error: Exception
    ) -> None:
        """Send the reason in one line, and close."""
        words = str(error)
        if isinstance(error, LimitReached):
            self.core.limits.note_hit(error.limit)
        elif isinstance(error, PeerUnknown):
            words = f"Cannot identify the peer completely: {error}; connection refused"
        with contextlib.suppress(OSError):
            sock.send(self.core.tables[SocketRole.CLIENT, dialect].wire.refusal(words))
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        subject = Subject(peer.role.value, peer.info if peer.pid >= 0 else None)
        self.core.audit.append_refusal("connect", peer.uid, subject, reason=words)
        close_connection(sock, peer, self.core.threads, self.core.tree.scratch)

    def start(self, coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Run a session's coroutine; it ends with the server at the latest."""
        return self._tasks.create_task(coroutine)

    def _forget(self, session: Session) -> None:
        """A session has ended."""
        self.sessions.discard(session)
        self._check_idle()

    def quit(self, data: str) -> None:
        """Send the events so far, then SHUTDOWN to all control connections; end `run`."""
        self.core.broadcaster.flush()
        event = wire_event("SHUTDOWN", data)
        for session in list(self.sessions):
            if session.receives_shutdown:
                session.send_events(event, 1)
        if self._store is not None:
            self._store.give_up()  # before the reply: the secrets must not return
        self.core.stopping = True
        self._stopped.set()

    def stop(self) -> None:
        """End `run` once all sent requests are answered; a second call ends it at once."""
        if self._stopped.is_set():
            self._idle.set()
        self._stopped.set()

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve until `stop` or `quit`; then close everything.

        ``ready``: called once all sockets are open.
        """
        deadlines = self.core.tree.deadlines
        async with self._tasks:
            deadlines.start(self.core.expire)
            loop = asyncio.get_running_loop()
            if self._files is not None:
                loop.add_reader(self._files.fileno(), self._files_changed, self._files)
            ready()
            self.core.serve_store()
            await self._stopped.wait()
            self.core.broadcaster.flush()
            if self._files is not None:
                loop.remove_reader(self._files.fileno())
                self._files.close()
            for listener in self._listeners:
                loop.remove_reader(listener.sock.fileno())
                listener.close(self.core.threads)
            await self._finish()
            deadlines.stop()
            self.core.broadcaster.flush()
            for session in list(self.sessions):
                session.transport.close()
            self.credentials.stop()
        await self.core.close_store()
        self.space.close()

    async def _finish(self) -> None:
        """Wait until everything is answered; every wait has a time limit."""
        for session in list(self.sessions):
            session.transport.finish(read=not self.core.stopping)
        self._check_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.core.tuning.stop_seconds):
                await self._idle.wait()

    def _check_idle(self) -> None:
        if self._stopped.is_set() and not self.sessions and not self.credentials.busy:
            self._idle.set()
