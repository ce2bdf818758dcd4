# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keys of an open store, and what they seal: rows, the head's state, tombstones.

A random data key seals the rows; the head holds it wrapped under the administrator's secret. Two
keys are derived from it: one names rows, so that the file shows no ids, and one authenticates what
is not sealed. Everything lies in locked memory. store.store calls this module.
"""

import hashlib
import os
import struct
from collections.abc import Callable
from typing import Final, NamedTuple, Self

from secretd.crypto import aead
from secretd.crypto.aead import KEY_BYTES, OpenError, seal, sealer, unseal
from secretd.errors import StoreError
from secretd.memory.arena import Arena, LockedBuffer

UUID_BYTES: Final = 16
ROW_KEY_BYTES: Final = 32
TAG_BYTES: Final = aead.TAG_BYTES
MAC_BYTES: Final = 24

_STATE: Final = struct.Struct("<QqQ32s")
_DIGESTS: Final = 1 << 256


class State(NamedTuple):
    """What a store held after its last transaction.

    ``sequence``: the number of transactions. ``clock``: nanoseconds since the epoch, the latest
    that were ever seen. ``rows``: the number of rows. ``digest``: the sum of the rows' digests.
    """

    sequence: int = 0
    clock: int = 0
    rows: int = 0
    digest: int = 0

    def without(self, digest: int) -> "State":
        """Return the state after a row of this digest was removed."""
        return self._replace(rows=self.rows - 1, digest=(self.digest - digest) % _DIGESTS)

    def plus(self, digest: int) -> "State":
        """Return the state after a row of this digest was added."""
        return self._replace(rows=self.rows + 1, digest=(self.digest + digest) % _DIGESTS)


class StoreKeys:
    """The keys of the store ``uuid``; ``data``: its data key, owned."""

    def __init__(self, uuid: bytes, data: LockedBuffer, scratch: Arena) -> None:
        self.uuid = uuid
        self._scratch = scratch
        self._data = data
        self._derived = scratch.allocate(2 * KEY_BYTES)
        for at, name in ((0, b"rows"), (KEY_BYTES, b"macs")):
            self._derived.view[at : at + KEY_BYTES] = hashlib.blake2b(
                uuid, digest_size=KEY_BYTES, key=data.view, person=b"secretd " + name
            ).digest()
        self._names, self._macs = self._derived.view[:KEY_BYTES], self._derived.view[KEY_BYTES:]

    @classmethod
    def generate(cls, uuid: bytes, scratch: Arena) -> Self:
        """Return new keys."""
        data = scratch.allocate(KEY_BYTES)
        with open("/dev/urandom", "rb", buffering=0) as random:
            random.readinto(data.view)
        return cls(uuid, data, scratch)

    @classmethod
    def unwrap(cls, uuid: bytes, wraps: list[bytes], key: memoryview, scratch: Arena) -> Self:
        """Return the keys that one of ``wraps`` holds under the administrator's ``key``.

        Raises StoreError.
        """
        for wrap in wraps:
            try:
                return cls(uuid, unseal(wrap, key, b"secretd key " + uuid, scratch), scratch)
            except OpenError:
                continue
        raise StoreError("the key is not this store's")

    def wrap(self, key: memoryview) -> bytes:
        """Return the data key, wrapped under the administrator's 32-byte ``key``."""
        return seal(self._data.view, key, b"secretd key " + self.uuid)

    def close(self) -> None:
        """Wipe the keys."""
        self._derived.free()
        self._data.free()

    # --- rows

    def row_key(self, object_id: str) -> bytes:
        """Return the key of an object's row."""
        return hashlib.blake2b(
            object_id.encode(), digest_size=ROW_KEY_BYTES, key=self._names
        ).digest()

    def seal_row(self, row_key: bytes, kind: int, content: memoryview) -> bytes:
        """Return the box of a row; its key and its object's type number are bound to it."""
        return self.row_sealer()(row_key, kind, content)

    def row_sealer(self) -> Callable[[bytes, int, memoryview], bytes]:
        """Return `seal_row` for many rows; the caller drops it in the same function."""
        seal_one = sealer(self._data.view)
        return lambda row_key, kind, content: seal_one(content, self._purpose(row_key, kind))

    def open_row(self, row_key: bytes, kind: int, box: bytes) -> LockedBuffer:
        """Return the content of a row in scratch memory. Raises OpenError."""
        return unseal(box, self._data.view, self._purpose(row_key, kind), self._scratch)

    def _purpose(self, row_key: bytes, kind: int) -> bytes:
        return b"secretd row " + self.uuid + row_key + struct.pack("<I", kind)

    def digest(self, row_key: bytes, tag: bytes) -> int:
        """Return a row's part of the digest; ``tag``: the last bytes of its box."""
        return int.from_bytes(
            hashlib.blake2b(row_key + tag, digest_size=32, key=self._macs).digest()
        )

    # --- the head and the tombstones

    def seal_state(self, state: State) -> bytes:
        """Return the sealed state of the head."""
        packed = _STATE.pack(state.sequence, state.clock, state.rows, state.digest.to_bytes(32))
        return seal(packed, self._data.view, b"secretd head " + self.uuid)

    def open_state(self, box: bytes) -> State:
        """Return the state of the head. Raises StoreError."""
        try:
            with unseal(
                box, self._data.view, b"secretd head " + self.uuid, self._scratch
            ) as opened:
                sequence, clock, rows, digest = _STATE.unpack(opened.view)
        except (OpenError, struct.error):
            raise StoreError("its head was changed") from None
        return State(sequence, clock, rows, int.from_bytes(digest))

    def mac(self, message: bytes) -> bytes:
        """Return the authentication of a tombstone."""
        return hashlib.blake2b(
            message, digest_size=MAC_BYTES, key=self._macs, person=b"secretd tombs"
        ).digest()


def new_uuid() -> bytes:
    """Return the identity of a new store."""
    return os.urandom(UUID_BYTES)
