# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading the records that an earlier process wrote.

`LoadResult.read` checks every record and fills in what the journal has to know of it. It writes
nothing; journal.journal calls it at the start.
"""

import math
import struct
from collections import defaultdict
from functools import lru_cache
from typing import Final
from zlib import crc32

from secretd.errors import StateError
from secretd.journal.layout import FILE, GONE, LENGTH, LIVE, NO_SLOT, RECORD, UNCHECKED

_RUN: Final = 512
"""Records that are read in one go, where so many are live and of one length."""

_SHORT_RUN: Final = 8
_SHAPES: Final = 64  # lengths of records that are known at a time

_SINGLES: Final = 64
"""Records that are read one by one after a run of less than _SHORT_RUN."""


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
        self._begin()

    def _begin(self) -> None:
        self.offsets.clear()
        self.survey = LoadSummary()
        self.buffers: dict[int, list[int]] = defaultdict(list)
        self.superseded: list[int] = []
        self.dead = 0
        self.end = FILE.size

    def read(self, data: bytes) -> None:
        """Read all that is whole. Raises StateError where it is not what somebody wrote."""
        try:
            self._read(data)
        except UnicodeDecodeError:
            raise _damaged() from None

    def _read(self, data: bytes) -> None:
        singles = 0.0
        while True:
            begun = self.end
            if singles:
                singles -= 1
            else:
                count = self._read_run(data)
                if count < _SHORT_RUN:
                    singles = _SINGLES
                elif len(self.offsets) < self.survey.count:
                    # A record that was put in the place of another: only one by one is it known which.
                    self._begin()
                    singles = math.inf
                    continue
            if self.end == begun and not self._read_one(data):
                return

    def _read_one(self, data: bytes) -> bool:
        """Read the next record; False if it was begun and not finished, or there is none."""
        offset = self.end
        if offset + RECORD.size > len(data):
            return False
        length, crc, state, kind, id_length, size, slot, uid = RECORD.unpack_from(data, offset)
        behind = offset + length
        if length < RECORD.size or behind > len(data) or state not in (LIVE, GONE):
            return False
        self.end = behind
        if state == GONE:
            self.dead += length
            return True
        if crc32(data[offset + UNCHECKED.size : behind]) != crc:
            raise StateError("a record's checksum is wrong")
        id_end = offset + RECORD.size + id_length
        if id_end > behind:
            raise _damaged()
        object_id = data[offset + RECORD.size : id_end].decode()
        if object_id in self.offsets:
            self._supersede(data, object_id)
        self.offsets[object_id] = offset
        if slot != NO_SLOT:
            self.buffers[size].append(slot)
        self.survey.by_type[kind].append(object_id)
        if id_end < behind and data[id_end]:
            self.survey.described.add(object_id)
        held = self.survey.held[uid]
        held[0] += 1
        held[1] += size + length
        return True

    def _supersede(self, data: bytes, object_id: str) -> None:
        """The process ended while it put a record in the place of another, which is no longer
        valid.
        """
        old = self.offsets[object_id]
        length, _, _, kind, _, size, slot, uid = RECORD.unpack_from(data, old)
        self.superseded.append(old)
        self.dead += length
        if slot != NO_SLOT:
            self.buffers[size].remove(slot)
        self.survey.by_type[kind].remove(object_id)
        self.survey.described.discard(object_id)
        held = self.survey.held[uid]
        held[0] -= 1
        held[1] -= size + length

    def _read_run(self, data: bytes) -> int:
        """Read records that are like the next one: live, of its length, type and uid, each with a
        plaintext. That is how most journals look, and takes a third of the time. Returns how many.
        """
        begin = self.end
        length = LENGTH.unpack_from(data, begin)[0] if begin + RECORD.size <= len(data) else 0
        count = min(_RUN, (len(data) - begin) // length) if length >= RECORD.size else 0
        if count < _SHORT_RUN:
            return 0
        whole, checked = _shape(length)
        chunk = data[begin : begin + count * length]
        columns = list(zip(*whole.iter_unpack(chunk), strict=True))
        lengths, _, states, kinds, _, _, _, uids, _ = columns
        alike = ((lengths, length), (states, LIVE), (kinds, kinds[0]), (uids, uids[0]))
        if any(column.count(value) < count for column, value in alike):
            count = next(
                i for i in range(count) if any(column[i] != value for column, value in alike)
            )
            columns = [column[:count] for column in columns]
        _, crcs, _, _, id_lengths, sizes, slots, _, texts = columns
        if count < _SHORT_RUN or NO_SLOT in slots:
            return 0
        (bodies,) = zip(*checked.iter_unpack(chunk[: count * length]), strict=True)
        if tuple(map(crc32, bodies)) != crcs:
            raise StateError("a record's checksum is wrong")
        # Behind an identifier there are only zeros, if it has no properties.
        together = b"\n".join(texts).translate(None, b"\0")
        ids = together.decode().split("\n") if together.isascii() else []
        if tuple(map(len, ids)) != id_lengths:
            if max(id_lengths) > len(texts[0]):
                raise _damaged()
            ids = [text[:size].decode() for text, size in zip(texts, id_lengths, strict=True)]
            self.survey.described.update(
                object_id
                for object_id, text, size in zip(ids, texts, id_lengths, strict=True)
                if any(text[size : size + 1])
            )
        self.end = begin + count * length
        self.offsets.update(zip(ids, range(begin, self.end, length), strict=True))
        if sizes.count(sizes[0]) == count:
            self.buffers[sizes[0]] += slots
        else:
            for size, slot in zip(sizes, slots, strict=True):
                self.buffers[size].append(slot)
        self.survey.by_type[kinds[0]] += ids
        held = self.survey.held[uids[0]]
        held[0] += count
        held[1] += sum(sizes) + count * length
        return count


def _damaged() -> StateError:
    return StateError("a record's id is damaged")


@lru_cache(_SHAPES)
def _shape(length: int) -> tuple[struct.Struct, struct.Struct]:
    """Return what cuts a record of that length, and what cuts out all that its checksum covers."""
    return (
        struct.Struct(f"{RECORD.format}{length - RECORD.size}s"),
        struct.Struct(f"<{UNCHECKED.size}x{length - UNCHECKED.size}s"),
    )
