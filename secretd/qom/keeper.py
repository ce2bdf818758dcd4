# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeps the objects that a `secret-store` names in its store on disk.

The tree tells it of every addition, change and removal.

Order. An addition is in the store before it is in the tree. A change is in the tree first, and
undone if the store fails. A removal is in the tree first: the plaintext is wiped, whatever happens
to the disk. Replies follow the store in each case (`Commit`).
"""

from functools import partial
from typing import TYPE_CHECKING

from secretd.errors import CommandError
from secretd.journal.files import ObjectRecord
from secretd.memory.arena import LockedBuffer
from secretd.qom.declared_store import DeclaredStore
from secretd.qom.object_type import ObjectType, properties_size
from secretd.qom.store_rows import as_row
from secretd.store.commit import Commit
from secretd.store.store import Store

if TYPE_CHECKING:
    from secretd.qom.tree import ObjectTree


class Keeper(DeclaredStore):
    """The store of the secret-store object ``store_id``, and the objects in it."""

    def __init__(self, tree: "ObjectTree", store_id: str) -> None:
        super().__init__(tree, store_id)
        self._replacing: set[str] = set()
        self._updating: set[str] = set()
        self._noting: set[str] = set()
        self._unwritten: dict[str, None] = {}  # noted in memory only
        self._retried_at = -1  # the number of the transaction after which that was written again

    def add(
        self,
        object_id: str,
        kind: ObjectType,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> Commit:
        """Add an object to the store and then to the tree.

        Takes over the plaintext, unless it raises CommandError.
        """
        store = self.check()
        commit = self._put(object_id, kind, properties, plaintext, uid)
        tree, limits = self._tree, self._tree.limits
        size = commit.size + properties_size(properties)
        tree.reserved.add(object_id)
        limits.objects.count(uid)
        limits.object_bytes.count(uid, size)

        def written(error: CommandError | None) -> None:
            tree.reserved.discard(object_id)
            limits.objects.release(uid)
            limits.object_bytes.release(uid, size)
            if error is not None:
                if plaintext is not None:
                    plaintext.free()
                return
            self._doomed.pop(object_id, None)  # an earlier one, whose row this one has replaced
            try:
                tree.place(object_id, kind, properties, plaintext, uid)
            except Exception as failure:
                store.delete(object_id)
                if not isinstance(failure, CommandError):
                    raise
                commit.fail(failure)

        commit.then(written)
        return commit

    def exchange(
        self,
        object_id: str,
        kind: ObjectType,
        properties: dict[str, object],
        plaintext: LockedBuffer | None,
        uid: int,
    ) -> Commit:
        """Replace an object in the store and then in the tree; see `add`."""
        commit = self._put(object_id, kind, properties, plaintext, uid)
        tree, limits = self._tree, self._tree.limits
        self._replacing.add(object_id)
        limits.object_bytes.count(uid, commit.size)

        def written(error: CommandError | None) -> None:
            self._replacing.discard(object_id)
            limits.object_bytes.release(uid, commit.size)
            if error is None and object_id in tree.journal:
                try:
                    tree.replace(object_id, kind, properties, plaintext, uid)
                except Exception as failure:
                    self._write_again(object_id)
                    if not isinstance(failure, CommandError):
                        raise
                    commit.fail(failure)
                return
            if plaintext is not None:
                plaintext.free()
            if error is None:  # it was deleted meanwhile, here and, after this, in the store
                commit.fail(CommandError(f"No secret with id '{object_id}'"))

        commit.then(written)
        return commit

    def update(self, object_id: str, properties: dict[str, object], *, undo: bool) -> Commit:
        """Write an object whose properties the tree is about to change. Raises CommandError.

        ``undo``: if the store fails, the changed ones are as before again. Of such changes one at a
        time is under way for an object.
        """
        tree = self._tree
        record = tree.journal.get(object_id)
        assert record is not None
        if not undo:
            return self._put_present(object_id, record, properties)
        if object_id in self._updating:
            raise CommandError(f"object '{object_id}' is being changed; try again")
        commit = self._put_present(object_id, record, properties)
        self._updating.add(object_id)
        before = record.properties
        changed = [n for n in {*properties, *before} if properties.get(n) != before.get(n)]

        def written(error: CommandError | None) -> None:
            self._updating.discard(object_id)
            present = tree.journal.get(object_id)
            if error is not None and present is not None:
                earlier = {n: v for n, v in present.properties.items() if n not in changed}
                earlier |= {name: before[name] for name in changed if name in before}
                tree.undo(object_id, earlier)
            self._write_noted()

        commit.then(written)
        return commit

    def _note_written(self, store: Store) -> None:
        """After a transaction: if it was written, write what could not be written before."""
        super()._note_written(store)
        if store.sequence != self._retried_at:
            self._retried_at = store.sequence
            self._write_noted()

    def is_changing(self, object_id: str) -> bool:
        """True while a change of an object is being written, which may yet fail."""
        return object_id in self._updating or object_id in self._replacing

    def note(self, object_id: str) -> None:
        """Write an object whose noted properties have changed in memory.

        One such write of an object is under way, and none beside a change that may be undone; later
        notes are written with the next one, also after a failure.
        """
        self._unwritten[object_id] = None
        self._write_noted()

    def _write_noted(self) -> None:
        for object_id in list(self._unwritten):
            if self.store is None or object_id in self._noting or self.is_changing(object_id):
                continue
            del self._unwritten[object_id]
            record = self._tree.journal.get(object_id)
            if record is not None:
                self._noting.add(object_id)
                commit = self._put_present(object_id, record, record.properties)
                commit.then(partial(self._noted, object_id))

    def _noted(self, object_id: str, error: CommandError | None) -> None:
        self._noting.discard(object_id)
        if error is not None:
            self._unwritten[object_id] = None  # for the next one
        else:
            self._write_noted()

    def _put_present(
        self, object_id: str, record: ObjectRecord, properties: dict[str, object]
    ) -> Commit:
        """Write an object that memory has, with some properties."""
        tree = self._tree
        kind = tree.types.numbered[record.type]
        plaintext = tree.journal.plaintext(object_id) if record.size else None
        return self._put(object_id, kind, properties, plaintext, record.uid)

    def _write_again(self, object_id: str) -> None:
        """Write what memory has, after the tree refused what the store has by now."""
        record = self._tree.journal.get(object_id)
        assert record is not None
        self._put_present(object_id, record, record.properties)

    def _put(
        self,
        object_id: str,
        kind: ObjectType,
        properties: dict[str, object],
        plaintext: LockedBuffer | memoryview | None,
        uid: int,
    ) -> Commit:
        store = self.check()
        if object_id in self._replacing:
            raise CommandError(f"object '{object_id}' is being replaced; try again")
        view = plaintext.view if isinstance(plaintext, LockedBuffer) else plaintext
        return store.put(kind.number, as_row(object_id, properties, uid), view)

    def removing(self, object_id: str) -> bool:
        """Note that the tree is about to wipe an object; return True if the store keeps it.

        Raises CommandError if it is the store itself, and in use.
        """
        if object_id == self.id:
            if self.is_busy:
                raise CommandError(f"object '{object_id}' is in use, can not be deleted")
            self._tree.keeper = None
            self._settled.set()
            return False
        if object_id == self.keyid:
            self.lock()
        if object_id == self._dropping or not self.covers(object_id):
            return False
        # Its deadline keeps an expired row from coming back.
        if not self._tree.deadlines.expired(object_id):
            self._doomed[object_id] = None
            self._note()
        return True

    def removed(self, object_id: str) -> Commit:
        """Remove an object from the store, which the tree has wiped."""
        if self.store is not None:
            return self._delete_row(self.store, object_id)
        commit = Commit()
        commit.finish(
            CommandError(
                f"object '{object_id}' is deleted, but its row in {self.path} remains until the "
                f"store is open; it is {self.state}"
            )
        )
        return commit
