# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a host accepts from its fleet, and what follows from that.

A roster must be signed by the root, and a manifest by a publisher of the roster; the number of
either never goes back. A record is accepted while the publisher's manifest has its digest. What a
manifest no longer has is withdrawn. Carriers, and etcd, can only withhold. The roles are those of
TUF: root, targets (manifests) and, by the time in each, timestamp. monitor.commands.fleet calls it.
"""

import base64
import os
import time
from collections.abc import Iterator
from typing import Final

from secretd.crypto import record as records
from secretd.crypto.host_keys import PublicKeys
from secretd.crypto.record import Head, Malformed
from secretd.crypto.roster import (
    MANIFEST_IDS,
    ROSTER_BYTES,
    Manifest,
    Roster,
    digest_of,
    read_manifest,
    read_roster,
)
from secretd.errors import CommandError
from secretd.qom.alias import LAST, SecretAlias, check_versions, number_of
from secretd.qom.fleet import (
    SIGNED_BYTES,
    SIGNER,
    SecretManifest,
    SecretRoster,
    manifest_id,
    roster_id,
    sent_id,
)
from secretd.qom.fleet_state import PUBLISHED, Fleet
from secretd.qom.hosts import NAME, SKEW_SECONDS
from secretd.qom.identifiers import check_identifier
from secretd.qom.lookup import ORIGIN
from secretd.qom.origin import DIGEST
from secretd.qom.patterns import matcher
from secretd.qom.rotation import set_alias
from secretd.qom.tree import ObjectTree
from secretd.store.commit import Commit

FLEET_SECRET_BYTES: Final = 512 << 10
"""Bytes of a secret in a fleet: etcd takes requests of 1.5 MiB."""


def fleet_of(tree: ObjectTree) -> Fleet:
    """Return the fleet of this host. Raises CommandError."""
    if not tree.fleet.id:
        raise CommandError("This host has no fleet; object-add a secret-fleet first")
    return tree.fleet


def roster_of(fleet: Fleet) -> Roster:
    """Return a roster that can be used. Raises Malformed."""
    roster = fleet.roster
    if roster is None:
        raise Malformed("there is no roster yet")
    if roster.until and roster.until < time.time():
        raise Malformed(f"the roster has expired {int(time.time()) - roster.until} s ago")
    return roster


def checked_roster(fleet: Fleet, data: bytes) -> Roster | None:
    """Return what a roster says if it is to be accepted, None if it is known. Raises Malformed."""
    _check_size(data)
    roster = read_roster(data)
    _check_fleet(fleet, roster.fleet)
    try:
        records.verify(data, fleet.root)
    except Malformed:
        raise Malformed("it is not signed by the root of the fleet") from None
    known = fleet.roster
    if known == roster:
        return None
    _check_number(roster.number, None if known is None else known.number)
    if roster.until and roster.until < time.time():
        raise Malformed(f"it has expired {int(time.time()) - roster.until} s ago")
    for names in (roster.hosts, roster.publishers):
        for name in names:
            if not NAME.fullmatch(name):
                raise Malformed(f"{name!a} is no name")
    return roster


def checked_manifest(tree: ObjectTree, data: bytes) -> Manifest | None:
    """Return what a manifest says if it is to be accepted, None if it is known. Raises
    Malformed.
    """
    _check_size(data)
    fleet, manifest = tree.fleet, read_manifest(data)
    _check_fleet(fleet, manifest.fleet)
    roster = roster_of(fleet)
    if manifest.host != tree.host_name:
        raise Malformed(f"it is for host '{manifest.host}', and this is '{tree.host_name}'")
    if tree.host_name not in roster.hosts:
        raise Malformed(f"host '{tree.host_name}' is not in the roster")
    publisher = roster.publishers.get(manifest.publisher)
    if publisher is None:
        raise Malformed(f"publisher '{manifest.publisher}' is not in the roster")
    records.verify(data, publisher.keys.signing)
    if fleet.digests.get(manifest.publisher) == digest_of(data).hex():
        return None
    known = fleet.manifest(manifest.publisher)
    _check_number(manifest.number, None if known is None else known.number)
    ahead = manifest.signed_at - int(time.time())
    if ahead > SKEW_SECONDS:
        raise Malformed(f"it was signed {ahead} s from now; do the clocks differ?")
    check_content(manifest, publisher.pattern)
    return manifest


def check_content(manifest: Manifest, pattern: str) -> None:
    """Raise Malformed unless a publisher may publish what a manifest has."""
    matches = matcher(pattern)
    if max(len(manifest.ids), len(manifest.aliases)) > MANIFEST_IDS:
        raise Malformed(f"it has more than {MANIFEST_IDS} ids, and that is the limit")
    for object_id in (*manifest.ids, *manifest.aliases):
        try:
            check_identifier(object_id)
        except CommandError:
            raise Malformed(f"{object_id[:64]!a} is no id") from None
        if not matches(object_id):
            raise Malformed(
                f"'{object_id}' is outside of the pattern '{pattern}' of publisher "
                f"'{manifest.publisher}'"
            )
    for object_id, (current, previous) in manifest.aliases.items():
        try:
            check_versions(object_id, {"current": current, "previous": previous})
        except CommandError as error:
            raise Malformed(f"alias '{object_id}': {error}") from None
        if object_id in manifest.ids:
            raise Malformed(f"'{object_id}' is an alias and a secret")
        for version in filter(None, (current, previous)):
            if version not in manifest.ids:
                raise Malformed(f"alias '{object_id}' names '{version}', which it does not have")


def _check_size(data: bytes) -> None:
    if len(data) > ROSTER_BYTES:
        raise Malformed(f"it has {len(data)} bytes, and the limit is {ROSTER_BYTES}")


def _check_fleet(fleet: Fleet, name: str) -> None:
    if name != fleet.name:
        raise Malformed(f"it is of fleet '{name}', and this host's is '{fleet.name}'")


def _check_number(number: int, known: int | None) -> None:
    """Raise Malformed if numbers would go back."""
    if known is not None and number < known:
        raise Malformed(f"it is an older one: its number is {number}, and {known} is known")
    if number == known:
        raise Malformed(f"it is another one of number {number}")


# --- what follows


def keep_roster(tree: ObjectTree, data: bytes) -> Commit | None:
    """Keep a checked roster, and forget the numbers of publishers that have another key by now.

    Returns what waits for the disk. Raises CommandError.
    """
    fleet = tree.fleet
    return _keep(tree, roster_id(fleet), SecretRoster.number, data, fleet.root.hex())


def keep_manifest(tree: ObjectTree, data: bytes, manifest: Manifest) -> Commit | None:
    """Keep a checked manifest; see `keep_roster`."""
    roster = roster_of(tree.fleet)
    signer = roster.publishers[manifest.publisher].keys.signing.hex()
    object_id = manifest_id(tree.fleet, manifest.publisher)
    return _keep(tree, object_id, SecretManifest.number, data, signer)


def keep_sent(tree: ObjectTree, data: bytes, host: str) -> Commit | None:
    """Keep a manifest that was signed here; see `keep_roster`."""
    return _keep(tree, sent_id(tree.fleet, host), SecretManifest.number, data, "")


def _keep(tree: ObjectTree, object_id: str, number: int, data: bytes, signer: str) -> Commit | None:
    properties: dict[str, object] = {
        SIGNED_BYTES: base64.b64encode(data).decode(), SIGNER: signer,
    }  # fmt: skip
    kind = tree.types.numbered[number]
    if object_id not in tree.journal:
        tree.check_new(object_id)
        stored = tree.store_content(object_id, kind, properties, None, os.getuid())
        return stored if isinstance(stored, Commit) else None
    if tree.type_of(object_id) is not kind:
        raise CommandError(f"Object with id '{object_id}' is not a {kind.info.name}")
    commit = tree.change(object_id, properties)

    def joined(_error: object = None) -> None:
        record = tree.journal.get(object_id)
        if record is not None:  # as it is now: a store that failed has it undone
            kind.joined(tree, object_id, record.properties)

    joined()
    if commit is not None:
        commit.then(joined)
    return commit


def origin(publisher: str) -> str:
    """Return the origin of a publisher's secrets."""
    return f"{PUBLISHED}{publisher}"


def withdraw(tree: ObjectTree, manifest: Manifest) -> None:
    """Note what a new manifest no longer has."""
    mine, publisher = origin(manifest.publisher), manifest.publisher
    tree.fleet.withdrawn[publisher] = {
        each for each, came_from in tree.origins.items()
        if came_from == mine and each not in manifest.ids and each not in manifest.aliases
    }  # fmt: skip


def settle(tree: ObjectTree, publisher: str) -> Iterator[tuple[str, str, Commit | None]]:
    """Let the aliases of a publisher point at what has arrived, and remove what was withdrawn and
    is no current version of an alias.

    Yields what was done, "alias", "flip" or "del", to which id, and what waits for the disk.
    """
    manifest = tree.fleet.manifest(publisher)
    if manifest is None or not tree.fleet.id:
        return
    mine = origin(publisher)
    for alias_id, (current, previous) in manifest.aliases.items():
        if tree.is_secret(current) and tree.origins.get(current) == mine:
            yield from _point(tree, alias_id, current, previous, mine)
    if publisher not in tree.fleet.withdrawn:  # an earlier process may have ended in between
        withdraw(tree, manifest)
    withdrawn = tree.fleet.withdrawn[publisher]
    # Aliases first: they need their versions.
    for object_id in sorted(withdrawn, key=lambda each: (each not in tree.aliases, each)):
        if tree.origins.get(object_id) != mine:
            withdrawn.discard(object_id)
            continue
        try:
            tree.check_deletable(object_id)
            _, commit = tree.delete(object_id)
        except CommandError:
            continue  # with the next record, or the next manifest
        withdrawn.discard(object_id)
        yield "del", object_id, commit


def _point(
    tree: ObjectTree, alias_id: str, current: str, previous: str, mine: str
) -> Iterator[tuple[str, str, Commit | None]]:
    found = tree.aliases.get(alias_id)
    if not tree.is_secret(previous):
        previous = ""
    if found is None:
        if alias_id in tree.journal or alias_id in tree.reserved:
            return
        kind = tree.types.numbered[SecretAlias.number]
        last = max(number_of(current), number_of(previous))
        properties: dict[str, object] = {"current": current, LAST: last, ORIGIN: mine}
        if previous:
            properties["previous"] = previous
        stored = tree.store_content(
            alias_id, kind, properties, None, tree.journal.owner(tree.fleet.id)[0]
        )
        yield "alias", alias_id, stored if isinstance(stored, Commit) else None
        return
    if tree.origins.get(alias_id) != mine or (found.current, found.previous) == (current, previous):
        return
    expected = {
        "current": found.current, "staged": found.staged, "previous": found.previous,
    }  # fmt: skip
    versions = {"current": current, "previous": previous, "staged": ""}
    try:
        commit = set_alias(tree, alias_id, expected, versions, None)
    except CommandError:
        return  # a store is writing it; the next record or manifest comes here again
    yield "flip" if found.current != current else "alias", alias_id, commit


def listed(tree: ObjectTree, head: Head, data: bytes) -> PublicKeys:
    """Return the keys of the publisher whose manifest has a record. Raises Malformed."""
    fleet = tree.fleet
    if not fleet.id:
        raise Malformed("it is of a fleet, and this host has none")
    _check_fleet(fleet, head.subject)
    roster = roster_of(fleet)
    manifest = fleet.manifest(head.sender)
    if manifest is None:
        raise Malformed(f"there is no manifest of publisher '{head.sender}'")
    if manifest.ids.get(head.object_id) != digest_of(data):
        raise Malformed(f"the manifest of '{head.sender}' does not have it")
    return roster.publishers[head.sender].keys


def is_held(tree: ObjectTree, head: Head, data: bytes) -> bool:
    """Return True if the secret that a record brings has come from it."""
    if tree.origins.get(head.object_id) != origin(head.sender):
        return False
    record = tree.journal.get(head.object_id)
    return record is not None and record.properties.get(DIGEST) == digest_of(data).hex()


def missing(tree: ObjectTree, publisher: str) -> list[str]:
    """Return the digests of the records that have not arrived, in hexadecimal."""
    manifest, mine = tree.fleet.manifest(publisher), origin(publisher)
    if manifest is None:
        return []
    lacking = []
    for object_id, digest in manifest.ids.items():
        record = tree.journal.get(object_id) if tree.origins.get(object_id) == mine else None
        if record is None or record.properties.get(DIGEST) != digest.hex():
            lacking.append(digest.hex())
    return lacking
