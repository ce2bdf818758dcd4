# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading the records that an earlier process wrote.

`load` checks every live record and fills in the LoadResult. journal.journal calls it at the start.
"""

import math
import mmap
from typing import Final
from zlib import crc32

from secretd.errors import StateError
from secretd.journal.bulk_loader import SHORT_RUN, read_run
from secretd.journal.layout import (
    END,
    END_OFFSET,
    GONE,
    LIVE,
    NO_SLOT,
    RECORD,
    STATE_OFFSET,
    UNCHECKED,
)
from secretd.journal.load_result import LoadResult, damaged

_SINGLES: Final = 64
"""Records that are read one by one after a run of fewer than SHORT_RUN."""


def load(result: LoadResult, mapping: mmap.mmap, end: int) -> None:
    """Read the records of a file up to ``end``, and one finished record after it.

    Unfinished changes of the earlier process are undone in the file. Raises StateError.
    """
    data = mapping[:]
    read(result, data)
    if result.end < end:
        raise StateError("the records end too early")
    for old in result.superseded:
        mapping[old + STATE_OFFSET] = GONE
    END.pack_into(mapping, END_OFFSET, result.end)
    if data.count(b"\0", result.end) != len(data) - result.end:
        mapping[result.end :] = bytes(len(data) - result.end)


def read(result: LoadResult, data: bytes) -> None:
    """Read all finished records. Raises StateError for bytes that no process can have written."""
    try:
        _read(result, data)
    except UnicodeDecodeError:
        raise damaged() from None


def _read(result: LoadResult, data: bytes) -> None:
    singles = 0.0
    while True:
        begun = result.end
        if singles:
            singles -= 1
        else:
            count = read_run(result, data)
            if count < SHORT_RUN:
                singles = _SINGLES
            elif len(result.offsets) < result.survey.count:
                # An id occurs twice: re-read the file one by one to find the superseded record.
                result.begin()
                singles = math.inf
                continue
        if result.end == begun and not _read_one(result, data):
            return


def _read_one(result: LoadResult, data: bytes) -> bool:
    """Read the next record; return False if it is unfinished, or if there is none."""
    # 1. Is there a finished record?
    offset = result.end
    if offset + RECORD.size > len(data):
        return False
    length, crc, state, kind, id_length, size, slot, uid = RECORD.unpack_from(data, offset)
    behind = offset + length
    if length < RECORD.size or behind > len(data) or state not in (LIVE, GONE):
        return False
    result.end = behind
    if state == GONE:
        result.dead += length
        return True
    # 2. A live one: check it.
    if crc32(data[offset + UNCHECKED.size : behind]) != crc:
        raise StateError("a record's checksum is wrong")
    id_end = offset + RECORD.size + id_length
    if id_end > behind:
        raise damaged()
    object_id = data[offset + RECORD.size : id_end].decode()
    # 3. Its place in the result.
    if object_id in result.offsets:
        _supersede(result, data, object_id)
    result.offsets[object_id] = offset
    if slot != NO_SLOT:
        result.buffers[size].append(slot)
    result.survey.by_type[kind].append(object_id)
    if id_end < behind and data[id_end]:
        result.survey.described.add(object_id)
    held = result.survey.held[uid]
    held[0] += 1
    held[1] += size + length
    return True


def _supersede(result: LoadResult, data: bytes, object_id: str) -> None:
    """Remove the earlier record of an id from the result; `load` marks it dead in the file."""
    old = result.offsets[object_id]
    length, _, _, kind, _, size, slot, uid = RECORD.unpack_from(data, old)
    result.superseded.append(old)
    result.dead += length
    if slot != NO_SLOT:
        result.buffers[size].remove(slot)
    result.survey.by_type[kind].remove(object_id)
    result.survey.described.discard(object_id)
    held = result.survey.held[uid]
    held[0] -= 1
    held[1] -= size + length
