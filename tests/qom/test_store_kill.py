# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kill at each bytecode of what writes to the store, in the loop and in the store's thread.

What a kill would leave (the store's files, the journal and the arena) is looked at before each
bytecode. From each such moment the next process, and the next boot, have what was acknowledged, and
of the change that was under way all or nothing.
"""

import os
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

from secretd.journal import compaction, journal
from secretd.journal.journal import Journal
from secretd.memory.arena import Arena
from secretd.qom import declared_store, keeper, store_rows, tree
from secretd.qom.keeper import Keeper
from secretd.qom.registry import TYPES
from secretd.qom.tree import ObjectTree
from secretd.store import commit, database, directory, disk, store
from tests.journal.test_restore import WINDOW, left, restored
from tests.qom.test_store import KEY, Kept
from tests.support.needs import ARENA_LEVEL

WATCHED = frozenset(
    str(module.__file__)
    for module in (
        commit, database, declared_store, directory, disk, journal, compaction, keeper, store,
        store_rows, tree,
    )
)  # fmt: skip

State = dict[str, object]


class Moment(NamedTuple):
    """What there would be after a kill, and the numbers of the changes that were acknowledged and
    begun by then.
    """

    files: tuple[tuple[str, bytes], ...]
    memory: object
    acknowledged: int
    begun: int


class Watch:
    """Looks before each bytecode."""

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self.moments: list[Moment] = []
        self.acknowledged = self.begun = 0
        self._busy = threading.Lock()

    def look(self) -> None:
        """Remember this moment, unless it is like the one before."""
        with self._busy:
            path = self.kept.path
            files = tuple((name, (path / name).read_bytes()) for name in sorted(os.listdir(path)))
            moment = Moment(files, left(self.kept.journal), self.acknowledged, self.begun)
            if not self.moments or self.moments[-1] != moment:
                self.moments.append(moment)

    def trace(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        """See sys.settrace()."""
        if frame.f_code.co_filename not in WATCHED:
            return None
        frame.f_trace_opcodes = True
        if not self._busy.locked():
            self.look()
        return self.trace


def state(objects: ObjectTree) -> State:
    """What an ObjectTree has, but the store and its key."""
    found: State = {}
    for object_id in objects.journal:
        if object_id in ("store", "key"):
            continue
        record = objects.journal.get(object_id)
        assert record is not None
        plain = bytes(objects.journal.plaintext(object_id)) if record.size else b""
        found[object_id] = (plain, record.properties.get("reads"), "deadline" in record.properties)
    return found


def lay(moment: Moment, place: Path) -> None:
    """Write the files of a moment."""
    place.mkdir(0o700)
    for name, content in moment.files:
        (place / name).write_bytes(content)
        os.chmod(place / name, 0o600)


async def resumed(moment: Moment, place: Path, *, boot: bool) -> State:
    """What the next process has, or with ``boot`` the next boot."""
    lay(moment, place)
    if boot:
        kept = Kept(place.parent)
        kept.path = place
        await kept.add("key", KEY)
        await kept.declare(create=False)
        found = state(kept.tree)
        assert kept.keeper.state == "open", kept.keeper.reason
        await kept.end()
        return found
    copied = restored(moment.memory)  # type: ignore[arg-type]  # see look()
    return await _continued(copied, place)


async def _continued(copied: Journal, place: Path) -> State:
    record = copied.get("store")
    assert record is not None
    copied.set_properties("store", record.properties | {"path": str(place)})
    scratch = Arena(ARENA_LEVEL)
    objects = ObjectTree(copied, scratch, TYPES)
    objects.keeper = Keeper(objects, "store")
    await objects.keeper.unlock()
    assert objects.keeper.state == "open", objects.keeper.reason
    found = state(objects)
    assert objects.keeper.store is not None
    await objects.keeper.store.call(lambda _disk: None)  # what was removed is deleted by then
    rows = objects.keeper.store.rows
    await objects.keeper.store.close()
    assert rows == len(found)
    copied.close()
    copied.arena.close()
    scratch.close()
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_at_every_moment_changes_are_whole_or_absent(tmp_path: Path) -> None:
    """In the next process and after the next boot."""
    kept = Kept(tmp_path, Arena("none", window=WINDOW))
    await kept.add("key", KEY)
    await kept.declare()
    watch = Watch(kept)

    async def counted() -> None:
        record = kept.journal.get("g")
        assert record is not None
        commit_ = kept.tree.replace_properties("g", record.properties | {"reads": 2}, undo=False)
        assert commit_ is not None
        await commit_

    steps: list[Callable[[], Coroutine[Any, Any, None]]] = [
        lambda: kept.add("a", "value of a"),
        lambda: kept.add("b", "value of b"),
        lambda: kept.grant("g", max_reads=5),
        counted,
        lambda: kept.replace("a", "another value"),
        lambda: kept.done(kept.tree.expire_after("b", 1000)),
        lambda: kept.delete("a"),
        lambda: kept.add("a", "again"),
        lambda: kept.delete("g"),
    ]
    states = [state(kept.tree)]
    # The store's thread is told to look by the job that it carries out next.
    assert kept.keeper.store is not None
    before = await kept.keeper.store.call(lambda _disk: sys.gettrace())
    await kept.keeper.store.call(lambda _disk: sys.settrace(watch.trace))
    own = sys.gettrace()
    sys.settrace(watch.trace)
    try:
        for step in steps:
            watch.begun += 1
            await step()
            watch.acknowledged += 1
            watch.look()
            states.append(state(kept.tree))
    finally:
        sys.settrace(own)
        await kept.keeper.store.call(lambda _disk: sys.settrace(before))
    await kept.end()

    assert len(watch.moments) > 4 * len(steps)
    for number, moment in enumerate(watch.moments):
        allowed = states[moment.acknowledged : moment.begun + 1]
        for boot in (False, True):
            found = await resumed(moment, tmp_path / f"m{number}{boot}", boot=boot)
            assert found in allowed, (number, boot)
