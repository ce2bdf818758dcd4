# SPDX-License-Identifier: LGPL-2.1-or-later
"""What follows from an accepted manifest, as its records arrive: aliases move, and what it no
longer has is removed. monitor.fleet_watch carries it out and records it.
"""

from collections.abc import Iterator

from secretd.crypto.roster import Manifest
from secretd.errors import CommandError
from secretd.qom.alias import LAST, SecretAlias, number_of
from secretd.qom.fleet_rules import origin
from secretd.qom.lookup import ORIGIN
from secretd.qom.rotation import put_in_place, set_alias
from secretd.qom.tree import ObjectTree
from secretd.store.commit import Commit


def withdraw(tree: ObjectTree, manifest: Manifest) -> None:
    """Note what a new manifest no longer has."""
    mine, publisher = origin(manifest.publisher), manifest.publisher
    tree.fleet.withdrawn[publisher] = {
        each for each, came_from in tree.origins.items()
        if came_from == mine and each not in manifest.aliases
        and (each not in manifest.ids or each in tree.aliases)
    }  # fmt: skip


def pending(tree: ObjectTree, publisher: str) -> int:
    """Return how many aliases are not as in a publisher's manifest, and how many of the withdrawn
    objects are still there.
    """
    manifest, mine = tree.fleet.manifest(publisher), origin(publisher)
    if manifest is None:
        return 0
    different = 0
    for alias_id, (current, _) in manifest.aliases.items():
        found = tree.aliases.get(alias_id)
        if found is None or found.current != current or tree.origins.get(alias_id) != mine:
            different += 1
    return different + len(tree.fleet.withdrawn.get(publisher, ()))


def settle(tree: ObjectTree, publisher: str) -> Iterator[tuple[str, str, Commit | None]]:
    """Let the aliases of a publisher point at what has arrived, and remove what was withdrawn and
    is no current version of an alias.

    Yields what was done, "alias", "flip" or "del", to which id, and what waits for the disk; and
    "blocked" for an alias whose id another object has.
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
        kind = tree.types.numbered[SecretAlias.number]
        last = max(number_of(current), number_of(previous))
        properties: dict[str, object] = {"current": current, LAST: last, ORIGIN: mine}
        if previous:
            properties["previous"] = previous
        uid = tree.journal.owner(tree.fleet.id)[0]
        try:
            if alias_id in tree.journal:
                if tree.origins.get(alias_id) != mine:
                    yield "blocked", alias_id, None
                    return
                # It was published as a secret before: one step for its readers.
                yield "alias", alias_id, put_in_place(tree, alias_id, kind, properties, uid)
                return
            tree.check_new(alias_id)
            stored = tree.store_content(alias_id, kind, properties, None, uid)
        except CommandError:
            return
        yield "alias", alias_id, stored if isinstance(stored, Commit) else None
        return
    if tree.origins.get(alias_id) != mine:
        yield "blocked", alias_id, None
        return
    if (found.current, found.previous) == (current, previous):
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
