# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keys of a host: X25519 to receive and Ed25519 to sign, both from one secret of 32 bytes.

HKDF-SHA256 derives the private keys, each under a label of its own. While such a key's object
lives, OpenSSL has a copy of the key in its heap; so it lives within one function. qom.secret_host
and crypto.record call this module.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

from secretd.memory.arena import Arena

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

SEED_BYTES: Final = 32
PUBLIC_BYTES: Final = 64
"""Bytes of the public half: X25519, then Ed25519."""

_KEY_BYTES: Final = 32
_RECEIVING: Final = b"secretd host 1 X25519"
_SIGNING: Final = b"secretd host 1 Ed25519"


class PublicKeys(NamedTuple):
    """The public half of a host's keys: 32 bytes of X25519, and 32 of Ed25519."""

    receiving: bytes
    signing: bytes


def public_keys(seed: memoryview, scratch: Arena) -> PublicKeys:
    """Return the public half of the keys from ``seed``. Raises LockedMemoryExhausted."""
    receiving = receiving_key(seed, scratch).public_key().public_bytes_raw()
    return PublicKeys(receiving, signing_key(seed, scratch).public_key().public_bytes_raw())


def receiving_key(seed: memoryview, scratch: Arena) -> "X25519PrivateKey":
    """Return the key to receive with; the caller drops it in the same function."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    with scratch.allocate(_KEY_BYTES) as key:
        _derive(seed, _RECEIVING, key.view)
        return X25519PrivateKey.from_private_bytes(key.view)


def signing_key(seed: memoryview, scratch: Arena) -> "Ed25519PrivateKey":
    """Return the key to sign with; the caller drops it in the same function."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    with scratch.allocate(_KEY_BYTES) as key:
        _derive(seed, _SIGNING, key.view)
        return Ed25519PrivateKey.from_private_bytes(key.view)


def _derive(seed: memoryview, label: bytes, into: memoryview) -> None:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    HKDF(SHA256(), _KEY_BYTES, None, label).derive_into(seed, into)


def is_usable(keys: PublicKeys) -> bool:
    """Return False for a point of low order, with which an exchange has no secret."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(keys.signing)
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(keys.receiving))
    except ValueError:
        return False
    return True
