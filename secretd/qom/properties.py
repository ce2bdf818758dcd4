# SPDX-License-Identifier: LGPL-2.1-or-later
"""Changing the properties and lifetimes of existing objects, in the journal and in a store.

The tree is a `Properties`, and adds and removes objects. monitor.commands, access and the store
call it.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING

from secretd.qom.deadlines import DEADLINE, now
from secretd.qom.lookup import Lookup
from secretd.qom.object_type import ObjectType, properties_size
from secretd.store.commit import Commit

if TYPE_CHECKING:
    from secretd.qom.keeper import Keeper


class Properties(Lookup):
    """The objects of a journal, whose properties can be changed."""

    keeper: "Keeper | None" = None

    @abstractmethod
    def _changed(self, object_id: str, kind: ObjectType, changes: dict[str, object]) -> None:
        """Update what is known of an object, and notify."""

    def keep(self, object_id: str) -> Commit | None:
        """Remove the lifetime of an existing object; see `replace_properties`."""
        record = self.journal.get(object_id)
        assert record is not None
        if DEADLINE not in record.properties:
            return None
        left = {n: value for n, value in record.properties.items() if n != DEADLINE}
        commit = self.replace_properties(object_id, left)
        self.deadlines.forget(object_id)
        return commit

    def expire_after(self, object_id: str, seconds: int) -> Commit | None:
        """Set the lifetime of an existing object, from now; see `replace_properties`."""
        record = self.journal.get(object_id)
        assert record is not None
        deadline = now() + seconds * 1_000_000_000
        commit = self.replace_properties(object_id, record.properties | {DEADLINE: deadline})
        self.deadlines.set(object_id, deadline)
        return commit

    def replace_properties(
        self, object_id: str, properties: dict[str, object], *, undo: bool = True
    ) -> Commit | None:
        """Replace all properties of an existing object.

        Returns what waits for the disk if a store has the object. If the store fails then, the
        properties are the earlier ones again, with ``undo``. Raises CommandError.
        """
        keeper, commit = self.keeper, None
        if keeper is not None and keeper.covers(object_id):
            commit = keeper.update(object_id, properties, undo=undo)
        self._set_properties(object_id, properties)
        return commit

    def _set_properties(self, object_id: str, properties: dict[str, object]) -> None:
        uid, before = self.journal.owner(object_id)
        self.journal.set_properties(object_id, properties)
        self.limits.object_bytes.release(uid, before)
        self.limits.object_bytes.count(*self.journal.owner(object_id))

    def change(self, object_id: str, changes: dict[str, object]) -> Commit | None:
        """Change some properties of an existing object; its loaded content stays."""
        record = self.journal.get(object_id)
        assert record is not None
        properties = record.properties | changes
        more = max(0, properties_size(properties) - properties_size(record.properties))
        self.limits.object_bytes.check(record.uid, more)
        commit = self.replace_properties(object_id, properties)
        self._changed(object_id, self.types.numbered[record.type], changes)
        return commit

    def note(self, object_id: str, properties: dict[str, object]) -> None:
        """Replace the properties of an object by what the daemon has noted; a store gets them at
        leisure.
        """
        record = self.journal.get(object_id)
        assert record is not None
        self._set_properties(object_id, properties)
        self._changed(object_id, self.types.numbered[record.type], {})
        if self.keeper is not None and self.keeper.covers(object_id):
            self.keeper.note(object_id)

    def undo(self, object_id: str, properties: dict[str, object]) -> None:
        """Give an existing object its earlier properties again."""
        record = self.journal.get(object_id)
        assert record is not None
        self._set_properties(object_id, properties)
        self.deadlines.forget(object_id)
        self._changed(object_id, self.types.numbered[record.type], properties)
