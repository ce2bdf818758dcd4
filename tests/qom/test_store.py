# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objects that a store keeps: over reboots, restarts, failures, and beside other objects.

A reboot is another tree over the same files; a restart is another keeper of the same tree, which
knows what the journal has.
"""

import asyncio
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from secretd.descriptors.source import CommandLineSources
from secretd.errors import CommandError, LimitReached, StoreError
from secretd.journal.journal import Journal
from secretd.memory.arena import Arena
from secretd.qom import deadlines
from secretd.qom.grant import SecretGrantOptions
from secretd.qom.keeper import Keeper
from secretd.qom.registry import TYPES
from secretd.qom.renewal import exchange, renew
from secretd.qom.secret import SecretOptions
from secretd.qom.secret_store import SecretStoreOptions
from secretd.qom.tree import ObjectTree
from secretd.store import store as store_module
from secretd.store.commit import Commit
from secretd.store.disk import Disk
from tests.support.needs import ARENA_LEVEL
from tests.support.slow_disk import SlowDisk

KEY = "0123456789abcdef" * 2


def _options(**options: Any) -> SecretStoreOptions:
    return SecretStoreOptions(id="store", **options)


class Kept:
    """A tree with a store, in this loop."""

    def __init__(self, path: Path, arena: Arena | None = None) -> None:
        self.path = path / "store"
        self.journal = Journal(arena or Arena(ARENA_LEVEL))
        self.scratch = Arena(ARENA_LEVEL)
        self.tree = ObjectTree(self.journal, self.scratch, TYPES)
        self.states: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def keeper(self) -> Keeper:
        """The keeper of the tree."""
        assert self.tree.keeper is not None
        return self.tree.keeper

    async def state(self, wanted: str) -> None:
        """Wait until the store is in a state."""
        while self.keeper.state != wanted:
            await asyncio.sleep(0)

    async def declare(self, pattern: str = "*", **options: Any) -> Keeper:
        """Declare the store, and open it if its key exists."""
        options = {"path": str(self.path), "keyid": "key", "create": True} | options
        self.tree.add(_options(secrets=pattern, **options), self._loading())
        return await self.restart()

    async def restart(self) -> Keeper:
        """What a new process does with the same journal; the old one has closed its files."""
        await asyncio.gather(*self._tasks)
        keeper = self.tree.keeper = Keeper(self.tree, "store")
        keeper.start = self._start
        keeper.on_state = lambda: self.states.append(keeper.state)
        await keeper.unlock()
        return keeper

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        self._tasks.append(asyncio.create_task(coroutine))
        return self._tasks[-1]

    def _loading(self) -> Any:
        return self.tree.loading(CommandLineSources(self.scratch))

    async def add(self, object_id: str, text: str = "letmein") -> None:
        """Add a secret."""
        await self.done(self.add_soon(object_id, text))

    def add_soon(self, object_id: str, text: str = "letmein") -> Any:
        """Begin to add a secret."""
        buffer = self.journal.arena.allocate(len(text))
        buffer.view[:] = text.encode()
        self.tree.check_new(object_id)
        return self.tree.store(SecretOptions(id=object_id), buffer, os.getuid())

    async def grant(self, object_id: str, **options: Any) -> None:
        """Add a grant."""
        given = SecretGrantOptions(id=object_id, secret="*", authz="a", **options)
        await self.done(self.tree.add(given, self._loading()))

    async def replace(self, object_id: str, text: str) -> None:
        """Replace a secret."""
        await self.done(self.replace_soon(object_id, text))

    def replace_soon(self, object_id: str, text: str) -> Any:
        """Begin to replace a secret."""
        read, write = os.pipe()
        os.write(write, text.encode())
        os.close(write)
        try:
            options = SecretOptions(id=object_id, file=f"/dev/fd/{read}")
            return exchange(self.tree, options, self._loading())
        finally:
            os.close(read)

    async def delete(self, object_id: str) -> None:
        """Delete an object."""
        _, commit = self.tree.delete(object_id)
        if commit is not None:
            await commit

    @staticmethod
    async def done(outcome: Any) -> None:
        """Wait for the store, if there is something to wait for."""
        if isinstance(outcome, Awaitable):
            await outcome

    def secrets(self) -> dict[str, str]:
        """All secrets but the key."""
        return {
            object_id: bytes(self.tree.plaintext(object_id)).decode()
            for object_id in sorted(self.journal)
            if self.tree.is_secret(object_id) and object_id != "key"
        }

    async def close_files(self) -> None:
        """The end of a process, as far as the files go."""
        if self.tree.keeper is not None and self.tree.keeper.store is not None:
            store, self.tree.keeper.store = self.tree.keeper.store, None
            await store.close()

    async def end(self) -> None:
        """The end of the machine: nothing is left but files."""
        await asyncio.gather(*self._tasks)
        await self.close_files()
        assert self.scratch.held == 0
        self.journal.close()
        self.journal.arena.close()
        self.scratch.close()

    async def reboot(self, pattern: str = "*", **options: Any) -> Keeper:
        """Another machine's start with the same files."""
        await self.end()
        self.__init__(self.path.parent)  # type: ignore[misc]
        await self.add("key", KEY)
        return await self.declare(pattern, **options)


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    """An open store for all ids."""
    made = Kept(tmp_path)
    await made.add("key", KEY)
    await made.declare()
    yield made
    await made.end()


async def test_what_the_pattern_names_survives_a_reboot(kept: Kept) -> None:
    """Nothing else does, and the key is no row."""
    await kept.reboot("vm*")
    for object_id in ("vm1", "vm2", "other"):
        await kept.add(object_id, f"value of {object_id}")
    await kept.delete("vm2")
    assert kept.keeper.store is not None
    assert kept.keeper.store.rows == 1
    keeper = await kept.reboot("vm*")
    assert kept.secrets() == {"vm1": "value of vm1"}
    assert (keeper.state, keeper.loaded) == ("open", 1)
    await kept.reboot("*")
    assert kept.secrets() == {"vm1": "value of vm1"}


async def test_grants_keep_their_reads_and_lifetimes(kept: Kept) -> None:
    """Counts are those of the last read; lifetimes go on while the machine is off."""
    await kept.grant("g", max_reads=5, expires_after=1000)
    record = kept.journal.get("g")
    assert record is not None
    counted = kept.tree.replace_properties("g", record.properties | {"reads": 3}, undo=False)
    assert counted is not None
    await counted
    await kept.add("s")
    commit = kept.tree.expire_after("s", 500)
    assert commit is not None
    await commit
    await kept.reboot()
    record = kept.journal.get("g")
    assert record is not None
    assert record.properties["reads"] == 3
    assert 900 < (kept.tree.deadlines.remaining("g") or 0) <= 1000
    assert 400 < (kept.tree.deadlines.remaining("s") or 0) <= 500
    assert kept.tree.deciding == {"g"}
    forever = kept.tree.keep("s")
    assert forever is not None
    await forever
    assert kept.tree.keep("s") is None
    await kept.reboot()
    assert kept.tree.deadlines.remaining("s") is None


async def test_lifetimes_only_get_shorter_whatever_the_clock_says(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that went back gives none back; what has expired is deleted, not loaded."""
    await kept.add("s")
    await kept.add("t")
    for object_id in ("s", "t"):
        await kept.done(kept.tree.expire_after(object_id, 500))
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 10**9 * 86400)
    await kept.reboot()
    assert 400 < (kept.tree.deadlines.remaining("s") or 0) <= 500
    monkeypatch.setattr(time, "time_ns", lambda: real() + 10**9 * 501)
    await kept.reboot()
    assert kept.secrets() == {}
    monkeypatch.undo()
    await kept.reboot()
    assert kept.secrets() == {}


async def test_an_equal_number_means_that_nothing_is_read(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart, with the journal of the process before."""
    await kept.add("s")
    await kept.close_files()

    def never(_disk: Disk) -> None:
        raise AssertionError("rows were read")

    monkeypatch.setattr(Disk, "living", never)
    monkeypatch.setattr(Disk, "check", never)
    keeper = await kept.restart()
    assert (keeper.state, keeper.loaded) == ("open", 0)
    await kept.add("t")
    assert kept.keeper.store is not None
    assert kept.keeper.store.rows == 2


async def test_a_store_that_is_ahead_wins(kept: Kept) -> None:
    """A process was killed between the store and the journal."""
    for object_id in ("stays", "deleted", "changed"):
        await kept.add(object_id, "before")
    record = kept.journal.get("store")
    assert record is not None
    before = dict(record.properties)
    await kept.add("added")
    await kept.delete("deleted")
    await kept.replace("changed", "after")
    await kept.close_files()
    # The journal as it would be, had the process ended before all of that.
    kept.tree.keeper = None
    kept.tree.replace_properties("store", before)
    kept.tree.delete("added")
    await kept.add("deleted", "before")
    kept.tree.delete("changed")
    await kept.add("changed", "before")
    keeper = await kept.restart()
    assert keeper.state == "open"
    assert kept.secrets() == {"added": "letmein", "changed": "after", "stays": "before"}


async def test_an_older_copy_is_refused_and_memory_stays(kept: Kept, tmp_path: Path) -> None:
    """The words have both numbers. Without the journal nothing can tell."""
    await kept.add("s", "old")
    await kept.close_files()
    shutil.copytree(kept.path, tmp_path / "copy")
    await kept.restart()
    await kept.replace("s", "new")
    await kept.close_files()
    shutil.rmtree(kept.path)
    shutil.copytree(tmp_path / "copy", kept.path)
    os.chmod(kept.path, 0o700)
    keeper = await kept.restart()
    assert keeper.state == "failed"
    assert "it was rolled back from 2 to 1" in keeper.reason
    assert kept.secrets() == {"s": "new"}
    with pytest.raises(CommandError, match="Store 'store' has failed: it was rolled back"):
        kept.add_soon("t")
    with pytest.raises(CommandError, match="but its row in .* remains"):
        await kept.delete("s")
    kept.tree.delete("store")
    await kept.declare()
    assert kept.secrets() == {"s": "old"}


async def test_a_removal_whose_row_stayed_is_heeded_later(kept: Kept) -> None:
    """In the locked state, and even if the process ends then."""
    await kept.add("s")
    await kept.add("t")
    kept.tree.delete("key")
    assert kept.states[-1] == "locked"
    with pytest.raises(CommandError, match="'s' is deleted, but its row in .*; it is locked"):
        await kept.delete("s")
    with pytest.raises(CommandError, match="Store 'store' is locked; add its key 'key' first"):
        kept.add_soon("u")
    with pytest.raises(CommandError, match="is locked"):
        kept.tree.expire_after("t", 9)
    assert kept.secrets() == {"t": "letmein"}
    keeper = await kept.restart()
    assert keeper.state == "locked"
    await kept.add("key", KEY)
    await kept.state("open")
    assert kept.secrets() == {"t": "letmein"}
    await kept.reboot()
    assert kept.secrets() == {"t": "letmein"}


async def test_a_wrong_key_fails_and_the_right_one_repairs(kept: Kept) -> None:
    """Each addition of the key is another attempt; so is a replacement."""
    await kept.add("s")
    kept.tree.delete("key")
    for text, words in (
        ("x" * 32, "the key is not this store's"),
        ("short", "key 'key' has 5 bytes, and 32 are needed"),
    ):
        await kept.add("key", text)
        await kept.state("failed")
        assert kept.keeper.reason == words
        kept.tree.delete("key")
        kept.keeper.state = "locked"
    await kept.add("key", "x" * 32)
    await kept.state("failed")
    await kept.replace("key", KEY)
    await kept.state("open")
    await kept.add("t")


async def test_objects_of_the_command_line_are_no_rows(kept: Kept) -> None:
    """On a conflict the command line wins."""
    await kept.add("s", "of the store")
    await kept.end()
    kept.__init__(kept.path.parent)  # type: ignore[misc]
    for object_id, text in (("key", KEY), ("s", "of the command line"), ("u", "fixed")):
        await kept.add(object_id, text)
        kept.tree.fixed.add(object_id)
    await kept.declare()
    assert kept.secrets() == {"s": "of the command line", "u": "fixed"}
    kept.tree.delete("u")
    await kept.reboot()
    assert kept.secrets() == {"s": "of the store"}


async def test_the_keys_of_the_key_are_no_rows(kept: Kept) -> None:
    """A key that was encrypted under another secret needs that one, too."""
    for object_id, keyid in (("key", "master"), ("master", "root"), ("root", "key")):
        record = kept.journal.get(object_id)
        if record is None:
            await kept.delete(object_id) if object_id in kept.journal else None
            kept.keeper._not_rows.add(object_id)
            await kept.add(object_id, KEY)
        kept.journal.set_properties(object_id, {"keyid": keyid})
    assert kept.keeper._key_chain() == ["key", "master", "root"]


async def test_what_memory_has_is_written_when_a_store_is_declared(kept: Kept) -> None:
    """But not over another object of its id, which is a conflict and changes nothing."""
    await kept.add("both", "in the store")
    await kept.add("stored", "in the store")
    await kept.end()
    kept.__init__(kept.path.parent)  # type: ignore[misc]
    for object_id, text in (("key", KEY), ("both", "in memory"), ("new", "in memory")):
        await kept.add(object_id, text)
    keeper = await kept.declare()
    assert keeper.state == "failed"
    assert keeper.reason == "object 'both' exists, and the store has another one"
    assert kept.secrets() == {"both": "in memory", "new": "in memory"}
    kept.tree.keeper = None
    kept.tree.delete("both")
    keeper = await kept.restart()
    assert keeper.state == "open"
    await kept.reboot()
    assert kept.secrets() == {
        "both": "in the store", "new": "in memory", "stored": "in the store",
    }  # fmt: skip


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    """A slow disk."""
    return SlowDisk(monkeypatch)


async def test_an_addition_is_invisible_until_it_is_written(kept: Kept, slow: SlowDisk) -> None:
    """Its id is taken, and it cannot be deleted; those that wait are written together."""
    commits = [kept.add_soon(f"s{number}") for number in range(40)]
    with pytest.raises(CommandError, match="attempt to add duplicate property 's7'"):
        kept.tree.check_new("s7")
    with pytest.raises(CommandError, match="object 's7' not found"):
        kept.tree.delete("s7")
    assert kept.secrets() == {}
    assert all(isinstance(commit, Commit) and not commit.done for commit in commits)
    slow.go()
    for commit in commits:
        await commit
    assert len(kept.secrets()) == 40
    assert len(slow.batches) <= 3


async def test_a_failed_addition_leaves_nothing(kept: Kept, slow: SlowDisk) -> None:
    """Neither memory, nor a count, nor its id."""
    held = kept.journal.arena.held
    commit = kept.add_soon("s")
    assert kept.tree.limits.objects.held(os.getuid()) == 3
    slow.go("Unable to write")
    with pytest.raises(CommandError, match="Unable to write"):
        await commit
    assert (kept.journal.arena.held, kept.tree.limits.objects.held(os.getuid())) == (held, 2)
    slow.go()
    await kept.add("s")


async def test_a_failed_change_is_undone(kept: Kept, slow: SlowDisk) -> None:
    """A lifetime, or a grant's pattern; of two, only the one that still stands."""
    slow.go()
    await kept.add("s")
    await kept.grant("g")
    slow.stop()
    changes = [
        kept.tree.expire_after("s", 9), kept.tree.change("g", {"secret": "x*"}),
    ]  # fmt: skip
    assert kept.tree.deadlines.remaining("s") == 9
    slow.go("Unable to write")
    for commit in changes:
        assert commit is not None
        with pytest.raises(CommandError, match="Unable to write"):
            await commit
    assert kept.tree.deadlines.remaining("s") is None
    record = kept.journal.get("g")
    assert record is not None
    assert record.properties["secret"] == "*"
    slow.stop()
    commit = kept.tree.expire_after("s", 9)
    kept.tree.delete("s")
    slow.go("Unable to write")
    assert commit is not None
    with pytest.raises(CommandError):
        await commit


async def test_a_replacement_is_invisible_until_it_is_written(kept: Kept, slow: SlowDisk) -> None:
    """Other changes of it wait for another time, and a deletion wins."""
    slow.go()
    await kept.add("s", "old")
    slow.stop()
    commit = kept.replace_soon("s", "new")
    assert kept.secrets() == {"s": "old"}
    with pytest.raises(CommandError, match="object 's' is being replaced; try again"):
        kept.tree.expire_after("s", 9)
    with pytest.raises(CommandError, match="object 's' is being replaced; try again"):
        kept.replace_soon("s", "newer")
    slow.go()
    await commit
    assert kept.secrets() == {"s": "new"}
    slow.stop()
    commit = kept.replace_soon("s", "newest")
    deleted = kept.tree.delete("s")[1]
    slow.go()
    with pytest.raises(CommandError, match="No secret with id 's'"):
        await commit
    assert deleted is not None
    await deleted
    await kept.reboot()
    assert kept.secrets() == {}
    await kept.add("s", "old")
    slow.go("Unable to write")
    with pytest.raises(CommandError, match="Unable to write"):
        await kept.replace_soon("s", "new")
    assert kept.secrets() == {"s": "old"}


async def test_an_addition_for_which_memory_ends_leaves_no_row(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known and unknown failures of the tree, after the store has it."""
    for failure, words in (
        (LimitReached("x", "no room"), "no room"), (OSError(28, "x"), "Internal error"),
    ):  # fmt: skip

        def fail(*_args: object, failure: Exception = failure) -> int:
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(kept.journal, "add", fail)
            with pytest.raises(CommandError, match=words):
                await kept.add("s")
    await kept.reboot()
    assert kept.secrets() == {}


async def test_expired_rows_that_stayed_do_not_come_back(kept: Kept, slow: SlowDisk) -> None:
    """Their deadline is in the row, so nothing needs to be noted."""
    slow.go()
    await kept.add("s")
    await kept.done(kept.tree.expire_after("s", 1))
    real = deadlines.now
    deadlines.now = lambda: real() + 2 * 10**9
    try:
        slow.go("Unable to write")
        _, commit = kept.tree.delete("s")
        assert commit is not None
        with pytest.raises(CommandError):
            await commit
        record = kept.journal.get("store")
        assert record is not None
        assert "doomed" not in record.properties
    finally:
        deadlines.now = real
    slow.go()


async def test_there_is_one_store(kept: Kept) -> None:
    """It cannot be deleted while it is open, nor changed."""
    other = SecretStoreOptions(id="other", path="/x", keyid="key")
    with pytest.raises(CommandError, match="There is a secret-store already: 'store'"):
        kept.tree.add(other, kept._loading())
    with pytest.raises(CommandError, match="object 'store' is in use, can not be deleted"):
        kept.tree.delete("store")
    with pytest.raises(CommandError, match=r"Property 'secret-store.path' is not writable"):
        TYPES.numbered[7].set("path", None)
    kept.tree.delete("key")
    with pytest.raises(CommandError, match="in use"):
        kept.tree.delete("store")  # its files are not closed yet
    await asyncio.gather(*kept._tasks)
    kept.tree.delete("store")
    assert kept.tree.keeper is None
    with pytest.raises(CommandError, match="expects an absolute path"):
        kept.tree.add(SecretStoreOptions(id="o", path="x", keyid="k"), kept._loading())
    with pytest.raises(CommandError, match="'secrets' expects a pattern"):
        kept.tree.add(SecretStoreOptions(id="o", path="/x", keyid="k", secrets=""), kept._loading())
    with pytest.raises(CommandError, match="'unlock-timeout' expects"):
        kept.tree.add(
            SecretStoreOptions(id="o", path="/x", keyid="k", unlock_timeout=9999),
            kept._loading(),
        )


async def test_an_equal_declaration_keeps_what_is_known(kept: Kept) -> None:
    """As from a directory of objects, at the next start."""
    await kept.add("s")
    options = SecretStoreOptions(id="store", path=str(kept.path), keyid="key", secrets="*")
    assert not renew(kept.tree, options, kept._loading(), {})


async def test_a_store_of_a_later_release_is_refused(kept: Kept) -> None:
    """By the type of an object that this one does not have."""
    assert kept.keeper.store is not None
    await kept.keeper.store.put(99, store_module.Stored("s", 0, {}), None)
    keeper = await kept.reboot()
    assert keeper.reason == "'s' has type 99, which this release does not know"


async def test_many_rows_are_taken_over_in_turns(kept: Kept) -> None:
    """Others have their turn meanwhile, and may delete what was taken over."""
    for commit in [kept.add_soon(f"s{number}") for number in range(300)]:
        await commit
    await kept.end()
    kept.__init__(kept.path.parent)  # type: ignore[misc]
    await kept.add("key", KEY)
    opening = asyncio.ensure_future(kept.declare())
    while "s0" not in kept.journal:
        await asyncio.sleep(0)
    loaded = next(i for i in sorted(kept.journal) if i.startswith("s") and i != "store")
    with pytest.raises(CommandError, match="remains until the store is open"):
        await kept.delete(loaded)
    await opening
    assert len(kept.secrets()) == 299
    await kept.reboot()
    assert len(kept.secrets()) == 299


async def test_units_wait_for_the_store_until_a_deadline(kept: Kept) -> None:
    """Not when it is open, and not for ever."""
    assert not await kept.keeper.settled()
    kept.tree.delete("key")
    waiting = asyncio.ensure_future(kept.keeper.settled())
    await asyncio.sleep(0)
    assert not waiting.done()
    await kept.add("key", KEY)
    assert await waiting
    kept.tree.delete("key")
    kept.keeper._until = 0
    assert not await kept.keeper.settled()


async def test_keys_are_changed_and_everything_is_destroyed(kept: Kept) -> None:
    """The memory goes with the files."""
    await kept.add("s")
    await kept.add("new", KEY[::-1])
    with pytest.raises(CommandError, match="No secret with id 'nope'"):
        await kept.keeper.rekey("nope", only=False, data=False)
    await kept.keeper.rekey("new", only=False, data=True)
    record = kept.journal.get("store")
    assert record is not None
    assert kept.keeper.store is not None
    assert record.properties["sequence"] == kept.keeper.store.sequence
    await kept.keeper.destroy()
    assert (kept.keeper.state, kept.keeper.reason) == ("failed", "it was destroyed")
    assert kept.secrets() == {}
    assert os.listdir(kept.path) == []


async def test_a_directory_that_is_missing_is_made_on_request_only(
    kept: Kept, tmp_path: Path
) -> None:
    """An empty mount point is no new store."""
    await kept.end()
    shutil.rmtree(kept.path)
    kept.__init__(tmp_path)  # type: ignore[misc]
    await kept.add("key", KEY)
    keeper = await kept.declare(create=False)
    assert keeper.state == "failed"
    assert "No such file or directory" in keeper.reason


async def test_an_id_that_is_added_again_is_no_longer_doomed(kept: Kept, slow: SlowDisk) -> None:
    """Its row is the new object's, which no later opening deletes."""
    slow.go()
    await kept.add("s", "old")
    slow.go("Unable to write")
    with pytest.raises(CommandError, match="Unable to write"):
        await kept.delete("s")
    slow.go()
    await kept.add("s", "new")
    await kept.close_files()
    await kept.restart()
    assert kept.secrets() == {"s": "new"}
    await kept.reboot()
    assert kept.secrets() == {"s": "new"}


async def test_what_is_removed_while_the_store_opens_is_deleted(kept: Kept, slow: SlowDisk) -> None:
    """Though nothing has to be read then."""
    slow.go()
    for object_id in ("a", "b"):
        await kept.add(object_id)
    kept.tree.delete("key")
    with pytest.raises(CommandError):
        await kept.delete("a")
    await kept.add("key", KEY)
    await asyncio.sleep(0)
    with pytest.raises(CommandError, match="remains until the store is open"):
        await kept.delete("b")
    await kept.state("open")
    await kept.reboot()
    assert kept.secrets() == {}


async def test_another_declaration_keeps_what_is_known(kept: Kept) -> None:
    """At a restart with other options: removals whose rows stayed, and its number."""
    await kept.add("a")
    kept.tree.delete("key")
    with pytest.raises(CommandError):
        await kept.delete("a")
    options = SecretStoreOptions(
        id="store", path=str(kept.path), keyid="key", secrets="*", unlock_timeout=90
    )
    assert renew(kept.tree, options, kept._loading(), {})
    await kept.restart()
    await kept.add("key", KEY)
    await kept.state("open")
    assert kept.secrets() == {}
    await kept.reboot()
    assert kept.secrets() == {}
    elsewhere = SecretStoreOptions(id="store", path="/elsewhere", keyid="key", secrets="*")
    assert renew(kept.tree, elsewhere, kept._loading(), {})
    record = kept.journal.get("store")
    assert record is not None
    assert "uuid" not in record.properties


async def test_of_two_changes_one_is_refused(kept: Kept, slow: SlowDisk) -> None:
    """So that a failure leads back to what was acknowledged; counts of reads go on."""
    slow.go()
    await kept.grant("g", max_reads=5)
    held = kept.tree.limits.object_bytes.held(os.getuid())
    slow.stop()
    first = kept.tree.change("g", {"secret": "wide*"})
    with pytest.raises(CommandError, match="object 'g' is being changed; try again"):
        kept.tree.change("g", {"secret": "other*"})
    record = kept.journal.get("g")
    assert record is not None
    counted = kept.tree.replace_properties("g", record.properties | {"reads": 1}, undo=False)
    slow.go("Unable to write")
    for commit in (first, counted):
        assert commit is not None
        with pytest.raises(CommandError, match="Unable to write"):
            await commit
    record = kept.journal.get("g")
    assert record is not None
    assert (record.properties["secret"], record.properties["reads"]) == ("*", 1)
    assert abs(kept.tree.limits.object_bytes.held(os.getuid()) - held) <= 16


async def test_a_replacement_that_memory_refuses_is_taken_back(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has what memory has."""
    await kept.add("s", "old")
    for failure, words in (
        (LimitReached("x", "no room"), "no room"), (OSError(28, "x"), "Internal error"),
    ):  # fmt: skip

        def fail(*_args: object, failure: Exception = failure) -> int:
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(kept.journal, "replace", fail)
            with pytest.raises(CommandError, match=words):
                await kept.replace("s", "new")
        assert kept.secrets() == {"s": "old"}
    await kept.reboot()
    assert kept.secrets() == {"s": "old"}


async def test_replacements_under_way_count_for_their_owner(kept: Kept, slow: SlowDisk) -> None:
    """Their bytes are held from the beginning."""
    slow.go()
    await kept.add("s", "old")
    slow.stop()
    before = kept.tree.limits.object_bytes.held(os.getuid())
    commit = kept.replace_soon("s", "x" * 5000)
    assert kept.tree.limits.object_bytes.held(os.getuid()) == before + 5000
    slow.go("Unable to write")
    with pytest.raises(CommandError):
        await commit
    assert kept.tree.limits.object_bytes.held(os.getuid()) == before


async def test_what_leaves_the_command_line_becomes_a_row(kept: Kept) -> None:
    """Memory is newer than an old row of that id."""
    await kept.add("s", "old row")
    await kept.close_files()
    kept.tree.keeper = None
    kept.tree.delete("s")
    await kept.add("s", "of the command line")
    await kept.add("u", "of the command line")
    kept.tree.fixed |= {"s", "u"}
    await kept.restart()
    assert kept.keeper.store is not None
    assert kept.keeper.store.rows == 1
    await kept.close_files()
    kept.tree.fixed.clear()
    await kept.restart()
    both = {"s": "of the command line", "u": "of the command line"}
    assert kept.secrets() == both
    await kept.reboot()
    assert kept.secrets() == both


async def test_a_failed_take_over_leaves_memory_as_it_was(kept: Kept) -> None:
    """Replaced objects, too."""
    for number in range(3):
        await kept.add(f"s{number}", "before")
    record = kept.journal.get("store")
    assert record is not None
    before = dict(record.properties)
    for number in range(3):
        await kept.replace(f"s{number}", "after")
    assert kept.keeper.store is not None
    await kept.keeper.store.put(99, store_module.Stored("zzz", 0, {}), None)
    await kept.close_files()
    kept.tree.keeper = None
    kept.tree.replace_properties("store", before)
    for number in range(3):
        kept.tree.delete(f"s{number}")
        await kept.add(f"s{number}", "before")
    keeper = await kept.restart()
    assert keeper.state == "failed"
    assert set(kept.secrets().values()) == {"before"}


async def test_a_destroyed_store_does_not_come_back(kept: Kept) -> None:
    """Not by its key, nor by an unlock at the same time; a failure says so and can be repeated."""
    await kept.add("s")
    kept.tree.pinned.add("s")
    (kept.path / "tombstones").chmod(0o640)
    with pytest.raises(StoreError, match="has mode 0640"):
        await kept.keeper.destroy()
    assert kept.keeper.reason.startswith("it was not destroyed: ")
    (kept.path / "tombstones").chmod(0o600)
    await kept.keeper.unlock()
    assert kept.keeper.state == "open"
    await asyncio.gather(kept.keeper.destroy(), kept.keeper.unlock())
    await kept.keeper.unlock()
    assert (kept.keeper.state, kept.keeper.reason) == ("failed", "it was destroyed")
    assert os.listdir(kept.path) == []
    assert kept.secrets() == {"s": "letmein"}  # pinned: the daemon needs it
    kept.tree.pinned.clear()


async def test_faults_of_the_stores_thread_are_reported(
    kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on, and whoever waits gets an error; without a thread the store has failed."""

    def fail(*_args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "_try", fail)
        with pytest.raises(CommandError, match="Internal error"):
            await kept.add("s")
    await kept.add("s")
    kept.tree.delete("key")
    await asyncio.gather(*kept._tasks)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        await kept.add("key", KEY)
        await kept.state("failed")
    assert kept.keeper.reason == "internal error: MemoryError"
    await kept.keeper.unlock()
    assert kept.secrets() == {"s": "letmein"}


async def test_keys_of_the_command_line_are_not_replaced(kept: Kept) -> None:
    """The next start would bring the earlier one."""
    kept.tree.fixed.add("key")
    with pytest.raises(CommandError, match="key 'key' is an object of the command line"):
        await kept.keeper.rekey("key", only=True, data=False)


async def test_a_removal_that_a_kill_interrupted_is_completed(kept: Kept) -> None:
    """It was noted, and the object was still there."""
    await kept.add("s")
    kept.keeper._doomed["s"] = None
    kept.keeper._note()
    await kept.close_files()
    await kept.restart()
    assert kept.secrets() == {}
    await kept.reboot()
    assert kept.secrets() == {}


async def test_a_store_that_is_no_longer_declared_notes_nothing(kept: Kept) -> None:
    """A transaction may end after that; the chain of keys ends at a missing one."""
    keeper, store = kept.keeper, kept.keeper.store
    assert store is not None
    kept.tree.keeper = None
    keeper._note_written(store)
    kept.journal.set_properties("key", {"keyid": "gone"})
    assert keeper._key_chain() == ["key", "gone"]
    kept.tree.keeper = keeper


async def test_many_objects_are_written_in_groups(kept: Kept) -> None:
    """When a store is declared over what memory has."""
    await kept.end()
    shutil.rmtree(kept.path)
    kept.__init__(kept.path.parent)  # type: ignore[misc]
    await kept.add("key", KEY)
    for number in range(300):
        await kept.add(f"s{number}")
    await kept.declare()
    assert kept.keeper.store is not None
    assert kept.keeper.store.rows == 300


async def test_calls_of_the_stores_thread_are_answered_or_discarded(kept: Kept) -> None:
    """Errors of the database in its words; a result that nothing waits for is given back."""
    store = kept.keeper.store
    assert store is not None

    def fail(_disk: Disk) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with pytest.raises(StoreError, match="disk I/O error"):
        await store.call(fail)
    discarded: list[int] = []
    functions: list[Callable[[Disk], Any]] = [lambda _disk: 7, fail]
    for function in functions:
        waiting = asyncio.ensure_future(store.call(function, discarded.append))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    await store.call(lambda _disk: None)
    assert discarded == [7]
    await kept.close_files()
    await store.close()  # a second time
