# SPDX-License-Identifier: LGPL-2.1-or-later
"""What reading a journal's file results in; loader and bulk_loader fill it in."""

from collections import defaultdict

from secretd.errors import StateError
from secretd.journal.layout import FILE


class LoadSummary:
    """What there is when a journal is opened: ids by their type's number, those that have
    properties, and how many objects and bytes (plaintext and record) each uid has.
    """

    def __init__(self) -> None:
        self.by_type: dict[int, list[str]] = defaultdict(list)
        self.described: set[str] = set()
        self.held: dict[int, list[int]] = defaultdict(lambda: [0, 0])

    @property
    def count(self) -> int:
        """How many objects there are."""
        return sum(count for count, _ in self.held.values())


class LoadResult:
    """What stands in a file: ``offsets`` of the live records by id, ``end`` of them all, bytes of
    the ``dead``, the offsets of plaintexts by size (``buffers``), and what they sum up to
    (``survey``). ``superseded``: the offsets of records that are live and should not be, since the
    process ended while it put others in their place.
    """

    def __init__(self, offsets: dict[str, int]) -> None:
        self.offsets = offsets
        self.begin()

    def begin(self) -> None:
        """Start from the beginning of the file."""
        self.offsets.clear()
        self.survey = LoadSummary()
        self.buffers: dict[int, list[int]] = defaultdict(list)
        self.superseded: list[int] = []
        self.dead = 0
        self.end = FILE.size


def damaged() -> StateError:
    """Return the error of an id that no process wrote."""
    return StateError("a record's id is damaged")
