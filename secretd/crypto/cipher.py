# SPDX-License-Identifier: LGPL-2.1-or-later
"""AES-256-CBC from locked memory into locked memory, in the steps of QEMU's crypto/secret_common.c.

A cipher context lives within one function that does not await: while the context exists, the key is
in the heap. qom.secret and the command secret-seal call this module.
"""

import binascii
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from secretd.crypto.base64 import INVALID_BASE64
from secretd.errors import CommandError
from secretd.memory.arena import Arena, LockedBuffer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher, modes

KEY_BYTES: Final = 32
IV_BYTES: Final = 16
BLOCK_BYTES: Final = 16


def decode_iv(text: str) -> bytes:
    """Return the 16 bytes of a base64 initialisation vector, or raise CommandError."""
    try:
        iv = binascii.a2b_base64(text.replace("\n", "").encode("ascii"), strict_mode=True)
    except ValueError:  # UnicodeEncodeError and binascii.Error
        raise CommandError(INVALID_BASE64) from None
    if len(iv) != IV_BYTES:
        raise CommandError(f"IV should be {IV_BYTES} bytes in length not {len(iv)}")
    return iv


def check_key(key: memoryview) -> None:
    """Raise CommandError unless a secret can serve as an AES-256 key."""
    if len(key) != KEY_BYTES:
        raise CommandError(f"Key should be {KEY_BYTES} bytes in length")


@functools.cache
def _aes_256_cbc() -> "Callable[[memoryview, bytes], Cipher[modes.CBC]]":
    """Return the constructor of a cipher from key and IV, imported at its first use: most daemons
    never need it.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return lambda key, iv: Cipher(algorithms.AES(key), modes.CBC(iv))


def decrypt(
    ciphertext: memoryview, key: memoryview, iv: bytes, scratch_arena: Arena, arena: Arena
) -> LockedBuffer:
    """Return, in ``arena``, the plaintext of AES-256-CBC after checking all of its PKCS#7 padding.

    Raises CommandError in the words of qcrypto_secret_decrypt() of crypto/secret_common.c.
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

    QEMU's ``object-add qom-type=secret keyid= iv= format=base64`` accepts the result. ``arena``:
    for intermediate results.
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
