# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records: secrets on their way to another host; and offers, which ask for them.

Both are raw bytes, signed as they are: there is no text form to canonicalise.

An offer:  magic, names, id, subject, nonce, time | signature by the host that will receive.
A record:  magic, names, id, subject, purpose, time | wrapped key | box | signature by the sender.

Names, ids and subjects have their length before them. The wrapped key is an HPKE message (RFC 9180,
base mode, X25519, HKDF-SHA256, AES-256-GCM) with a one-time key; the box has the secret under that
key. The bytes of the head are HPKE's ``info`` and the box's associated data. Each signature covers
all bytes before it, after a prefix of its own. qom and the commands decide what is accepted; this
module only says what is written, and whether it is whole.
"""

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from secretd.crypto import aead
from secretd.crypto.host_keys import PublicKeys, receiving_key, signing_key
from secretd.linux.immutable import wipe_bytes
from secretd.memory.arena import Arena, LockedBuffer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.hpke import Suite

NONCE_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
NAME_BYTES: Final = 4096
"""Bytes of each name, id and subject in a head."""

_OFFER: Final = b"secretd offer 1\0"
_RECORD: Final = b"secretd record 1\0"
_FLEET_RECORD: Final = b"secretd fleet record 1\0"
SIGNED: Final = b"signed "
"""What stands before the bytes that a signature covers."""

_WRAPPED_BYTES: Final = 32 + 32 + 16
_NUMBERS: Final = struct.Struct(f">{NONCE_BYTES}sQ")


class Malformed(Exception):
    """The bytes are no offer or record, or were changed; the text says in what way."""


class Head(NamedTuple):
    """What an offer asks for, and a record brings.

    ``sender``, ``receiver``: names of hosts. ``object_id``: the secret's. ``subject``: what it is
    for, such as a guest, or "". ``nonce``: the offer's. ``until``: seconds since the epoch.

    In the record of a fleet ``sender`` is a publisher, ``subject`` the fleet, ``nonce`` random, and
    ``until`` 0: it is good while a manifest has its digest.
    """

    sender: str
    receiver: str
    object_id: str
    subject: str
    nonce: bytes
    until: int

    @property
    def is_of_fleet(self) -> bool:
        """True for the record of a fleet, and not of an offer."""
        return self.until == 0

    def encoded(self, magic: bytes) -> bytes:
        """Return the bytes of the head."""
        texts = (self.sender, self.receiver, self.object_id, self.subject)
        parts = [magic]
        for text in texts:
            data = text.encode()
            parts += [len(data).to_bytes(2, "big"), data]
        return b"".join((*parts, _NUMBERS.pack(self.nonce, self.until)))


def make_offer(head: Head, seed: memoryview, scratch: Arena) -> bytes:
    """Return an offer, signed by the host with ``seed``."""
    data = head.encoded(_OFFER)
    return data + signing_key(seed, scratch).sign(SIGNED + data)


def read_offer(data: bytes) -> Head:
    """Return what an offer says, unverified. Raises Malformed."""
    head, end = _head(data, _OFFER, "offer")
    if len(data) != end + SIGNATURE_BYTES:
        raise Malformed("this is no whole offer")
    return head


def read_record(data: bytes) -> Head:
    """Return what a record says, unverified. Raises Malformed."""
    head, end = _head(data, _magic(data), "record")
    if head.is_of_fleet is not is_of_fleet(data):
        raise Malformed("this is no record")
    if len(data) < end + _WRAPPED_BYTES + aead.BOX_BYTES + SIGNATURE_BYTES:
        raise Malformed("this is no whole record")
    return head


def is_of_fleet(data: bytes) -> bool:
    """Return True if these are the bytes of a fleet's record, whole or not."""
    return data.startswith(_FLEET_RECORD)


def verify(data: bytes, by: bytes) -> None:
    """Raise Malformed unless the Ed25519 key ``by`` (32 bytes) has signed some bytes."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(by)
        key.verify(data[-SIGNATURE_BYTES:], SIGNED + data[:-SIGNATURE_BYTES])
    except InvalidSignature:
        raise Malformed(
            "its signature does not fit: it was changed, or another signed it"
        ) from None
    except ValueError:
        raise Malformed("the key of its signer is none") from None


def make_record(
    head: Head, plaintext: memoryview, to: PublicKeys, seed: memoryview, scratch: Arena
) -> bytes:
    """Return a record with a secret for the host ``to``, signed by the host with ``seed``."""
    return signed(wrapped(head, plaintext, to, scratch), seed, scratch)


def wrapped(head: Head, plaintext: memoryview, to: PublicKeys, scratch: Arena) -> bytes:
    """Return a record without its signature; each half of the work takes about as long."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    data = head.encoded(_FLEET_RECORD if head.is_of_fleet else _RECORD)
    with scratch.allocate(aead.KEY_BYTES) as key:
        _fill_random(key.view)
        receiver = X25519PublicKey.from_public_bytes(to.receiving)
        message = _suite().encrypt(key.view, receiver, info=data)
        box = aead.seal(plaintext, key.view, data)
    return b"".join((data, message, box))


def signed(data: bytes, seed: memoryview, scratch: Arena) -> bytes:
    """Return a record with the signature of the host with ``seed``."""
    return data + signing_key(seed, scratch).sign(SIGNED + data)


def open_record(data: bytes, seed: memoryview, scratch: Arena, arena: Arena) -> LockedBuffer:
    """Return the secret in a verified record, in ``arena``. Raises Malformed and
    LockedMemoryExhausted.
    """
    from cryptography.exceptions import InvalidTag

    _, end = _head(data, _magic(data), "record")
    head = data[:end]
    private = receiving_key(seed, scratch)
    try:
        key = _suite().decrypt(data[end : end + _WRAPPED_BYTES], private, info=head)
    except (InvalidTag, ValueError):
        raise Malformed("it was not wrapped for this host") from None
    try:
        box = data[end + _WRAPPED_BYTES : -SIGNATURE_BYTES]
        return aead.unseal(box, memoryview(key), head, arena)
    except aead.OpenError:
        raise Malformed("its content was changed") from None
    finally:
        wipe_bytes(key)


def _magic(data: bytes) -> bytes:
    return _FLEET_RECORD if is_of_fleet(data) else _RECORD


def _head(data: bytes, magic: bytes, what: str) -> tuple[Head, int]:
    """Return the head and the position after it."""
    if not data.startswith(magic):
        raise Malformed(f"this is no {what}")
    at = len(magic)
    texts: list[str] = []
    for _ in range(4):
        size = int.from_bytes(data[at : at + 2], "big")
        text = data[at + 2 : at + 2 + size]
        if len(text) != size or size > NAME_BYTES:
            raise Malformed(f"this is no whole {what}")
        try:
            texts.append(text.decode())
        except UnicodeDecodeError:
            raise Malformed(f"this is no {what}") from None
        at += 2 + size
    if len(data) < at + _NUMBERS.size:
        raise Malformed(f"this is no whole {what}")
    nonce, until = _NUMBERS.unpack_from(data, at)
    return Head(texts[0], texts[1], texts[2], texts[3], nonce, until), at + _NUMBERS.size


def _fill_random(view: memoryview) -> None:
    """Fill locked memory from urandom(4): os.urandom() would leave a copy in the heap."""
    with open("/dev/urandom", "rb", buffering=0) as random:
        random.readinto(view)


def _suite() -> "Suite":
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
