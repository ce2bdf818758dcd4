# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compaction of the journal in its own file, a few records at a time.

journal.journal calls `Compaction.step` with each change while most bytes are dead, so no change
waits for a whole pass.

Theory of operation. One gap of dead bytes moves from the first dead record to the end of the file,
and the live records behind it move down in front of it. The gap is a dead record, whose length
reaches to the next record that the pass has not visited.

- A dead record behind the gap joins it.
- A live record that fits into the gap is copied to the gap's start, then the original is marked
  dead and joins the gap. One that does not fit is copied to the end of the file, and visited again.
- When the gap has reached the end of the records, they end where it begins, and the file shrinks.

Why a kill at any moment loses nothing: a reader steps over the records by their lengths. Each
change of a length or a state is one store of the processor (an aligned slice of one, four or eight
bytes), and the bytes around it already are what the new value needs. While a record has two live
copies, they are identical, and a reader may let either of them count.
"""

import mmap
from typing import Final

from secretd.journal.layout import (
    END,
    END_OFFSET,
    GONE,
    LENGTH,
    LIVE,
    RECORD,
    STATE_OFFSET,
    WRITTEN,
)

_HEAD: Final = RECORD.size
_CHECKSUM: Final = slice(LENGTH.size, 2 * LENGTH.size)
_AFTER_STATE: Final = STATE_OFFSET + 1
_LONGEST: Final = (1 << 32) - 1  # a length has 32 bits
RECORDS_PER_CHANGE: Final = 8
"""Records that are visited with each change: more than a change makes, so that a pass ends."""


class Compaction:
    """One pass over the records of a file.

    ``offsets``: the live records by id; it is updated. ``start``: the offset of the first record to
    visit. ``gap``: where the gap begins; records before it stay where they are. ``ended``: whether
    the pass has ended. ``longest``: the largest length of a record in bytes.
    """

    def __init__(self, offsets: dict[str, int], start: int, longest: int = _LONGEST) -> None:
        self._offsets = offsets
        self._longest = longest
        self.gap = start
        self.ended = False
        self._next = start  # the first record that was not visited, and the end of the gap

    def step(self, mapping: mmap.mmap, end: int) -> int:
        """Visit the next record; behind the last one, cut the gap off and end the pass.

        ``end``: where the records end. Returns where they end now.
        """
        if self._next == end:
            self._cut(mapping)
            return self.gap
        offset = self._next
        (length,) = LENGTH.unpack_from(mapping, offset)
        gap = offset - self.gap
        if mapping[offset + STATE_OFFSET] != LIVE:
            self._join(mapping, offset, length)
        elif not gap:
            self.gap += length
            self._next += length
        elif gap == length or gap >= length + _HEAD:
            self._move_down(mapping, offset, length)
        else:
            end = self._move_to_end(mapping, offset, length, end)
        return end

    def _join(self, mapping: mmap.mmap, offset: int, length: int) -> None:
        """Let a dead record behind the gap join it."""
        self._next = offset + length
        if self._next - self.gap > self._longest:
            self.gap = offset  # the next pass visits what lies before it
        if self.gap != offset:
            _set_length(mapping, self.gap, self._next - self.gap)

    def _move_down(self, mapping: mmap.mmap, offset: int, length: int) -> None:
        target, rest = self.gap, offset - self.gap - length
        # 1. All of the copy but its length and its state; behind it, the rest of the gap.
        if rest:
            behind = target + length
            mapping[behind + STATE_OFFSET] = GONE
            _set_length(mapping, behind, rest)
        _copy(mapping, offset, target, length)
        # 2. The gap ends behind the copy, then the copy lives, then the original is dead.
        _set_length(mapping, target, length)
        mapping[target + STATE_OFFSET] = LIVE
        self._follow(mapping, offset, target)
        mapping[offset + STATE_OFFSET] = GONE
        # 3. The original joins the gap.
        self.gap = target + length
        self._join(mapping, offset, length)

    def _move_to_end(self, mapping: mmap.mmap, offset: int, length: int, end: int) -> int:
        """Copy a live record to the end, as if it were added; return the new end."""
        target, end = end, end + length
        if end > len(mapping):
            mapping.resize(max(2 * len(mapping), end))
        _set_length(mapping, target, length)
        _copy(mapping, offset, target, length)
        mapping[target + STATE_OFFSET] = LIVE
        _set_end(mapping, end)
        self._follow(mapping, offset, target)
        mapping[offset + STATE_OFFSET] = GONE
        return end

    def _cut(self, mapping: mmap.mmap) -> None:
        """Let the records end where the gap begins, and give the memory behind it back."""
        gap = self.gap
        size = min(-(-gap // mmap.PAGESIZE) * mmap.PAGESIZE, len(mapping))
        _set_end(mapping, gap)
        if gap < self._next:
            # From here on a reader ignores everything behind the gap's start.
            mapping[gap + STATE_OFFSET] = WRITTEN
        mapping[gap:size] = bytes(size - gap)
        if size < len(mapping):
            mapping.resize(size)
        self.ended = True

    def _follow(self, mapping: mmap.mmap, offset: int, target: int) -> None:
        """Note the new place of a record."""
        id_length = RECORD.unpack_from(mapping, offset)[4]
        start = offset + RECORD.size
        self._offsets[mapping[start : start + id_length].decode()] = target


def _copy(mapping: mmap.mmap, source: int, target: int, length: int) -> None:
    """Copy what the lengths and states of two records do not cover."""
    first, last = _CHECKSUM.start, _CHECKSUM.stop
    mapping[target + first : target + last] = mapping[source + first : source + last]
    first = _AFTER_STATE
    mapping[target + first : target + length] = mapping[source + first : source + length]


def _set_length(mapping: mmap.mmap, offset: int, length: int) -> None:
    # Assigning a slice copies its four bytes at once; Struct.pack_into stores byte by byte.
    mapping[offset : offset + LENGTH.size] = LENGTH.pack(length)


def _set_end(mapping: mmap.mmap, end: int) -> None:
    mapping[END_OFFSET : END_OFFSET + END.size] = END.pack(end)
