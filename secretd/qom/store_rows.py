# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objects as rows of a store, and rows as objects.

qom.declared_store takes the rows over when it opens a store; qom.keeper writes them.
"""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from secretd.errors import StoreError
from secretd.memory.arena import LockedBuffer
from secretd.qom.deadlines import DEADLINE, now
from secretd.qom.object_type import ObjectType
from secretd.store.rows import Stored, unpack
from secretd.store.store import Store

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


class TakingOver:
    """What is taken over from a store, row by row.

    ``covers``: returns True for the ids that the store keeps. ``drop``: removes an object from the
    tree only. ``wins``: the store's rows replace objects that differ, which are a conflict
    otherwise. ``added``: the ids of the objects that were added.
    """

    def __init__(
        self,
        tree: "ObjectTree",
        store: Store,
        covers: Callable[[str], bool],
        drop: Callable[[str], None],
        *,
        wins: bool,
    ) -> None:
        self.added: list[str] = []
        self._tree, self._store, self._wins = tree, store, wins
        self._covers, self._drop = covers, drop
        self._rows: set[str] = set()
        self._expired: list[str] = []
        self._turn = 0
        self._clock = max(time.time_ns(), store.clock)

    async def take(self, number: int, content: memoryview) -> None:
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
        properties = dict(stored.properties)
        if stored.deadline is not None:
            # Lifetimes only ever get shorter, whatever the clock says.
            left = min(stored.deadline - self._clock, stored.left)
            if left <= 0:
                self._expired.append(object_id)
                return
            properties[DEADLINE] = now() + left
        present = tree.journal.get(object_id)
        if present is None:
            buffer = self._copied(kind, plaintext)
            tree.place(object_id, kind, properties, buffer, stored.uid)
            self.added.append(object_id)
        elif not self._is_equal(object_id, kind, properties, plaintext):
            if not self._wins:
                raise StoreError(f"object '{object_id}' exists, and the store has another one")
            tree.replace(object_id, kind, properties, self._copied(kind, plaintext), stored.uid)

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

    def undo(self) -> None:
        """Remove what was added."""
        for object_id in self.added:
            if object_id in self._tree.journal:
                self._drop(object_id)

    async def complete(self) -> None:
        """Handle what only one side has: remove it where the store wins, else write it."""
        tree = self._tree
        commits = [self._store.delete(object_id) for object_id in self._expired]
        for object_id in list(tree.journal):
            if object_id in self._rows or not self._covers(object_id):
                continue
            if self._wins:
                self._drop(object_id)
                continue
            record = tree.journal.get(object_id)
            assert record is not None
            plaintext = tree.journal.plaintext(object_id) if record.size else None
            stored = as_row(object_id, record.properties, record.uid)
            commits.append(self._store.put(record.type, stored, plaintext))
        for commit in commits:
            await commit
