# SPDX-License-Identifier: LGPL-2.1-or-later
r"""The property store of the objects: an append-only, checksummed journal in an ordinary memfd.

It holds everything about an object but plaintext, which stays in the arena: a record names the slot. So
arena and journal together are all that another process needs to go on: `Journal.restore` does. qom adds,
reads and removes; nothing else writes here. daemon has the service manager keep the descriptors.

Each object is whole or absent at every moment, whenever the process is killed: adding fills the slot, then
the record, then the record's state byte; removing clears the state byte, then wipes the slot. In Python
only a dict from id to record offset is kept.

There are two files, so that compaction needs nobody else: it writes what lives into the other one, whose
magic comes last. Of two files that have it the one of the later generation counts.

Layout (little-endian)
    file     magic "secretd\0", u32 format, u32 bytes of this header, u64 generation (from 1),
             u64 inode of the arena's file, u32 bytes of the arena's windows, u32 level,
             u32 windows of the arena that were ever used, u32 unused, u64 end of the records;
             then records, then zeros
    record   u32 length, u32 crc32 of what follows but the state byte, u8 state, u8 type,
             u16 id length, u32 slot size in bytes, u64 slot offset in the arena's file,
             u32 uid of who added it, id, properties as a JSON object; padded to 8 bytes
"""

import json
import mmap
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, Self
from zlib import crc32

import msgspec

from secretd.errors import StateError
from secretd.memory import FILE_BYTES, Arena, Level, LockedBuffer

MAGIC: Final = b"secretd\0"
FORMAT: Final = 1
"""The layout's version; a process refuses one it does not know. It changes with the numbers and
properties of object types, too."""

_FILE = struct.Struct("<8sIIQQIIIIQ")
_RECORD = struct.Struct("<IIBBHIQI")
_UNCHECKED = struct.Struct("<IIB")  # of a record: what its checksum does not cover, ...
_CHECKED = "<BHIQI{}s"  # ... and what it covers, with the id and so on, and zeros behind them
_LENGTH = struct.Struct("<I")
_END = struct.Struct("<Q")
_WINDOWS_OFFSET: Final = 40
_END_OFFSET: Final = 48
_STATE_OFFSET: Final = 8
_CRC_FROM: Final = 9
_WRITTEN: Final = 0
_LIVE: Final = 1
_GONE: Final = 2
_PACKS: Final = 64
"""Sizes of records that are known at a time; in most cases it is one or two."""

_INITIAL_BYTES: Final = 64 << 10
_COMPACT_BYTES: Final = 256 << 10
"""Bytes of dead records below which compaction is not worth its while."""

_LEVELS: Final[tuple[Level, ...]] = ("secretmem", "mlock", "none")

NO_SLOT: Final = (1 << 64) - 1
"""Slot offset of an object without plaintext."""


class Record(NamedTuple):
    """An object as the journal holds it. ``type`` is its type's number; sizes are bytes; ``uid`` added it."""

    id: str
    type: int
    size: int
    slot: int
    properties: dict[str, object]
    uid: int


class Survey:
    """What there is when a journal is opened: ids by their type's number, those that have properties, and
    how many objects and bytes (plaintext and record) each uid has.
    """

    def __init__(self) -> None:
        self.by_type: dict[int, list[str]] = defaultdict(list)
        self.described: set[str] = set()
        self.held: dict[int, list[int]] = defaultdict(lambda: [0, 0])


class _Header(NamedTuple):
    """The beginning of a file."""

    magic: bytes
    format: int
    size: int
    generation: int
    inode: int
    window: int
    level: int
    windows: int
    unused: int
    end: int


class _Kept(NamedTuple):
    """Both files, the second -1 if there is none, and the first one's mapping."""

    fd: int
    spare: int
    mapping: mmap.mmap


class Journal:
    """The objects' records, and through them their plaintext in ``arena``.

    ``ids``: of all objects, at any time. ``survey``: what there was at first.
    """

    def __init__(self, arena: Arena, kept: "_Kept | None" = None) -> None:
        self.arena = arena
        self.fixed = False  # True: stay with this file
        self._offsets: dict[str, int] = {}
        self.ids = self._offsets.keys()
        self.survey = Survey()
        self._dead = 0
        self._end = _FILE.size
        self._packs: dict[
            int, Callable[..., bytes]
        ] = {}  # by the bytes of a record behind its numbers
        if kept is None:
            self._spare = -1
            self._fd = _memfd()
            try:
                self._map = self._begin(self._fd, _INITIAL_BYTES, 1, 0)
            except BaseException:
                os.close(self._fd)
                raise
            self._map[: len(MAGIC)] = MAGIC
        else:
            self._fd, self._spare, self._map = kept
        arena.on_window = self._note_windows

    @classmethod
    def restore(cls, arena_fd: int, journal_fds: Sequence[int]) -> Self:
        """Return the journal that an earlier process left, with its arena; takes over the descriptors.

        Raises StateError or LockedMemoryExhausted; then all is as it was for who else keeps it.
        """
        try:
            header, fd = _latest(journal_fds)
            if header.inode != os.fstat(arena_fd).st_ino:
                raise StateError("the journal belongs to another arena")
            mapping = mmap.mmap(fd, os.fstat(fd).st_size)
        except BaseException:
            for each in (arena_fd, *journal_fds):
                os.close(each)
            raise
        others = [other for other in journal_fds if other != fd]
        spare = others.pop() if others else -1
        for other in others:
            os.close(other)
        arena = Arena(_LEVELS[header.level], window=header.window, fd=arena_fd)
        journal = cls(arena, _Kept(fd, spare, mapping))
        # Compaction would go on in a file that nobody else keeps.
        journal.fixed = spare < 0
        try:
            arena.adopt(header.windows, journal._load(header.end))
            if spare >= 0:
                os.ftruncate(spare, 0)
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
        """The descriptors of both files, borrowed: with the arena's, all that another process needs."""
        if not self.paired:
            self._spare = _memfd()
        return self._fd, self._spare

    def add(
        self,
        object_id: str,
        type_number: int,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> int:
        """Store an object under an id that is free; takes over the plaintext buffer. Returns its size in
        bytes: plaintext and record.
        """
        if object_id in self._offsets:
            raise ValueError("the id is taken")
        if self._dead > _COMPACT_BYTES:
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
        # Two live records with one slot, for a moment: the later one counts.
        self._offsets[object_id] = self._append(
            object_id, record.type, properties, record.size, record.slot, record.uid
        )
        self._bury(old)

    def replace(
        self,
        object_id: str,
        type_number: int,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> tuple[int, int, int]:
        """Put another object in the place of one that there is, and wipe that; takes over the plaintext
        buffer. Returns the uid that added the old one, its size and the new one's.
        """
        size, slot = (0, NO_SLOT) if plaintext is None else (plaintext.size, plaintext.offset)
        self._compact_if_due()
        old = self._offsets[object_id]
        length, _, _, _, _, old_size, old_slot, old_uid = _RECORD.unpack_from(self._map, old)
        new = self._append(object_id, type_number, properties, size, slot, uid)
        self._offsets[object_id] = new
        if plaintext is not None:
            plaintext.disown()
        self._bury(old)
        if old_slot != NO_SLOT:
            self.arena.free(old_slot, old_size)
        return old_uid, old_size + length, size + self._end - new

    def remove(self, object_id: str) -> tuple[int, int, int]:
        """Forget an object and wipe its plaintext; return its type's number, the uid that added it, and
        its size in bytes: plaintext and record.
        """
        offset = self._offsets.pop(object_id)
        length, _, _, kind, _, size, slot, uid = _RECORD.unpack_from(self._map, offset)
        self._map[offset + _STATE_OFFSET] = _GONE
        self._dead += length
        if slot != NO_SLOT:
            self.arena.free(slot, size)
        return kind, uid, size + length

    def get(self, object_id: str) -> Record | None:
        """Return an object's record, or None."""
        offset = self._offsets.get(object_id)
        return None if offset is None else self._read(offset)

    def summary(self, object_id: str) -> tuple[int, int] | None:
        """Return an object's type number and plaintext size in bytes, or None; cheaper than `get`."""
        offset = self._offsets.get(object_id)
        if offset is None:
            return None
        fields = _RECORD.unpack_from(self._map, offset)
        return fields[3], fields[5]

    def owner(self, object_id: str) -> tuple[int, int]:
        """Return the uid that added an object that there is, and its size in bytes: plaintext and record."""
        fields = _RECORD.unpack_from(self._map, self._offsets[object_id])
        return fields[7], fields[5] + fields[0]

    def content(self, object_id: str) -> tuple[int, int, int] | None:
        """Return an object's type number, plaintext size in bytes and the offset that `Arena.view` takes, or
        None.
        """
        offset = self._offsets.get(object_id)
        if offset is None:
            return None
        _, _, _, kind, _, size, slot, _ = _RECORD.unpack_from(self._map, offset)
        return kind, size, slot

    def plaintext(self, object_id: str) -> memoryview:
        """Return the plaintext in locked memory, borrowed until the object is removed."""
        fields = _RECORD.unpack_from(self._map, self._offsets[object_id])
        return self.arena.view(fields[6], fields[5])

    def close(self) -> None:
        """Wipe all plaintext and close the journal."""
        for object_id in list(self._offsets):
            self.remove(object_id)
        self._close_files()

    def leave(self) -> None:
        """Close journal and arena, and leave everything to the process that goes on with them."""
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
        content = encoded_id + _encode(properties) if properties else encoded_id
        rest = (_RECORD.size + len(content) + 7 & ~7) - _RECORD.size
        pack = self._packs.get(rest)
        if pack is None:
            if len(self._packs) == _PACKS:
                self._packs.clear()
            pack = self._packs[rest] = struct.Struct(_CHECKED.format(rest)).pack
        checked = pack(type_number, len(encoded_id), size, slot, uid, content)
        length = _RECORD.size + rest
        mapping, offset = self._map, self._end
        end = offset + length
        if end > len(mapping):
            mapping.resize(max(2 * len(mapping), end))
        # Bytes behind the end are zeros, since the file only grows.
        mapping[offset:end] = _UNCHECKED.pack(length, crc32(checked), _WRITTEN) + checked
        mapping[offset + _STATE_OFFSET] = _LIVE
        _END.pack_into(mapping, _END_OFFSET, end)
        self._end = end
        return offset

    def _bury(self, offset: int) -> None:
        self._map[offset + _STATE_OFFSET] = _GONE
        self._dead += _LENGTH.unpack_from(self._map, offset)[0]

    def _read(self, offset: int) -> Record:
        length, _, _, kind, id_length, size, slot, uid = _RECORD.unpack_from(self._map, offset)
        start = offset + _RECORD.size
        object_id = self._map[start : start + id_length].decode()
        text = self._map[start + id_length : offset + length].rstrip(b"\0")
        return Record(object_id, kind, size, slot, _decode(text) if text else {}, uid)

    # --- files

    def _begin(self, fd: int, size: int, generation: int, windows: int) -> mmap.mmap:
        """Make a file that lacks only its magic, and map it."""
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
        mapping = mmap.mmap(fd, size)
        arena = self.arena
        mapping[: _FILE.size] = _FILE.pack(
            b"",
            FORMAT,
            _FILE.size,
            generation,
            os.fstat(arena.fileno()).st_ino,
            arena.window,
            _LEVELS.index(arena.level),
            windows,
            0,
            _FILE.size,
        )
        return mapping

    def _note_windows(self, count: int) -> None:
        """So many windows of the arena will have been used: the next process wipes what is unused of them."""
        struct.pack_into("<I", self._map, _WINDOWS_OFFSET, count)

    def _compact_if_due(self) -> None:
        """Where most is dead, copy what lives into the other file and go on with that one.

        Offsets noted before are void then.
        """
        if self._dead <= max(_COMPACT_BYTES, self._end // 2) or self.fixed:
            return
        fd = self.filenos()[1]
        header = _Header(*_FILE.unpack_from(self._map))
        fresh = self._begin(
            fd,
            max(_INITIAL_BYTES, 2 * (self._end - self._dead)),
            header.generation + 1,
            header.windows,
        )
        offsets = {}
        end = _FILE.size
        for object_id, offset in self._offsets.items():
            length = struct.unpack_from("<I", self._map, offset)[0]
            fresh[end : end + length] = self._map[offset : offset + length]
            offsets[object_id] = end
            end += length
        struct.pack_into("<Q", fresh, _END_OFFSET, end)
        fresh[: len(MAGIC)] = MAGIC
        self._map.close()
        self._fd, self._spare, self._map = fd, self._fd, fresh
        self._offsets.update(offsets)
        self._end, self._dead = end, 0
        os.ftruncate(self._spare, 0)

    def _load(self, end: int) -> list[tuple[int, int]]:
        """Find the records up to ``end``, and one that was finished behind it; return offset and size of
        each plaintext. Raises StateError.
        """
        data = self._map[:]
        offsets, survey = self._offsets, self.survey
        described, held = survey.described, survey.held
        buffers: list[tuple[int, int]] = []
        offset, unpack, head, size_of_all = _FILE.size, _RECORD.unpack_from, _RECORD.size, len(data)
        last_kind = last_uid = -1
        while offset + head <= size_of_all:
            length, crc, state, kind, id_length, size, slot, uid = unpack(data, offset)
            behind = offset + length
            if length < head or behind > size_of_all:
                break
            if state == _LIVE:
                if crc32(data[offset + _CRC_FROM : behind]) != crc:
                    raise StateError("a record's checksum is wrong")
                id_end = offset + head + id_length
                object_id = data[offset + head : id_end].decode()
                if object_id in offsets:
                    self._supersede(object_id, buffers)
                offsets[object_id] = offset
                if slot != NO_SLOT:
                    buffers.append((slot, size))
                if kind != last_kind:
                    last_kind, ids = kind, survey.by_type[kind]
                ids.append(object_id)
                if id_end < behind and data[id_end]:
                    described.add(object_id)
                if uid != last_uid:
                    last_uid, sizes = uid, held[uid]
                sizes[0] += 1
                sizes[1] += size + length
            elif state == _GONE:
                self._dead += length
            else:
                break  # begun and not finished; or the end
            offset = behind
        if offset < end:
            raise StateError("the records end too early")
        self._end = offset
        struct.pack_into("<Q", self._map, _END_OFFSET, offset)
        if data.count(b"\0", offset) != len(data) - offset:
            self._map[offset:] = bytes(len(data) - offset)
        return buffers

    def _supersede(self, object_id: str, buffers: list[tuple[int, int]]) -> None:
        """The process ended while it put a record in the place of another, which is no longer valid."""
        old = self._offsets[object_id]
        length, _, _, kind, _, size, slot, uid = _RECORD.unpack_from(self._map, old)
        self._bury(old)
        if slot != NO_SLOT:
            buffers.remove((slot, size))
        self.survey.by_type[kind].remove(object_id)
        self.survey.described.discard(object_id)
        sizes = self.survey.held[uid]
        sizes[0] -= 1
        sizes[1] -= size + length


def _latest(fds: Sequence[int]) -> tuple[_Header, int]:
    """Return the header and descriptor of the file that counts, or raise StateError."""
    found = []
    for fd in fds:
        data = os.pread(fd, _FILE.size, 0)
        if data[: len(MAGIC)] == MAGIC and len(data) == _FILE.size:
            known = struct.unpack_from("<I", data, len(MAGIC))[0]
            if known != FORMAT:
                raise StateError(f"the journal has format {known}, not {FORMAT}")
            header = _Header(*_FILE.unpack(data))
            _check(header, os.fstat(fd).st_size)
            found.append((header.generation, header, fd))
    if not found:
        raise StateError("there is no journal")
    return max(found)[1:]


def _check(header: _Header, size: int) -> None:
    """Raise StateError for a header that no process has written, in a file of so many bytes."""
    window = header.window
    if (
        header.level >= len(_LEVELS)
        or window & (window - 1)
        or window < mmap.PAGESIZE
        or header.windows * window > FILE_BYTES
        or not _FILE.size <= header.end <= size
    ):
        raise StateError("the journal's header is damaged")


def _memfd() -> int:
    return os.memfd_create("secretd-journal", os.MFD_CLOEXEC)


def _encode(properties: dict[str, object]) -> bytes:
    try:
        return msgspec.json.encode(properties)
    except UnicodeEncodeError:  # a file name that is not UTF-8, from a command line
        return json.dumps(properties).encode()


def _decode(text: bytes) -> dict[str, object]:
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError:
        properties: dict[str, object] = json.loads(text)
        return properties
