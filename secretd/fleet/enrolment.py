# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operator's verbs: init, enrol and revoke. They need the root key, and no secretd.

A host becomes part of a fleet by three things: its rights in etcd, its line in the roster, and the
root that its own secretd pins (`secretd-fleet join`).
"""

from collections.abc import Mapping
from typing import NamedTuple

from secretd.crypto.host_keys import PublicKeys
from secretd.crypto.record import Malformed
from secretd.crypto.roster import Publisher, read_manifest
from secretd.errors import CommandError, UsageError
from secretd.fleet import directory, rights
from secretd.fleet.directory import Directory
from secretd.fleet.etcd import Endpoint, prefix_end
from secretd.fleet.keyspace import Keyspace, publisher_of
from secretd.qom.hosts import check_name, decoded


class Enrolled(NamedTuple):
    """``where``: the directory for the host; ``number``: the roster's."""

    where: str
    number: int


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
    roster, data = opened.roster()
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
    keyspace, etcd = Keyspace(opened.fleet), opened.etcd()
    try:
        await rights.protect(etcd)
        await rights.allow(etcd, keyspace, host, publishes=bool(publisher))
        where = opened.save_host(host, days)
        if (hosts, publishers) != (roster.hosts, roster.publishers):
            data = opened.save_roster(roster._replace(hosts=hosts, publishers=publishers))
        await etcd.write({keyspace.roster: data})
    finally:
        etcd.close()
    return Enrolled(where, opened.roster()[0].number)


async def sign_again(opened: Directory) -> int:
    """Sign the roster again, with a later end; return its number."""
    etcd = opened.etcd()
    try:
        data = opened.save_roster(opened.roster()[0])
        await etcd.write({Keyspace(opened.fleet).roster: data})
    finally:
        etcd.close()
    return opened.roster()[0].number


async def revoke(opened: Directory, host: str) -> list[str]:
    """Take a host out of the fleet; return the ids that it has had, as etcd says.

    Other hosts refuse what it publishes once they have the new roster, and publishers make nothing
    for it. It keeps what it has.
    """
    roster, data = opened.roster()
    hosts = {name: keys for name, keys in roster.hosts.items() if name != host}
    publishers = {name: each for name, each in roster.publishers.items() if name != host}
    keyspace, etcd = Keyspace(opened.fleet), opened.etcd()
    try:
        own = keyspace.host(host)
        found = await etcd.range(own, prefix_end(own))
        if host in roster.hosts:
            data = opened.save_roster(roster._replace(hosts=hosts, publishers=publishers))
        gone = [*(each.key for each in found.kvs), keyspace.ack(host)]
        await etcd.write({keyspace.roster: data}, gone)
        await rights.forbid(etcd, host)
        if host not in roster.hosts and not found.kvs:
            raise UsageError(f"host '{host}' is not in the roster of fleet '{opened.fleet}'")
    finally:
        etcd.close()
    ids = set()
    for each in found.kvs:
        if publisher_of(each.key):
            try:
                ids |= set(read_manifest(each.value).ids)
            except Malformed:
                continue
    return sorted(ids)


def _check_name(name: str) -> None:
    try:
        check_name(name)
    except CommandError as error:
        raise UsageError(f"'{name}': {error.desc}") from None


def _keys(public: str) -> PublicKeys:
    try:
        return decoded(public)
    except CommandError as error:
        raise UsageError(error.desc) from None
