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
from secretd.qom.alias import alias_of, check_versions
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
from secretd.qom.origin import DIGEST
from secretd.qom.patterns import matcher
from secretd.qom.tree import ObjectTree
from secretd.store.commit import Commit

FLEET_SECRET_BYTES: Final = 512 << 10
"""Bytes of a secret in a fleet: etcd takes requests of 1.5 MiB."""

_HEAD_BYTES: Final = 64 << 10
"""Room for all of a record but the secret."""


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


def checked_roster(tree: ObjectTree, data: bytes) -> Roster | None:
    """Return what a roster says if it is to be accepted, None if it is known. Raises Malformed."""
    fleet, host = tree.fleet, tree.host_name
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
                raise Malformed(f"{name[:64]!a} is no name")
    if host not in roster.hosts:  # another host's, or this one was revoked
        raise Malformed(f"it does not have host '{host}'")
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
        raise Malformed(f"it is for host {manifest.host[:64]!a}, and this is '{tree.host_name}'")
    if tree.host_name not in roster.hosts:
        raise Malformed(f"host '{tree.host_name}' is not in the roster")
    publisher = roster.publishers.get(manifest.publisher)
    if publisher is None:
        raise Malformed(f"publisher {manifest.publisher[:64]!a} is not in the roster")
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
    if len(manifest.ids) + len(manifest.aliases) > MANIFEST_IDS:
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
        raise Malformed(f"it is of fleet {name[:64]!a}, and this host's is '{fleet.name}'")


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


def listed(tree: ObjectTree, head: Head, data: bytes) -> PublicKeys:
    """Return the keys of the publisher whose manifest has a record. Raises Malformed."""
    fleet = tree.fleet
    if not fleet.id:
        raise Malformed("it is of a fleet, and this host has none")
    _check_fleet(fleet, head.subject)
    roster = roster_of(fleet)
    if tree.host_name not in roster.hosts:
        raise Malformed(f"host '{tree.host_name}' is not in the roster")
    manifest = fleet.manifest(head.sender)
    if manifest is None:
        raise Malformed(f"there is no manifest of publisher {head.sender[:64]!a}")
    if manifest.ids.get(head.object_id) != digest_of(data):
        raise Malformed(f"the manifest of '{head.sender}' does not have it")
    publisher = roster.publishers[head.sender]
    if not matcher(publisher.pattern)(head.object_id):  # narrower than when it was accepted
        raise Malformed(
            f"'{head.object_id}' is outside of the pattern '{publisher.pattern}' of publisher "
            f"'{head.sender}'"
        )
    if len(data) > FLEET_SECRET_BYTES + _HEAD_BYTES:
        raise Malformed(f"it has {len(data)} bytes, more than a secret of {FLEET_SECRET_BYTES}")
    return publisher.keys


def check_version(tree: ObjectTree, object_id: str, publisher: str) -> None:
    """Raise Malformed for a version of an object that is not the publisher's: a rotation of it
    would take that version.
    """
    base = alias_of(object_id)
    if base and base in tree.journal and tree.origins.get(base) != origin(publisher):
        raise Malformed(f"'{object_id}' would be a version of '{base}', which did not come from it")


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
