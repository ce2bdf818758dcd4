# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own commands of a publisher: sign what a host of the fleet is to have, and show it.

The host's own key signs. What was signed last is kept, so that numbers only grow.
"""

import base64
import time
from collections.abc import Awaitable, Sequence
from typing import Final, TypedDict

from msgspec import UNSET, Struct, UnsetType

from secretd.crypto.host_keys import signing_key
from secretd.crypto.record import Malformed
from secretd.crypto.roster import DIGEST_BYTES, AliasVersions, Manifest, Publisher, signed_part
from secretd.errors import CommandError
from secretd.monitor.commands.fleet import when_kept
from secretd.monitor.commands.known_hosts import own
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands
from secretd.qom import fleet_rules, hosts
from secretd.qom.fleet_rules import fleet_of
from secretd.qom.fleet_state import Fleet
from secretd.store.commit import Commit

command: Final = Commands()

PAGE_BYTES: Final = 48 << 10
"""Bytes of the entries of one reply: a reply has 64 KiB at most."""

_ENTRY_BYTES: Final = 100
"""An entry without its ids."""


class FleetRecord(Struct, forbid_unknown_fields=True):
    """The SHA-256 digest of a secret's record, in hexadecimal."""

    id: str
    digest: str


class FleetAlias(Struct, forbid_unknown_fields=True):
    """The versions that an alias is to have."""

    id: str
    current: str
    previous: str | UnsetType = UNSET


FleetSigned = TypedDict("FleetSigned", {"number": int, "signed-at": int, "signature": str})
"""The result of secret-fleet-sign: what a manifest has beside what was given."""


class SentRecord(TypedDict):
    """An id of a manifest, and the digest of its record in hexadecimal."""

    id: str
    digest: str


class SentAlias(TypedDict):
    """An alias of a manifest; ``previous`` may be ""."""

    id: str
    current: str
    previous: str


SentInfo = TypedDict(
    "SentInfo",
    {
        "number": int, "signed-at": int, "publisher": str,
        "ids": list[SentRecord], "aliases": list[SentAlias],
    },
)  # fmt: skip
"""The result of query-secret-fleet-sent: those after ``after``, in the order of all ids."""


def publisher_of(monitor: Monitor, fleet: Fleet) -> tuple[str, Publisher]:
    """Return this host as a publisher, by its key. Raises CommandError."""
    tree = monitor.tree
    try:
        roster = fleet_rules.roster_of(fleet)
    except Malformed as error:
        raise CommandError(f"This host cannot publish: {error}") from None
    record = tree.journal.get(tree.host)
    assert record is not None
    keys = hosts.decoded(str(record.properties["public"]))
    for name, publisher in roster.publishers.items():
        if publisher.keys == keys:
            return name, publisher
    raise CommandError(f"This host is no publisher of fleet '{fleet.name}'")


@command(waits=True)
def secret_fleet_sign(
    monitor: Monitor,
    host: str,
    expect: int,
    ids: list[FleetRecord],
    aliases: list[FleetAlias] | UnsetType = UNSET,
) -> FleetSigned | Awaitable[FleetSigned]:
    """Sign what a host of the fleet is to have of this publisher: all of it, each time.

    ``expect``: the number of the manifest that was signed last for this host, 0 for none; the new
    one is the next. What is not among ``ids`` any more is withdrawn from the host.
    """
    tree = monitor.tree
    fleet = fleet_of(tree)
    _, seed = own(monitor)
    name, publisher = publisher_of(monitor, fleet)
    roster = fleet_rules.roster_of(fleet)
    if host not in roster.hosts:
        raise CommandError(f"Host '{host}' is not in the roster of fleet '{fleet.name}'")
    last = fleet.sent.get(host)
    number = 0 if last is None else last.number
    if expect != number:
        raise CommandError(
            f"The last manifest for host '{host}' has number {number}; expected was {expect}"
        )
    manifest = Manifest(
        fleet.name, host, name, number + 1, int(time.time()),
        {each.id: _digest(each) for each in ids},
        {} if aliases is UNSET else {
            each.id: AliasVersions(each.current, "" if each.previous is UNSET else each.previous)
            for each in aliases
        },
    )  # fmt: skip
    try:
        fleet_rules.check_content(manifest, publisher.pattern)
    except Malformed as error:
        raise CommandError(f"The manifest cannot be signed: {error}") from None
    data = manifest.encoded()
    signature = signing_key(seed, monitor.scratch).sign(signed_part(data))
    commit = fleet_rules.keep_sent(tree, data + signature, host)

    def kept() -> Sequence[Commit]:
        monitor.core.audit.append(
            "manifest", monitor.subject, id=fleet.id, number=manifest.number, host=host,
            count=len(manifest.ids),
        )  # fmt: skip
        return ()

    reply: FleetSigned = {
        "number": manifest.number, "signed-at": manifest.signed_at,
        "signature": base64.b64encode(signature).decode(),
    }  # fmt: skip
    return when_kept(commit, kept, reply)


def _digest(record: FleetRecord) -> bytes:
    try:
        digest = bytes.fromhex(record.digest)
    except ValueError:
        digest = b""
    if len(digest) != DIGEST_BYTES:
        raise CommandError("Parameter 'digest' expects 64 hexadecimal digits")
    return digest


@command()
def query_secret_fleet_sent(
    monitor: Monitor, host: str, after: str | UnsetType = UNSET
) -> SentInfo:
    """Return the manifest that was signed here last for a host; number 0 if there is none."""
    fleet = fleet_of(monitor.tree)
    name, _ = publisher_of(monitor, fleet)
    sent = fleet.sent.get(host)
    if sent is None:
        return {"number": 0, "signed-at": 0, "publisher": name, "ids": [], "aliases": []}
    first = "" if after is UNSET else after
    info: SentInfo = {
        "number": sent.number, "signed-at": sent.signed_at, "publisher": name, "ids": [],
        "aliases": [],
    }  # fmt: skip
    room = PAGE_BYTES
    for each in sorted({*sent.ids, *sent.aliases}):
        if each <= first:
            continue
        digest, versions = sent.ids.get(each), sent.aliases.get(each)
        room -= _ENTRY_BYTES + len(each) + sum(map(len, versions or ()))
        if room < 0:
            break
        if digest is not None:
            info["ids"].append({"id": each, "digest": digest.hex()})
        elif versions is not None:
            current, previous = versions
            info["aliases"].append({"id": each, "current": current, "previous": previous})
    return info
