# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compaction in the journal's own file; test_restore looks at it before each bytecode."""

import random

import pytest

from secretd.journal.compaction import Compaction
from secretd.journal.journal import Journal
from secretd.journal.layout import FILE
from secretd.limits import Tuning
from secretd.memory.arena import Arena
from tests.journal.test_restore import WINDOW, content, discard, left, restored
from tests.support.journals import put


def run(journal: Journal, compaction: Compaction) -> None:
    """A whole pass; the journal is whole after each step, also for another process."""
    expected = content(journal)
    while not compaction.ended:
        journal._end = compaction.step(journal._map, journal._end)
        assert content(journal) == expected
        other = restored(left(journal))
        assert content(other) == expected
        discard(other)


@pytest.mark.parametrize("longest", [500, 1000, 1 << 20])
def test_a_gap_longer_than_a_record_can_be_is_left(longest: int) -> None:
    """Its dead bytes stay until the next pass, and nothing else changes."""
    journal = Journal(Arena("none", window=WINDOW), tuning=Tuning(dead_bytes=1 << 20))
    rng = random.Random(3)
    for number in range(60):
        put(journal, f"s{number}", b"%d" % number, file="x" * rng.randrange(90))
    for number in rng.sample(range(60), 40):
        journal.remove(f"s{number}")
    size = journal.size
    run(journal, Compaction(journal._offsets, FILE.size, longest))
    assert journal.size <= size
    discard(journal)


def test_a_pass_over_a_dense_journal_changes_nothing() -> None:
    """The file ends where the records do."""
    journal = Journal(Arena("none", window=WINDOW), tuning=Tuning(journal_bytes=FILE.size + 3 * 32))
    for name in "abc":
        put(journal, name, b"x")
    before = left(journal)
    run(journal, Compaction(journal._offsets, FILE.size))
    assert left(journal) == before
    discard(journal)


def test_a_record_without_room_before_it_goes_to_the_end() -> None:
    """The file grows for it, and shrinks at the end of the pass."""
    journal = Journal(Arena("none", window=WINDOW), tuning=Tuning(journal_bytes=WINDOW))
    put(journal, "a", b"dead")
    for number in range(9):
        put(journal, f"s{number}", b"%d" % number, file="x" * 370)
    journal.remove("a")
    assert WINDOW - journal.size < 400
    compaction = Compaction(journal._offsets, FILE.size)
    grown = []
    expected = content(journal)
    while not compaction.ended:
        journal._end = compaction.step(journal._map, journal._end)
        grown.append(len(journal._map))
    assert max(grown) > WINDOW
    assert content(journal) == expected
    assert grown[-1] == WINDOW
    discard(journal)
