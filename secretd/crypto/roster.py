# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rosters and manifests: what a fleet's root and its publishers sign.

Both are raw bytes, signed as they are, like records.

A roster:    magic, fleet, number, time | hosts: name, keys | publishers: name, keys, pattern |
             signature by the fleet's root.
A manifest:  magic, fleet, host, publisher, number, time | ids: id, digest | aliases: id, current,
             previous | signature by the publisher.

Texts have their length before them, and lists their number. The number of a roster or manifest only
ever grows. qom.fleet_rules decides what is accepted; secretd-fleet makes rosters. There is nothing
secret in either.
"""

import hashlib
from typing import Final, NamedTuple

from secretd.crypto.host_keys import PUBLIC_BYTES, PublicKeys
from secretd.crypto.record import SIGNATURE_BYTES, SIGNED, Malformed

ROSTER_BYTES: Final = 1 << 20
"""Bytes of a roster or manifest: etcd takes requests of 1.5 MiB."""

MANIFEST_IDS: Final = 1024
"""Ids and aliases of a manifest, each."""

DIGEST_BYTES: Final = 32

_ROSTER: Final = b"secretd roster 1\0"
_MANIFEST: Final = b"secretd manifest 1\0"
_TEXT_BYTES: Final = 4096


class Publisher(NamedTuple):
    """A publisher's keys, and the pattern of the ids that it may publish."""

    keys: PublicKeys
    pattern: str


class Roster(NamedTuple):
    """The hosts and publishers of a fleet.

    ``number``: grows with each roster. ``until``: seconds since the epoch; 0 for no end.
    """

    fleet: str
    number: int
    until: int
    hosts: dict[str, PublicKeys]
    publishers: dict[str, Publisher]

    def encoded(self) -> bytes:
        """Return the bytes that the root signs."""
        parts = [_ROSTER, _text(self.fleet), _number(self.number), _number(self.until)]
        parts.append(_number(len(self.hosts)))
        for name, keys in sorted(self.hosts.items()):
            parts += [_text(name), keys.receiving, keys.signing]
        parts.append(_number(len(self.publishers)))
        for name, publisher in sorted(self.publishers.items()):
            keys = publisher.keys
            parts += [_text(name), keys.receiving, keys.signing, _text(publisher.pattern)]
        return b"".join(parts)


class AliasVersions(NamedTuple):
    """The versions that an alias has on the hosts; ``previous`` may be ""."""

    current: str
    previous: str


class Manifest(NamedTuple):
    """What a host is to have of a publisher.

    ``number``: grows with each manifest for this host. ``signed_at``: seconds since the epoch.
    ``ids``: the SHA-256 digest of the record of each secret.
    """

    fleet: str
    host: str
    publisher: str
    number: int
    signed_at: int
    ids: dict[str, bytes]
    aliases: dict[str, AliasVersions]

    def encoded(self) -> bytes:
        """Return the bytes that the publisher signs."""
        parts = [_MANIFEST, _text(self.fleet), _text(self.host), _text(self.publisher)]
        parts += [_number(self.number), _number(self.signed_at), _number(len(self.ids))]
        for object_id, digest in sorted(self.ids.items()):
            parts += [_text(object_id), digest]
        parts.append(_number(len(self.aliases)))
        for object_id, (current, previous) in sorted(self.aliases.items()):
            parts += [_text(object_id), _text(current), _text(previous)]
        return b"".join(parts)


def digest_of(data: bytes) -> bytes:
    """Return the digest by which a manifest names a record."""
    return hashlib.sha256(data).digest()


def signed_part(data: bytes) -> bytes:
    """Return what a signature covers: the bytes before it, after a prefix of its own."""
    return SIGNED + data


def is_roster(data: bytes) -> bool:
    """Return True if these are the bytes of a roster, whole or not."""
    return data.startswith(_ROSTER)


def read_roster(data: bytes) -> Roster:
    """Return what a roster says, unverified. Raises Malformed."""
    reader = _Reader(data, _ROSTER, "roster")
    fleet, number, until = reader.text(), reader.number(), reader.number()
    hosts = {reader.text(): reader.keys() for _ in range(reader.count(PUBLIC_BYTES))}
    publishers = {
        reader.text(): Publisher(reader.keys(), reader.text())
        for _ in range(reader.count(PUBLIC_BYTES))
    }
    reader.end()
    return Roster(fleet, number, until, hosts, publishers)


def read_manifest(data: bytes) -> Manifest:
    """Return what a manifest says, unverified. Raises Malformed."""
    reader = _Reader(data, _MANIFEST, "manifest")
    fleet, host, publisher = reader.text(), reader.text(), reader.text()
    number, signed_at = reader.number(), reader.number()
    ids = {reader.text(): reader.raw(DIGEST_BYTES) for _ in range(reader.count(DIGEST_BYTES))}
    aliases = {
        reader.text(): AliasVersions(reader.text(), reader.text()) for _ in range(reader.count(6))
    }
    reader.end()
    return Manifest(fleet, host, publisher, number, signed_at, ids, aliases)


class _Reader:
    """Reads the parts of some bytes in order. All methods raise Malformed."""

    def __init__(self, data: bytes, magic: bytes, what: str) -> None:
        self._data, self._what = data, what
        if not data.startswith(magic):
            raise Malformed(f"this is no {what}")
        self._at, self._last = len(magic), len(data) - SIGNATURE_BYTES

    def raw(self, size: int) -> bytes:
        """The next bytes."""
        end = self._at + size
        if end > self._last:
            raise Malformed(f"this is no whole {self._what}")
        part, self._at = self._data[self._at : end], end
        return part

    def number(self) -> int:
        """A number."""
        return int.from_bytes(self.raw(8), "big")

    def count(self, least: int) -> int:
        """The number of entries, each of which has some bytes at least."""
        number = self.number()
        if number * least > self._last - self._at:
            raise Malformed(f"this is no whole {self._what}")
        return number

    def text(self) -> str:
        """A text."""
        size = int.from_bytes(self.raw(2), "big")
        if size > _TEXT_BYTES:
            raise Malformed(f"this is no {self._what}")
        try:
            return self.raw(size).decode()
        except UnicodeDecodeError:
            raise Malformed(f"this is no {self._what}") from None

    def keys(self) -> PublicKeys:
        """The public half of keys."""
        half = PUBLIC_BYTES // 2
        return PublicKeys(self.raw(half), self.raw(half))

    def end(self) -> None:
        """Nothing may follow but the signature."""
        if self._at != self._last:
            raise Malformed(f"this is no whole {self._what}")


def _text(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


def _number(number: int) -> bytes:
    return number.to_bytes(8, "big")
