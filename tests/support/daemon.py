# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server in a thread of this process, for clients that block or are hostile."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from secretd.access.peer import SocketRole
from secretd.audit.log import Audit
from secretd.daemon import initial_objects
from secretd.descriptors.source import CommandLineSources
from secretd.errors import CommandError, UsageError
from secretd.journal.journal import Journal
from secretd.limits import Tuning
from secretd.linux.locked_pages import Level
from secretd.memory.arena import SCRATCH_RESERVE, SCRATCH_WINDOW, Arena
from secretd.monitor.commands import COMMANDS
from secretd.net.listener import listen
from secretd.net.loop import Loop
from secretd.qom.identifiers import with_hint
from secretd.qom.object_type import ObjectOptions
from secretd.qom.registry import TYPES
from secretd.qom.tree import ObjectTree
from secretd.server.server import Server
from tests.support.needs import ARENA_LEVEL
from tests.support.qmp import Client
from tests.support.users import connect_as


def add_object(tree: ObjectTree, text: str) -> ObjectOptions | None:
    """Make the object of ``--object TEXT``; UsageError has QEMU's words and nothing else."""
    options = initial_objects.parse(tree, text)
    if options is not None:
        try:
            tree.add(options, tree.loading(CommandLineSources(tree.scratch)))
        except CommandError as error:
            raise UsageError(with_hint(error.desc)) from None
    return options


class Daemon:
    """A server in a thread of this process, with all sockets, and a control socket with
    authz=admins.
    """

    def __init__(
        self,
        directory: Path,
        level: Level = ARENA_LEVEL,
        make_audit: Callable[[], Audit] = Audit,
        tuning: Tuning = Tuning(),  # noqa: B008 - it cannot be changed
    ) -> None:
        self._make_audit = make_audit
        self._tuning = tuning
        self.control = str(directory / "control.sock")
        self.client = str(directory / "client.sock")
        self.admins = str(directory / "admins.sock")
        self.credentials = str(directory / "credentials.sock")
        self._level = level
        self._clients: list[Client] = []
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()
        self._ready.result(20)

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=Loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            else:
                raise

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.errors: list[dict] = []
        self.loop.set_exception_handler(lambda _loop, context: self.errors.append(context))
        self.scratch = Arena(self._level, window=SCRATCH_WINDOW, reserve=SCRATCH_RESERVE)
        self.journal = Journal(Arena(self._level))
        self.tree = ObjectTree(self.journal, self.scratch, TYPES)
        self.server = Server(
            self.tree,
            COMMANDS.by_name.values(),
            "secretd test",
            self._make_audit(),
            tuning=self._tuning,
        )
        try:
            self.server.add(listen(self.control, SocketRole.CONTROL, 0o600))
            self.server.add(listen(self.client, SocketRole.CLIENT, 0o666))
            self.server.add(listen(self.admins, SocketRole.CONTROL, 0o666, authz="admins"))
            self.server.add(listen(self.credentials, SocketRole.CREDENTIALS, 0o666))
            await self.server.run(lambda: self._ready.set_result(None))
            self.held = self.scratch.held
        finally:
            self.journal.close()
            self.journal.arena.close()
            self.scratch.close()

    def call(self, function: Callable[[], object]) -> object:
        """Run a function in the server's thread; return its result."""
        done: Future[object] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self.loop.call_soon_threadsafe(run)
        return done.result(20)

    def empty(self) -> None:
        """Delete all objects."""
        self.call(lambda: [self.tree.delete(object_id) for object_id in list(self.journal)])

    def connect(
        self,
        *,
        role: str = "control",
        negotiate: bool = True,
        uid: int | None = None,
        gid: int | None = None,
        groups: tuple[int, ...] = (),
    ) -> Client:
        """Connect, as another user if there is a uid; the client is closed with the daemon."""
        path = {"control": self.control, "client": self.client, "admins": self.admins}[role]
        sock = None if uid is None else connect_as(path, uid, uid if gid is None else gid, groups)
        client = Client(path, negotiate=negotiate, sock=sock)
        self._clients.append(client)
        return client

    def stop(self) -> None:
        """Stop; nothing may be left over."""
        for client in self._clients:
            client.close()
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(20)
        assert not self._thread.is_alive()
        while not self.server.core.threads.idle():  # the listeners are closed in a thread
            pass
        assert self.errors == []
        assert self.held == 0, "scratch memory was not freed"
        assert not os.path.exists(self.control)
