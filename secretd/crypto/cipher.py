# SPDX-License-Identifier: LGPL-2.1-or-later
"""Base64 and AES-256-CBC from locked memory into locked memory; crypto/secret_common.c's steps.

The only module that uses `cryptography`. Errors have QEMU's words. The loaders in qom and the
commands call it.

Rules
- A cipher context lives in one function, with no await in it: while it exists the key is in the heap.
- `binascii` is never used on secrets (its results are ordinary bytes, and it leaves the plaintext on the C
  stack); msgspec decodes base64 into a bytearray, which is wiped.
"""

import binascii
import functools
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from secretd.errors import CommandError
from secretd.linux.locked_pages import wipe_bytearray
from secretd.memory.arena import Arena, LockedBuffer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher, modes

KEY_BYTES: Final = 32
IV_BYTES: Final = 16
BLOCK_BYTES: Final = 16

_decode_base64 = msgspec.json.Decoder(bytearray, strict=True).decode
_encode_base64_into = msgspec.json.Encoder().encode_into
_NOT_NEWLINES: Final = re.compile(rb"[^\n]+")
_NEWLINE: Final = re.compile(rb"\n")
_NUL: Final = re.compile(rb"\0")
_BASE64: Final = re.compile(rb'"[A-Za-z0-9+/]*={0,2}"')
_INVALID = "Base64 data contains invalid characters"


def decode_base64(quoted: memoryview, scratch_arena: Arena, arena: Arena) -> LockedBuffer:
    """Return, in ``arena``, what ``quoted`` stands for: base64 text between double quotes.

    Raises CommandError in QEMU's words (qbase64_decode()).
    """
    if _NEWLINE.search(quoted):
        with scratch_arena.allocate(len(quoted)) as copy:
            return _decode_joined(_without_newlines(quoted, copy.view), arena)
    return _decode_joined(quoted, arena)


def _decode_joined(quoted: memoryview, arena: Arena) -> LockedBuffer:
    # Only what is base64 to the letter goes to msgspec, which would undo escapes in its own memory.
    if not _BASE64.fullmatch(quoted):
        if _NUL.search(quoted):
            raise CommandError("Base64 data contains embedded NUL characters")
        raise CommandError(_INVALID)
    try:
        decoded = _decode_base64(quoted)
    except msgspec.MsgspecError:
        raise CommandError(_INVALID) from None
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


def decode_iv(text: str) -> bytes:
    """Return the 16 bytes of an initialisation vector given in base64, or raise CommandError."""
    try:
        iv = binascii.a2b_base64(text.replace("\n", "").encode("ascii"), strict_mode=True)
    except ValueError:  # UnicodeEncodeError and binascii.Error
        raise CommandError(_INVALID) from None
    if len(iv) != IV_BYTES:
        raise CommandError(f"IV should be {IV_BYTES} bytes in length not {len(iv)}")
    return iv


def check_key(key: memoryview) -> None:
    """Raise CommandError unless a secret can serve as AES-256 key."""
    if len(key) != KEY_BYTES:
        raise CommandError(f"Key should be {KEY_BYTES} bytes in length")


@functools.cache
def _aes_256_cbc() -> "Callable[[memoryview, bytes], Cipher[modes.CBC]]":
    """Return what makes a cipher of key and IV. Imported when it is first needed: most never do."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return lambda key, iv: Cipher(algorithms.AES(key), modes.CBC(iv))


def decrypt(
    ciphertext: memoryview, key: memoryview, iv: bytes, scratch_arena: Arena, arena: Arena
) -> LockedBuffer:
    """Return, in ``arena``, the plaintext of AES-256-CBC with PKCS#7 padding, all of which is checked.

    Raises CommandError in the words of qcrypto_secret_decrypt().
    """
    size = len(ciphertext)
    if size % BLOCK_BYTES:
        raise CommandError(f"Length {size} must be a multiple of block size {BLOCK_BYTES}")
    with scratch_arena.allocate(size + BLOCK_BYTES) as scratch:
        decryptor = _aes_256_cbc()(key, iv).decryptor()
        decryptor.update_into(ciphertext, scratch.view)
        del decryptor
        padding = scratch.view[size - 1] if size else 0
        start = size - padding
        if (
            not 1 <= padding <= BLOCK_BYTES
            or start < 0
            or scratch.view[start:size] != bytes([padding]) * padding
        ):
            raise CommandError(
                f"Incorrect number of padding bytes ({padding}) found on decrypted data"
            )
        plaintext = arena.allocate(start)
        plaintext.view[:] = scratch.view[:start]
    return plaintext


def seal(plaintext: memoryview, key: memoryview, arena: Arena) -> tuple[str, str]:
    """Encrypt with AES-256-CBC under a fresh random IV; return ciphertext and IV in base64.

    What QEMU's ``object-add qom-type=secret keyid= iv= format=base64`` takes.
    """
    iv = os.urandom(IV_BYTES)
    size = len(plaintext)
    padding = BLOCK_BYTES - size % BLOCK_BYTES
    padded = size + padding
    ciphertext = bytearray(padded + BLOCK_BYTES - 1)
    with arena.allocate(padded) as scratch:
        scratch.view[:size] = plaintext
        scratch.view[size:] = bytes([padding]) * padding
        encryptor = _aes_256_cbc()(key, iv).encryptor()
        encryptor.update_into(scratch.view, ciphertext)
        del encryptor
    data = binascii.b2a_base64(memoryview(ciphertext)[:padded], newline=False)
    return data.decode("ascii"), binascii.b2a_base64(iv, newline=False).decode("ascii")


def encode_base64(plaintext: memoryview, arena: Arena) -> LockedBuffer:
    """Return the base64 text of a secret, in locked memory."""
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
