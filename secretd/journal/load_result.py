# SPDX-License-Identifier: LGPL-2.1-or-later
"""The result of reading a journal's file; loader and bulk_loader fill it in."""

from collections import defaultdict

from secretd.errors import StateError
from secretd.journal.layout import FILE


class LoadSummary:
    """The objects of a journal when it is opened.

    Ids by type number, ids with properties, and the number of objects and bytes (plaintext and
    record) of each uid.
    """

    def __init__(self) -> None:
        self.by_type: dict[int, list[str]] = defaultdict(list)
        self.described: set[str] = set()
        self.held: dict[int, list[int]] = defaultdict(lambda: [0, 0])

    @property
    def count(self) -> int:
        """The number of objects."""
        return sum(count for count, _ in self.held.values())


class LoadResult:
    """The content of a file.

    ``offsets``: of the live records, by id; ``end``: of all records; ``dead``: bytes of dead
    records; ``buffers``: the offsets of plaintexts by size; ``survey``: the summary.
    ``superseded``: the offsets of live records that a later one replaces, since the process ended
    in between.
    """

    def __init__(self, offsets: dict[str, int]) -> None:
        self.offsets = offsets
        self.begin()

    def begin(self) -> None:
        """Start again from the beginning of the file."""
        self.offsets.clear()
        self.survey = LoadSummary()
        self.buffers: dict[int, list[int]] = defaultdict(list)
        self.superseded: list[int] = []
        self.dead = 0
        self.end = FILE.size


def damaged() -> StateError:
    """Return the error of an id that no process can have written."""
    return StateError("a record's id is damaged")
