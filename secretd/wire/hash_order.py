# SPDX-License-Identifier: LGPL-2.1-or-later
"""The orders in which QEMU meets names: those of its two hash tables.

QDict (qobject/qdict.c) decides the order of members in replies, and which wrong member of a command
is named. GLib's GHashTable decides which of several unexpected arguments is named, and the order of
qom-list. Programs that read replies as text see both. This module does not know what the names
mean.
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from operator import lshift, mul
from typing import Final, TypeVar

T = TypeVar("T")

_QDICT_BUCKETS: Final = 512

_MIN_SHIFT: Final = 3  # HASH_TABLE_MIN_SHIFT of GLib's ghash.c
_PRIMES: Final = (
    1, 2, 3, 7, 13, 31, 61, 127, 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521
)  # fmt: skip
"""GLib's prime_mod[]: the modulus for a hash, by the log2 of the table's size.

It covers more names than any reply can list.
"""


def _bytes(name: str) -> bytes:
    """Return a name as QEMU holds it, with NUL as C0 80."""
    return name.encode().replace(b"\0", b"\xc0\x80")


_TDB_SHIFTS: Final = tuple(index * 5 % 24 for index in range(24))


def qdict_bucket(name: str) -> int:
    """Return QDict's bucket of a member: tdb_hash() % 512."""
    encoded = _bytes(name)
    number = 0x238F13AF * len(encoded) + sum(map(lshift, encoded, cycle(_TDB_SHIFTS)))
    return int(1103515243 * number + 12345 & 0xFFFFFFFF) % _QDICT_BUCKETS


def qdict_items(members: Mapping[str, T]) -> list[tuple[str, T]]:
    """Return the members in QDict's order: by bucket, and in a bucket the latest first."""
    items = list(members.items())
    if len(items) > 1:
        items.reverse()
        items.sort(key=lambda item: _KNOWN.get(item[0]) or qdict_bucket(item[0]))
    return items


# The members of nearly all replies. Names from clients are not cached: they may be secrets.
_NAMES: Final = (
    "execute", "exec-oob", "arguments", "id", "qom-type", "name", "type", "parent", "abstract",
    "fd",
    "fdset-id", "fds", "opaque", "size", "memory", "data", "iv", "meta-type", "arg-type",
    "ret-type",
    "members", "features", "default", "values", "tag", "variants", "case", "element-type",
    "json-type", "uid", "gid", "pid", "expires-in",
)  # fmt: skip
_KNOWN: Final = {name: qdict_bucket(name) for name in _NAMES}
KNOWN_NAMES: Final = frozenset(_NAMES)


class GHashTable:
    """The places of names in a GHashTable of g_str_hash(), which decide the order of its listing.

    All names are entered first; some may be removed then.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._slots: list[tuple[int, str] | None] = []
        self._hashes: list[int] = []  # 0 unused, 1 removed, else the hash
        self._resize(_MIN_SHIFT)
        self._count = 0
        self._occupied = 0
        for name in names:
            self._insert(name)

    def __iter__(self) -> Iterator[str]:
        return (slot[1] for slot in self._slots if slot is not None)

    def _insert(self, name: str) -> None:
        number = _string_hash(name)
        index = self._find(number, name)
        self._hashes[index] = number
        self._slots[index] = (number, name)
        self._count += 1
        self._occupied += 1
        self._resize_if_due()

    def remove(self, name: str) -> None:
        """Remove a name that is in the table."""
        index = self._find(_string_hash(name), name)
        self._hashes[index] = 1
        self._slots[index] = None
        self._count -= 1
        self._resize_if_due()

    def _find(self, number: int, name: str) -> int:
        """Return the place of a name, or its future place."""
        index = number * 11 % (1 << 32) % self._modulus
        step = 0
        while (found := self._hashes[index]) != 0:
            if found == number and self._slots[index] == (number, name):
                break
            step += 1
            index = (index + step) % len(self._hashes)
        return index

    def _resize_if_due(self) -> None:
        size = len(self._hashes)
        too_large = size > 4 * self._count and size > 1 << _MIN_SHIFT
        if too_large or size <= self._occupied + self._occupied // 16:
            self._resize(max(_MIN_SHIFT, int(self._count * 1.333).bit_length()))
            self._occupied = self._count

    def _resize(self, shift: int) -> None:
        """ghash.c's resize_map(): in place, moving the entries that are in the way."""
        old, size = len(self._slots), 1 << shift
        self._modulus = _PRIMES[shift]
        slots = self._slots + [None] * (size - old)
        settled = [False] * len(slots)
        for start in range(old):
            node = slots[start]
            if node is None or settled[start]:
                continue
            slots[start] = None
            while node is not None:
                index = node[0] * 11 % (1 << 32) % self._modulus
                step = 0
                while settled[index]:
                    step += 1
                    index = (index + step) % size
                settled[index] = True
                slots[index], node = node, slots[index]
        self._slots = slots[:size]
        self._hashes = [0 if slot is None else slot[0] for slot in self._slots]


def _string_hash(name: str) -> int:
    """g_str_hash(), moved away from the marks for unused and removed."""
    number = 5381
    encoded = array("b", _bytes(name))  # signed char
    for start in range(0, len(encoded), len(_POWERS)):
        piece = encoded[start : start + len(_POWERS)]
        number *= pow(33, len(piece), 1 << 32)
        number += sum(map(mul, piece, _POWERS[-len(piece) :]))
        number &= 0xFFFFFFFF
    return number if number > 1 else 2


_POWERS: Final = tuple(pow(33, exponent, 1 << 32) for exponent in range(255, -1, -1))
