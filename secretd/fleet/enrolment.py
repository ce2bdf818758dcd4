# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operator's verbs: init, enrol and revoke. They need the root key, and no secretd.

A host becomes part of a fleet by three things: its rights in etcd, its line in the roster, and the
root that its own secretd pins (`secretd-fleet join`).
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from secretd.crypto.host_keys import PublicKeys, is_usable
from secretd.crypto.record import Malformed
from secretd.crypto.roster import Publisher, read_manifest
from secretd.errors import CommandError, UsageError
from secretd.fleet import directory, rights
from secretd.fleet import messages as m
from secretd.fleet.directory import Directory
from secretd.fleet.etcd import Endpoint, Etcd, prefix_end
from secretd.fleet.keyspace import Keyspace
from secretd.qom.hosts import check_name, decoded


class Revoked(NamedTuple):
    """``knows``: the ids that a host has had, as etcd says; ``published``: those that others have
    of it.
    """

    knows: list[str]
    published: list[str]


class Enrolled(NamedTuple):
    """``where``: the directory for the host; ``number``: the roster's; ``was_known``: the host was
    in it before.
    """

    where: str
    number: int
    was_known: bool


def init(path: str, fleet: str, nodes: Mapping[str, Endpoint], roster_days: int) -> None:
    """Make a fleet: its root key, its CA, and the configuration of etcd's nodes."""
    for name in (fleet, *nodes):
        _check_name(name)
    directory.create(path, fleet, nodes, roster_days)


async def enrol(
    opened: Directory, host: str, public: str, publisher: str | None, days: float, *, replace: bool
) -> Enrolled:
    """Take a host into the fleet, or change or renew what it has.

    ``public``: the public half of its keys in base64. ``publisher``: the pattern of ids that it may
    publish, "" for none, None to leave it as it is. ``days``: of its certificate. ``replace``: its
    keys may be others than those of the roster.
    """
    _check_name(host)
    if host == rights.ROOT:
        raise UsageError("'root' is etcd's own user, and cannot be a host")
    keys = _keys(public)
    async with _changing(opened) as change:
        roster = opened.roster()[0]
        known = roster.hosts.get(host)
        if known is not None and known != keys and not replace:
            raise UsageError(
                f"host '{host}' is in the roster with other keys; --replace exchanges them"
            )
        hosts, publishers = {**roster.hosts, host: keys}, dict(roster.publishers)
        if publisher is None and host in publishers:
            publisher = publishers[host].pattern
        publishers.pop(host, None)
        if publisher:
            publishers[host] = Publisher(keys, publisher)
        await rights.protect(change.etcd)
        await rights.allow(change.etcd, change.keyspace, host, publishes=bool(publisher))
        where = opened.save_host(host, days)
        if known is not None and known != keys:  # what is there was wrapped for the other keys
            prefix = change.keyspace.records(host)
            old = await change.etcd.range(prefix, prefix_end(prefix), keys_only=True)
            await change.etcd.write({}, [each.key for each in old.kvs])
        if (hosts, publishers) != (roster.hosts, roster.publishers):
            opened.save_roster(roster._replace(hosts=hosts, publishers=publishers))
        everyone = publishers != roster.publishers
        await change.put([*hosts] if everyone else [host, *publishers])
    return Enrolled(where, opened.roster()[0].number, known is not None)


async def sign_again(opened: Directory) -> int:
    """Sign the roster again, with a later end; return its number."""
    async with _changing(opened) as change:
        roster = opened.roster()[0]
        await rights.protect(change.etcd)
        for host in roster.hosts:  # etcd may have been made anew
            await rights.allow(
                change.etcd, change.keyspace, host, publishes=host in roster.publishers
            )
        opened.save_roster(roster)
        await change.put([*roster.hosts])
    return opened.roster()[0].number


async def revoke(opened: Directory, host: str) -> Revoked:
    """Take a host out of the fleet.

    Other hosts refuse what it publishes once they have the new roster, and publishers make nothing
    for it. It keeps what it has, and so do those that got something from it.
    """
    async with _changing(opened) as change:
        roster, keyspace = opened.roster()[0], change.keyspace
        everything = (await change.etcd.range(keyspace.hosts, prefix_end(keyspace.hosts))).kvs
        own = keyspace.host(host)
        gone = [each.key for each in everything if each.key.startswith(own)]
        knows: set[str] = set()
        published: set[str] = set()
        there = {each.key: each.value for each in everything}
        for key, value in there.items():
            try:
                if key.startswith(own) and keyspace.publisher_of(host, key):
                    knows |= set(read_manifest(value).ids)
            except Malformed:
                continue
        for other in roster.hosts:
            key = keyspace.manifest(other, host)
            if key in there and other != host:
                gone.append(key)
                try:
                    manifest = read_manifest(there[key])
                except Malformed:
                    continue
                published |= set(manifest.ids)
                digests = {each.hex() for each in manifest.ids.values()}
                gone += [
                    record for each in digests if (record := keyspace.record(other, each)) in there
                ]
        was_there = host in roster.hosts
        if was_there:
            opened.save_roster(roster._replace(
                hosts={name: keys for name, keys in roster.hosts.items() if name != host},
                publishers={n: each for n, each in roster.publishers.items() if n != host},
            ))  # fmt: skip
        rest = opened.roster()[0]
        everyone = host in roster.publishers
        await change.put([*(rest.hosts if everyone else rest.publishers)])
        await rights.forbid(change.etcd, host)
        await change.etcd.write({}, [*gone, keyspace.ack(host)])
    if not was_there and not gone:
        raise UsageError(f"host '{host}' is not in the roster of fleet '{opened.fleet}'")
    return Revoked(sorted(knows), sorted(published))


class _Change:
    """A change of the roster: nobody else may put one meanwhile.

    ``was_interrupted``: an earlier change was, or etcd has not got the directory's roster; so
    hosts may not have theirs.
    """

    def __init__(self, opened: Directory, etcd: Etcd, keyspace: Keyspace, revision: int) -> None:
        self.etcd, self.keyspace = etcd, keyspace
        self._opened, self._revision = opened, revision
        self.was_interrupted = False

    async def put(self, hosts: Sequence[str]) -> None:
        """Put the directory's roster, and those of hosts for which it has changed. Raises
        UsageError if another was put.
        """
        key = self.keyspace.roster
        roster, data = self._opened.roster()
        put = m.Operation(put=m.PutRequest(key=key, value=data))
        if not await self.etcd.transact([put], {key: self._revision}):
            raise UsageError("another secretd-fleet has changed the roster in etcd; try again")
        if self.was_interrupted:
            hosts = [*roster.hosts]
        await self.etcd.write({
            self.keyspace.host_roster(host): self._opened.for_host(host) for host in hosts
        })  # fmt: skip


@asynccontextmanager
async def _changing(opened: Directory) -> AsyncIterator[_Change]:
    """Begin with the latest roster, of this directory or of a copy of it."""
    keyspace, etcd = Keyspace(opened.fleet), opened.etcd()
    try:
        there, revision = await etcd.get(keyspace.roster)
        opened.adopt(there)
        change = _Change(opened, etcd, keyspace, revision)
        with opened.unfinished() as was_left:
            change.was_interrupted = was_left or there != opened.roster()[1]
            yield change
    finally:
        etcd.close()


def _check_name(name: str) -> None:
    try:
        check_name(name)
    except CommandError as error:
        raise UsageError(f"'{name}': {error.desc}") from None


def _keys(public: str) -> PublicKeys:
    try:
        keys = decoded(public)
    except CommandError as error:
        raise UsageError(error.desc) from None
    if not is_usable(keys):
        raise UsageError("the public half of the host's keys is none that can be used")
    return keys
