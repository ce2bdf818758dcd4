# SPDX-License-Identifier: LGPL-2.1-or-later
"""The descriptors that the service manager passes at start: listening sockets, and those of an
earlier process.

`inherited` sorts them by name; `open_journal` continues with the stored arena and journal, or
creates new ones. daemon.process calls both.
"""

import logging
import os
import socket
from typing import Final, NamedTuple

from secretd.daemon.sockets import PASSED_NAMES, is_listening
from secretd.errors import LockedMemoryExhausted, MemoryLockError, StateError, UsageError
from secretd.journal.journal import Journal
from secretd.memory.arena import Arena
from secretd.memory.level import Choice, choose_level
from secretd.server.credentials import STORED
from secretd.systemd.activation import Passed, passed

log = logging.getLogger("secretd")

ARENA: Final = "arena"

JOURNAL: Final = "journal"
"""The name of the journal's files in the descriptor store."""

_ROLES: Final = tuple(PASSED_NAMES)


class InheritedDescriptors(NamedTuple):
    """The descriptors from the service manager: listening sockets, and those of an earlier process.

    ``connections``: those of the credentials socket.
    """

    sockets: list[Passed]
    arenas: list[int]
    journals: list[int]
    connections: list[Passed]


def inherited() -> InheritedDescriptors:
    """Return the descriptors that the service manager passed, by their names; the caller owns them.

    Unknown names stay with the service manager. Raises UsageError for a socket with a wrong name or
    type.
    """
    found = InheritedDescriptors([], [], [], [])
    for each in passed():
        name, fd = each
        # 1. Sockets of .socket units.
        if name in _ROLES:
            if not is_listening(fd):
                raise UsageError(
                    f"what the service manager passed as '{name}' is no listening AF_UNIX stream "
                    "socket"
                )
            found.sockets.append(each)
        # 2. Descriptors that an earlier process stored.
        elif name == ARENA:
            found.arenas.append(fd)
        elif name == JOURNAL:
            found.journals.append(fd)
        elif name.startswith(STORED) and name.removeprefix(STORED).isdecimal():
            found.connections.append(each)
        # 3. Unknown names: a socket is a mistake in a unit.
        elif is_listening(fd):
            raise UsageError(
                f"the service manager passed a socket as '{name}': FileDescriptorName= of a "
                f".socket unit must be {', '.join(_ROLES[:-1])} or {_ROLES[-1]}"
            )
        else:
            if name != "probe":
                log.warning(
                    "the service manager keeps '%s', which this secretd does not know", name
                )
            os.close(fd)
    return found


def open_journal(
    found: InheritedDescriptors, *, require_lock: bool, memory: Choice = "auto"
) -> tuple[Journal, bool]:
    """Return the journal with its arena, and whether an earlier process left it.

    ``memory``: the level of new memory; that of an earlier process stays as it is. Raises
    UsageError if it cannot be taken over, and MemoryLockError if memory must be locked and cannot
    be.
    """
    # 1. Nothing was stored: begin with new memory.
    if not found.journals:
        for fd in found.arenas:  # from a process that ended before it had a journal
            os.close(fd)
        level = choose_level(require=require_lock, choice=memory)
        return Journal(Arena(level)), False
    # 2. Continue with the stored memory, or leave it as it is.
    try:
        if not found.arenas:
            raise StateError("the arena is missing")
        arena, *others = found.arenas
        for fd in others:
            os.close(fd)
        journal = Journal.restore(arena, found.journals)
    except (StateError, LockedMemoryExhausted) as error:
        raise UsageError(
            f"what secretd held before cannot be taken over: {error}. It stays with the service "
            "manager: repair this and the next start takes it over, or give all secrets up with "
            "'systemctl stop'"
        ) from None
    if require_lock and journal.arena.level == "none":
        journal.leave()
        raise MemoryLockError(
            "the secrets that secretd held before are not in locked memory, and "
            "--memory-lock=require was given: give them up with 'systemctl stop', or start "
            "without it"
        )
    if memory not in ("auto", journal.arena.level):
        log.warning(
            "the secrets that secretd held before stay in %s memory until 'systemctl stop' gives "
            "them up; --memory=%s counts for new ones after that",
            journal.arena.level,
            memory,
        )
    return journal, True


def adopt(connections: list[Passed]) -> list[tuple[socket.socket, str]]:
    """Return the connections of the credentials socket that an earlier process accepted."""
    found = []
    for name, fd in connections:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        found.append((sock, name))
    return found
