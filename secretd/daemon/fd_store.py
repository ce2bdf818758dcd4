# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd as a service: what it takes over at start, what it tells while it runs, what it leaves.

The service manager keeps two files for it, the arena and the journal, over restarts, kill -9 and upgrades:
with them the next process goes on. Without a service manager that does, secrets end with the process, as
QEMU's do. daemon calls it; systemd has the protocols.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Final, NamedTuple

from secretd.access.peer import Door
from secretd.daemon.sockets import is_listening
from secretd.errors import LockedMemoryExhausted, MemoryLockError, StateError, UsageError
from secretd.journal.journal import Journal
from secretd.memory.arena import Arena, choose_level
from secretd.qom.tree import ObjectTree
from secretd.server.credentials import STORED
from secretd.systemd.notify import (
    Manager,
    Passed,
    has_ended,
    passed,
)

log = logging.getLogger("secretd")

ARENA: Final = "arena"
JOURNAL: Final = "journal"
"""What the files are called in the descriptor store."""

PROBE_SECONDS: Final = 2.0
"""Seconds after which a descriptor counts as kept: systemd closes what it has no room for in the
background.
"""

STATUS_SECONDS: Final = 1.0
"""Seconds after a change within which `systemctl status` shows it: not each is worth a message."""

_DOORS: Final = tuple(door.value for door in Door)


class Inherited(NamedTuple):
    """What the service manager passed: listening sockets, and what it kept of an earlier process.
    ``connections``: of the credentials door.
    """

    doors: list[Passed]
    arenas: list[int]
    journals: list[int]
    connections: list[Passed]


def inherited() -> Inherited:
    """Return what the service manager passed, by the names that it has; the caller owns the descriptors.

    Raises UsageError for a socket that is no door. What else is unknown stays with the service manager.
    """
    found = Inherited([], [], [], [])
    for each in passed():
        name, fd = each
        if name in _DOORS:
            if not is_listening(fd):
                raise UsageError(
                    f"what the service manager passed as '{name}' is no listening AF_UNIX stream socket"
                )
            found.doors.append(each)
        elif name == ARENA:
            found.arenas.append(fd)
        elif name == JOURNAL:
            found.journals.append(fd)
        elif name.startswith(STORED) and name.removeprefix(STORED).isdecimal():
            found.connections.append(each)
        elif is_listening(fd):
            raise UsageError(
                f"the service manager passed a socket as '{name}': FileDescriptorName= of a .socket unit "
                f"must be {', '.join(_DOORS[:-1])} or {_DOORS[-1]}"
            )
        else:
            if name != "probe":
                log.warning(
                    "the service manager keeps '%s', which this secretd does not know", name
                )
            os.close(fd)
    return found


def open_journal(found: Inherited, *, require_lock: bool) -> tuple[Journal, bool]:
    """Return the journal, with its arena, and whether an earlier process has left it.

    Raises UsageError if what was left cannot be taken over, MemoryLockError if memory has to be locked and
    cannot be.
    """
    if not found.journals:
        for fd in found.arenas:  # of a process that ended before it had a journal
            os.close(fd)
        return Journal(Arena(choose_level(require=require_lock))), False
    try:
        if not found.arenas:
            raise StateError("the arena is missing")
        arena, *others = found.arenas
        for fd in others:
            os.close(fd)
        journal = Journal.restore(arena, found.journals)
    except (StateError, LockedMemoryExhausted) as error:
        raise UsageError(
            f"what secretd held before cannot be taken over: {error}. It stays with the service manager: "
            "mend this and the next start takes it over, or give all secrets up with 'systemctl stop'"
        ) from None
    if require_lock and journal.arena.level == "none":
        journal.leave()
        raise MemoryLockError(
            "the secrets that secretd held before are not in locked memory, and --memory-lock=require was "
            "given: give them up with 'systemctl stop', or start without it"
        )
    return journal, True


class Store:
    """What the service manager keeps for the next process.

    ``kept``: all that is needed, as far as is known. ``holds``: it may have a part of it, so nothing is wiped
    when this process ends.
    """

    def __init__(self, manager: Manager, journal: Journal, *, restored: bool) -> None:
        self.manager = manager
        self.kept = self.holds = restored
        self._journal = journal
        self._was_kept = restored
        self._source = -1  # of the probe that is out
        self._sure: asyncio.TimerHandle | None = None  # when it has stayed long enough
        self._said = False
        self._given_up = False
        if not restored:
            self._forget()
        if not (restored and journal.paired):
            if self._offer(wait=True) and manager.barrier() and not has_ended(self._source):
                self.kept = True
            else:
                self._lost()

    def _offer(self, *, wait: bool) -> bool:
        """Have everything kept (what is kept already is no second time) and a probe; False if that could not
        even be said.
        """
        self.holds = True
        # A file that may not be kept must not become the one that counts.
        self._journal.fixed = True
        told = self.manager.keep(ARENA, [self._journal.arena.fileno()], wait=wait)
        told = self.manager.keep(JOURNAL, self._journal.filenos(), wait=wait) and told
        self._source = self.manager.probe(wait=wait)
        return told

    def watch(self, changed: Callable[[], None]) -> None:
        """Find out, from the running loop, whether there was room; call ``changed`` when it is known."""
        if self._source < 0:
            return
        loop = asyncio.get_running_loop()

        def ended() -> None:
            self._lost()
            changed()

        def stays() -> None:
            self.close()
            self.kept = self._was_kept = True
            self._journal.fixed = self._said = False
            changed()

        self._sure = loop.call_later(PROBE_SECONDS, stays)
        loop.add_reader(self._source, ended)

    def again(self, changed: Callable[[], None]) -> None:
        """Offer everything once more: a daemon-reload may have made the store smaller for a moment."""
        if self._source < 0 and not self._given_up:
            if self._offer(wait=False):
                self.watch(changed)
            else:
                self._lost()

    def _lost(self) -> None:
        self.close()
        self.kept = False
        if not self._was_kept:
            # Nothing, rather than a part that the next process could not use.
            self._forget()
            self.holds = self._journal.fixed = False
        if self._said:
            return
        self._said = True
        if self._was_kept:
            log.error(
                "the service manager has no room for another descriptor; raise FileDescriptorStoreMax= "
                "in the unit, or secrets may end with this process"
            )
        else:
            log.error(
                "the service manager keeps no descriptors, so secrets end with this process; "
                "FileDescriptorStoreMax=512 and NotifyAccess=main in the unit change that"
            )

    def give_up(self) -> None:
        """Have nothing kept any more; that is certain when this returns, if the service manager answers."""
        self._given_up = True
        self.kept = self.holds = False
        self.close()
        self._forget()
        self.manager.barrier()

    def _forget(self) -> None:
        self.manager.drop(ARENA)
        self.manager.drop(JOURNAL)

    def close(self) -> None:
        """Watch no longer."""
        if self._sure is not None:
            self._sure.cancel()
        if self._source >= 0:
            with contextlib.suppress(
                RuntimeError
            ):  # there is no loop before the start is over, nor after the end
                asyncio.get_running_loop().remove_reader(self._source)
            os.close(self._source)
            self._source = -1
            self.manager.drop("probe", wait=False)


class Reports:
    """What the service manager is told while the daemon runs: that the loop turns, and a line of status."""

    def __init__(self, store: Store, tree: ObjectTree) -> None:
        self._store = store
        self._manager = store.manager
        self._tree = tree
        self._due: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Tell that all is ready; go on telling."""
        self._tree.on_count = self._changed
        self._manager.ready(self.status())
        self._store.watch(self._changed)
        if self._manager.watchdog is not None:
            self._beat(self._manager.watchdog / 2)

    def status(self) -> str:
        """Return the line that `systemctl status` shows."""
        secrets = len(self._tree.journal) - len(self._tree.deciding)
        level = self._tree.journal.arena.level
        kept = "kept over restarts" if self._store.kept else "not kept over restarts"
        return f"{secrets} secret{'' if secrets == 1 else 's'}, memory: {level}, {kept}"

    def reloading(self) -> None:
        """Report that a reload begins."""
        self._manager.reloading()

    def reloaded(self) -> None:
        """Report that a reload has ended."""
        self._manager.ready(self.status())

    def stopping(self) -> None:
        """Tell that the end has begun."""
        self._tree.on_count = None
        if self._due is not None:
            self._due.cancel()
        self._manager.stopping(self.status())

    def _beat(self, seconds: float) -> None:
        self._manager.alive()
        self._store.again(self._changed)
        asyncio.get_running_loop().call_later(seconds, self._beat, seconds)

    def _changed(self) -> None:
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(STATUS_SECONDS, self._tell)

    def _tell(self) -> None:
        self._due = None
        if not self._manager.status(self.status()):
            self._changed()


def adopt(connections: list[Passed]) -> list[tuple[socket.socket, str]]:
    """Return the connections of the credentials door that an earlier process had accepted."""
    found = []
    for name, fd in connections:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        found.append((sock, name))
    return found
