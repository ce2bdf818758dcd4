# SPDX-License-Identifier: LGPL-2.1-or-later
"""The property store of the objects: an append-only, checksummed journal in an ordinary memfd.

A record holds everything about an object but its plaintext, and names the slot in the arena. Only
qom adds, changes and removes records; daemon stores the descriptors.

Theory of operation. Each object is whole or absent at every moment, whenever the process is killed.
Adding fills the slot, then the record, then its state byte (live). Removing sets the state byte to
dead, then wipes the slot. Replacing writes a second live record, then marks the first one dead;
`restore` lets the later one count. Python keeps only a dict from id to offset. There are two files:
compaction copies the live records into the other one, whose magic comes last, and the complete file
of the later generation counts. What can go wrong: memory is exhausted, and nothing has changed; or
a file is damaged, `restore` raises StateError and changes no object. layout has the formats.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Self
from zlib import crc32

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
    UNCHECKED,
    WINDOWS_OFFSET,
    WRITTEN,
    Header,
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
        self._initial_bytes, self._dead_bytes = tuning.journal_bytes, tuning.dead_bytes
        self.compaction_allowed = True
        self._offsets: dict[str, int] = {}
        self.ids = self._offsets.keys()
        self.survey = LoadSummary()
        self._dead = 0
        self._end = FILE.size
        self._packs: dict[int, Callable[..., bytes]] = {}  # by the bytes after a record's numbers
        if kept is None:
            self._spare = -1
            self._fd = new_file()
            try:
                self._map = begin(self._fd, self._initial_bytes, 1, 0, arena)
            except BaseException:
                os.close(self._fd)
                raise
            self._map[: len(MAGIC)] = MAGIC
        else:
            self._fd, self._spare, self._map = kept
        arena.on_window = self._note_windows

    @classmethod
    def restore(cls, arena_fd: int, journal_fds: Sequence[int]) -> Self:
        """Return the journal and arena of an earlier process; takes over the descriptors.

        Raises StateError or LockedMemoryExhausted; every object then stays as it was.
        """
        header, files = open_files(arena_fd, journal_fds)
        arena = Arena(LEVELS[header.level], window=header.window, fd=arena_fd)
        journal = cls(arena, files)
        # Compaction would continue in a file that is not stored.
        journal.compaction_allowed = files.spare >= 0
        try:
            arena.adopt(plan(arena.window, header.windows, journal._load(header.end)))
            if files.spare >= 0:
                os.ftruncate(files.spare, 0)
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

    @property
    def paired(self) -> bool:
        """True once there is a second file."""
        return self._spare >= 0

    def filenos(self) -> tuple[int, int]:
        """The descriptors of both files, borrowed; creates the second one if necessary."""
        if not self.paired:
            self._spare = new_file()
        return self._fd, self._spare

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
        offset = self._append(object_id, type_number, properties, size, slot, uid)
        self._offsets[object_id] = offset
        if plaintext is not None:
            plaintext.disown()
        return size + self._end - offset

    def set_properties(self, object_id: str, properties: dict[str, object]) -> None:
        """Replace an object's properties; its plaintext stays."""
        self._compact_if_due()
        old = self._offsets[object_id]
        record = self._read(old)
        # For a moment two live records share one slot: the later one counts.
        self._offsets[object_id] = self._append(
            object_id, record.type, properties, record.size, record.slot, record.uid
        )
        self._mark_dead(old)

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
        length, _, _, _, _, old_size, old_slot, old_uid = RECORD.unpack_from(self._map, old)
        new = self._append(object_id, type_number, properties, size, slot, uid)
        self._offsets[object_id] = new
        if plaintext is not None:
            plaintext.disown()
        self._mark_dead(old)
        if old_slot != NO_SLOT:
            self.arena.free(old_slot, old_size)
        return old_uid, old_size + length, size + self._end - new

    def remove(self, object_id: str) -> tuple[int, int, int]:
        """Remove an object and wipe its plaintext.

        Returns its type's number, the uid that added it, and its size in bytes: plaintext and
        record.
        """
        offset = self._offsets.pop(object_id)
        length, _, _, kind, _, size, slot, uid = RECORD.unpack_from(self._map, offset)
        self._map[offset + STATE_OFFSET] = GONE
        self._dead += length
        if slot != NO_SLOT:
            self.arena.free(slot, size)
        return kind, uid, size + length

    def get(self, object_id: str) -> ObjectRecord | None:
        """Return an object's record, or None."""
        offset = self._offsets.get(object_id)
        return None if offset is None else self._read(offset)

    def summary(self, object_id: str) -> tuple[int, int] | None:
        """Return an object's type number and plaintext size in bytes, or None; cheaper than
        `get`.
        """
        offset = self._offsets.get(object_id)
        if offset is None:
            return None
        fields = RECORD.unpack_from(self._map, offset)
        return fields[3], fields[5]

    def owner(self, object_id: str) -> tuple[int, int]:
        """Return the uid that added an existing object, and its size in bytes: plaintext and
        record.
        """
        fields = RECORD.unpack_from(self._map, self._offsets[object_id])
        return fields[7], fields[5] + fields[0]

    def content(self, object_id: str) -> tuple[int, int, int] | None:
        """Return an object's type number, plaintext size in bytes and offset for `Arena.view`, or
        None.
        """
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
        if self._spare >= 0:
            os.close(self._spare)

    def _append(  # noqa: PLR0917 - a record's members
        self,
        object_id: str,
        type_number: int,
        properties: dict[str, object],
        size: int,
        slot: int,
        uid: int,
    ) -> int:
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
        mapping, offset = self._map, self._end
        end = offset + length
        if end > len(mapping):
            mapping.resize(max(2 * len(mapping), end))
        # Bytes after the end are zeros, since the file only grows.
        mapping[offset:end] = UNCHECKED.pack(length, crc32(checked), WRITTEN) + checked
        mapping[offset + STATE_OFFSET] = LIVE
        END.pack_into(mapping, END_OFFSET, end)
        self._end = end
        return offset

    def _mark_dead(self, offset: int) -> None:
        self._map[offset + STATE_OFFSET] = GONE
        self._dead += LENGTH.unpack_from(self._map, offset)[0]

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
        """Record how many windows were ever used: the next process wipes what is not in use
        there.
        """
        struct.pack_into("<I", self._map, WINDOWS_OFFSET, count)

    def _compact_if_due(self) -> None:
        """If most bytes are dead, copy the live records into the other file and continue there.

        Earlier offsets are invalid then.
        """
        if self._dead <= max(self._dead_bytes, self._end // 2) or not self.compaction_allowed:
            return
        fd = self.filenos()[1]
        header = Header(*FILE.unpack_from(self._map))
        size = max(self._initial_bytes, 2 * (self._end - self._dead))
        fresh = begin(fd, size, header.generation + 1, header.windows, self.arena)
        offsets = {}
        end = FILE.size
        for object_id, offset in self._offsets.items():
            length = struct.unpack_from("<I", self._map, offset)[0]
            fresh[end : end + length] = self._map[offset : offset + length]
            offsets[object_id] = end
            end += length
        struct.pack_into("<Q", fresh, END_OFFSET, end)
        fresh[: len(MAGIC)] = MAGIC
        self._map.close()
        self._fd, self._spare, self._map = fd, self._fd, fresh
        self._offsets.update(offsets)
        self._end, self._dead = end, 0
        os.ftruncate(self._spare, 0)

    def _load(self, end: int) -> dict[int, list[int]]:
        """Find all records; return the offsets of all plaintexts by size. Raises StateError."""
        found = LoadResult(self._offsets)
        load(found, self._map, end)
        self.survey, self._dead, self._end = found.survey, found.dead, found.end
        return found.buffers
