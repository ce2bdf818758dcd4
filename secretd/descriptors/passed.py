# SPDX-License-Identifier: LGPL-2.1-or-later
"""The descriptors that a connection holds: the pending one, named ones and numbered sets.

Names and sets work as in QEMU's monitor/fds.c, but belong to one connection. The monitor calls this
module; the transport receives descriptors.
"""

from typing import Final, NotRequired, TypedDict

from secretd.descriptors.fd import Fd
from secretd.errors import CommandError

DESCRIPTORS_PER_CONNECTION: Final = 64
"""Descriptors that one connection may hold by name and in sets together. QEMU has no limit."""


class PendingFd:
    """The descriptor that waits on a connection until a command takes it.

    QEMU keeps those of the latest message, and only ever uses the first (chardev/char-socket.c).
    """

    def __init__(self) -> None:
        self._waiting: Fd | None = None

    def receive(self, fds: list[Fd]) -> None:
        """Keep the first descriptor of a message in place of the waiting one; close the others."""
        if self._waiting is not None:
            self.close()
        self._waiting = fds[0]
        for fd in fds[1:]:
            fd.close()

    def take(self) -> Fd:
        """Return the waiting descriptor, or raise CommandError as the callers of monitor_get_fd()
        do.
        """
        fd, self._waiting = self._waiting, None
        if fd is None:
            raise CommandError("No file descriptor supplied via SCM_RIGHTS")
        return fd

    def close(self) -> None:
        """Close the waiting descriptor."""
        fd, self._waiting = self._waiting, None
        if fd is not None:
            fd.close()


class NamedFds:
    """The descriptors that getfd named (monitor/fds.c)."""

    def __init__(self) -> None:
        self._by_name: dict[str, Fd] = {}

    def __len__(self) -> int:
        return len(self._by_name)

    def add(self, name: str, fd: Fd) -> None:
        """Name a descriptor, and close the previous one of that name. The descriptor is always
        consumed.
        """
        if name[:1].isascii() and name[:1].isdigit():
            fd.close()
            raise CommandError("Parameter 'fdname' expects a name not starting with a digit")
        previous = self._by_name.get(name)
        self._by_name[name] = fd
        if previous is not None:
            previous.close()

    def take(self, name: str) -> Fd:
        """Remove and return the descriptor of that name, or raise CommandError."""
        fd = self._by_name.pop(name, None)
        if fd is None:
            raise CommandError(f"File descriptor named '{name}' not found")
        return fd

    def close(self) -> None:
        """Close and remove all."""
        while self._by_name:
            self._by_name.popitem()[1].close()


AddfdInfo = TypedDict("AddfdInfo", {"fdset-id": int, "fd": int})
"""The result of add-fd (qapi/misc.json)."""


class FdsetFdInfo(TypedDict):
    """A descriptor of a set, as query-fdsets lists it."""

    fd: int
    opaque: NotRequired[str]


FdsetInfo = TypedDict("FdsetInfo", {"fdset-id": int, "fds": list[FdsetFdInfo]})
"""A set, as query-fdsets lists it."""

FIRST_NUMBER: Final = 10
"""The first number that add-fd returns on each connection, distinct from 0 to 9."""


class FdSets:
    """The numbered sets of add-fd, remove-fd and query-fdsets (monitor/fds.c).

    Numbers belong to the connection: the process's own would reveal what others do.
    """

    def __init__(self) -> None:
        self._sets: dict[
            int, list[tuple[int, Fd, str | None]]
        ] = {}  # by set: number, descriptor, opaque text
        self._number = FIRST_NUMBER

    def __len__(self) -> int:
        return sum(map(len, self._sets.values()))

    def add(self, fd: Fd, set_id: int | None, opaque: str | None) -> AddfdInfo:
        """Add a descriptor to a set, the lowest free one without ``set_id``; return AddfdInfo."""
        if set_id is None:
            set_id = next(i for i in range(len(self._sets) + 1) if i not in self._sets)
        elif set_id < 0:
            fd.close()
            raise CommandError("Parameter 'fdset-id' expects a non-negative value")
        number, self._number = self._number, self._number + 1
        self._sets.setdefault(set_id, []).append((number, fd, opaque))
        return {"fd": number, "fdset-id": set_id}

    def remove(self, set_id: int, number: int | None) -> None:
        """Close one descriptor of a set, or all of them; remove an empty set."""
        members = self._sets.get(set_id, [])
        doomed = [m for m in members if number is None or m[0] == number]
        if not doomed:
            detail = "" if number is None else f", fd:{number}"
            raise CommandError(f"File descriptor named 'fdset-id:{set_id}{detail}' not found")
        kept = [m for m in members if m not in doomed]
        if kept:
            self._sets[set_id] = kept
        else:
            del self._sets[set_id]
        for _, fd, _ in doomed:
            fd.close()

    def query(self) -> list[FdsetInfo]:
        """Return the FdsetInfo list: sets by descending id, descriptors in the order of adding."""
        listed = []
        for set_id in sorted(self._sets, reverse=True):
            fds = []
            for number, _, opaque in self._sets[set_id]:
                info: FdsetFdInfo = {"fd": number}
                if opaque is not None:
                    info["opaque"] = opaque
                fds.append(info)
            listed.append(FdsetInfo({"fdset-id": set_id, "fds": fds}))
        return listed

    def in_set(self, set_id: int) -> list[int]:
        """Return the descriptors of a set, borrowed; an empty list if there is no such set."""
        return [fd.fileno() for _, fd, _ in self._sets.get(set_id, [])]

    def numbered(self, number: int) -> int | None:
        """Return the descriptor to which add-fd gave this number, borrowed; None if there is
        none.
        """
        members = (member for each in self._sets.values() for member in each)
        return next((fd.fileno() for known, fd, _ in members if known == number), None)

    def close(self) -> None:
        """Close and remove all."""
        for set_id in list(self._sets):
            self.remove(set_id, None)
