# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object tree: what there is, by id (QEMU's qom/object_interfaces.c).

Objects are records of the journal, not Python objects; what a type can do is said once for all of its
objects by a `typeinfo.ObjectType`. It decides nothing about who may do what. commands calls it.
"""

import re
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import Final

from secretd.errors import CommandError, LimitReached
from secretd.journal.journal import Journal
from secretd.journal.loader import Survey
from secretd.limits import OBJECTS_IN_ALL, Limits
from secretd.memory.arena import Arena, LockedBuffer
from secretd.qom.deadlines import Lifetimes, now
from secretd.qom.loading import SourceReader
from secretd.qom.object_type import (
    SECRET_COMMON,
    ObjectOptions,
    ObjectType,
    Types,
)
from secretd.qom.sorted_ids import SortedIds

ID_BYTES: Final = 4096
"""Bytes of an object's id. QEMU has no limit."""

_BAD_ID: Final = "Parameter 'id' expects an identifier"
_ID_HINT: Final = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."

_IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")

DEADLINE: Final = "deadline"
"""What the journal calls an object's deadline, beside its properties: nanoseconds of CLOCK_BOOTTIME."""

IDS_PER_LOOK: Final = 512
"""Ids that are looked at before others get their turn."""

HAPPENED: Final = frozenset({DEADLINE, "reads"})
"""What the journal keeps of an object that was not given but came of what happened to it."""


class ObjectTree:
    """All objects: `/objects` and what is in it.

    Secrets are in the journal's arena; ``scratch`` is locked memory for intermediate results.
    ``deciding``: the ids of the objects by which access decides; ``on_decision`` is told of each
    that comes, goes or changes. ``withdraw`` ends whatever still touches the plaintext of an object that
    is about to be deleted. ``pinned``: the ids of objects that cannot be deleted, since the
    daemon itself needs them.
    """

    def __init__(
        self,
        journal: Journal,
        scratch: Arena,
        types: Types,
    ) -> None:
        self.journal = journal
        self.scratch = scratch
        self.types = types
        self._kinds = types.of
        self.lifetimes = Lifetimes()
        self.limits = Limits()
        self.pinned: set[str] = set()
        self.deciding: set[str] = set()
        self.on_decision: Callable[[str], None] = lambda _object_id: None
        self.withdraw: Callable[[str], None] = lambda _object_id: None
        self._ids = journal.ids
        self._loading: set[str] = set()
        self._sorted = SortedIds(())
        self.on_count: Callable[[], None] | None = None  # an object came or went
        self._take_over()

    def _take_over(self) -> None:
        """Know of the objects that an earlier process has left."""
        survey = self.journal.survey
        for uid, (count, size) in survey.held.items():
            self.limits.objects.add(uid, count)
            self.limits.object_bytes.add(uid, size)
        for number, object_ids in survey.by_type.items():
            kind = self.types.numbered[number]
            for object_id in (
                object_ids if kind.decides else survey.described.intersection(object_ids)
            ):
                record = self.journal.get(object_id)
                assert record is not None
                self._changed(object_id, kind, record.properties)
        self.journal.survey = Survey()
        self._sorted = SortedIds(self.journal)

    # --- object-add, object-del

    def add(self, options: ObjectOptions, sources: SourceReader) -> Awaitable[int] | int:
        """Make an object; user_creatable_add_type()'s order of checks. A failed add leaves nothing.

        Returns the plaintext's size in bytes, an awaitable of it if the source must be waited for.
        """
        object_id = options.id
        self.check_new(object_id)
        kind = self._kinds[type(options)]
        plaintext = kind.create(self, options, sources)
        if plaintext is None or isinstance(plaintext, LockedBuffer):
            return self._store(object_id, kind, kind.stored(options), plaintext, sources.uid)
        # Taken from now on, not only when the coroutine first runs.
        self._loading.add(object_id)
        return self._add_later(options, plaintext, sources.uid)

    async def _add_later(
        self, options: ObjectOptions, plaintext: Awaitable[LockedBuffer | None], uid: int
    ) -> int:
        try:
            return self.store(options, await plaintext, uid)
        finally:
            self._loading.discard(options.id)

    def renew(
        self, options: ObjectOptions, sources: SourceReader, changes: dict[str, object]
    ) -> bool:
        """Make an object at start, where an earlier process may have left it: it stays if nothing about
        it is new, with its deadline and what it has counted, and is replaced otherwise. A failure leaves
        it as it is. Returns True if it was made.

        ``changes``: properties to store instead of those given. The sources must answer at once.
        """
        known = options.id in self._ids
        if not known:
            self.check_new(options.id)
        kind = self.types.of[type(options)]
        plaintext = kind.create(self, options, sources)
        assert plaintext is None or isinstance(plaintext, LockedBuffer)
        properties = kind.stored(options) | changes
        if known:
            if self._is_same(options.id, kind, properties, plaintext):
                if plaintext is not None:
                    plaintext.free()
                return False
            self._replace(options.id, kind, properties, plaintext, sources.uid)
        else:
            self._store(options.id, kind, properties, plaintext, sources.uid)
        return True

    def _replace(
        self,
        object_id: str,
        kind: ObjectType,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> None:
        """Put another object in the place of one that there is, in one step."""
        try:
            before = self.journal.replace(object_id, kind.number, properties, plaintext, uid)
        except BaseException:
            if plaintext is not None:
                plaintext.free()
            raise
        old_uid, old_size, size = before
        self.limits.give_object(old_uid, old_size)
        self.limits.add_object(uid, size)
        self.lifetimes.forget(object_id)
        self.deciding.discard(object_id)
        self._changed(object_id, kind, properties)

    def pin(self, object_id: str) -> None:
        """Keep an object from being deleted, and from ending by itself."""
        self.pinned.add(object_id)
        self.keep(object_id)

    def keep(self, object_id: str) -> None:
        """Take back the lifetime of an existing object."""
        record = self.journal.get(object_id)
        assert record is not None
        if DEADLINE in record.properties:
            left = {n: value for n, value in record.properties.items() if n != DEADLINE}
            self.replace_properties(object_id, left)
            self.lifetimes.forget(object_id)

    def end_due(self) -> list[str]:
        """Delete those objects that an earlier process has left and whose time is over; return their ids."""
        due = self.lifetimes.due()
        for object_id in due:
            self.delete(object_id)
        return due

    def _is_same(
        self,
        object_id: str,
        kind: ObjectType,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
    ) -> bool:
        record = self.journal.get(object_id)
        assert record is not None
        names = (properties.keys() | record.properties.keys()) - HAPPENED
        return (
            record.type == kind.number
            and all(properties.get(n) == record.properties.get(n) for n in names)
            and (plaintext is None or plaintext.view == self.journal.plaintext(object_id))
        )

    def check_new(self, object_id: str) -> None:
        """Raise CommandError unless an object of that id can be added."""
        if not _IDENTIFIER.fullmatch(object_id):
            raise CommandError(_BAD_ID)
        if len(object_id) > ID_BYTES:
            raise CommandError(f"Parameter 'id' is longer than the limit of {ID_BYTES} bytes")
        if object_id in self._ids or object_id in self._loading or object_id == "type":
            raise CommandError(
                f"attempt to add duplicate property '{object_id}' to object (type 'container')"
            )

    def store(self, options: ObjectOptions, plaintext: LockedBuffer | None, uid: int) -> int:
        """Take over the plaintext (in the journal's arena) of an object of ``uid`` that passed
        `check_new`; return its size in bytes.
        """
        kind = self.types.of[type(options)]
        return self._store(options.id, kind, kind.stored(options), plaintext, uid)

    def _store(
        self,
        object_id: str,
        kind: ObjectType,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> int:
        size = 0 if plaintext is None else plaintext.size
        limits = self.limits
        try:
            if len(self._ids) >= OBJECTS_IN_ALL:
                raise LimitReached(
                    "objects",
                    f"There are {OBJECTS_IN_ALL} objects, and that is the limit (objects)",
                )
            if uid not in limits.trusted:
                limits.check_object(uid, size + _length(properties))
            bytes_held = self.journal.add(object_id, kind.number, properties, plaintext, uid)
        except BaseException:
            if plaintext is not None:
                plaintext.free()
            raise
        self._sorted.add(object_id)
        limits.add_object(uid, bytes_held)
        if kind.decides or properties:
            self._changed(object_id, kind, properties)
        if self.on_count is not None:
            self.on_count()
        return size

    def _changed(self, object_id: str, kind: ObjectType, changes: dict[str, object]) -> None:
        deadline = changes.get(DEADLINE)
        if isinstance(deadline, int):
            self.lifetimes.set(object_id, deadline)
        if kind.decides:
            self.deciding.add(object_id)
            self.on_decision(object_id)

    def delete(self, object_id: str) -> ObjectType:
        """Remove an object and wipe its plaintext, or raise CommandError; return its type."""
        if object_id not in self._ids:
            raise CommandError(f"object '{object_id}' not found")
        if object_id in self.pinned:
            raise CommandError(f"object '{object_id}' is in use, can not be deleted")
        self.withdraw(object_id)
        number, uid, size = self.journal.remove(object_id)
        self._sorted.remove(object_id)
        self.limits.give_object(uid, size)
        self.lifetimes.forget(object_id)
        if object_id in self.deciding:
            self.deciding.discard(object_id)
            self.on_decision(object_id)
        if self.on_count is not None:
            self.on_count()
        return self.types.numbered[number]

    def expire_after(self, object_id: str, seconds: int) -> None:
        """Give an object that there is a lifetime from now."""
        record = self.journal.get(object_id)
        assert record is not None
        deadline = now() + seconds * 1_000_000_000
        self.replace_properties(object_id, record.properties | {DEADLINE: deadline})
        self.lifetimes.set(object_id, deadline)

    def replace_properties(self, object_id: str, properties: dict[str, object]) -> None:
        """Store other properties of an object that there is."""
        uid, before = self.journal.owner(object_id)
        self.journal.set_properties(object_id, properties)
        self.limits.object_bytes.give(uid, before)
        self.limits.object_bytes.add(*self.journal.owner(object_id))

    def change(self, object_id: str, changes: dict[str, object]) -> None:
        """Change some properties of an object that there is; what it has loaded stays."""
        record = self.journal.get(object_id)
        assert record is not None
        properties = record.properties | changes
        more = max(0, _length(properties) - _length(record.properties))
        self.limits.object_bytes.check(record.uid, more)
        self.replace_properties(object_id, properties)
        self._changed(object_id, self.types.numbered[record.type], changes)

    def is_secret(self, object_id: str) -> bool:
        """True if there is a secret of that id whose time is not over."""
        kind = self.type_of(object_id)
        return (
            kind is not None
            and SECRET_COMMON in kind.info.ancestors
            and not self.lifetimes.ended(object_id)
        )

    def secret(self, object_id: str) -> tuple[str, int]:
        """Return the type's name and the size in bytes of a secret that there is."""
        summary = self.journal.summary(object_id)
        assert summary is not None
        return self.types.numbered[summary[0]].info.name, summary[1]

    def secrets_after(
        self, object_id: str, prefixes: Collection[str] = ("",)
    ) -> Iterator[str | None]:
        """Return the ids of the secrets that come after ``object_id``, as `ids_after` does."""
        found = self.ids_after(object_id, prefixes)
        return (each for each in found if each is None or self.is_secret(each))

    def ids_after(self, object_id: str, prefixes: Collection[str]) -> Iterator[str | None]:
        """Return the ids that come after ``object_id``, in order; those that begin with one of
        ``prefixes``, each once. After each IDS_PER_LOOK ids it returns None: objects may come and go then.
        """
        last = object_id
        for prefix in sorted(prefixes):
            included = prefix > last
            last = max(last, prefix)
            if not last.startswith(prefix):
                continue
            while True:
                looked_at = self._sorted.after(last, IDS_PER_LOOK, included=included)
                for each in looked_at:
                    if not each.startswith(prefix):
                        break
                    last = each
                    yield each
                else:
                    if len(looked_at) < IDS_PER_LOOK:
                        break
                    included = False
                    yield None
                    continue
                break

    def type_of(self, object_id: str) -> ObjectType | None:
        """Return the type of an object, None if there is none of that id."""
        summary = self.journal.summary(object_id)
        return None if summary is None else self.types.numbered[summary[0]]


def _length(properties: dict[str, object]) -> int:
    """About how many bytes they take in the journal."""
    return sum(len(str(value)) for value in properties.values())


def with_hint(words: str) -> str:
    """Return an error as people get it, beside whom programs get none (error_append_hint())."""
    return f"{words}\n{_ID_HINT}" if words == _BAD_ID else words
