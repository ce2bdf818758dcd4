# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own commands about the fleet: accept rosters and manifests, sign, and show them.

Whoever brings them need not be trusted: they are signed. The secret-fleet's ``carrier`` limits
that to some peers, since each costs arithmetic.
"""

import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, Literal, NotRequired, TypedDict, TypeVar

from msgspec import UNSET, UnsetType

from secretd.crypto.record import Malformed
from secretd.crypto.roster import (
    is_roster,
    read_manifest,
    read_roster,
)
from secretd.errors import AccessDenied, CommandError
from secretd.monitor.commands.known_hosts import decoded, recorded
from secretd.monitor.commands.objects import once_written
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands
from secretd.qom import fleet_rules, fleet_settling
from secretd.qom.fleet_rules import fleet_of
from secretd.qom.fleet_state import State
from secretd.qom.loading import use_content
from secretd.store.commit import Commit

command: Final = Commands()

T = TypeVar("T")

DIGESTS_PER_REPLY: Final = 400
"""Digests or ids of one reply."""


class PublisherInfo(TypedDict):
    """What a host has of a publisher. ``number``, ``digest``: of its manifest; ``age``: seconds
    since it was signed; ``missing``: the number of records that have not arrived; ``pending``: of
    aliases that are not as in the manifest, and of withdrawn objects that are still in use.
    """

    name: str
    pattern: str
    number: int
    digest: str
    age: int
    missing: int
    pending: int


RosterInfo = TypedDict(
    "RosterInfo", {"number": int, "not-after": int, "hosts": int, "publishers": int}
)
"""A roster: its number, its end in seconds since the epoch (0 for none), and how many it has."""


class FleetInfo(TypedDict):
    """An entry of query-secret-fleet. ``since``: seconds since the epoch; ``reason``: why the last
    thing that came was refused, or what is stale; ``publishers``: those with a manifest.
    """

    id: str
    name: str
    host: str
    state: State
    since: int
    reason: NotRequired[str]
    roster: NotRequired[RosterInfo]
    publishers: list[PublisherInfo]


class FleetAccepted(TypedDict):
    """The result of secret-fleet-accept. ``changed``: False for what was known already."""

    kind: Literal["roster", "manifest"]
    number: int
    publisher: NotRequired[str]
    changed: bool


def check_carrier(monitor: Monitor) -> None:
    """Raise AccessDenied unless the peer may bring what was signed."""
    if not monitor.core.access.may_carry(monitor.peer):
        raise AccessDenied(
            f"Only uid 0, the daemon's own uid, and those whom the 'carrier' of fleet "
            f"'{monitor.tree.fleet.id}' allows may bring what was signed"
        )


@command(client=True, waits=True)
def secret_fleet_accept(
    monitor: Monitor,
    data: str | UnsetType = UNSET,
    file: str | UnsetType = UNSET,
) -> FleetAccepted | Awaitable[FleetAccepted]:
    """Accept a roster that the fleet's root has signed, or a manifest of a publisher.

    ``data``: in base64; or ``file``: /dev/fdset/N of a descriptor with its bytes. What a manifest
    no longer has is withdrawn; its records come by secret-accept.
    """
    if (data is UNSET) is (file is UNSET):
        raise CommandError("Either 'data' or 'file' must be provided")
    with recorded(monitor, "fleet"):
        fleet_of(monitor.tree)
        check_carrier(monitor)
    if file is not UNSET:
        sources = monitor.loading.sources
        outcome = use_content(
            lambda: sources.file(file), lambda content: bytes(content.view[1:-1]), file
        )
        return _accept_later(monitor, outcome)
    assert data is not UNSET
    try:
        return _accept(monitor, decoded(data))
    except Malformed as error:
        raise CommandError(f"Parameter 'data' cannot be accepted: {error}") from None


async def _accept_later(monitor: Monitor, outcome: bytes | Awaitable[bytes]) -> FleetAccepted:
    content = outcome if isinstance(outcome, bytes) else await outcome
    accepted = _accept(monitor, content)
    return await accepted if isinstance(accepted, Awaitable) else accepted


def _accept(monitor: Monitor, data: bytes) -> FleetAccepted | Awaitable[FleetAccepted]:
    """Check, keep, and do what follows."""
    tree, watch = monitor.tree, monitor.core.fleet
    kind: Literal["roster", "manifest"] = "roster" if is_roster(data) else "manifest"
    try:
        with recorded(monitor, "fleet"):
            try:
                if kind == "roster":
                    return _roster(monitor, data)
                return _manifest(monitor, data)
            except Malformed as error:
                raise CommandError(f"The {kind} cannot be accepted: {error}") from None
    except CommandError as error:
        if tree.fleet.id:
            watch.refused(kind, error.desc)
        raise


def _roster(monitor: Monitor, data: bytes) -> FleetAccepted | Awaitable[FleetAccepted]:
    tree, watch = monitor.tree, monitor.core.fleet
    roster = fleet_rules.checked_roster(tree, data)
    if roster is None:
        watch.accepted("roster")
        return {"kind": "roster", "number": read_roster(data).number, "changed": False}
    commit = fleet_rules.keep_roster(tree, data)

    def kept() -> Sequence[Commit]:
        monitor.core.audit.append(
            "roster", monitor.subject, id=tree.fleet.id, number=roster.number,
            count=len(roster.hosts),
        )  # fmt: skip
        watch.accepted("roster", is_new=True)
        return ()

    reply: FleetAccepted = {"kind": "roster", "number": roster.number, "changed": True}
    return when_kept(commit, kept, reply)


def _manifest(monitor: Monitor, data: bytes) -> FleetAccepted | Awaitable[FleetAccepted]:
    tree, watch = monitor.tree, monitor.core.fleet
    manifest = fleet_rules.checked_manifest(tree, data)
    if manifest is None:
        known = read_manifest(data)
        watch.accepted("manifest")
        same: FleetAccepted = {
            "kind": "manifest", "number": known.number, "publisher": known.publisher,
            "changed": False,
        }  # fmt: skip
        return when_kept(None, lambda: watch.settle(known.publisher), same)
    commit = fleet_rules.keep_manifest(tree, data, manifest)

    def kept() -> Sequence[Commit]:
        monitor.core.audit.append(
            "manifest", monitor.subject, id=tree.fleet.id, number=manifest.number,
            origin=fleet_rules.origin(manifest.publisher), count=len(manifest.ids),
        )  # fmt: skip
        fleet_settling.withdraw(tree, manifest)
        watch.accepted("manifest", is_new=True)
        return watch.settle(manifest.publisher)

    reply: FleetAccepted = {
        "kind": "manifest", "number": manifest.number, "publisher": manifest.publisher,
        "changed": True,
    }  # fmt: skip
    return when_kept(commit, kept, reply)


def when_kept(
    commit: Commit | None, kept: Callable[[], Sequence[Commit]], reply: T
) -> T | Coroutine[Any, Any, T]:
    """Return a reply once a store has what was kept and what follows, if there is one."""
    following: list[Commit] = []
    if commit is not None:
        return _once_settled(
            once_written(commit, lambda: following.extend(kept())), following, reply
        )
    following += kept()
    return _once_settled(None, following, reply) if following else reply


async def _once_settled(commit: Commit | None, following: Sequence[Commit], reply: T) -> T:
    """Return a reply once a store has some changes; those that follow may fail."""
    if commit is not None:
        await commit
    for each in following:
        with suppress(CommandError):
            await each
    return reply


@command(client=True)
def query_secret_fleet(monitor: Monitor) -> list[FleetInfo]:
    """Return the fleet of this host, if it has one."""
    tree, fleet = monitor.tree, monitor.tree.fleet
    if not fleet.id:
        return []
    info: FleetInfo = {
        "id": fleet.id, "name": fleet.name, "host": tree.host_name, "state": fleet.state,
        "since": monitor.core.fleet.since, "publishers": [],
    }  # fmt: skip
    if fleet.reason:
        info["reason"] = fleet.reason
    roster = fleet.roster
    if roster is not None:
        info["roster"] = {
            "number": roster.number, "not-after": roster.until, "hosts": len(roster.hosts),
            "publishers": len(roster.publishers),
        }  # fmt: skip
        for name, publisher in roster.publishers.items():
            manifest = fleet.manifest(name)
            if manifest is not None:
                info["publishers"].append({
                    "name": name, "pattern": publisher.pattern, "number": manifest.number,
                    "digest": fleet.digests[name], "age": int(time.time()) - manifest.signed_at,
                    "missing": len(fleet_rules.missing(tree, name)),
                    "pending": fleet_settling.pending(tree, name),
                })  # fmt: skip
    return [info]


@command(client=True)
def query_secret_fleet_missing(
    monitor: Monitor, publisher: str, after: str | UnsetType = UNSET
) -> list[str]:
    """List the digests of a publisher's records that have not arrived, in order, 400 at most.

    ``after`` continues after that digest.
    """
    fleet_of(monitor.tree)
    first = "" if after is UNSET else after
    missing = sorted(fleet_rules.missing(monitor.tree, publisher))
    return [each for each in missing if each > first][:DIGESTS_PER_REPLY]
