# SPDX-License-Identifier: LGPL-2.1-or-later
"""The open files of a store, and the transactions in them. All calls come from the store's thread.

A transaction that fails leaves nothing. Deletions that fail with others are tried again without
them, and then recorded as tombstones. The head's digest is the sum over all rows, so that changed,
swapped, missing and returned rows are noticed. store.store calls this module.
"""

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

from secretd.crypto.aead import OpenError
from secretd.errors import CommandError, SecretdError, StoreError
from secretd.memory.arena import Arena, LockedBuffer
from secretd.store.commit import Commit
from secretd.store.database import Database, Head, Row, remove_leftovers, words
from secretd.store.directory import BACKUP, Tombstone, Tombstones
from secretd.store.keys import TAG_BYTES, State, StoreKeys, new_uuid
from secretd.store.rows import unpack

WRAPS = 8
"""Keys that may open a store at a time; more than two are those of interrupted changes of keys."""


class Change(NamedTuple):
    """A row to write, or to delete where there is no content (owned).

    ``kind``: the number of the object's type.
    """

    object_id: str
    kind: int
    content: LockedBuffer | None
    commit: Commit


class Disk:
    """The open store in ``path``."""

    def __init__(self, path: str, key: LockedBuffer, scratch: Arena) -> None:
        """Open it with the administrator's ``key``. Raises StoreError."""
        self.path = path
        self._scratch = scratch
        self._database = Database(path)
        try:
            head = self._database.head()
            self._keys = StoreKeys.unwrap(head.uuid, head.wraps, key.view, scratch)
            try:
                self._state = self._keys.open_state(head.state)
                self._tombstones = Tombstones(path, self._keys.mac)
            except BaseException:
                self._keys.close()
                raise
        except BaseException:
            self._database.close()
            raise
        self.uuid, self.clock = head.uuid.hex(), self._state.clock
        if self._pending_tombstones():
            with contextlib.suppress(sqlite3.Error):  # they are heeded nevertheless
                self._transact(lambda: None)

    @classmethod
    def create(cls, path: str, key: LockedBuffer, scratch: Arena) -> Self:
        """Make an empty store and open it; see `Disk`."""
        keys = StoreKeys.generate(new_uuid(), scratch)
        try:
            head = Head(keys.uuid, [keys.wrap(key.view)], keys.seal_state(State()))
            Database.create(path, head)
        finally:
            keys.close()
        return cls(path, key, scratch)

    def close(self) -> None:
        """Wipe the keys and close the files."""
        self._tombstones.close()
        with contextlib.suppress(sqlite3.Error):
            self._database.close()
        self._keys.close()

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self._state.rows

    @property
    def sequence(self) -> int:
        """The sequence number of the head, or of a later tombstone."""
        return max([self._state.sequence, *(each.sequence for each in self._tombstones.present)])

    def _pending_tombstones(self) -> list[Tombstone]:
        return [each for each in self._tombstones.present if each.sequence > self._state.sequence]

    def write(self, batch: list[Change]) -> list[CommandError | None]:
        """Write changes; return the error of each."""
        try:
            failure = self._try(batch)
            deletions = [change for change in batch if change.content is None]
            if failure is None:
                return [None] * len(batch)
            left: str | None = failure
            if deletions and len(deletions) < len(batch):
                left = self._try(deletions)
            if deletions and left is not None:
                left = self._bury(deletions)
            return [
                self._failed(change, failure if change.content is not None else left)
                for change in batch
            ]
        finally:
            for change in batch:
                if change.content is not None:
                    change.content.free()

    def _failed(self, change: Change, reason: str | None) -> CommandError | None:
        if reason is None:
            return None
        if change.content is not None:
            return CommandError(f"Unable to write {self.path}: {reason}")
        return CommandError(
            f"object '{change.object_id}' is deleted, but its row in {self.path} remains: {reason}"
        )

    def _try(self, batch: list[Change]) -> str | None:
        """Write changes in one transaction; return the reason of a failure."""
        try:
            self._transact(lambda: self._apply(batch))
        except (sqlite3.Error, SecretdError) as error:
            return words(error)
        return None

    def _bury(self, deletions: list[Change]) -> str | None:
        try:
            for change in deletions:
                row_key = self._keys.row_key(change.object_id)
                self._tombstones.add(row_key, self.sequence + 1)
        except OSError as error:
            return words(error)
        return None

    def _transact(self, apply: Callable[[], object]) -> None:
        """Make changes, and write the head, in one transaction. Raises sqlite3.Error."""
        before, database = self._state, self._database
        database.begin()
        try:
            for tombstone in self._pending_tombstones():
                self._delete(tombstone.row_key)
            sequence = self.sequence + 1
            apply()
            self._state = self._state._replace(
                sequence=sequence, clock=max(self._state.clock, time.time_ns())
            )
            database.set_state(self._keys.seal_state(self._state))
            database.commit()
        except BaseException:
            self._state = before
            with contextlib.suppress(sqlite3.Error):
                database.rollback()
            raise
        with contextlib.suppress(OSError):  # they are void now, by their sequence numbers
            self._tombstones.clear()

    def _apply(self, batch: list[Change]) -> None:
        keys = self._keys
        seal = keys.row_sealer()
        for change in batch:
            row_key = keys.row_key(change.object_id)
            if change.content is None:
                self._delete(row_key)
            else:
                box = seal(row_key, change.kind, change.content.view)
                self._put(Row(row_key, change.kind, box))

    def _put(self, row: Row) -> None:
        if not self._database.add(row):  # there is an earlier one
            self._delete(row.key)
            self._database.add(row)
        self._state = self._state.plus(self._keys.digest(row.key, row.box[-TAG_BYTES:]))

    def _delete(self, row_key: bytes) -> None:
        tag = self._database.tag(row_key)
        if tag is not None:
            self._database.delete(row_key)
            self._state = self._state.without(self._keys.digest(row_key, tag))

    # --- all rows

    def living(self) -> Iterator[list[Row]]:
        """Yield the rows that are not deleted, some at a time. Raises StoreError."""
        dead = {each.row_key for each in self._pending_tombstones()}
        for rows in self._database.rows():
            yield [row for row in rows if row.key not in dead]

    def verify(self) -> int:
        """Open every row and check the digest; return the number of rows. Raises StoreError."""
        for rows in self._database.rows():
            for row in rows:
                self.opened(row).free()
        self.check()
        return self._state.rows

    def rewrap(self, key: LockedBuffer, *, only: bool) -> None:
        """Let a further key open the store, or with ``only`` no key but this one. Raises
        StoreError and sqlite3.Error.
        """
        wraps = [self._keys.wrap(key.view)]
        if not only:
            wraps += self._database.head().wraps
        if len(wraps) > WRAPS:
            raise StoreError(f"{WRAPS} keys open it, which is the limit; name one with only=true")
        self._transact(lambda: self._database.set_wraps(wraps))
        if only:
            self._database.flush_log()  # the log has the earlier ones

    def copy(self) -> int:
        """Return the descriptor of a copy of the database, which has no name any more; the caller
        closes it. Raises StoreError.
        """
        path = f"{self.path}/{BACKUP}"
        try:
            self._database.copy_to(path)
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{path}: {words(error)}") from None
        finally:
            remove_leftovers(self.path)

    def opened(self, row: Row) -> LockedBuffer:
        """Return the content of a row. Raises StoreError."""
        content = None
        try:
            content = self._keys.open_row(row.key, row.kind, row.box)
            if self._keys.row_key(unpack(content.view)[0].id) != row.key:
                raise ValueError("its id is another row's")
        except (OpenError, ValueError, TypeError):
            if content is not None:
                content.free()
            name = bytes(row.key[:8]).hex()
            raise StoreError(f"row {name}… was changed, or moved from elsewhere") from None
        return content

    def check(self) -> None:
        """Compare the digest of all rows with the head's. Raises StoreError."""
        found = State()
        for row_key, tag in self._database.tags():
            found = found.plus(self._keys.digest(row_key, tag))
        if found.rows != self._state.rows:
            raise StoreError(f"it has {found.rows} rows, and its head says {self._state.rows}")
        if found.digest != self._state.digest:
            raise StoreError("some of its rows are not those of its last change")

    def reencrypt(self, key: LockedBuffer) -> None:
        """Seal everything anew, under a new data key that ``key`` opens. Raises StoreError and
        sqlite3.Error.
        """
        old, database = self._keys, self._database
        fresh = StoreKeys.generate(old.uuid, self._scratch)

        def apply() -> None:
            wrap = fresh.wrap(key.view)
            rows = [row for chunk in database.rows() for row in chunk]
            for row in rows:
                database.delete(row.key)
            self._state = State(clock=self._state.clock)
            for row in rows:
                with self.opened(row) as content:
                    row_key = fresh.row_key(unpack(content.view)[0].id)
                    box = fresh.seal_row(row_key, row.kind, content.view)
                database.add(Row(row_key, row.kind, box))
                self._state = self._state.plus(fresh.digest(row_key, box[-TAG_BYTES:]))
            database.set_wraps([wrap])
            self._keys = fresh

        try:
            self._transact(apply)
        except BaseException:
            self._keys = old
            fresh.close()
            raise
        old.close()
        self._tombstones.mac = fresh.mac
        database.flush_log()
