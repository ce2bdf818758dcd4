# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which ids this process's user namespace maps (user_namespaces(7)).

The kernel shows every id without a mapping as one overflow id, so that id names no peer.
access.peer, net.listener, daemon.process and secretctl's doctor call it.
"""

from typing import Final, NamedTuple

_ALL_IDS: Final = (1 << 32) - 1


class IdMap(NamedTuple):
    """The ids of one kind that this user namespace maps (user_namespaces(7)).

    ``overflow``: the id that the kernel shows for every unmapped id; None where all ids are mapped,
    since it is an ordinary id then.
    """

    ranges: tuple[range, ...]
    overflow: int | None

    def is_mapped(self, number: int) -> bool:
        """Return True if the map has this id."""
        return any(number in each for each in self.ranges)


def read_id_map(kind: str, root: str = "/proc") -> IdMap:
    """Return the map of "uid" or "gid" of this process. ``root``: the mount point of proc(5)."""
    try:
        with open(f"{root}/self/{kind}_map", encoding="ascii") as file:
            lines = [[int(word) for word in line.split()] for line in file]
        with open(f"{root}/sys/kernel/overflow{kind}", encoding="ascii") as file:
            overflow = int(file.read())
    except FileNotFoundError:  # a kernel without user namespaces, or /proc with subset=pid
        overflow = _OVERFLOW_ID
        try:
            with open(f"{root}/self/{kind}_map", encoding="ascii") as file:
                lines = [[int(word) for word in line.split()] for line in file]
        except FileNotFoundError:
            return IdMap((range(_ALL_IDS),), None)
    ranges = tuple(range(first, first + count) for first, _, count in lines)
    return IdMap(ranges, None if sum(map(len, ranges)) >= _ALL_IDS else overflow)


_OVERFLOW_ID: Final = 65534
UIDS: Final = read_id_map("uid")
GIDS: Final = read_id_map("gid")


def unmapped_words(uids: IdMap = UIDS, gids: IdMap = GIDS) -> str:
    """Return a text about the ids that this user namespace does not map; "" if it maps all."""
    missing = [
        f"{kind} {each.overflow} stands for all that are not"
        for kind, each in (("uid", uids), ("gid", gids))
        if each.overflow is not None
    ]
    return f"this user namespace does not map all ids: {', '.join(missing)}" if missing else ""
