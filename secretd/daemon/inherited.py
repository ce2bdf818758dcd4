# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the service manager passes at start: listening sockets, and what it stored for an earlier
process.

`inherited` sorts the descriptors by name; `open_journal` continues with the stored arena and
journal, or makes new ones. daemon.process calls both.
"""

import logging
import os
import socket
from typing import Final, NamedTuple

from secretd.access.peer import SocketRole
from secretd.daemon.sockets import is_listening
from secretd.errors import LockedMemoryExhausted, MemoryLockError, StateError, UsageError
from secretd.journal.journal import Journal
from secretd.memory.arena import Arena
from secretd.memory.level import choose_level
from secretd.server.credentials import STORED
from secretd.systemd.activation import Passed, passed

log = logging.getLogger("secretd")

ARENA: Final = "arena"

JOURNAL: Final = "journal"
"""What the files are called in the descriptor store."""

_ROLES: Final = tuple(role.value for role in SocketRole)


class InheritedDescriptors(NamedTuple):
    """What the service manager passed: listening sockets, and what it kept of an earlier process.
    ``connections``: of the credentials socket.
    """

    sockets: list[Passed]
    arenas: list[int]
    journals: list[int]
    connections: list[Passed]


def inherited() -> InheritedDescriptors:
    """Return what the service manager passed, by the names that it has; the caller owns the
    descriptors.

    Raises UsageError for a socket that is no socket. What else is unknown stays with the service
    manager.
    """
    found = InheritedDescriptors([], [], [], [])
    for each in passed():
        name, fd = each
        if name in _ROLES:
            if not is_listening(fd):
                raise UsageError(
                    f"what the service manager passed as '{name}' is no listening AF_UNIX stream socket"
                )
            found.sockets.append(each)
        elif name == ARENA:
            found.arenas.append(fd)
        elif name == JOURNAL:
            found.journals.append(fd)
        elif name.startswith(STORED) and name.removeprefix(STORED).isdecimal():
            found.connections.append(each)
        elif is_listening(fd):
            raise UsageError(
                f"the service manager passed a socket as '{name}': FileDescriptorName= of a .socket unit "
                f"must be {', '.join(_ROLES[:-1])} or {_ROLES[-1]}"
            )
        else:
            if name != "probe":
                log.warning(
                    "the service manager keeps '%s', which this secretd does not know", name
                )
            os.close(fd)
    return found


def open_journal(found: InheritedDescriptors, *, require_lock: bool) -> tuple[Journal, bool]:
    """Return the journal, with its arena, and whether an earlier process has left it.

    Raises UsageError if what was left cannot be taken over, MemoryLockError if memory has to be
    locked and cannot be.
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


def adopt(connections: list[Passed]) -> list[tuple[socket.socket, str]]:
    """Return the connections of the credentials socket that an earlier process had accepted."""
    found = []
    for name, fd in connections:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        found.append((sock, name))
    return found
