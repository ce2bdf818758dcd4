# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objects as rows of a store, and rows as objects.

qom.declared_store takes the rows over when it opens a store; qom.keeper writes them.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Literal

from secretd.errors import StoreError
from secretd.memory.arena import LockedBuffer
from secretd.qom.deadlines import DEADLINE, now
from secretd.qom.object_type import ObjectType
from secretd.store.rows import Stored, unpack
from secretd.store.store import CHANGES_PER_TRANSACTION, Store

if TYPE_CHECKING:
    from secretd.qom.tree import ObjectTree

ROWS_PER_TURN: Final = 50
"""Rows that become objects before others get their turn."""


def as_row(object_id: str, properties: dict[str, object], uid: int) -> Stored:
    """Return an object as the store keeps it: with a deadline by the calendar."""
    deadline = properties.get(DEADLINE)
    if not isinstance(deadline, int):
        return Stored(object_id, uid, properties)
    left = deadline - now()
    given = {name: value for name, value in properties.items() if name != DEADLINE}
    return Stored(object_id, uid, given, time.time_ns() + left, left)


def dropping_order(tree: "ObjectTree", object_ids: Iterable[str]) -> list[str]:
    """Return the present ones of some ids, those that pin others first."""
    present = [each for each in object_ids if each in tree.journal]
    kinds = {each: tree.type_of(each) for each in present}
    return sorted(present, key=lambda each: not getattr(kinds[each], "registers", False))


Winner = Literal["store", "memory", "neither"]


class TakingOver:
    """What is taken over from a store, row by row.

    ``covers``: returns True for the ids that the store keeps. ``drop``: removes an object from the
    tree only. ``wins``: which side counts where an object differs; with "neither" it is a conflict.
    """

    def __init__(
        self,
        tree: "ObjectTree",
        store: Store,
        covers: Callable[[str], bool],
        drop: Callable[[str], None],
        wins: Winner,
    ) -> None:
        self._tree, self._store, self._wins = tree, store, wins
        self._covers, self._drop = covers, drop
        self._added: list[str] = []
        self._rows: set[str] = set()
        self._differing: set[str] = set()
        self._expired: list[str] = []
        self._turn = 0
        self._clock = max(time.time_ns(), store.clock)

    async def run(self) -> int:
        """Make memory and store equal; return the number of objects that were added.

        Raises StoreError, and then memory is as before.
        """
        try:
            async for kind, content in self._store.contents():
                with content:
                    await self._take(kind, content.view)
        except BaseException:
            for object_id in dropping_order(self._tree, self._added):
                self._drop(object_id)
            raise
        if self._differing and self._wins == "store":
            async for kind, content in self._store.contents():
                with content:
                    self._replace(kind, content.view)
        await self._complete()
        return len(self._added)

    async def _take(self, number: int, content: memoryview) -> None:
        """Take over one row. Raises StoreError."""
        self._turn += 1
        if self._turn % ROWS_PER_TURN == 0:
            await asyncio.sleep(0)
        stored, plaintext = unpack(content)
        tree, object_id = self._tree, stored.id
        kind = tree.types.numbered.get(number)
        if kind is None:
            raise StoreError(f"'{object_id}' has type {number}, which this release does not know")
        if not self._covers(object_id):
            return
        self._rows.add(object_id)
        properties = self._properties(stored)
        if properties is None:
            self._expired.append(object_id)
        elif object_id not in tree.journal:
            buffer = self._copied(kind, plaintext)
            tree.place(object_id, kind, properties, buffer, stored.uid)
            self._added.append(object_id)
        elif not self._is_equal(object_id, kind, properties, plaintext):
            if self._wins == "neither":
                raise StoreError(f"object '{object_id}' exists, and the store has another one")
            self._differing.add(object_id)

    def _replace(self, number: int, content: memoryview) -> None:
        """Replace an object in memory by its row, if they differ."""
        stored, plaintext = unpack(content)
        if stored.id in self._differing and stored.id in self._tree.journal:
            kind = self._tree.types.numbered[number]
            properties = self._properties(stored) or {}
            buffer = self._copied(kind, plaintext)
            self._tree.replace(stored.id, kind, properties, buffer, stored.uid)

    def _properties(self, stored: Stored) -> dict[str, object] | None:
        """Return a row's properties as the journal has them, None if its lifetime has ended."""
        properties = dict(stored.properties)
        if stored.deadline is not None:
            # Lifetimes only ever get shorter, whatever the clock says.
            left = min(stored.deadline - self._clock, stored.left)
            if left <= 0:
                return None
            properties[DEADLINE] = now() + left
        return properties

    def _copied(self, kind: ObjectType, plaintext: memoryview) -> LockedBuffer | None:
        if kind.number not in self._tree.types.secrets:
            return None
        buffer = self._tree.journal.arena.allocate(len(plaintext))
        buffer.view[:] = plaintext
        return buffer

    def _is_equal(
        self, object_id: str, kind: ObjectType, properties: dict[str, object], plaintext: memoryview
    ) -> bool:
        record = self._tree.journal.get(object_id)
        assert record is not None
        names = (properties.keys() | record.properties.keys()) - {DEADLINE}
        return (
            record.type == kind.number
            and all(properties.get(n) == record.properties.get(n) for n in names)
            and (not record.size or self._tree.journal.plaintext(object_id) == plaintext)
        )

    async def _complete(self) -> None:
        """Handle what only one side has, or has newer: remove it where the store wins, else write
        it.
        """
        tree, waiting = self._tree, [self._store.delete(each) for each in self._expired]
        for object_id in list(tree.journal):
            is_newer = self._wins == "memory" and object_id in self._differing
            if (object_id in self._rows and not is_newer) or not self._covers(object_id):
                continue
            if self._wins == "store":
                self._drop(object_id)
                continue
            record = tree.journal.get(object_id)
            assert record is not None
            plaintext = tree.journal.plaintext(object_id) if record.size else None
            row = as_row(object_id, record.properties, record.uid)
            waiting.append(self._store.put(record.type, row, plaintext))
            if len(waiting) == CHANGES_PER_TRANSACTION:
                # What is written waits in locked memory, so there are never many.
                for commit in waiting:
                    await commit
                waiting.clear()
        for commit in waiting:
            await commit
