# SPDX-License-Identifier: LGPL-2.1-or-later
"""The SQLite file of a store: a head, wraps of its data key, and sealed rows.

It sees ciphertext only. All calls come from one thread at a time; store.store calls it.

Tables
    head   uuid, state (sealed)
    wraps  wrap: the data key under an administrator's secret; usually one
    rows   key (derived from the id), kind (the object's type number), box (sealed)
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from secretd.errors import StoreError
from secretd.store.directory import (
    DATABASE,
    FILES,
    LEFTOVERS,
    TOMBSTONES,
    TOMBSTONES_BYTES,
    check_directory,
    check_file,
    create_file,
    sync_directory,
)
from secretd.store.keys import TAG_BYTES

APPLICATION_ID: Final = 0x73656372
FORMAT: Final = 1
"""The version of the tables and of what they hold. Another one is refused."""

ROWS_PER_READ: Final = 256
"""Rows that are read at once."""

_TABLES: Final = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
CREATE TABLE head (id INTEGER PRIMARY KEY CHECK (id = 0), uuid BLOB NOT NULL, state BLOB NOT NULL);
CREATE TABLE wraps (wrap BLOB NOT NULL);
CREATE TABLE rows (key BLOB PRIMARY KEY, kind INTEGER NOT NULL, box BLOB NOT NULL) WITHOUT ROWID;
"""


class Row(NamedTuple):
    """A row as it lies in the file."""

    key: bytes
    kind: int
    box: bytes


class Head(NamedTuple):
    """What a store holds besides its rows."""

    uuid: bytes
    wraps: list[bytes]
    state: bytes


class Database:
    """The open file of a store. The kernel lets one process have it."""

    def __init__(self, directory: str) -> None:
        """Open the store in ``directory``. Raises StoreError."""
        check_directory(directory)
        path = f"{directory}/{DATABASE}"
        check_file(path)
        remove_leftovers(directory)
        self._connection = _connect(path)
        try:
            application, version = (
                self._one("PRAGMA application_id"),
                self._one("PRAGMA user_version"),
            )
            if application != APPLICATION_ID:
                raise StoreError(f"{path} is not a store")
            if version != FORMAT:
                raise StoreError(f"{path} has format {version}, not {FORMAT}")
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, directory: str, head: Head) -> None:
        """Make an empty store in ``directory``, which is made if it is missing.

        Raises StoreError; a failure leaves no store.
        """
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise StoreError(f"{directory}: {error.strerror}") from None
        check_directory(directory)
        path = f"{directory}/{DATABASE}"
        if os.path.lexists(path):
            raise StoreError(f"{path} exists")
        remove_leftovers(directory)
        try:
            create_file(f"{path}.new", 0)
            create_file(f"{directory}/{TOMBSTONES}.new", TOMBSTONES_BYTES)
            connection = _connect(f"{path}.new")
            try:
                connection.executescript(_TABLES)
                connection.execute("BEGIN")
                connection.execute("INSERT INTO head VALUES (0, ?, ?)", (head.uuid, head.state))
                connection.executemany("INSERT INTO wraps VALUES (?)", [(w,) for w in head.wraps])
                connection.execute("COMMIT")
            finally:
                connection.close()  # which empties and removes the WAL
            os.rename(f"{directory}/{TOMBSTONES}.new", f"{directory}/{TOMBSTONES}")
            os.rename(f"{path}.new", path)
            sync_directory(directory)
        except (OSError, sqlite3.Error) as error:
            remove_leftovers(directory)
            raise StoreError(f"{path}: {words(error)}") from None

    def _one(self, query: str) -> object:
        return self._read(query)[0][0]

    def _read(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[object, ...]]:
        try:
            return self._connection.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            raise StoreError(words(error)) from None

    def head(self) -> Head:
        """Return the head. Raises StoreError."""
        heads = self._read("SELECT uuid, state FROM head")
        wraps = [wrap for (wrap,) in self._read("SELECT wrap FROM wraps")]
        if len(heads) != 1 or not all(isinstance(each, bytes) for each in (*heads[0], *wraps)):
            raise StoreError("its head is missing or damaged")
        ((uuid, state),) = heads
        return Head(uuid, wraps, state)  # type: ignore[arg-type]  # see above

    def rows(self) -> Iterator[list[Row]]:
        """Yield all rows, some at a time. Raises StoreError."""
        try:
            cursor = self._connection.execute("SELECT key, kind, box FROM rows")
            while found := cursor.fetchmany(ROWS_PER_READ):
                yield [Row(*row) for row in found]
        except sqlite3.Error as error:
            raise StoreError(words(error)) from None

    def tags(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the key and tag of each row. Raises StoreError."""
        yield from self._read("SELECT key, substr(box, -?) FROM rows", (TAG_BYTES,))  # type: ignore[misc]

    # --- changes, within a transaction. They raise sqlite3.Error.

    def begin(self) -> None:
        """Begin a transaction."""
        self._connection.execute("BEGIN IMMEDIATE")

    def tag(self, row_key: bytes) -> bytes | None:
        """Return the tag of a row, None if there is no such row."""
        found = self._connection.execute(
            "SELECT substr(box, -?) FROM rows WHERE key = ?", (TAG_BYTES, row_key)
        ).fetchone()
        return None if found is None else found[0]

    def add(self, row: Row) -> bool:
        """Add a row; return False if there is one of its key."""
        added = self._connection.execute("INSERT OR IGNORE INTO rows VALUES (?, ?, ?)", row)
        return added.rowcount == 1

    def delete(self, row_key: bytes) -> None:
        """Delete a row."""
        self._connection.execute("DELETE FROM rows WHERE key = ?", (row_key,))

    def set_state(self, state: bytes) -> None:
        """Replace the sealed state."""
        self._connection.execute("UPDATE head SET state = ?", (state,))

    def set_wraps(self, wraps: Sequence[bytes]) -> None:
        """Replace the wraps of the data key."""
        self._connection.execute("DELETE FROM wraps")
        self._connection.executemany("INSERT INTO wraps VALUES (?)", [(wrap,) for wrap in wraps])

    def commit(self) -> None:
        """End the transaction; on return everything is on the disk."""
        self._connection.execute("COMMIT")

    def rollback(self) -> None:
        """Undo the transaction, if there is one."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    # --- the whole file

    def flush_log(self) -> None:
        """Move everything from the WAL into the file, and empty the WAL. Raises sqlite3.Error."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def copy_to(self, path: str) -> None:
        """Write a copy of the store's file. Raises StoreError."""
        try:
            create_file(path, 0)
            target = sqlite3.connect(path, isolation_level=None)
            try:
                self._connection.backup(target)
            finally:
                target.close()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{path}: {words(error)}") from None

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def remove_leftovers(directory: str) -> None:
    """Remove what an interrupted creation or backup has left."""
    for name in LEFTOVERS:
        with contextlib.suppress(OSError):
            os.unlink(f"{directory}/{name}")


def destroy(directory: str) -> None:
    """Overwrite the database with zeros and remove all files of a store. Raises StoreError, and
    then nothing was changed if a file is not the store's own.

    Without the wraps the rows cannot be opened, even where the disk keeps old blocks.
    """
    check_directory(directory)
    present = [f"{directory}/{n}" for n in FILES if os.path.lexists(f"{directory}/{n}")]
    for path in present:
        check_file(path)
    try:
        for path in present:
            _overwrite(path)
            os.unlink(path)
        sync_directory(directory)
    except OSError as error:
        raise StoreError(f"{error.filename or directory}: {error.strerror}") from None


def _overwrite(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        left, at = os.fstat(fd).st_size, 0
        while at < left:
            at += os.pwrite(fd, bytes(min(1 << 20, left - at)), at)
        os.fsync(fd)
    finally:
        os.close(fd)


def words(error: Exception) -> str:
    """Return the reason of a failed access to the file, which no content is part of."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = str(error)
    return "it is in use by another process" if said == "database is locked" else said


def _connect(path: str) -> sqlite3.Connection:
    """Open an existing file for this process alone. Raises StoreError."""
    try:
        connection = sqlite3.connect(
            f"file:{_quoted(path)}?mode=rw", uri=True, isolation_level=None, timeout=0,
            check_same_thread=False,
        )  # fmt: skip
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {words(error)}") from None
    try:
        # EXCLUSIVE before WAL: the index of the WAL is then private memory, and not a file.
        for pragma in (
            "locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL",
            "secure_delete = ON", "temp_store = MEMORY", "trusted_schema = OFF",
            "cell_size_check = ON",
        ):  # fmt: skip
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        connection.close()
        raise StoreError(f"{path}: {words(error)}") from None
    return connection


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
