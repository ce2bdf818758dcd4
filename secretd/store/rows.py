# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a row holds: an object, in locked memory, before it is sealed and after it was opened.

The content is the length of a header (u32, little-endian), the header as JSON, and the plaintext.
"""

import struct
from typing import Final

import msgspec

from secretd.memory.arena import Arena, LockedBuffer

_LENGTH: Final = struct.Struct("<I")


class Stored(msgspec.Struct, omit_defaults=True):
    """An object of the store, but its plaintext.

    ``uid``: its owner's. ``deadline``: nanoseconds since the epoch, None without a lifetime.
    ``left``: nanoseconds of its lifetime when the row was written.
    """

    id: str
    uid: int
    properties: dict[str, object]
    deadline: int | None = None
    left: int = 0


_decode = msgspec.json.Decoder(Stored).decode


def pack(stored: Stored, plaintext: memoryview | None, scratch: Arena) -> LockedBuffer:
    """Return the content of a row in scratch memory. Raises LockedMemoryExhausted."""
    header = msgspec.json.encode(stored)
    size = 0 if plaintext is None else len(plaintext)
    start = _LENGTH.size + len(header)
    content = scratch.allocate(start + size)
    content.view[:start] = _LENGTH.pack(len(header)) + header
    if plaintext is not None:
        content.view[start:] = plaintext
    return content


def unpack(content: memoryview) -> tuple[Stored, memoryview]:
    """Return the object of a row, and its plaintext as a view of ``content``. Raises ValueError."""
    if len(content) < _LENGTH.size:
        raise ValueError("too short")
    start = _LENGTH.size + _LENGTH.unpack_from(content)[0]
    try:
        return _decode(content[_LENGTH.size : start]), content[start:]
    except msgspec.DecodeError:
        raise ValueError("its header is damaged") from None
