# SPDX-License-Identifier: LGPL-2.1-or-later
"""The property store of the objects: an append-only, checksummed journal in an ordinary memfd.

A record holds everything about an object but its plaintext, and names the slot in the arena. Only
qom adds, changes and removes records; daemon stores the descriptors.

Theory of operation. Each object is whole or absent at every moment, whenever the process is killed.
Adding fills the slot, then the record, then its state byte (live). Removing sets the state byte to
dead, then wipes the slot. Replacing writes a second live record, then marks the first one dead;
`restore` lets the later one count. Python keeps a dict from id to offset, and the offsets of dead
records by length: a new object takes the place of a dead record of its length, which stays dead
until the new record is whole. Only an object under a free id may, since of two live records the
later one counts. What dead bytes remain, compaction removes, a few records with each change. What
can go wrong: memory is exhausted, and nothing has changed; or the file is damaged, `restore` raises
StateError and changes no object. layout has the formats.
"""

import os
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Self
from zlib import crc32

from secretd.journal.compaction import RECORDS_PER_CHANGE, Compaction
from secretd.journal.files import (
    JournalFiles,
    ObjectRecord,
    begin,
    decode_properties,
    encode_properties,
    new_file,
    open_files,
)
from secretd.journal.layout import (
    CHECKED,
    END,
    END_OFFSET,
    FILE,
    GONE,
    LENGTH,
    LEVELS,
    LIVE,
    MAGIC,
    NO_SLOT,
    RECORD,
    STATE_OFFSET,
    SUMMARY,
    UNCHECKED,
    WINDOWS_OFFSET,
    WRITTEN,
)
from secretd.journal.load_result import LoadResult, LoadSummary
from secretd.journal.loader import load
from secretd.limits import Tuning
from secretd.memory.arena import Arena, LockedBuffer
from secretd.memory.takeover import plan

_PACKS: Final = 64
"""Cached sizes of records; there are usually one or two."""


class Journal:
    """The objects' records, and through them their plaintext in ``arena``.

    ``survey``: a summary of the objects that were taken over.
    """

    def __init__(
        self,
        arena: Arena,
        kept: "JournalFiles | None" = None,
        tuning: Tuning = Tuning(),  # noqa: B008 - it cannot be changed
    ) -> None:
        self.arena = arena
        self._dead_bytes = tuning.dead_bytes
        self._offsets: dict[str, int] = {}
        self.ids = self._offsets.keys()
        self.survey = LoadSummary()
        self._dead = 0
        self._freed: dict[int, array[int]] = {}  # offsets of dead records by length
        self._compaction: Compaction | None = None
        self._end = FILE.size
        self._packs: dict[int, Callable[..., bytes]] = {}  # by the bytes after a record's numbers
        if kept is None:
            self._fd = new_file()
            try:
                self._map = begin(self._fd, tuning.journal_bytes, arena)
            except BaseException:
                os.close(self._fd)
                raise
            self._map[: len(MAGIC)] = MAGIC
        else:
            self._fd, self._map = kept
        arena.on_window = self._note_windows

    @classmethod
    def restore(cls, arena_fd: int, journal_fds: Sequence[int]) -> Self:
        """Return the journal and arena of an earlier process; takes over the descriptors.

        Raises StateError or LockedMemoryExhausted; every object then stays as it was.
        """
        header, files = open_files(arena_fd, journal_fds)
        arena = Arena(LEVELS[header.level], window=header.window, fd=arena_fd)
        journal = cls(arena, files)
        try:
            arena.adopt(plan(arena.window, header.windows, journal._load(header.end)))
        except BaseException:
            journal.leave()
            raise
        return journal

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, object_id: str) -> bool:
        return object_id in self._offsets

    def __iter__(self) -> Iterator[str]:
        return iter(self._offsets)

    @property
    def size(self) -> int:
        """Bytes of the journal in use."""
        return self._end

    def fileno(self) -> int:
        """The descriptor of the file, borrowed."""
        return self._fd

    def add(
        self,
        object_id: str,
        type_number: int,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> int:
        """Store an object under a free id; takes over the plaintext buffer.

        Returns its size in bytes: plaintext and record.
        """
        if object_id in self._offsets:
            raise ValueError("the id is taken")
        if self._dead > self._dead_bytes:
            self._compact_if_due()
        if plaintext is None:
            size, slot = 0, NO_SLOT
        else:
            size, slot = plaintext.size, plaintext.offset
        offset, length = self._write(
            object_id, type_number, properties, size, slot, uid, reuse=True
        )
        self._offsets[object_id] = offset
        if plaintext is not None:
            plaintext.disown()
        return size + length

    def set_properties(self, object_id: str, properties: dict[str, object]) -> None:
        """Replace an object's properties; its plaintext stays."""
        self._compact_if_due()
        old = self._offsets[object_id]
        record = self._read(old)
        # For a moment two live records share one slot: the later one counts.
        self._offsets[object_id], _ = self._write(
            object_id, record.type, properties, record.size, record.slot, record.uid
        )
        self._bury(old, LENGTH.unpack_from(self._map, old)[0])

    def replace(
        self,
        object_id: str,
        type_number: int,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> tuple[int, int, int]:
        """Replace an object by another one, and wipe the old one; takes over the plaintext buffer.

        Returns the uid that added the old one, and the sizes of the old and the new one in bytes.
        """
        size, slot = (0, NO_SLOT) if plaintext is None else (plaintext.size, plaintext.offset)
        self._compact_if_due()
        old = self._offsets[object_id]
        old_length, _, _, _, _, old_size, old_slot, old_uid = RECORD.unpack_from(self._map, old)
        new, length = self._write(object_id, type_number, properties, size, slot, uid)
        self._offsets[object_id] = new
        if plaintext is not None:
            plaintext.disown()
        self._bury(old, old_length)
        if old_slot != NO_SLOT:
            self.arena.free(old_slot, old_size)
        return old_uid, old_size + old_length, size + length

    def remove(self, object_id: str) -> tuple[int, int, int]:
        """Remove an object and wipe its plaintext.

        Returns its type's number, the uid that added it, and its bytes: plaintext and record.
        """
        offset = self._offsets.pop(object_id)
        length, _, _, kind, _, size, slot, uid = RECORD.unpack_from(self._map, offset)
        self._bury(offset, length)
        if slot != NO_SLOT:
            self.arena.free(slot, size)
        return kind, uid, size + length

    def get(self, object_id: str) -> ObjectRecord | None:
        """Return an object's record, or None."""
        offset = self._offsets.get(object_id)
        return None if offset is None else self._read(offset)

    def summary(self, object_id: str) -> tuple[int, int] | None:
        """Return an object's type number and plaintext size in bytes, or None."""
        offset = self._offsets.get(object_id)
        return None if offset is None else SUMMARY.unpack_from(self._map, offset)

    def owner(self, object_id: str) -> tuple[int, int]:
        """Return the uid that added an existing object, and its bytes: plaintext and record."""
        fields = RECORD.unpack_from(self._map, self._offsets[object_id])
        return fields[7], fields[5] + fields[0]

    def content(self, object_id: str) -> tuple[int, int, int] | None:
        """Return an object's type number, bytes of plaintext and offset for `Arena.view`."""
        offset = self._offsets.get(object_id)
        if offset is None:
            return None
        _, _, _, kind, _, size, slot, _ = RECORD.unpack_from(self._map, offset)
        return kind, size, slot

    def plaintext(self, object_id: str) -> memoryview:
        """Return the plaintext, a view that is borrowed until the object is removed."""
        fields = RECORD.unpack_from(self._map, self._offsets[object_id])
        return self.arena.view(fields[6], fields[5])

    def close(self) -> None:
        """Wipe all plaintext and close the journal."""
        for object_id in list(self._offsets):
            self.remove(object_id)
        self._close_files()

    def leave(self) -> None:
        """Close journal and arena, and leave everything to the next process."""
        self.arena.leave()
        self._close_files()

    def _close_files(self) -> None:
        self._map.close()
        os.close(self._fd)

    def _write(  # noqa: PLR0917 - a record's members
        self,
        object_id: str,
        type_number: int,
        properties: dict[str, object],
        size: int,
        slot: int,
        uid: int,
        *,
        reuse: bool = False,
    ) -> tuple[int, int]:
        """Write a live record; return its offset and length in bytes.

        ``reuse``: it may take the place of a dead one; otherwise it is the last one of the file.
        """
        # 1. Its bytes.
        encoded_id = object_id.encode()
        content = encoded_id + encode_properties(properties) if properties else encoded_id
        rest = (RECORD.size + len(content) + 7 & ~7) - RECORD.size
        pack = self._packs.get(rest)
        if pack is None:
            if len(self._packs) == _PACKS:
                self._packs.clear()
            pack = self._packs[rest] = struct.Struct(CHECKED.format(rest)).pack
        checked = pack(type_number, len(encoded_id), size, slot, uid, content)
        length = RECORD.size + rest
        mapping = self._map
        # 2. In the place of a dead one. Its length stays, and its state is "dead" until the end.
        if reuse and (freed := self._freed.get(length)):
            offset = freed.pop()
            mapping[offset : offset + length] = (
                UNCHECKED.pack(length, crc32(checked), GONE) + checked
            )
            mapping[offset + STATE_OFFSET] = LIVE
            self._dead -= length
            return offset, length
        # 3. At the end. The bytes behind the end are zeros.
        offset = self._end
        end = offset + length
        if end > len(mapping):
            mapping.resize(max(2 * len(mapping), end))
        mapping[offset:end] = UNCHECKED.pack(length, crc32(checked), WRITTEN) + checked
        mapping[offset + STATE_OFFSET] = LIVE
        END.pack_into(mapping, END_OFFSET, end)
        self._end = end
        return offset, length

    def _bury(self, offset: int, length: int) -> None:
        """Mark a record dead."""
        self._map[offset + STATE_OFFSET] = GONE
        self._dead += length
        if self._compaction is None or offset < self._compaction.gap:
            freed = self._freed.get(length)
            if freed is None:
                self._freed[length] = array("Q", (offset,))
            else:
                freed.append(offset)

    def _read(self, offset: int) -> ObjectRecord:
        length, _, _, kind, id_length, size, slot, uid = RECORD.unpack_from(self._map, offset)
        start = offset + RECORD.size
        object_id = self._map[start : start + id_length].decode()
        text = self._map[start + id_length : offset + length].rstrip(b"\0")
        return ObjectRecord(
            object_id, kind, size, slot, decode_properties(text) if text else {}, uid
        )

    # --- files

    def _note_windows(self, count: int) -> None:
        """Record how many windows were ever used; the next process wipes what is not in use."""
        struct.pack_into("<I", self._map, WINDOWS_OFFSET, count)

    def _compact_if_due(self) -> None:
        """While most bytes are dead, and until the pass ends, compact a few records.

        Earlier offsets are invalid then.
        """
        compaction = self._compaction
        if compaction is None:
            if self._dead <= max(self._dead_bytes, self._end // 2):
                return
            self._freed.clear()  # the pass visits these
            compaction = self._compaction = Compaction(self._offsets, FILE.size)
        for _ in range(RECORDS_PER_CHANGE):
            end = compaction.step(self._map, self._end)
            # Copies to the end leave dead originals, and the cut removes the gap.
            self._dead += end - self._end
            self._end = end
            if compaction.ended:
                self._compaction = None
                return

    def _load(self, end: int) -> dict[int, list[int]]:
        """Find all records; return the offsets of all plaintexts by size. Raises StateError."""
        found = LoadResult(self._offsets)
        load(found, self._map, end)
        self.survey, self._dead, self._end = found.survey, found.dead, found.end
        return found.buffers
