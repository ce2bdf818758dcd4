# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changing aliases: compare and set, what readers have read, and a secret that becomes an alias.

monitor.commands.aliases and access call this module.
"""

from collections.abc import Awaitable, Collection, Mapping
from typing import Final

from secretd.errors import CommandError
from secretd.qom.alias import (
    CONSUMERS,
    LAST,
    MORE,
    READERS,
    Alias,
    SecretAlias,
    check_consumers,
    check_versions,
    number_of,
)
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


def set_alias(
    tree: ObjectTree,
    alias_id: str,
    expect: Mapping[str, str],
    versions: Mapping[str, str],
    consumers: list[str] | None,
) -> Commit | None:
    """Change an alias if its versions are the expected ones; see `ObjectTree.change`.

    ``expect``, ``versions``: by property; "" is none, and so is a missing one in ``expect``.
    Raises CommandError, and then nothing has changed.
    """
    # 1. Compare.
    before = alias(tree, alias_id)
    present = {name: getattr(before, name) for name in _VERSIONS}
    expected = {name: expect.get(name, "") for name in _VERSIONS}
    if present != expected:
        raise CommandError(
            f"Alias '{alias_id}' is not as expected: its {_named(present)}; expected were "
            f"{_named(expected)}"
        )
    # 2. Check.
    after = {**present, **versions}
    check_versions(alias_id, after)
    if after["current"] != present["current"] and not tree.is_secret(after["current"]):
        raise CommandError(f"No secret with id '{after['current']}'")
    # 3. Set. Readers of another version than these two are no longer of interest.
    numbers = {number_of(after["current"]), number_of(after["previous"])} - {0}
    readers = {each: number for each, number in before.readers.items() if number in numbers}
    changes: dict[str, object] = {
        **after,
        READERS: readers,
        LAST: max(before.last, *map(number_of, after.values())),
    }
    if after["current"] != present["current"]:
        changes[MORE] = False
    if consumers is not None:
        check_consumers(consumers)
        changes["consumers"] = consumers
    return tree.change(alias_id, changes)


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
        if each in readers or each in found.consumers or len(readers) < CONSUMERS:
            readers[each] = number
        else:
            more = True
    if readers == found.readers and more == found.more:
        return
    record = tree.journal.get(alias_id)
    assert record is not None
    tree.note(alias_id, record.properties | {READERS: readers, MORE: more})


def convert(tree: ObjectTree, object_id: str) -> Commit | Awaitable[None] | None:
    """Turn a secret into an alias whose current version is ``ID.v1``, in one step for its readers.

    The version has the secret's content, properties, lifetime and owner. Returns what waits for the
    disk if a store has the object. Raises CommandError.
    """
    plaintext = tree.plaintext(object_id)
    if object_id in tree.pinned | tree.own_keys | tree.fixed:
        raise CommandError(f"object '{object_id}' is in use, can not be deleted")
    version = f"{object_id}.v1"
    # An interrupted conversion has left it.
    if tree.is_secret(version) and tree.plaintext(version) == plaintext:
        return _name(tree, object_id, version)
    tree.check_new(version)
    record = tree.journal.get(object_id)
    assert record is not None
    copy = tree.journal.arena.allocate(len(plaintext))
    copy.view[:] = plaintext
    kind = tree.types.numbered[record.type]
    stored = tree.store_content(version, kind, dict(record.properties), copy, record.uid)
    if isinstance(stored, Commit):
        return _name_later(tree, object_id, version, stored)
    return _name(tree, object_id, version)


async def _name_later(tree: ObjectTree, object_id: str, version: str, stored: Commit) -> None:
    await stored
    tree.plaintext(object_id)  # it may have been deleted meanwhile
    named = _name(tree, object_id, version)
    if named is not None:
        await named


def _name(tree: ObjectTree, object_id: str, version: str) -> Commit | None:
    """Put an alias in the place of a secret."""
    (kind,) = (each for each in tree.types.numbered.values() if isinstance(each, SecretAlias))
    properties: dict[str, object] = {"current": version, LAST: 1}
    uid, _ = tree.journal.owner(object_id)
    if tree.keeper is not None and tree.keeper.covers(object_id):
        return tree.keeper.exchange(object_id, kind, properties, None, uid)
    tree.replace(object_id, kind, properties, None, uid)
    return None
