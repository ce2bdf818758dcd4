# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process `secretd`: its options, its start, its end.

It builds the parts that other modules provide, and runs them; no other module reads the daemon's
options. Its messages on stderr are for the person who started it, or for the journal.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any

from secretd import __version__
from secretd.access.peer import SocketRole, check_own_uid
from secretd.audit.log import Audit
from secretd.audit.sinks import Sink
from secretd.daemon import argv, inherited
from secretd.daemon.announcement import objects_in_words, say_ready
from secretd.daemon.fd_store import DescriptorStore
from secretd.daemon.inherited import InheritedDescriptors
from secretd.daemon.initial_objects import InitialObjects
from secretd.daemon.log import LogHandler
from secretd.daemon.options import parser
from secretd.daemon.sockets import SocketSpec, open_sockets, wanted
from secretd.daemon.status import StatusReporter
from secretd.errors import CommandError, SecretdError, UsageError
from secretd.journal.journal import Journal
from secretd.linux.locked_pages import forbid_dumps
from secretd.memory.arena import SCRATCH_RESERVE, SCRATCH_WINDOW, Arena
from secretd.memory.level import choose_level
from secretd.monitor.commands import COMMANDS
from secretd.monitor.failures import log_internal
from secretd.net.loop import Loop
from secretd.qom.registry import TYPES
from secretd.qom.tree import ObjectTree
from secretd.server.server import Server
from secretd.systemd.notify import NotifySocket

log = logging.getLogger("secretd")


def main() -> int:
    """Run the daemon; return the exit status."""
    handler = LogHandler()
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    gc.disable()  # objects of the start stay, and are in no cycle
    gc.set_threshold(GARBAGE_OBJECTS, *gc.get_threshold()[1:])
    try:
        argv.hide_data()
        options = parser().parse_args(argv.words())
        if options.audit == "-" and "2" in os.environ.pop("SECRETD_CLOSED", "").split(","):
            raise UsageError("--audit=-: stderr is closed; give --audit=FILE")
        check_own_uid()
        return run(options, handler)
    except (SecretdError, OSError) as error:
        log.error("%s", error)
        return 1
    finally:
        gc.enable()
        logging.shutdown()


def run(options: argparse.Namespace, handler: LogHandler) -> int:
    """Start, serve, stop; return the exit status."""
    manager = NotifySocket.from_environment()
    found = inherited.inherited()
    forbid_dumps()
    _raise_descriptor_limit()
    specs = wanted(((role, getattr(options, role.value)) for role in SocketRole), found.sockets)
    if options.check_config:
        return check_config(options)
    journal, restored = inherited.open_journal(
        found, require_lock=options.memory_lock == "require", memory=options.memory
    )
    process = _Process(journal, manager, found, handler, restored=restored)
    try:
        process.run(options, specs)
    finally:
        process.end()
    return 0


def check_config(options: argparse.Namespace) -> int:
    """Create all objects in memory of their own, report how many, and wipe them."""
    level = choose_level(require=options.memory_lock == "require", choice=options.memory)
    scratch = Arena(level, window=SCRATCH_WINDOW, reserve=SCRATCH_RESERVE)
    journal = Journal(Arena(level))
    try:
        tree = ObjectTree(journal, scratch, TYPES)
        initial = InitialObjects(tree, argv.hidden_fds())
        if all(map(initial.make, options.object)):
            for directory in options.object_dir:
                initial.make_from(directory)
            print(f"the configuration is valid: {objects_in_words(len(journal))}")
    finally:
        journal.close()
        journal.arena.close()
        scratch.close()
    return 0


class _Process:
    """The parts of the running process.

    ``found``: the descriptors from the service manager. ``restored``: True if the journal is an
    earlier process's.
    """

    def __init__(
        self,
        journal: Journal,
        manager: NotifySocket | None,
        found: InheritedDescriptors,
        handler: LogHandler,
        *,
        restored: bool,
    ) -> None:
        self._handler = handler
        self._journal = journal
        self._manager = manager
        self._found = found
        self._restored = restored
        self._before = len(journal)
        self._keep = restored  # the secrets then stay with the service manager, whatever happens
        self._store: DescriptorStore | None = None
        self._served = False
        self._stored = 0  # objects in the store
        self._scratch: Arena | None = None

    def run(self, options: argparse.Namespace, specs: list[SocketSpec]) -> None:
        """Create the objects, then serve until the end."""
        journal = self._journal
        self._scratch = Arena(journal.arena.level, window=SCRATCH_WINDOW, reserve=SCRATCH_RESERVE)
        tree = ObjectTree(journal, self._scratch, TYPES)
        expired = tree.end_due()
        hidden = argv.hidden_fds()
        initial = InitialObjects(tree, hidden, required=options.object_policy == "require")
        if not all(map(initial.make, options.object)):
            return
        for directory in options.object_dir:
            initial.make_from(directory)
        argv.close(hidden)
        if self._manager is not None:
            self._store = DescriptorStore(self._manager, journal, restored=self._restored)
            self._keep = True
        audit = _audit(tree, options)
        self._handler.is_held = audit.is_in_line_on_stderr
        try:
            with asyncio.Runner(loop_factory=Loop) as runner:
                runner.run(self._serve(tree, audit, specs, initial.made, expired))
        finally:
            audit.stop()
        self._served = True

    async def _serve(
        self,
        tree: ObjectTree,
        audit: Audit,
        specs: list[SocketSpec],
        made: list[str],
        expired: list[str],
    ) -> None:
        """Serve until the end.

        ``made``: the ids of objects from the command line; ``expired``: those of objects that
        expired while no process ran.
        """
        # 1. The server and its sockets.
        server = Server(
            tree, COMMANDS.by_name.values(), f"secretd {__version__}", audit, self._store
        )
        server.core.log_dropped = lambda: self._handler.lost
        await server.core.open_store()
        listeners = open_sockets(specs, self._found.sockets)
        for listener in listeners:
            server.add(listener)
        reports = None if self._store is None else StatusReporter(self._store, tree)
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_unexpected)

        # 2. What signals do.
        def stop() -> None:
            if reports is not None:
                reports.stopping()
            server.stop()

        reloading = asyncio.Lock()

        async def reload() -> None:
            async with reloading:
                if reports is not None:
                    reports.reloading()
                await _reload(audit, server)
                if reports is not None:
                    reports.reloaded()

        def on_hangup() -> None:
            server.start(reload())

        # 3. What happens once all sockets are open, before the first connection.
        def ready() -> None:
            audit.start(__version__, len(tree.journal))
            if self._before:
                audit.append("restore", count=self._before)
            for object_id in expired:
                audit.append("expire", id=object_id)
            for object_id in made:
                kind = tree.type_of(object_id)
                assert kind is not None
                audit.append("add", id=object_id, type=kind.info.name, door="command line")
            for sock, name in inherited.adopt(self._found.connections):
                server.credentials.refuse(sock, name)
            say_ready(tree, listeners, self._before, audit)
            gc.freeze()
            gc.enable()
            if reports is not None:
                reports.start()

        # 4. Serve.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
        await server.run(ready)
        keeper = tree.keeper
        if keeper is not None and keeper.store is not None:
            self._stored = keeper.store.rows

    def end(self) -> None:
        """Wipe everything, or leave the secrets to the next process."""
        objects = len(self._journal)
        if self._store is not None:
            self._keep = self._store.holds
            self._store.close()
        if self._keep:
            self._journal.leave()
        else:
            self._journal.close()
            self._journal.arena.close()
        if self._scratch is not None:
            self._scratch.wipe()
        if self._manager is not None:
            self._manager.close()
        if self._served and self._keep:
            log.info("stopped; the service manager keeps %s", objects_in_words(objects))
        elif self._served and self._stored:
            log.info(
                "stopped; memory is wiped, and the store keeps %s", objects_in_words(self._stored)
            )
        elif self._served:
            log.info("stopped; all secrets are wiped")


def _unexpected(_loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """Log an uncaught error. asyncio itself would print the error's text and arguments."""
    error = context.get("exception")
    if isinstance(error, Exception):
        log_internal(error)
    else:
        log.error("internal error: something went wrong in the event loop")


REOPEN_SECONDS = 10.0
"""Seconds within which the audit file must be reopened."""

GARBAGE_OBJECTS = 20_000
"""Objects after which Python looks for cycles; its default of 700 takes a tenth of a pipelined
request.
"""

AUDIT_KEY_BYTES = 16
"""Bytes of the shortest audit key."""


def _audit(tree: ObjectTree, options: argparse.Namespace) -> Audit:
    """Open the audit, and protect its key from deletion."""
    key_id: str | None = options.audit_key
    key = None
    if key_id is not None:
        if options.audit == "none":
            raise UsageError("--audit-key cannot be used with --audit=none")
        try:
            size = len(tree.plaintext(key_id))
        except CommandError as error:
            raise UsageError(f"--audit-key={key_id}: {error.desc}") from None
        if size < AUDIT_KEY_BYTES:
            raise UsageError(
                f"--audit-key={key_id}: the secret has {size} bytes; {AUDIT_KEY_BYTES} at least "
                "are needed"
            )
        tree.pin(key_id)

        def key() -> memoryview:
            return tree.journal.plaintext(key_id)

    return Audit(options.audit, require=options.audit_policy == "require", key=key)


def _raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors, which is often 1024: one message may bring 253."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError):  # SystemCallFilter= of a unit may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _reload(audit: Audit, server: Server) -> None:
    """Handle SIGHUP; an error does not end the daemon."""
    try:
        await _reopen(audit, server)
        server.make_again()
    except Exception as error:  # noqa: BLE001 - see above
        log_internal(error)


async def _reopen(audit: Audit, server: Server, seconds: float = REOPEN_SECONDS) -> None:
    """Reopen the audit file after it was moved away, which may wait for a remote file system."""
    try:
        sink = await asyncio.wait_for(
            server.core.threads.run(os.getuid(), _close_sink, audit.open_again), seconds
        )
        if sink is not None:
            audit.switch(sink)
    except TimeoutError:
        log.error("the audit file was not opened within %g seconds; the old one goes on", seconds)
    except UsageError as error:
        log.error("%s; the old file goes on", error)


def _close_sink(sink: Sink | None) -> None:
    if sink is not None:
        sink.close()


if __name__ == "__main__":
    sys.exit(main())
