# SPDX-License-Identifier: LGPL-2.1-or-later
r"""The layout of the journal's files, and the choice between two files.

It opens and writes nothing; journal.files and journal.journal do.

Layout (little-endian)
    file     magic "secretd\0", u32 format, u32 bytes of this header, u64 generation (from 1),
             u64 inode of the arena's file, u32 bytes of the arena's windows, u32 level,
             u32 windows of the arena that were ever used, u32 unused, u64 end of the records;
             then records, then zeros
    record   u32 length, u32 crc32 of what follows but the state byte, u8 state, u8 type,
             u16 id length, u32 bytes of plaintext, u64 its offset in the arena's file,
             u32 uid of the peer that added it, id, properties as a JSON object; padded to 8 bytes
"""

import mmap
import os
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from secretd.errors import StateError
from secretd.linux.locked_pages import FILE_BYTES, Level

MAGIC: Final = b"secretd\0"

FORMAT: Final = 1
"""The layout's version, which also changes with the numbers and properties of object types. A
process refuses a version that it does not know.
"""

FILE = struct.Struct("<8sIIQQIIIIQ")
RECORD = struct.Struct("<IIBBHIQI")
SUMMARY = struct.Struct("<9xB2xI")  # the type and the size of a record
UNCHECKED = struct.Struct("<IIB")  # the part of a record that its checksum does not cover
CHECKED = "<BHIQI{}s"  # the covered part, with id, properties and padding
LENGTH = struct.Struct("<I")
END = struct.Struct("<Q")
WINDOWS_OFFSET: Final = 40
END_OFFSET: Final = 48
STATE_OFFSET: Final = 8
WRITTEN: Final = 0
LIVE: Final = 1
GONE: Final = 2
LEVELS: Final[tuple[Level, ...]] = ("secretmem", "mlock", "none")

NO_SLOT: Final = (1 << 64) - 1
"""Slot offset of an object without plaintext."""


class Header(NamedTuple):
    """The header of a file."""

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


def latest(fds: Sequence[int]) -> tuple[Header, int]:
    """Return the header and descriptor of the file that counts. Raises StateError."""
    found = []
    for fd in fds:
        data = os.pread(fd, FILE.size, 0)
        if data[: len(MAGIC)] == MAGIC and len(data) == FILE.size:
            known = struct.unpack_from("<I", data, len(MAGIC))[0]
            if known != FORMAT:
                raise StateError(f"the journal has format {known}, not {FORMAT}")
            header = Header(*FILE.unpack(data))
            _check(header, os.fstat(fd).st_size)
            found.append((header.generation, header, fd))
    if not found:
        raise StateError("there is no journal")
    return max(found)[1:]


def _check(header: Header, size: int) -> None:
    """Raise StateError for a header that no process can have written in a file of so many bytes."""
    window = header.window
    if (
        header.level >= len(LEVELS)
        or window & (window - 1)
        or window < mmap.PAGESIZE
        or header.windows * window > FILE_BYTES
        or not FILE.size <= header.end <= size
    ):
        raise StateError("the journal's header is damaged")
