# SPDX-License-Identifier: LGPL-2.1-or-later
"""Base64 from locked memory into locked memory, with QEMU's words for invalid base64.

msgspec decodes into a bytearray, which is wiped. `binascii` is never used on secrets: its results
are ordinary bytes, and it leaves plaintext on the C stack. qom.secret and the deliveries call this
module.
"""

import re
from typing import Final

import msgspec

from secretd.errors import CommandError
from secretd.memory.arena import Arena, LockedBuffer
from secretd.memory.wipe import wipe_bytearray

_decode_base64 = msgspec.json.Decoder(bytearray, strict=True).decode
_encode_base64_into = msgspec.json.Encoder().encode_into
_NOT_NEWLINES: Final = re.compile(rb"[^\n]+")
_NEWLINE: Final = re.compile(rb"\n")
_NUL: Final = re.compile(rb"\0")
_BASE64: Final = re.compile(rb'"[A-Za-z0-9+/]*={0,2}"')
INVALID_BASE64 = "Base64 data contains invalid characters"


def decode_base64(quoted: memoryview, scratch_arena: Arena, arena: Arena) -> LockedBuffer:
    """Return, in ``arena``, the bytes that a base64 text between double quotes encodes.

    ``quoted``: the text with its quotes; it is not changed. ``scratch_arena``: for intermediate
    results. Raises CommandError in QEMU's words (qbase64_decode() of util/base64.c) and
    LockedMemoryExhausted.
    """
    if _NEWLINE.search(quoted):
        with scratch_arena.allocate(len(quoted)) as copy:
            return _decode_joined(_without_newlines(quoted, copy.view), arena)
    return _decode_joined(quoted, arena)


def _decode_joined(quoted: memoryview, arena: Arena) -> LockedBuffer:
    # Only valid base64 goes to msgspec, which would undo escapes in memory of its own.
    if not _BASE64.fullmatch(quoted):
        if _NUL.search(quoted):
            raise CommandError("Base64 data contains embedded NUL characters")
        raise CommandError(INVALID_BASE64)
    try:
        decoded = _decode_base64(quoted)
    except msgspec.MsgspecError:
        raise CommandError(INVALID_BASE64) from None
    try:
        buffer = arena.allocate(len(decoded))
        buffer.view[:] = decoded
    finally:
        wipe_bytearray(decoded)
    return buffer


def _without_newlines(quoted: memoryview, into: memoryview) -> memoryview:
    at = 0
    for run in _NOT_NEWLINES.finditer(quoted):
        size = run.end() - run.start()
        into[at : at + size] = quoted[run.start() : run.end()]
        at += size
    return into[:at]


def encode_base64(plaintext: memoryview, arena: Arena) -> LockedBuffer:
    """Return the base64 text of a secret, in a buffer of ``arena``. Raises
    LockedMemoryExhausted.
    """
    size = -(-len(plaintext) // 3) * 4
    # Large enough from the start: growing would leave copies behind. It holds both quotes.
    encoded = bytearray(size + 64)
    try:
        _encode_base64_into(plaintext, encoded)
        buffer = arena.allocate(size)
        buffer.view[:] = memoryview(encoded)[1 : size + 1]
    finally:
        wipe_bytearray(encoded)
    return buffer
