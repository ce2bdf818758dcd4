# SPDX-License-Identifier: LGPL-2.1-or-later
"""Replacing objects: those of the command line at a start, and secrets by secret-replace.

The objects of the command line are added at every start, where an earlier process may have left
them. An existing equal object stays, with its deadline and counts; a file is read again each time.
daemon.initial_objects and monitor.commands call this module.
"""

from collections.abc import Awaitable
from typing import Final

from secretd.errors import CommandError
from secretd.memory.arena import LockedBuffer
from secretd.qom.alias import alias_of
from secretd.qom.deadlines import DEADLINE
from secretd.qom.grant import READS
from secretd.qom.loading import Loading, then
from secretd.qom.object_type import ObjectOptions, ObjectType
from secretd.qom.secret_store import COVERAGE, DOOMED, UUID
from secretd.qom.tree import ObjectTree
from secretd.store.commit import Commit

KNOWN: Final = ("state", "sequence", UUID, DOOMED, COVERAGE)
"""What the journal knows of a store on disk, beside its declaration."""

ACQUIRED: Final = frozenset({DEADLINE, READS, "create", *KNOWN})
"""Properties in the journal that were computed and not given; they do not count in the
comparison.
"""


def renew(
    tree: ObjectTree, options: ObjectOptions, loading: Loading, changes: dict[str, object]
) -> bool:
    """Add an object, or replace a different one in one step; return False if an equal object
    exists.

    A failure leaves an existing object unchanged. ``changes``: properties to store instead of the
    given ones. The sources must answer at once. Raises CommandError.
    """
    known = options.id in tree.journal
    if not known:
        tree.check_new(options.id)
    kind = tree.types.of[type(options)]
    content = kind.create(options, loading)
    properties = kind.stored(options) | changes
    if isinstance(content, dict):
        properties |= content
    plaintext = content if isinstance(content, LockedBuffer) else None
    if known and kind.declares_store:
        properties = _still_known(tree, options.id, properties)
    if known and kind.acquired:
        properties = _still_acquired(tree, options.id, kind, properties)
    if not known:
        tree.store_content(options.id, kind, properties, plaintext, loading.sources.uid)
    elif _is_same(tree, options.id, kind, properties, plaintext):
        if plaintext is not None:
            plaintext.free()
        return False
    else:
        tree.replace(options.id, kind, properties, plaintext, loading.sources.uid)
    return True


def _still_known(
    tree: ObjectTree, object_id: str, properties: dict[str, object]
) -> dict[str, object]:
    """Return the properties of a store's declaration with what is known of the same store."""
    record = tree.journal.get(object_id)
    assert record is not None
    if record.properties.get("path") != properties.get("path"):
        return properties
    known = {name: record.properties[name] for name in KNOWN if name in record.properties}
    return properties | known


def _still_acquired(
    tree: ObjectTree, object_id: str, kind: ObjectType, properties: dict[str, object]
) -> dict[str, object]:
    """Return the properties of an object with those that an existing one has acquired."""
    record = tree.journal.get(object_id)
    assert record is not None
    if record.type != kind.number:
        return properties
    acquired = {n: value for n, value in record.properties.items() if n in kind.acquired}
    return properties | acquired


def _is_same(
    tree: ObjectTree,
    object_id: str,
    kind: ObjectType,
    properties: dict[str, object],
    plaintext: LockedBuffer | None,
) -> bool:
    record = tree.journal.get(object_id)
    assert record is not None
    names = (properties.keys() | record.properties.keys()) - ACQUIRED
    return (
        record.type == kind.number
        and all(properties.get(n) == record.properties.get(n) for n in names)
        and (plaintext is None or plaintext.view == tree.journal.plaintext(object_id))
    )


def exchange(
    tree: ObjectTree, options: ObjectOptions, loading: Loading
) -> int | Commit | Awaitable[int | Commit]:
    """Replace a secret's content in one step; return the new one's size in bytes, maybe later, or
    what waits for the disk.

    A failure leaves the existing secret unchanged. Its lifetime ends with the old content. Raises
    CommandError.
    """
    check_replaceable(tree, options.id)
    kind = tree.types.of[type(options)]
    content = kind.create(options, loading)

    def store(loaded: object) -> int | Commit:
        assert isinstance(loaded, LockedBuffer)
        uid = loading.sources.uid
        try:
            check_replaceable(tree, options.id)  # again: it may have been deleted meanwhile
            owner, before = tree.journal.owner(options.id)
            more = loaded.size if owner != uid else max(0, loaded.size - before)
            tree.limits.object_bytes.check(uid, more)
            if tree.keeper is not None and tree.keeper.covers(options.id):
                return tree.keeper.exchange(options.id, kind, kind.stored(options), loaded, uid)
        except BaseException:
            loaded.free()
            raise
        size = loaded.size
        tree.replace(options.id, kind, kind.stored(options), loaded, uid)
        return size

    if isinstance(content, Awaitable):
        return then(content, store)
    return store(content)


def check_replaceable(tree: ObjectTree, object_id: str, *, is_version: bool = False) -> None:
    """Raise CommandError unless there is an unexpired secret that may be replaced.

    ``is_version``: also as a version of an alias.
    """
    tree.plaintext(object_id)
    if object_id in tree.pinned:
        raise CommandError(f"object '{object_id}' is in use, can not be deleted")
    alias = None if is_version else tree.aliases.get(alias_of(object_id))
    if alias is not None and object_id in (alias.current, alias.previous):
        raise CommandError(
            f"'{object_id}' is a version of alias '{alias_of(object_id)}', and is written once; "
            "add another version instead"
        )
