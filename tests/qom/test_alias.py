# SPDX-License-Identifier: LGPL-2.1-or-later
"""Aliases over restarts and reboots, on the command line, and in a store that is slow or fails."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from secretd.descriptors.source import CommandLineSources
from secretd.errors import CommandError
from secretd.journal.journal import Journal
from secretd.memory.arena import Arena
from secretd.qom import rotation
from secretd.qom.alias import SecretAliasOptions
from secretd.qom.authz import AuthZSimpleOptions
from secretd.qom.registry import TYPES
from secretd.qom.renewal import renew
from secretd.qom.tree import ObjectTree
from secretd.store.commit import Commit
from tests.journal.test_restore import left, restored
from tests.qom.test_store import KEY, Kept
from tests.support.needs import ARENA_LEVEL
from tests.support.slow_disk import SlowDisk


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    """An open store for all ids."""
    made = Kept(tmp_path)
    await made.add("key", KEY)
    await made.declare()
    yield made
    await made.end()


async def alias(kept: Kept, current: str) -> None:
    """Add the alias `a`."""
    loading = kept.tree.loading(CommandLineSources(kept.scratch))
    await kept.done(kept.tree.add(SecretAliasOptions(id="a", current=current), loading))


async def set_(kept: Kept, expect: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Change it."""
    await kept.done(rotation.set_alias(kept.tree, "a", expect, new, None))


async def test_an_alias_survives_a_reboot(kept: Kept) -> None:
    """With its versions, and what its readers have read."""
    await kept.add("a.v1")
    await kept.add("a.v2")
    await alias(kept, current="a.v1")
    rotation.note_read(kept.tree, "a", "a.v1", ["uid:1"], "uid:1")
    await set_(kept, {"current": "a.v1"}, {"current": "a.v2", "previous": "a.v1"})
    rotation.note_read(kept.tree, "a", "a.v2", ["uid:2"], "uid:2")
    await kept.reboot()
    found = kept.tree.aliases["a"]
    assert (found.current, found.previous, found.last) == ("a.v2", "a.v1", 2)
    assert (found.readers, found.missing) == ({"uid:1": 1, "uid:2": 2}, ["uid:1"])


async def test_a_locked_store_keeps_an_alias_as_it_is(kept: Kept) -> None:
    """What was read is noted in memory all the same, once for each reader."""
    await kept.add("a.v1")
    await kept.add("a.v2")
    await alias(kept, current="a.v1")
    await kept.delete("key")
    with pytest.raises(CommandError, match="is locked"):
        rotation.set_alias(kept.tree, "a", {"current": "a.v1"}, {"current": "a.v2"}, None)
    assert kept.tree.aliases["a"].current == "a.v1"
    for _ in range(2):
        rotation.note_read(kept.tree, "a", "a.v1", ["uid:1"], "uid:1")
    assert kept.tree.aliases["a"].readers == {"uid:1": 1}


async def test_a_failed_write_undoes_a_commit(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers have the earlier version again, and what was read meanwhile stays noted."""
    slow = SlowDisk(monkeypatch)
    slow.go()
    await kept.add("a.v1")
    await kept.add("a.v2")
    await alias(kept, current="a.v1")
    slow.stop()
    new = {"current": "a.v2", "previous": "a.v1"}
    commit = rotation.set_alias(kept.tree, "a", {"current": "a.v1"}, new, None)
    assert commit is not None
    assert kept.tree.aliases["a"].current == "a.v2"
    slow.go("No space left on device")
    with pytest.raises(CommandError):
        await commit
    assert kept.tree.aliases["a"].current == "a.v1"


@pytest.mark.parametrize("with_store", [True, False])
async def test_a_conversion_survives(tmp_path: Path, *, with_store: bool) -> None:
    """It is done in the store, too; the secret was a row."""
    kept = Kept(tmp_path)
    try:
        await kept.add("key", KEY)
        if with_store:
            await kept.declare()
        await kept.add("a", "letmein")
        await kept.done(rotation.convert(kept.tree, "a", 0))
        if with_store:
            await kept.reboot()
        assert kept.tree.aliases["a"].current == "a.v1"
        assert bytes(kept.tree.plaintext("a.v1")) == b"letmein"
        assert kept.secrets() == {"a.v1": "letmein"}
    finally:
        await kept.end()


async def test_a_secret_that_is_deleted_becomes_no_alias(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its version is being written."""
    slow = SlowDisk(monkeypatch)
    slow.go()
    await kept.add("a", "letmein")
    slow.stop()
    outcome = rotation.convert(kept.tree, "a", 0)
    _, deletion = kept.tree.delete("a")
    slow.go()
    assert deletion is not None
    await deletion
    with pytest.raises(CommandError, match="No secret with id 'a'"):
        await kept.done(outcome)
    assert kept.tree.aliases == {}


NO_ROOM = "No space left on device"


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    """A disk that goes on until it is stopped."""
    slow = SlowDisk(monkeypatch)
    slow.go()
    return slow


async def rotating(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> tuple[SlowDisk, Commit]:
    """An alias on its way from version 1 to 2, while the disk stands."""
    slow = slow_disk(monkeypatch)
    await kept.add("a.v1", "one")
    await kept.add("a.v2", "two")
    await alias(kept, current="a.v1")
    slow.stop()
    new = {"current": "a.v2", "previous": "a.v1"}
    commit = rotation.set_alias(kept.tree, "a", {"current": "a.v1"}, new, None)
    assert commit is not None
    return slow, commit


async def test_the_version_before_stays_until_a_commit_is_written(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may become current again; afterwards it can go."""
    slow, commit = await rotating(kept, monkeypatch)
    for version in ("a.v1", "a.v2"):
        with pytest.raises(CommandError, match="is in use, can not be deleted"):
            kept.tree.check_deletable(version)
    slow.go()
    await commit
    kept.tree.check_deletable("a.v1")
    await kept.delete("a.v1")


async def test_a_note_does_not_write_a_change_that_fails(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read meanwhile is written after the change, or forgotten with it."""
    slow, commit = await rotating(kept, monkeypatch)
    rotation.note_read(kept.tree, "a", "a.v1", ["uid:1"], "uid:1")
    rotation.note_read(kept.tree, "a", "a.v2", ["uid:2"], "uid:2")
    slow.go(NO_ROOM)
    with pytest.raises(CommandError):
        await commit
    assert kept.tree.aliases["a"].readers == {"uid:1": 1}
    slow.go()
    await kept.add("x")
    await kept.reboot()
    assert kept.tree.aliases["a"].current == "a.v1"
    assert kept.tree.aliases["a"].readers == {"uid:1": 1}


async def test_a_note_that_failed_is_written_later(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the next one, or when the store is opened again."""
    slow = slow_disk(monkeypatch)
    await kept.add("a.v1")
    await alias(kept, current="a.v1")
    slow.go(NO_ROOM)
    rotation.note_read(kept.tree, "a", "a.v1", ["uid:1"], "uid:1")
    while not kept.keeper._unwritten:
        await asyncio.sleep(0)
    slow.go()
    rotation.note_read(kept.tree, "a", "a.v1", ["uid:2"], "uid:2")
    await kept.delete("key")
    rotation.note_read(kept.tree, "a", "a.v1", ["uid:3"], "uid:3")
    await kept.add("key", KEY)
    await kept.state("open")
    await kept.add("x")
    await kept.reboot()
    assert kept.tree.aliases["a"].readers == {"uid:1": 1, "uid:2": 1, "uid:3": 1}


async def test_many_notes_are_few_writes(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, whatever a reader reads in turn while the disk stands."""
    slow, commit = await rotating(kept, monkeypatch)
    slow.go()
    await commit
    slow.stop()
    slow.batches.clear()
    for _ in range(100):
        for version in ("a.v1", "a.v2"):
            rotation.note_read(kept.tree, "a", version, ["uid:1"], "uid:1")
    slow.go()
    await kept.add("x")
    await kept.add("y")
    assert sum(batch.count("a") for batch in slow.batches) <= 2


async def test_what_is_being_replaced_becomes_no_current_version(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its readers would get two contents under one id."""
    slow = slow_disk(monkeypatch)
    await kept.add("a.v1")
    await kept.add("a.v2")
    await alias(kept, current="a.v1")
    slow.stop()
    replacing = kept.replace_soon("a.v2", "other")
    with pytest.raises(CommandError, match="object 'a.v2' is being changed; try again"):
        rotation.set_alias(kept.tree, "a", {"current": "a.v1"}, {"current": "a.v2"}, None)
    with pytest.raises(CommandError, match="object 'a.v2' is being changed; try again"):
        rotation.set_alias(kept.tree, "a", {"current": "a.v1"}, {"previous": "a.v2"}, None)
    slow.go()
    await kept.done(replacing)


@pytest.mark.parametrize("change", ["replace", "expire"])
async def test_a_change_meanwhile_ends_a_conversion(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Nothing of either is lost, and no copy is left."""
    slow = slow_disk(monkeypatch)
    await kept.add("a", "old")
    slow.stop()
    outcome = rotation.convert(kept.tree, "a", 0)
    if change == "replace":
        changing = kept.replace_soon("a", "new")
    else:
        changing = kept.tree.expire_after("a", 1000)
    with pytest.raises(CommandError, match="is being changed; try again"):
        rotation.convert(kept.tree, "a", 0)
    slow.go()
    await kept.done(changing)
    with pytest.raises(CommandError, match="is being changed; try again"):
        await kept.done(outcome)
    assert kept.secrets() == {"a": "new" if change == "replace" else "old"}
    await kept.done(rotation.convert(kept.tree, "a", 0))
    assert (kept.tree.deadlines.remaining("a.v1") is None) is (change == "replace")


async def test_a_store_keeps_both_names_or_none(tmp_path: Path) -> None:
    """A conversion would lose the value at the next reboot."""
    kept = Kept(tmp_path)
    try:
        await kept.add("key", KEY)
        await kept.declare("a")
        await kept.add("a")
        words = "Store 'store' would keep only one of 'a' and 'a.v1'; its pattern of secrets is 'a'"
        with pytest.raises(CommandError, match=words):
            rotation.convert(kept.tree, "a", 0)
    finally:
        await kept.end()


async def test_another_secrets_copy_is_no_version(kept: Kept) -> None:
    """One with a lifetime of its own, or of another owner."""
    await kept.add("a")
    await kept.add("a.v1")
    commit = kept.tree.expire_after("a.v1", 1000)
    assert commit is not None
    await commit
    with pytest.raises(CommandError, match="attempt to add duplicate property 'a.v1'"):
        rotation.convert(kept.tree, "a", 0)


def test_an_alias_of_the_command_line_stays() -> None:
    """As it has become, at later starts; only its consumers follow the line."""
    scratch = Arena(ARENA_LEVEL)
    journal = Journal(Arena("none", window=1 << 16))
    tree = ObjectTree(journal, scratch, TYPES)
    loading = tree.loading(CommandLineSources(scratch))
    for name in ("a.v1", "a.v2", "x"):
        buffer = journal.arena.allocate(1)
        tree.place(name, TYPES.numbered[1], {}, buffer, os.getuid())
    options = SecretAliasOptions(id="a", current="a.v1")
    assert renew(tree, options, loading, {})
    rotation.set_alias(tree, "a", {"current": "a.v1"}, {"current": "a.v2"}, None)
    assert not renew(tree, options, loading, {})
    assert tree.aliases["a"].current == "a.v2"
    named = SecretAliasOptions(id="a", current="a.v1", consumers=["uid:7"])
    assert renew(tree, named, loading, {})
    assert (tree.aliases["a"].current, tree.aliases["a"].consumers) == ("a.v2", ("uid:7",))
    with pytest.raises(CommandError, match="is in use"):
        tree.fixed.add("x")
        rotation.convert(tree, "x", 0)
    # What an alias was declared as may become another object, and the other way round.
    assert renew(tree, AuthZSimpleOptions(id="a", identity="x"), loading, {})
    assert tree.aliases == {}
    assert renew(tree, options, loading, {})
    assert tree.aliases["a"].current == "a.v1"
    again = restored(left(journal))
    assert ObjectTree(again, scratch, TYPES).aliases == tree.aliases
    for each in (journal, again):
        each.close()
        each.arena.close()
    scratch.close()
