# SPDX-License-Identifier: LGPL-2.1-or-later
"""An optimisation: read a run of similar records at once.

The reference is loader, record by record. `read_run` may only read records that the reference would
read in the same way, or decline by returning fewer than SHORT_RUN.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import compress
from typing import Any, Final
from zlib import crc32

from secretd.errors import StateError
from secretd.journal.layout import GONE, LENGTH, LIVE, NO_SLOT, RECORD, UNCHECKED
from secretd.journal.load_result import LoadResult, damaged

_RUN: Final = 512
"""Records that are read at once, where so many are live and of one length."""

SHORT_RUN: Final = 8
"""Records below which a run does not pay."""

_FINISHED: Final = (LIVE, GONE)
_SHAPES: Final = 64  # cached lengths of records


def read_run(result: LoadResult, data: bytes) -> int:
    """Read records of one length: dead ones, and live ones of one type and uid with a plaintext.

    Most journals consist of such runs, and this takes a third of the time. Returns the number of
    records read.
    """
    # 1. How many records of this length could follow?
    begin = result.end
    length = LENGTH.unpack_from(data, begin)[0] if begin + RECORD.size <= len(data) else 0
    count = min(_RUN, (len(data) - begin) // length) if length >= RECORD.size else 0
    if count < SHORT_RUN:
        return 0
    # 2. How many of them are alike? Of the dead ones only length and state count.
    whole, checked = _shape(length)
    chunk = data[begin : begin + count * length]
    rows = list(whole.iter_unpack(chunk))
    lengths, _, states, *_ = zip(*rows, strict=True)
    if lengths.count(length) < count or states.count(LIVE) + states.count(GONE) < count:
        count = next(i for i, row in enumerate(rows) if row[0] != length or row[2] not in _FINISHED)
    alive = [state == LIVE for state in states[:count]]
    rows = list(compress(rows, alive))
    offsets = list(compress(range(begin, begin + count * length, length), alive))
    kind, uid = (rows[0][3], rows[0][7]) if rows else (0, 0)
    for index, row in enumerate(rows):
        if row[3] != kind or row[7] != uid:
            count = (offsets[index] - begin) // length
            del rows[index:], offsets[index:], alive[count:]
            break
    if count < SHORT_RUN:
        return 0
    if rows:
        bodies = compress(checked.iter_unpack(chunk[: count * length]), alive)
        if not _read_live(result, rows, [body for (body,) in bodies], offsets):
            return 0
    # 3. The result.
    result.end = begin + count * length
    result.dead += (count - len(rows)) * length
    return count


def _read_live(
    result: LoadResult,
    rows: Sequence[tuple[Any, ...]],
    bodies: Sequence[bytes],
    offsets: Sequence[int],
) -> bool:
    """Read live records that are alike; return False, and change nothing, where one is not."""
    lengths, crcs, _, kinds, id_lengths, sizes, slots, uids, texts = zip(*rows, strict=True)
    if NO_SLOT in slots:
        return False
    # 1. Their checksums and ids.
    if tuple(map(crc32, bodies)) != crcs:
        raise StateError("a record's checksum is wrong")
    # Only zeros follow an identifier without properties.
    together = b"\n".join(texts).translate(None, b"\0")
    ids = together.decode().split("\n") if together.isascii() else []
    if tuple(map(len, ids)) != id_lengths:
        if max(id_lengths) > len(texts[0]):
            raise damaged()
        ids = [text[:size].decode() for text, size in zip(texts, id_lengths, strict=True)]
        result.survey.described.update(
            object_id
            for object_id, text, size in zip(ids, texts, id_lengths, strict=True)
            if any(text[size : size + 1])
        )
    # 2. The result.
    result.offsets.update(zip(ids, offsets, strict=True))
    if sizes.count(sizes[0]) == len(sizes):
        result.buffers[sizes[0]] += slots
    else:
        for size, slot in zip(sizes, slots, strict=True):
            result.buffers[size].append(slot)
    result.survey.by_type[kinds[0]] += ids
    held = result.survey.held[uids[0]]
    held[0] += len(ids)
    held[1] += sum(sizes) + len(ids) * lengths[0]
    return True


@lru_cache(_SHAPES)
def _shape(length: int) -> tuple[struct.Struct, struct.Struct]:
    """Return the struct that splits a record of that length, and the one of its checksummed
    bytes.
    """
    return (
        struct.Struct(f"{RECORD.format}{length - RECORD.size}s"),
        struct.Struct(f"<{UNCHECKED.size}x{length - UNCHECKED.size}s"),
    )
