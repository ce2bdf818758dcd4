# SPDX-License-Identifier: LGPL-2.1-or-later
r"""The property store of the objects: an append-only, checksummed journal in an ordinary memfd.

It holds everything about an object but plaintext, which stays in the arena: a record names the slot. So
arena and journal together are all that another process needs to go on. qom adds, reads and removes;
nothing else writes here.

Each object is whole or absent at every moment: adding fills the slot, then the record, then the
record's state byte; removing clears the state byte, then wipes the slot. In Python only a dict from id
to record offset is kept.

Layout (little-endian)
    file     magic "secretd\0", u32 format, u32 unused; then records, then zeros
    record   u32 length, u32 crc32 of what follows but the state byte, u8 state, u8 type,
             u16 id length, u32 slot size in bytes, u64 slot offset in the arena's file,
             u32 uid of who added it, id, properties as a JSON object; padded to 8 bytes
"""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from secretd.memory import Arena, LockedBuffer

MAGIC: Final = b"secretd\0"
FORMAT: Final = 1
"""The layout's version; a process refuses one it does not know."""

_FILE = struct.Struct("<8sII")
_RECORD = struct.Struct("<IIBBHIQI")
_STATE_OFFSET: Final = 8
_CRC_FROM: Final = 9
_WRITTEN: Final = 0
_LIVE: Final = 1
_GONE: Final = 2
_INITIAL_BYTES: Final = 64 << 10
_COMPACT_BYTES: Final = 256 << 10
"""Bytes of dead records below which compaction is not worth its while."""

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


class Journal:
    """The objects' records, and through them their plaintext in ``arena``."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._offsets: dict[str, int] = {}
        self._dead = 0
        self._fd, self._map = _new_file(_INITIAL_BYTES)
        self._end = _FILE.size

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

    def add(
        self,
        object_id: str,
        type_number: int,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> None:
        """Store an object under an id that is free; takes over the plaintext buffer."""
        if object_id in self._offsets:
            raise ValueError("the id is taken")
        size, slot = (0, NO_SLOT) if plaintext is None else (plaintext.size, plaintext.offset)
        self._compact_if_due()
        self._offsets[object_id] = self._append(
            object_id, type_number, properties, size, slot, uid=uid
        )
        if plaintext is not None:
            plaintext.disown()

    def set_properties(self, object_id: str, properties: dict[str, object]) -> None:
        """Replace an object's properties; its plaintext stays."""
        self._compact_if_due()
        old = self._offsets[object_id]
        record = self._read(old)
        # Two live records with one slot, for a moment: the later one counts.
        self._offsets[object_id] = self._append(
            object_id, record.type, properties, record.size, record.slot, uid=record.uid
        )
        self._bury(old)

    def remove(self, object_id: str) -> None:
        """Forget an object and wipe its plaintext."""
        offset = self._offsets.pop(object_id)
        size, slot = _RECORD.unpack_from(self._map, offset)[5:7]
        self._bury(offset)
        if slot != NO_SLOT:
            self.arena.free(slot, size)

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

    def plaintext(self, object_id: str) -> memoryview:
        """Return the plaintext in locked memory, borrowed until the object is removed."""
        fields = _RECORD.unpack_from(self._map, self._offsets[object_id])
        return self.arena.view(fields[6], fields[5])

    def close(self) -> None:
        """Wipe all plaintext and close the journal."""
        for object_id in list(self._offsets):
            self.remove(object_id)
        self._map.close()
        os.close(self._fd)

    def _append(
        self,
        object_id: str,
        type_number: int,
        properties: dict[str, object],
        size: int,
        slot: int,
        *,
        uid: int,
    ) -> int:
        encoded_id = object_id.encode()
        text = _encode(properties) if properties else b""
        length = -(-(_RECORD.size + len(encoded_id) + len(text)) // 8) * 8
        offset, end = self._end, self._end + length
        if end > len(self._map):
            self._map.resize(max(2 * len(self._map), end))
        # Bytes behind the end are zeros, since the file only grows.
        body = (
            _RECORD.pack(length, 0, _WRITTEN, type_number, len(encoded_id), size, slot, uid)
            + encoded_id
            + text
        )
        body += bytes(length - len(body))
        crc = struct.pack("<I", zlib.crc32(body[_CRC_FROM:]))
        self._map[offset:end] = body[:4] + crc + body[_STATE_OFFSET:]
        self._map[offset + _STATE_OFFSET] = _LIVE
        self._end = end
        return offset

    def _bury(self, offset: int) -> None:
        self._map[offset + _STATE_OFFSET] = _GONE
        self._dead += struct.unpack_from("<I", self._map, offset)[0]

    def _read(self, offset: int) -> Record:
        length, _, _, kind, id_length, size, slot, uid = _RECORD.unpack_from(self._map, offset)
        start = offset + _RECORD.size
        object_id = self._map[start : start + id_length].decode()
        text = self._map[start + id_length : offset + length].rstrip(b"\0")
        return Record(object_id, kind, size, slot, _decode(text) if text else {}, uid)

    def _compact_if_due(self) -> None:
        """Where most is dead, copy what lives into a second file and go on with that one.

        Offsets noted before are void then.
        """
        if self._dead <= max(_COMPACT_BYTES, self._end // 2):
            return
        fd, fresh = _new_file(max(_INITIAL_BYTES, 2 * (self._end - self._dead)))
        offsets = {}
        end = _FILE.size
        for object_id, offset in self._offsets.items():
            length = struct.unpack_from("<I", self._map, offset)[0]
            fresh[end : end + length] = self._map[offset : offset + length]
            offsets[object_id] = end
            end += length
        self._map.close()
        os.close(self._fd)
        self._fd, self._map = fd, fresh
        self._offsets, self._end, self._dead = offsets, end, 0


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


def _new_file(size: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("secretd-journal", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        mapping = mmap.mmap(fd, size)
    except BaseException:
        os.close(fd)
        raise
    mapping[: _FILE.size] = _FILE.pack(MAGIC, FORMAT, 0)
    return fd, mapping
