# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changing aliases: compare and set, what readers have read, and a secret that becomes an alias.

monitor.commands.aliases and access call this module.
"""

from collections.abc import Awaitable, Collection, Mapping
from typing import Final

from secretd.errors import CommandError
from secretd.qom.alias import (
    CONSUMERS,
    CONSUMERS_BYTES,
    LAST,
    MORE,
    READERS,
    Alias,
    SecretAlias,
    alias_of,
    check_consumers,
    check_note,
    check_versions,
    number_of,
    text_size,
)
from secretd.qom.object_type import ObjectType
from secretd.qom.renewal import check_replaceable
from secretd.qom.tree import ObjectTree
from secretd.store.commit import Commit

_VERSIONS: Final = ("current", "staged", "previous")


def alias(tree: ObjectTree, alias_id: str) -> Alias:
    """Return an existing alias. Raises CommandError."""
    found = tree.aliases.get(alias_id)
    if found is None:
        if alias_id in tree.journal:
            raise CommandError(f"Object with id '{alias_id}' is not a secret-alias")
        raise CommandError(f"No alias with id '{alias_id}'")
    return found


def set_alias(  # noqa: PLR0917 - what there is to set
    tree: ObjectTree,
    alias_id: str,
    expect: Mapping[str, str],
    versions: Mapping[str, str],
    consumers: list[str] | None,
    note: str | None = None,
) -> Commit | None:
    """Change an alias if its versions are the expected ones; see `ObjectTree.change`.

    ``expect``, ``versions``: by property; "" is none, and so is a missing one in ``expect``; it may
    have the note, too. Raises CommandError, and then nothing has changed.
    """
    # 1. Compare.
    before = alias(tree, alias_id)
    present = {name: getattr(before, name) for name in _VERSIONS}
    expected = {name: expect.get(name, "") for name in _VERSIONS}
    if "note" in expect and expect["note"] != before.note:
        raise CommandError(f"Alias '{alias_id}' is not as expected: its note is '{before.note}'")
    if present != expected:
        raise CommandError(
            f"Alias '{alias_id}' is not as expected: its {_named(present)}; expected were "
            f"{_named(expected)}"
        )
    # 2. Check.
    after = {**present, **versions}
    check_versions(alias_id, after)
    for version in {after["current"], after["previous"]} - {"", *present.values()}:
        _check_quiet(tree, version)
    for version in {*after.values()} - {"", *present.values()}:
        came_from = tree.origins.get(version)
        if came_from is not None and came_from != tree.origins.get(alias_id):
            raise CommandError(f"'{version}' came from {came_from}, and '{alias_id}' did not")
    if after["current"] != present["current"]:
        _check_quiet(tree, after["current"])
        if not tree.is_secret(after["current"]):
            raise CommandError(f"No secret with id '{after['current']}'")
    changes: dict[str, object] = {**after}
    changes[LAST] = max(before.last, *map(number_of, after.values()))
    if consumers is not None:
        check_consumers(consumers)
        changes |= {"consumers": consumers, MORE: False}
    if note is not None:
        check_note(note)
        changes["note"] = note
    # 3. Set. Until a store has it, the version before stays: the change may be undone.
    commit = tree.change(alias_id, changes)
    if commit is None:
        _forget_others(tree, alias_id)
    elif after["current"] != present["current"]:
        tree.promised[before.current] += 1
        commit.then(lambda _error: _settled(tree, alias_id, before.current))
    else:
        commit.then(lambda _error: _forget_others(tree, alias_id))
    return commit


def _settled(tree: ObjectTree, alias_id: str, version: str) -> None:
    """A change of the current version was written, or undone."""
    tree.promised[version] -= 1
    if not tree.promised[version]:
        del tree.promised[version]
    _forget_others(tree, alias_id)


def _check_quiet(tree: ObjectTree, object_id: str) -> None:
    """Raise CommandError while a store writes a change of an object."""
    if tree.keeper is not None and tree.keeper.is_changing(object_id):
        raise CommandError(f"object '{object_id}' is being changed; try again")


def _forget_others(tree: ObjectTree, alias_id: str) -> None:
    """Forget what was read of versions that are neither current nor previous."""
    found, record = tree.aliases.get(alias_id), tree.journal.get(alias_id)
    if (
        found is not None
        and record is not None
        and record.properties.get(READERS, {}) != found.readers
    ):
        tree.note(alias_id, record.properties | {READERS: found.readers})


def forget_version(tree: ObjectTree, version: str) -> None:
    """A version is removed: an identity that has read it has not read another one of that id."""
    alias_id = alias_of(version)
    found, record = tree.aliases.get(alias_id), tree.journal.get(alias_id)
    number = number_of(version)
    if found is not None and record is not None and number in found.readers.values():
        left = {each: n for each, n in found.readers.items() if n != number}
        tree.note(alias_id, record.properties | {READERS: left})


def _named(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} '{versions[name]}'" for name in _VERSIONS)


def note_read(
    tree: ObjectTree, alias_id: str, version: str, identities: Collection[str], reader: str
) -> None:
    """Note that an identity has read a version of an alias, if it is the current or previous one.

    ``identities``: all that the reader has; those among the consumers count. If there is none,
    ``reader`` counts, unless it is "".
    """
    found = tree.aliases.get(alias_id)
    if found is None or version not in (found.current, found.previous):
        return
    number = number_of(version)
    named = [each for each in found.consumers if each in identities] or [reader]
    if all(found.readers.get(each) == number for each in named) or named == [""]:
        return
    readers, more = dict(found.readers), found.more
    for each in named:
        if each in readers or each in found.consumers or _has_room(readers, each):
            readers[each] = number
        else:
            more = True
    if readers == found.readers and more == found.more:
        return
    record = tree.journal.get(alias_id)
    assert record is not None
    tree.note(alias_id, record.properties | {READERS: readers, MORE: more})


def _has_room(readers: Mapping[str, int], another: str) -> bool:
    return len(readers) < CONSUMERS and text_size((*readers, another)) <= CONSUMERS_BYTES


def convert(tree: ObjectTree, object_id: str, uid: int) -> Commit | Awaitable[None] | None:
    """Turn a secret into an alias whose current version is ``ID.v1``, in one step for its readers.

    The version has the secret's content, properties, lifetime and owner; the alias belongs to
    ``uid``. Returns what waits for the disk if a store has the object. Raises CommandError.
    """
    version = f"{object_id}.v1"
    check_versions(object_id, {"current": version})
    _check_place(tree, object_id)
    keeper = tree.keeper
    if keeper is not None and keeper.covers(object_id) != keeper.covers(version):
        raise CommandError(
            f"Store '{keeper.id}' would keep only one of '{object_id}' and '{version}'; its "
            f"pattern of secrets is '{keeper.pattern}'"
        )
    if uid not in tree.limits.trusted:
        tree.limits.objects.check(uid)
    # An interrupted conversion has left it.
    if _is_copy(tree, version, object_id):
        return _name(tree, object_id, version, uid)
    tree.check_new(version)
    record = tree.journal.get(object_id)
    assert record is not None
    plaintext = tree.plaintext(object_id)
    copy = tree.journal.arena.allocate(len(plaintext))
    copy.view[:] = plaintext
    kind = tree.types.numbered[record.type]
    stored = tree.store_content(version, kind, dict(record.properties), copy, record.uid)
    if isinstance(stored, Commit):
        return _name_later(tree, object_id, version, uid, stored)
    return _name(tree, object_id, version, uid)


def _is_copy(tree: ObjectTree, version: str, object_id: str) -> bool:
    """Return True if there is a secret with the content, properties, lifetime and owner of another
    one.
    """
    one, other = tree.journal.get(version), tree.journal.get(object_id)
    return (
        one is not None
        and other is not None
        and (one.type, one.uid, one.properties) == (other.type, other.uid, other.properties)
        and tree.is_secret(version)
        and tree.plaintext(version) == tree.plaintext(object_id)
    )


async def _name_later(
    tree: ObjectTree, object_id: str, version: str, uid: int, stored: Commit
) -> None:
    await stored
    tree.plaintext(object_id)  # it may have been deleted meanwhile
    try:
        _check_quiet(tree, object_id)
        if not _is_copy(tree, version, object_id):
            raise CommandError(f"object '{object_id}' is being changed; try again")
    except CommandError:
        tree.delete(version)
        raise
    named = _name(tree, object_id, version, uid)
    if named is not None:
        await named


def _name(tree: ObjectTree, object_id: str, version: str, uid: int) -> Commit | None:
    """Put an alias in the place of a secret."""
    kind = tree.types.numbered[SecretAlias.number]
    return _exchange(tree, object_id, kind, {"current": version, LAST: 1}, uid)


def _check_place(tree: ObjectTree, object_id: str) -> None:
    """Raise CommandError if an alias may not take the place of an object."""
    check_replaceable(tree, object_id)
    if object_id in tree.own_keys or object_id in tree.fixed:
        raise CommandError(f"object '{object_id}' is in use, can not be deleted")
    _check_quiet(tree, object_id)


def put_in_place(
    tree: ObjectTree, object_id: str, kind: ObjectType, properties: dict[str, object], uid: int
) -> Commit | None:
    """Put an alias in the place of a secret, in one step for its readers; see `convert`."""
    _check_place(tree, object_id)
    return _exchange(tree, object_id, kind, properties, uid)


def _exchange(
    tree: ObjectTree, object_id: str, kind: ObjectType, properties: dict[str, object], uid: int
) -> Commit | None:
    if tree.keeper is not None and tree.keeper.covers(object_id):
        return tree.keeper.exchange(object_id, kind, properties, None, uid)
    tree.replace(object_id, kind, properties, None, uid)
    return None
