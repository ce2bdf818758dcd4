# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object tree: `/objects`, by id (QEMU's qom/object_interfaces.c).

Objects are records of the journal; an `ObjectType` defines the behaviour of all objects of a type.
The tree decides nothing about access. monitor.commands calls it.
"""

from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator
from types import CoroutineType
from typing import Any, Final

from secretd.errors import AccessDenied, CommandError, LimitReached
from secretd.journal.journal import Journal
from secretd.journal.load_result import LoadSummary
from secretd.limits import Limits
from secretd.memory.arena import Arena, LockedBuffer
from secretd.qom.deadlines import DEADLINE, Deadlines, now
from secretd.qom.identifiers import ID_BYTES, IDENTIFIER, check_identifier
from secretd.qom.loading import Loading, SourceReader
from secretd.qom.object_type import (
    Content,
    ObjectOptions,
    ObjectType,
    Types,
    properties_size,
)
from secretd.qom.sorted_ids import SortedIds

_is_identifier: Final = IDENTIFIER.fullmatch


class ObjectTree:
    """All objects.

    Plaintext lies in the journal's arena; ``scratch`` is locked memory for intermediate results.
    ``pinned``: the ids of objects that cannot be deleted, since the daemon itself needs them.
    """

    def __init__(self, journal: Journal, scratch: Arena, types: Types) -> None:
        self.journal = journal
        self.scratch = scratch
        self.types = types
        self._types_by_options = types.of
        self.deadlines = Deadlines()
        self.limits = Limits()
        self.pinned: set[str] = set()
        self.deciding: set[str] = set()
        self._ids = journal.ids
        self._being_loaded: set[str] = set()
        self._on_decision: list[Callable[[str], None]] = []
        self._on_removal: list[Callable[[str], None]] = []
        self._on_count: list[Callable[[], None]] = []
        self._take_over()

    def subscribe(
        self,
        *,
        decision: Callable[[str], None] | None = None,
        removal: Callable[[str], None] | None = None,
        count: Callable[[], None] | None = None,
    ) -> None:
        """Subscribe to changes.

        ``decision``: called with the id of each object that access decides by, after it was added,
        changed or removed. ``removal``: called with the id of an object before its plaintext is
        wiped; it must end every reader. ``count``: called after an object was added or removed.
        """
        self._on_decision += [] if decision is None else [decision]
        self._on_removal += [] if removal is None else [removal]
        self._on_count += [] if count is None else [count]

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
            for object_id in (
                object_ids if kind.decides else survey.described.intersection(object_ids)
            ):
                record = self.journal.get(object_id)
                assert record is not None
                self._changed(object_id, kind, record.properties)
        self.journal.survey = LoadSummary()
        self._sorted = SortedIds(self.journal)

    # --- object-add, object-del

    def add(self, options: ObjectOptions, loading: Loading) -> Coroutine[Any, Any, int] | int:
        """Add an object in user_creatable_add_type()'s order of checks. A failed add leaves
        nothing.

        Returns the plaintext's size in bytes, or a coroutine of it if a source must be waited for.
        Raises CommandError.
        """
        object_id = options.id
        self.check_new(object_id)
        kind = self._types_by_options[type(options)]
        content = kind.create(options, loading)
        if isinstance(content, CoroutineType):
            # The id is reserved now, not only when the coroutine first runs.
            self._being_loaded.add(object_id)
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
    ) -> int:
        try:
            return self.store_content(options.id, kind, kind.stored(options), await content, uid)
        finally:
            self._being_loaded.discard(options.id)

    def replace(
        self,
        object_id: str,
        kind: ObjectType,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> None:
        """Replace an existing object by another one, in one step; its running readers end."""
        for callback in self._on_removal:
            callback(object_id)
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

    def pin(self, object_id: str) -> None:
        """Protect an object from deletion and expiry."""
        self.pinned.add(object_id)
        self.keep(object_id)

    def keep(self, object_id: str) -> None:
        """Remove the lifetime of an existing object."""
        record = self.journal.get(object_id)
        assert record is not None
        if DEADLINE in record.properties:
            left = {n: value for n, value in record.properties.items() if n != DEADLINE}
            self.replace_properties(object_id, left)
            self.deadlines.forget(object_id)

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
        if object_id in self._ids or object_id in self._being_loaded or object_id == "type":
            raise CommandError(
                f"attempt to add duplicate property '{object_id}' to object (type 'container')"
            )

    def store(self, options: ObjectOptions, plaintext: LockedBuffer, uid: int) -> int:
        """Store plaintext (in the journal's arena, taken over); return its size in bytes.

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
    ) -> int:
        """Store an object with its loaded content; return its plaintext's size in bytes.

        Takes over the plaintext, also if it raises CommandError.
        """
        # 1. Plaintext, or further properties.
        plaintext, size = None, 0
        if isinstance(content, LockedBuffer):
            plaintext, size = content, content.size
        elif content is not None:
            properties |= content
        # 2. Check the limits and store.
        limits = self.limits
        try:
            if len(self._ids) >= limits.objects_in_all:
                raise LimitReached(
                    "objects",
                    f"There are {limits.objects_in_all} objects, and that is the limit (objects)",
                )
            if uid not in limits.trusted:
                limits.objects.check(uid)
                limits.object_bytes.check(uid, size + properties_size(properties))
            bytes_held = self.journal.add(object_id, kind.number, properties, plaintext, uid)
        except BaseException:
            if plaintext is not None:
                plaintext.free()
            raise
        # 3. Count and notify.
        self._sorted.add(object_id)
        limits.objects.count(uid)
        limits.object_bytes.count(uid, bytes_held)
        if kind.decides or properties:
            self._changed(object_id, kind, properties)
        for callback in self._on_count:
            callback()
        return size

    def _changed(self, object_id: str, kind: ObjectType, changes: dict[str, object]) -> None:
        deadline = changes.get(DEADLINE)
        if isinstance(deadline, int):
            self.deadlines.set(object_id, deadline)
        if kind.decides:
            self.deciding.add(object_id)
            self._notify_decision(object_id)

    def _notify_decision(self, object_id: str) -> None:
        for callback in self._on_decision:
            callback(object_id)

    def delete(self, object_id: str) -> ObjectType:
        """Remove an object and wipe its plaintext, or raise CommandError; return its type."""
        if object_id not in self._ids:
            raise CommandError(f"object '{object_id}' not found")
        if object_id in self.pinned:
            raise CommandError(f"object '{object_id}' is in use, can not be deleted")
        for callback in self._on_removal:
            callback(object_id)
        number, uid, size = self.journal.remove(object_id)
        self._sorted.remove(object_id)
        self.limits.objects.release(uid)
        self.limits.object_bytes.release(uid, size)
        self.deadlines.forget(object_id)
        if object_id in self.deciding:
            self.deciding.discard(object_id)
            self._notify_decision(object_id)
        for counted in self._on_count:
            counted()
        return self.types.numbered[number]

    def expire_after(self, object_id: str, seconds: int) -> None:
        """Set the lifetime of an existing object, from now."""
        record = self.journal.get(object_id)
        assert record is not None
        deadline = now() + seconds * 1_000_000_000
        self.replace_properties(object_id, record.properties | {DEADLINE: deadline})
        self.deadlines.set(object_id, deadline)

    def replace_properties(self, object_id: str, properties: dict[str, object]) -> None:
        """Replace all properties of an existing object."""
        uid, before = self.journal.owner(object_id)
        self.journal.set_properties(object_id, properties)
        self.limits.object_bytes.release(uid, before)
        self.limits.object_bytes.count(*self.journal.owner(object_id))

    def change(self, object_id: str, changes: dict[str, object]) -> None:
        """Change some properties of an existing object; its loaded content stays."""
        record = self.journal.get(object_id)
        assert record is not None
        properties = record.properties | changes
        more = max(0, properties_size(properties) - properties_size(record.properties))
        self.limits.object_bytes.check(record.uid, more)
        self.replace_properties(object_id, properties)
        self._changed(object_id, self.types.numbered[record.type], changes)

    def is_secret(self, object_id: str) -> bool:
        """Return True if there is an unexpired secret of that id."""
        found = self.journal.summary(object_id)
        is_secret = found is not None and found[0] in self.types.secrets
        return is_secret and not self.deadlines.expired(object_id)

    def secret(self, object_id: str) -> tuple[str, int]:
        """Return the type's name and the size in bytes of an existing secret."""
        summary = self.journal.summary(object_id)
        assert summary is not None
        return self.types.numbered[summary[0]].info.name, summary[1]

    def secrets_after(
        self, object_id: str, prefixes: Collection[str] = ("",)
    ) -> Iterator[str | None]:
        """Yield the ids of the secrets after ``object_id``, as `ids_after` does."""
        summary, secrets, expired = self.journal.summary, self.types.secrets, self.deadlines.expired
        for each in self.ids_after(object_id, prefixes):
            if each is None:
                yield None
            elif (found := summary(each)) and found[0] in secrets and not expired(each):
                yield each

    def ids_after(self, object_id: str, prefixes: Collection[str]) -> Iterator[str | None]:
        """See SortedIds.with_prefixes."""
        return self._sorted.with_prefixes(object_id, prefixes)

    def plaintext(self, object_id: str, loading: str | None = None) -> memoryview:
        """Return a secret's plaintext, borrowed; qcrypto_secret_lookup(). Raises CommandError.

        ``loading`` is the id of an object that exists but has no content yet.
        """
        content = self.journal.content(object_id)
        if content is None or self.deadlines.expired(object_id):
            if object_id == loading:
                raise CommandError(f"Secret with id '{object_id}' has no data")
            raise CommandError(f"No secret with id '{object_id}'")
        number, size, slot = content
        if number not in self.types.secrets:
            raise CommandError(f"Object with id '{object_id}' is not a secret")
        return self.journal.arena.view(slot, size)

    def key(self, keyid: str, uid: int, loading: str | None = None) -> memoryview:
        """Return the plaintext of a secret that ``uid`` uses as a key. Raises CommandError.

        Untrusted uids may not use the audit's key: its use would disclose it.
        """
        if keyid in self.pinned and uid not in self.limits.trusted:
            raise AccessDenied(f"Reading secret '{keyid}' is not permitted")
        return self.plaintext(keyid, loading)

    def type_of(self, object_id: str) -> ObjectType | None:
        """Return the type of an object, None if there is none of that id."""
        summary = self.journal.summary(object_id)
        return None if summary is None else self.types.numbered[summary[0]]
