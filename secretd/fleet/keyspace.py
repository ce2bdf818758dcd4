# SPDX-License-Identifier: LGPL-2.1-or-later
"""The keys of a fleet in etcd. Each host has a prefix of its own, which it watches.

/secretd/v1/FLEET/roster                        with all hosts, for publishers
/secretd/v1/FLEET/to/HOST/roster                with this host only, unless it publishes
/secretd/v1/FLEET/to/HOST/manifest/PUBLISHER
/secretd/v1/FLEET/to/HOST/record/DIGEST
/secretd/v1/FLEET/ack/HOST
"""

from typing import Final

from secretd.qom.hosts import NAME

_VERSION: Final = "/secretd/v1"
_MANIFEST: Final = "/manifest/"
_RECORD: Final = "/record/"


class Keyspace:
    """The keys of one fleet."""

    def __init__(self, fleet: str) -> None:
        self._prefix = f"{_VERSION}/{fleet}/"
        self.roster = f"{self._prefix}roster".encode()
        self.hosts = f"{self._prefix}to/".encode()
        self.acks = f"{self._prefix}ack/".encode()

    def host(self, host: str) -> bytes:
        """The prefix of what a host gets."""
        return self.hosts + f"{host}/".encode()

    def host_roster(self, host: str) -> bytes:
        """The key of the roster for a host."""
        return f"{self._prefix}to/{host}/roster".encode()

    def manifest(self, host: str, publisher: str) -> bytes:
        """The key of a publisher's manifest for a host."""
        return f"{self._prefix}to/{host}{_MANIFEST}{publisher}".encode()

    def manifests(self, host: str) -> bytes:
        """The prefix of the manifests for a host."""
        return f"{self._prefix}to/{host}{_MANIFEST}".encode()

    def record(self, host: str, digest: str) -> bytes:
        """The key of a record; ``digest``: of all its bytes, in hexadecimal."""
        return f"{self._prefix}to/{host}{_RECORD}{digest}".encode()

    def records(self, host: str) -> bytes:
        """The prefix of the records for a host."""
        return f"{self._prefix}to/{host}{_RECORD}".encode()

    def ack(self, host: str) -> bytes:
        """The key of what a host says that it has."""
        return self.acks + host.encode()

    def publisher_of(self, host: str, key: bytes) -> str:
        """Return the publisher of a manifest's key, "" for any other key."""
        return self._last(f"{self._prefix}to/{host}{_MANIFEST}", key)

    def digest_of(self, host: str, key: bytes) -> str:
        """Return the digest of a record's key, "" for any other key."""
        return self._last(f"{self._prefix}to/{host}{_RECORD}", key)

    def _last(self, prefix: str, key: bytes) -> str:
        text = key.decode(errors="replace")
        name = text.removeprefix(prefix)
        return name if text.startswith(prefix) and NAME.fullmatch(name) else ""
