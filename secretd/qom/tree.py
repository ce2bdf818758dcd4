# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object tree: `/objects`, by id (QEMU's qom/object_interfaces.c).

Objects are records of the journal; an `ObjectType` defines the behaviour of all objects of a type.
The tree decides nothing about access. monitor.commands calls it.
"""

from collections.abc import Awaitable, Coroutine
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final

from secretd.errors import CommandError, LimitReached
from secretd.journal.journal import Journal
from secretd.journal.load_result import LoadSummary
from secretd.memory.arena import Arena, LockedBuffer
from secretd.qom.alias import alias_in
from secretd.qom.deadlines import DEADLINE
from secretd.qom.identifiers import ID_BYTES, IDENTIFIER, check_identifier
from secretd.qom.loading import Loading, SourceReader
from secretd.qom.lookup import ORIGIN
from secretd.qom.object_type import (
    Content,
    ObjectOptions,
    ObjectType,
    Types,
    properties_size,
)
from secretd.qom.properties import Properties
from secretd.qom.sorted_ids import SortedIds
from secretd.qom.subscriptions import Subscriptions
from secretd.store.commit import Commit

if TYPE_CHECKING:
    pass

_is_identifier: Final = IDENTIFIER.fullmatch


class ObjectTree(Properties, Subscriptions):
    """All objects.

    Plaintext lies in the journal's arena; ``scratch`` is locked memory for intermediate results.
    ``reserved``: the ids of objects that are being added. ``fixed``: those of the command line.
    ``declared``: those of secret-store objects, one at most. ``keeper``: keeps objects in the open
    store; monitor.core sets it.
    """

    def __init__(self, journal: Journal, scratch: Arena, types: Types) -> None:
        Properties.__init__(self, journal, types)
        Subscriptions.__init__(self)
        self.scratch = scratch
        self._types_by_options = types.of
        self.deciding: set[str] = set()
        self.reserved: set[str] = set()
        self.fixed: set[str] = set()
        self.declared: set[str] = set()
        self._ids = journal.ids
        self._take_over()

    def loading(self, sources: SourceReader) -> Loading:
        """Return the `Loading` for objects with these sources: the tree adds its memory and
        keys.
        """
        return Loading(self.journal.arena, self.scratch, sources, self.key)

    def _take_over(self) -> None:
        """Count and index the objects that an earlier process left."""
        survey = self.journal.survey
        for uid, (count, size) in survey.held.items():
            self.limits.objects.count(uid, count)
            self.limits.object_bytes.count(uid, size)
        for number, object_ids in survey.by_type.items():
            kind = self.types.numbered[number]
            every = kind.decides or kind.names_versions or kind.registers
            for object_id in object_ids if every else survey.described.intersection(object_ids):
                record = self.journal.get(object_id)
                assert record is not None
                self._changed(object_id, kind, record.properties)
                kind.joined(self, object_id, record.properties)
        self.journal.survey = LoadSummary()
        self._sorted = SortedIds(self.journal)

    # --- object-add, object-del

    def add(
        self, options: ObjectOptions, loading: Loading
    ) -> Coroutine[Any, Any, int | Commit] | int | Commit:
        """Add an object in user_creatable_add_type()'s order of checks. A failed add leaves
        nothing.

        Returns the plaintext's size in bytes; a `Commit` if the object is added once a store has
        it; or a coroutine of either if a source must be waited for. Raises CommandError.
        """
        object_id = options.id
        self.check_new(object_id)
        kind = self._types_by_options[type(options)]
        content = kind.create(options, loading)
        if isinstance(content, CoroutineType):
            # The id is reserved now, not only when the coroutine first runs.
            self.reserved.add(object_id)
            return self._add_later(options, kind, content, loading.sources.uid)
        return self.store_content(
            object_id,
            kind,
            kind.stored(options),
            content,  # type: ignore[arg-type]  # one that is awaitable is a coroutine
            loading.sources.uid,
        )

    async def _add_later(
        self, options: ObjectOptions, kind: ObjectType, content: Awaitable[Content], uid: int
    ) -> int | Commit:
        try:
            loaded = await content
        finally:
            self.reserved.discard(options.id)
        return self.store_content(options.id, kind, kind.stored(options), loaded, uid)

    def replace(
        self,
        object_id: str,
        kind: ObjectType,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> None:
        """Replace an existing object by another one, in one step; its running readers end."""
        self._leave(object_id)
        try:
            old_uid, old_size, size = self.journal.replace(
                object_id, kind.number, properties, plaintext, uid
            )
        except BaseException:
            if plaintext is not None:
                plaintext.free()
            raise
        limits = self.limits
        limits.objects.release(old_uid)
        limits.object_bytes.release(old_uid, old_size)
        limits.objects.count(uid)
        limits.object_bytes.count(uid, size)
        self.deadlines.forget(object_id)
        self.deciding.discard(object_id)
        self._changed(object_id, kind, properties)
        if kind.registers:
            kind.joined(self, object_id, properties)
        if self.keeper is not None:
            self.keeper.placed(object_id)

    def pin(self, object_id: str) -> None:
        """Protect an object from deletion and expiry."""
        self.pinned.add(object_id)
        self.own_keys.add(object_id)
        self.keep(object_id)

    def end_due(self) -> list[str]:
        """Delete the objects that expired while no process ran; return their ids."""
        due = self.deadlines.due()
        for object_id in due:
            self.delete(object_id)
        return due

    def check_new(self, object_id: str) -> None:
        """Raise CommandError unless an object of that id can be added."""
        if not _is_identifier(object_id) or len(object_id) > ID_BYTES:
            check_identifier(object_id)
        if object_id in self._ids or object_id in self.reserved or object_id == "type":
            raise CommandError(
                f"attempt to add duplicate property '{object_id}' to object (type 'container')"
            )

    def store(self, options: ObjectOptions, plaintext: LockedBuffer, uid: int) -> int | Commit:
        """Store plaintext (in the journal's arena, taken over); see `add` for what is returned.

        The id has passed `check_new`; ``uid``: the owner.
        """
        kind = self._types_by_options[type(options)]
        return self.store_content(options.id, kind, kind.stored(options), plaintext, uid)

    def store_content(
        self,
        object_id: str,
        kind: ObjectType,
        properties: dict[str, object],
        content: Content,
        uid: int,
    ) -> int | Commit:
        """Store an object with its loaded content; see `add` for what is returned.

        Takes over the plaintext, also if it raises CommandError.
        """
        # 1. Plaintext, or further properties.
        plaintext, size = None, 0
        if isinstance(content, LockedBuffer):
            plaintext, size = content, content.size
        elif content is not None:
            properties |= content
        # 2. Check the limits.
        limits, keeper = self.limits, self.keeper
        try:
            if len(self._ids) >= limits.objects_in_all:
                raise LimitReached(
                    "objects",
                    f"There are {limits.objects_in_all} objects, and that is the limit (objects)",
                )
            if uid not in limits.trusted:
                limits.objects.check(uid)
                limits.object_bytes.check(uid, size + properties_size(properties))
            if kind.declares_store and self.declared:
                raise CommandError(f"There is a secret-store already: '{min(self.declared)}'")
            if kind.registers:
                kind.check(self, object_id, properties)
            if keeper is not None and keeper.covers(object_id):
                return keeper.add(object_id, kind, properties, plaintext, uid)
        except BaseException:
            if plaintext is not None:
                plaintext.free()
            raise
        # 3. Store.
        self.place(object_id, kind, properties, plaintext, uid)
        return size

    def place(
        self,
        object_id: str,
        kind: ObjectType,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> None:
        """Add an object to the journal, without checks, and notify.

        Takes over the plaintext, also if it raises CommandError.
        """
        limits = self.limits
        try:
            bytes_held = self.journal.add(object_id, kind.number, properties, plaintext, uid)
        except BaseException:
            if plaintext is not None:
                plaintext.free()
            raise
        self._sorted.add(object_id)
        limits.objects.count(uid)
        limits.object_bytes.count(uid, bytes_held)
        if kind.decides or properties:
            self._changed(object_id, kind, properties)
        if kind.registers:
            kind.joined(self, object_id, properties)
        for callback in self._on_count:
            callback()
        if self.keeper is not None:
            self.keeper.placed(object_id)

    def _changed(self, object_id: str, kind: ObjectType, changes: dict[str, object]) -> None:
        deadline = changes.get(DEADLINE)
        if isinstance(deadline, int):
            self.deadlines.set(object_id, deadline)
        if kind.names_versions:
            record = self.journal.get(object_id)
            assert record is not None
            self.aliases[object_id] = alias_in(record.properties)
        origin = changes.get(ORIGIN)
        if isinstance(origin, str):
            self.origins[object_id] = origin
        if kind.declares_store:
            self.declared.add(object_id)
            for declared in self._on_store:
                declared(object_id)
        if kind.decides:
            self.deciding.add(object_id)
            self._notify_decision(object_id)

    def _leave(self, object_id: str) -> None:
        """End the readers of an object that is about to be removed, and forget its registration."""
        for callback in self._on_removal:
            callback(object_id)
        self.aliases.pop(object_id, None)
        self.origins.pop(object_id, None)
        found = self.journal.summary(object_id)
        assert found is not None
        kind = self.types.numbered[found[0]]
        if kind.registers:
            record = self.journal.get(object_id)
            assert record is not None
            kind.left(self, object_id, record)

    def _notify_decision(self, object_id: str) -> None:
        for callback in self._on_decision:
            callback(object_id)

    def delete(self, object_id: str) -> tuple[ObjectType, Commit | None]:
        """Remove an object and wipe its plaintext, or raise CommandError.

        Returns its type, and what waits for the disk if a store has the object.
        """
        if object_id not in self._ids:
            raise CommandError(f"object '{object_id}' not found")
        if object_id in self.pinned:
            raise CommandError(f"object '{object_id}' is in use, can not be deleted")
        keeper = self.keeper
        is_row = keeper is not None and keeper.removing(object_id)
        self._leave(object_id)
        number, uid, size = self.journal.remove(object_id)
        self.declared.discard(object_id)
        self._sorted.remove(object_id)
        self.limits.objects.release(uid)
        self.limits.object_bytes.release(uid, size)
        self.deadlines.forget(object_id)
        if object_id in self.deciding:
            self.deciding.discard(object_id)
            self._notify_decision(object_id)
        for counted in self._on_count:
            counted()
        commit = None if keeper is None or not is_row else keeper.removed(object_id)
        return self.types.numbered[number], commit
