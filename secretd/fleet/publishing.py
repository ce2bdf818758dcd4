# SPDX-License-Identifier: LGPL-2.1-or-later
"""The publisher's verbs: publish, withdraw and renew. secretd wraps and signs; this module carries.

What a host is to have is what was signed for it last, with the changes of one call. secretd signs
each number once, and etcd takes a manifest only if nobody changed it meanwhile: of several
publishing programs one is first, and the others begin again on top of it.
"""

import asyncio
import base64
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, TypedDict, cast

from qemu.qmp import ExecuteError

from secretd.client.record_client import RecordClient
from secretd.crypto.record import Malformed, verify
from secretd.crypto.roster import AliasVersions, Manifest, digest_of, read_manifest
from secretd.errors import UsageError
from secretd.fleet import messages as m
from secretd.fleet.config import Config
from secretd.fleet.etcd import REQUEST_BYTES, REQUEST_OPERATIONS, Etcd, Refused, prefix_end
from secretd.fleet.keyspace import Keyspace

TRIES: Final = 20
"""Tries for a host whose manifest others change at the same time."""

HOSTS_AT_ONCE: Final = 64
"""Hosts whose keys are asked for at once."""

BEHIND: Final = 1000
"""Manifests that are signed again after secretd has forgotten them."""

PREPARED_BYTES: Final = 16 << 20
"""Bytes that are prepared before they go to etcd."""


log: Final = logging.getLogger("secretd-fleet")

_OTHER_WAS_FIRST: Final = re.compile(
    "; expected was |is being changed; try again|duplicate property"
)
"""What secret-fleet-sign says to the second of two programs that publish for a host, before and
after a store has what was signed for the first.
"""


class _Sent(TypedDict):
    number: int
    publisher: str
    ids: list[dict[str, str]]
    aliases: list[dict[str, str]]


@dataclass
class Wanted:
    """What is to change. ``ids``: to publish; ``gone``: to withdraw; without both manifests are
    signed again as they are.
    """

    ids: Sequence[str] = ()
    gone: Sequence[str] = ()


@dataclass
class Prepared:
    """A host's next manifest, which has the key ``key``, and what else changes at once.

    ``revision``: of the last change of that key.
    """

    host: str
    key: bytes
    revision: int
    manifest: bytes
    records: dict[bytes, bytes] = field(default_factory=dict)
    stale: list[bytes] = field(default_factory=list)

    @property
    def operations(self) -> list[Any]:
        """All as operations of a transaction."""
        puts = {**self.records, self.key: self.manifest}
        return [
            *(m.Operation(put=m.PutRequest(key=key, value=value)) for key, value in puts.items()),
            *(m.Operation(delete=m.DeleteRequest(key=key)) for key in self.stale),
        ]


class Publishing:
    """A publisher with its secretd, over the control socket, and etcd."""

    def __init__(self, config: Config, client: RecordClient, etcd: Etcd) -> None:
        self._config, self._client, self._etcd = config, client, etcd
        self._keys = Keyspace(config.fleet)
        self._signer = b""

    async def publish(self, globs: Sequence[str], wanted: Wanted) -> dict[str, int]:
        """Change what hosts are to have; return the number of each one's manifest.

        ``globs``: patterns of their names. Raises UsageError, Refused, Unreachable, and what the
        client raises; hosts whose manifests are in etcd by then keep them.
        """
        hosts = await self.hosts(globs)
        self._check_published(hosts, wanted.gone)
        numbers: dict[str, int] = {}
        for _ in range(TRIES):
            lost: list[str] = []
            batch: list[tuple[Prepared, int]] = []
            for first in range(0, len(hosts), HOSTS_AT_ONCE):
                some = hosts[first : first + HOSTS_AT_ONCE]
                known = await asyncio.gather(*(self.known(host) for host in some))
                for host, (revision, manifest, records) in zip(some, known, strict=True):
                    try:
                        batch.append(self.prepared(host, wanted, revision, manifest, records))
                    except ExecuteError as error:
                        if not _OTHER_WAS_FIRST.search(str(error)):
                            raise
                        lost.append(host)
                if sum(sum(map(len, each.records.values())) for each, _ in batch) > PREPARED_BYTES:
                    lost += await self.put(batch, numbers)
                    batch = []
            lost += await self.put(batch, numbers)
            if not lost:
                return numbers
            hosts = lost
        raise UsageError(f"others publish for {', '.join(hosts)} all the time; try again later")

    async def hosts(self, globs: Sequence[str]) -> list[str]:
        """Bring the roster to this secretd; return the hosts of it that are meant."""
        try:
            data, _ = await self._etcd.get(self._keys.roster)
        except Refused as error:
            raise UsageError(
                f"etcd refuses: {error}; is '{self._config.host}' a publisher of fleet "
                f"'{self._config.fleet}'?"
            ) from None
        roster = self._config.checked_roster(data)
        assert data is not None
        self._client.accept_signed(data)
        if self._config.host in roster.publishers:
            self._signer = roster.publishers[self._config.host].keys.signing
        for glob in globs:
            if not any(fnmatchcase(host, glob) for host in roster.hosts):
                raise UsageError(f"no host of fleet '{self._config.fleet}' is '{glob}'")
        return [each for each in roster.hosts if any(fnmatchcase(each, glob) for glob in globs)]

    def _check_published(self, hosts: Sequence[str], ids: Sequence[str]) -> None:
        """Raise UsageError for ids that cannot be withdrawn."""
        if not ids:
            return
        sent = [self._sent(host) for host in hosts]
        for each in ids:
            if not any(each in one.ids or each in one.aliases for one in sent):
                raise UsageError(f"'{each}' was not published to these hosts")
            for one in sent:
                for alias, versions in one.aliases.items():
                    if each in versions and alias not in ids:
                        raise UsageError(
                            f"'{each}' is a version of alias '{alias}', which needs it; withdraw "
                            "the alias, or retire the version"
                        )

    async def known(self, host: str) -> tuple[int, bytes | None, set[str]]:
        """Return the revision of our manifest in etcd, that manifest, and the digests there."""
        own = self._keys.manifest(host, self._config.host)
        records = self._keys.records(host)
        # The manifest first: a change between both makes the transaction fail.
        manifest, revision = await self._etcd.get(own)
        found = (await self._etcd.range(records, prefix_end(records), keys_only=True)).kvs
        return revision, manifest, {self._keys.digest_of(host, each.key) for each in found}

    def _sent(self, host: str) -> Manifest:
        """Return what was signed last for a host."""
        ids: dict[str, bytes] = {}
        aliases: dict[str, AliasVersions] = {}
        number, after = None, ""
        while True:
            found = cast(
                _Sent,
                self._client.execute("query-secret-fleet-sent", {"host": host, "after": after}),
            )
            if number not in (None, found["number"]):  # another program has signed: begin again
                ids, aliases, number, after = {}, {}, None, ""
                continue
            number = found["number"]
            ids |= {each["id"]: bytes.fromhex(each["digest"]) for each in found["ids"]}
            aliases |= {
                each["id"]: AliasVersions(each["current"], each["previous"])
                for each in found["aliases"]
            }
            entries = [each["id"] for each in (*found["ids"], *found["aliases"])]
            if not entries:
                break
            after = max(entries)
        return Manifest(
            self._config.fleet, host, found["publisher"], found["number"], 0, ids, aliases
        )

    def prepared(
        self, host: str, wanted: Wanted, revision: int, manifest: bytes | None, there: set[str]
    ) -> tuple[Prepared, int]:
        """Wrap what a host lacks, and sign; return that and the manifest's number."""
        sent = self._caught_up(self._sent(host), manifest)
        aliases = dict(sent.aliases)
        wrap: set[str] = set()  # anew, whether it is there or not
        needed = set(sent.ids)
        for object_id in (*wanted.ids, *wanted.gone):
            before = aliases.pop(object_id, None)
            needed -= {object_id, *(before or ())}
        for object_id in wanted.ids:
            versions = self._versions(object_id)
            if versions is None:
                wrap.add(object_id)
            else:
                aliases[object_id] = versions
                needed |= {each for each in versions if each}
        for versions in aliases.values():  # one may have versions of another's name
            needed |= {each for each in versions if each}
        wrap |= {
            each for each in needed if each not in sent.ids or sent.ids[each].hex() not in there
        }
        ids = {each: sent.ids[each] for each in needed - wrap}
        records = {}
        for object_id in sorted(wrap):
            data = self._client.wrap(object_id, receiver=host)
            ids[object_id] = digest_of(data)
            records[self._keys.record(host, ids[object_id].hex())] = data
        signed, number = self._signed(sent, ids, aliases)
        stale = {*sent.ids.values(), *_digests(manifest)} - set(ids.values())
        prepared = Prepared(
            host, self._keys.manifest(host, self._config.host), revision, signed, records,
            [self._keys.record(host, each.hex()) for each in stale if each.hex() in there],
        )  # fmt: skip
        return prepared, number

    def _caught_up(self, sent: Manifest, there: bytes | None) -> Manifest:
        """Return what was signed last, which may be in etcd and no longer in a secretd whose store
        was restored: then sign up to that number, or hosts would refuse what follows.
        """
        try:
            verify(there or b"", self._signer)
            known = read_manifest(there or b"")
        except Malformed:
            return sent
        if (known.fleet, known.host) != (sent.fleet, sent.host) or known.number <= sent.number:
            return sent
        if known.number - sent.number > BEHIND:
            raise UsageError(
                f"manifest {known.number} for host '{sent.host}' is in etcd, and secretd has "
                f"signed {sent.number} only; give this host new keys, and enrol it with --replace"
            )
        log.warning(
            "manifest %d for host '%s' is in etcd, and secretd has signed %d only: was its store "
            "restored? Going on from the one in etcd", known.number, sent.host, sent.number,
        )  # fmt: skip
        while sent.number < known.number:
            _, number = self._signed(sent, known.ids, known.aliases)
            sent = sent._replace(number=number, ids=known.ids, aliases=known.aliases)
        return sent

    def _versions(self, object_id: str) -> AliasVersions | None:
        """Return the versions of an alias, None for a secret."""
        info = self._client.info(object_id)
        if info is None:
            raise UsageError(f"object '{object_id}' not found")
        if not info.version:
            return None
        found = cast(
            "list[dict[str, str]]", self._client.execute("query-secret-alias", {"id": object_id})
        )
        return AliasVersions(found[0]["current"], found[0].get("previous", ""))

    def _signed(
        self, sent: Manifest, ids: dict[str, bytes], aliases: dict[str, AliasVersions]
    ) -> tuple[bytes, int]:
        arguments = {
            "host": sent.host,
            "expect": sent.number,
            "ids": [{"id": each, "digest": digest.hex()} for each, digest in ids.items()],
            "aliases": [
                {"id": each, "current": current, **({"previous": previous} if previous else {})}
                for each, (current, previous) in aliases.items()
            ],
        }
        reply = cast("dict[str, Any]", self._client.execute("secret-fleet-sign", arguments))
        manifest = sent._replace(
            number=reply["number"], signed_at=reply["signed-at"], ids=ids, aliases=aliases
        )
        return manifest.encoded() + base64.b64decode(reply["signature"]), manifest.number

    async def put(
        self, batch: Iterable[tuple[Prepared, int]], numbers: dict[str, int]
    ) -> list[str]:
        """Put manifests and records, as many at once as etcd takes; return the hosts whose
        manifests others have changed.
        """
        lost: list[str] = []
        together: list[tuple[Prepared, int]] = []
        operations: list[Any] = []
        size = 0

        async def put_together() -> None:
            if not together:
                return
            compare = {each.key: each.revision for each, _ in together}
            if await self._etcd.transact(operations, compare):
                numbers.update((each.host, number) for each, number in together)
            elif len(together) == 1:
                lost.append(together[0][0].host)
            else:  # one of them was changed: find out which
                for each, number in together:
                    if await self._etcd.transact(each.operations, {each.key: each.revision}):
                        numbers[each.host] = number
                    else:
                        lost.append(each.host)

        for prepared, number in batch:
            own = prepared.operations
            own_size = sum(each.ByteSize() for each in own)
            if len(own) > REQUEST_OPERATIONS or own_size > REQUEST_BYTES:
                # Records first: a manifest without its records would withdraw what they replace.
                await self._etcd.write(prepared.records)
                stale, prepared.records, prepared.stale = prepared.stale, {}, []
                if await self._etcd.transact(
                    prepared.operations, {prepared.key: prepared.revision}
                ):
                    numbers[prepared.host] = number
                    await self._etcd.write({}, stale)
                else:
                    lost.append(prepared.host)
                continue
            if (
                len(operations) + len(own) > REQUEST_OPERATIONS
                or len(together) == REQUEST_OPERATIONS
                or size + own_size > REQUEST_BYTES
            ):
                await put_together()
                together, operations, size = [], [], 0
            together.append((prepared, number))
            operations += own
            size += own_size
        await put_together()
        return lost


def _digests(manifest: bytes | None) -> set[bytes]:
    """Return the digests of a manifest in etcd, whoever wrote it."""
    if manifest is None:
        return set()
    try:
        return set(read_manifest(manifest).ids.values())
    except Malformed:
        return set()
