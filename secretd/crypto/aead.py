# SPDX-License-Identifier: LGPL-2.1-or-later
"""AES-256-GCM between locked buffers (NIST SP 800-38D), for data that leaves locked memory.

A box is a random nonce of 12 bytes, the ciphertext, and a tag of 16 bytes. The cipher's context
keeps the key in the heap, so it lives within one function. The store calls this module.
"""

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from secretd.memory.arena import Arena, LockedBuffer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
BOX_BYTES: Final = NONCE_BYTES + TAG_BYTES
"""Bytes that a box has in addition to its content."""


class OpenError(Exception):
    """A box cannot be opened: it was changed, or sealed with another key or for another purpose."""


@functools.cache
def _aes_gcm() -> "type[AESGCM]":
    """Return the cipher's class, imported at its first use: most daemons never need it."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM


def seal(plaintext: memoryview | bytes, key: memoryview, purpose: bytes) -> bytes:
    """Return a box with ``plaintext``.

    ``key``: 32 bytes. ``purpose``: the associated data, which `unseal` must repeat.
    """
    return sealer(key)(plaintext, purpose)


def sealer(key: memoryview) -> Callable[[memoryview | bytes, bytes], bytes]:
    """Return `seal` for many boxes under one key; the caller drops it in the same function."""
    encrypt_into = _aes_gcm()(key).encrypt_into

    def seal_one(plaintext: memoryview | bytes, purpose: bytes) -> bytes:
        box = bytearray(BOX_BYTES + len(plaintext))
        nonce = os.urandom(NONCE_BYTES)
        box[:NONCE_BYTES] = nonce
        encrypt_into(nonce, plaintext, purpose, memoryview(box)[NONCE_BYTES:])
        return bytes(box)

    return seal_one


def unseal(box: bytes, key: memoryview, purpose: bytes, arena: Arena) -> LockedBuffer:
    """Return the content of a box in a buffer of ``arena``.

    Raises OpenError, and LockedMemoryExhausted.
    """
    from cryptography.exceptions import InvalidTag

    if len(box) < BOX_BYTES:
        raise OpenError
    content = arena.allocate(len(box) - BOX_BYTES)
    view = memoryview(box)
    try:
        _aes_gcm()(key).decrypt_into(view[:NONCE_BYTES], view[NONCE_BYTES:], purpose, content.view)
    except InvalidTag:
        content.free()
        raise OpenError from None
    except BaseException:
        content.free()
        raise
    return content
