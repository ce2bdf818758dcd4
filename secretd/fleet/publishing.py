# SPDX-License-Identifier: LGPL-2.1-or-later
"""The publisher's verbs: publish, withdraw and renew. secretd wraps and signs; this module carries.

What a host is to have is what was signed for it last, with the changes of one call. secretd signs
each number once, and etcd takes a manifest only if nobody changed it meanwhile: of several
publishing programs one is first, and the others begin again on top of it.
"""

import asyncio
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

from qemu.qmp import ExecuteError

from secretd.client.record_client import RecordClient
from secretd.errors import UsageError
from secretd.fleet.config import Config
from secretd.fleet.etcd import REQUEST_BYTES, REQUEST_OPERATIONS, Etcd, Refused, prefix_end
from secretd.fleet.keyspace import Keyspace
from secretd.fleet.preparing import Prepared, Preparing, Wanted

TRIES: Final = 20
"""Tries for a host whose manifest others change at the same time."""

HOSTS_AT_ONCE: Final = 64
"""Hosts whose keys are asked for at once."""

PREPARED_BYTES: Final = 16 << 20
"""Bytes that are prepared before they go to etcd."""


_OTHER_WAS_FIRST: Final = re.compile(
    "; expected was |is being changed; try again|duplicate property"
)
"""What secret-fleet-sign says to the second of two programs that publish for a host, before and
after a store has what was signed for the first.
"""


class Outcome(NamedTuple):
    """By host, the number of its manifest; and what is wrong with the others."""

    numbers: dict[str, int]
    failures: dict[str, str]


class Publishing:
    """A publisher with its secretd, over the control socket, and etcd."""

    def __init__(self, config: Config, client: RecordClient, etcd: Etcd) -> None:
        self._config, self._client, self._etcd = config, client, etcd
        self._keys = Keyspace(config.fleet)
        self.preparing = Preparing(config, client)

    async def publish(self, globs: Sequence[str], wanted: Wanted) -> Outcome:
        """Change what hosts are to have. An error of one host does not stop the others.

        ``globs``: patterns of their names. Raises UsageError, Refused, Unreachable and
        ConnectError; hosts whose manifests are in etcd by then keep them.
        """
        hosts = await self.hosts(globs)
        self._check_published(hosts, wanted.gone)
        numbers: dict[str, int] = {}
        failures: dict[str, str] = {}
        for _ in range(TRIES):
            lost: list[str] = []
            batch: list[tuple[Prepared, int]] = []
            for first in range(0, len(hosts), HOSTS_AT_ONCE):
                some = hosts[first : first + HOSTS_AT_ONCE]
                known = await asyncio.gather(*(self.known(host) for host in some))
                for host, (revision, manifest, records) in zip(some, known, strict=True):
                    try:
                        batch.append(
                            self.preparing.prepared(host, wanted, revision, manifest, records)
                        )
                    except ExecuteError as error:
                        if _OTHER_WAS_FIRST.search(str(error)):
                            lost.append(host)
                        else:
                            failures[host] = str(error)
                    except UsageError as error:
                        failures[host] = str(error)
                if sum(sum(map(len, each.records.values())) for each, _ in batch) > PREPARED_BYTES:
                    lost += await self.put(batch, numbers)
                    batch = []
            lost += await self.put(batch, numbers)
            hosts = lost
            if not hosts:
                break
        others = "others publish for it all the time; try again later"
        return Outcome(numbers, failures | dict.fromkeys(hosts, others))

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
        name = self._config.host
        if name not in roster.publishers:
            raise UsageError(f"'{name}' is no publisher of fleet '{self._config.fleet}'")
        self.preparing.publisher = roster.publishers[name]
        for glob in globs:
            if not any(fnmatchcase(host, glob) for host in roster.hosts):
                raise UsageError(f"no host of fleet '{self._config.fleet}' is '{glob}'")
        return [
            each for each in roster.hosts
            if any(fnmatchcase(each, glob) for glob in globs)
            and (each != self._config.host or each in globs)  # a pattern does not mean itself
        ]  # fmt: skip

    def _check_published(self, hosts: Sequence[str], ids: Sequence[str]) -> None:
        """Raise UsageError for ids that cannot be withdrawn."""
        if not ids:
            return
        sent = [self.preparing.sent(host) for host in hosts]
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
