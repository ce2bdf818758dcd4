# SPDX-License-Identifier: LGPL-2.1-or-later
"""One store: its thread, and the queue of changes that it writes in groups.

Theory of operation. A thread of its own owns the store's files, since fdatasync(2) may take seconds
or for ever; the loop only adds to its queue. The thread takes all changes that wait, writes them in
one transaction (group commit), and reports their outcome to the loop, which finishes their
`Commit`s in order. So a change is acknowledged after it is on the disk, and changes of one id are
written in the order in which they were made.

What can go wrong: a transaction fails (a full disk, a read-only file system), and its changes fail
(store.disk); or it never returns, and nothing but its changes waits. An older copy of everything
cannot be told from inside; qom.declared_store compares sequence numbers.

qom.declared_store and qom.keeper call this module. It knows objects only as `Stored` and a number
for their type.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from queue import Empty, SimpleQueue
from typing import Final, NamedTuple, TypeVar

from secretd.errors import INTERNAL_ERROR, CommandError, StoreError
from secretd.memory.arena import Arena, LockedBuffer
from secretd.store.commit import Commit
from secretd.store.database import destroy, words
from secretd.store.directory import DATABASE
from secretd.store.disk import Change, Disk
from secretd.store.rows import Stored, pack

CHANGES_PER_TRANSACTION: Final = 128
"""Changes that are written together; their outcomes are reported in one turn of the loop."""

T = TypeVar("T")

log = logging.getLogger("secretd")


class _End(NamedTuple):
    """The last job: close the files, and with ``destroyed`` remove them."""

    destroyed: bool


class Store:
    """A store that the process has open.

    ``on_written``: called in the loop with the store after each transaction, once its `Commit`s are
    finished.
    ``sequence``, ``rows``, ``uuid``, ``clock``: of the head, as of the last report to the loop.
    """

    def __init__(self, path: str, scratch: Arena, on_written: "Callable[[Store], None]") -> None:
        self.path = path
        self.sequence = self.rows = self.clock = 0
        self.uuid = ""
        self._scratch = scratch
        self._on_written = on_written
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[Change | Callable[[], None] | _End] = SimpleQueue()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._disk: Disk = None  # type: ignore[assignment]  # until it is open
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    # --- the loop's side

    def put(self, kind: int, stored: Stored, plaintext: memoryview | None) -> Commit:
        """Write an object, replacing the one of its id. Raises LockedMemoryExhausted."""
        commit = Commit(0 if plaintext is None else len(plaintext))
        content = pack(stored, plaintext, self._scratch)
        self._jobs.put(Change(stored.id, kind, content, commit))
        return commit

    def delete(self, object_id: str) -> Commit:
        """Delete an object's row, if there is one."""
        commit = Commit()
        self._jobs.put(Change(object_id, 0, None, commit))
        return commit

    async def open(self, key: LockedBuffer) -> None:
        """Open the store with the administrator's ``key``, which is taken over. Raises
        StoreError.
        """
        await self._begin(key, Disk)

    async def create(self, key: LockedBuffer) -> None:
        """Make an empty store and open it; see `open`."""
        await self._begin(key, Disk.create)

    async def _begin(
        self, key: LockedBuffer, opened: Callable[[str, LockedBuffer, Arena], Disk]
    ) -> None:
        def begin() -> None:
            with key:
                self._disk = opened(self.path, key, self._scratch)

        await self.call(lambda _disk: begin())
        self._refresh()
        self.uuid, self.clock = self._disk.uuid, self._disk.clock

    async def exists(self) -> bool:
        """Return True if there is a file in the store's place."""
        return await self.call(lambda _disk: os.path.lexists(f"{self.path}/{DATABASE}"))

    async def contents(self) -> AsyncIterator[tuple[int, LockedBuffer]]:
        """Yield the type number and the content (owned by the caller) of each row that is not
        deleted. Raises StoreError.
        """
        chunks = self._disk.living()
        while (rows := await self.call(lambda _disk: next(chunks, None))) is not None:
            for row in rows:
                yield row.kind, self._disk.opened(row)

    async def rekey(self, key: LockedBuffer, *, only: bool, data: bool) -> None:
        """Let a further ``key`` (taken over) open the store, or with ``only`` no other.

        With ``data`` everything is sealed anew, too, and no other key opens it. Raises StoreError.
        """

        def rekey(disk: Disk) -> None:
            with key:
                if data:
                    disk.reencrypt(key)
                else:
                    disk.rewrap(key, only=only)

        await self.call(rekey)
        self._refresh()

    def _refresh(self) -> None:
        self.sequence, self.rows = self._disk.sequence, self._disk.rows

    async def close(self, *, destroyed: bool = False) -> None:
        """Write what waits, wipe the keys and close the files; with ``destroyed`` remove them, too.

        Raises StoreError if they cannot be removed.
        """
        if not self._ended.done():
            self._jobs.put(_End(destroyed))
        await asyncio.shield(self._ended)

    async def call(
        self, function: Callable[[Disk], T], discard: Callable[[T], object] = lambda _value: None
    ) -> T:
        """Return what ``function`` returns, called in the store's thread with its files. Raises
        what it raises, and StoreError for errors of the database.

        ``discard``: called with the result if the caller was cancelled meanwhile.
        """
        outcome: asyncio.Future[T] = self._loop.create_future()

        def finish(value: T | None, error: BaseException | None) -> None:
            if outcome.cancelled():
                if error is None:
                    discard(value)  # type: ignore[arg-type]  # it is a T then
            elif error is None:
                outcome.set_result(value)  # type: ignore[arg-type]  # it is a T then
            else:
                outcome.set_exception(error)

        def job() -> None:
            try:
                value = function(self._disk)
            except sqlite3.Error as error:
                self._post(finish, None, StoreError(words(error)))
            except Exception as error:  # noqa: BLE001 - the caller gets it
                self._post(finish, None, error)
            else:
                self._post(finish, value, None)

        self._jobs.put(job)
        return await outcome

    # --- the thread's side

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            # 1. All changes that wait, up to another job.
            batch: list[Change] = []
            while isinstance(job, Change):
                batch.append(job)
                if len(batch) == CHANGES_PER_TRANSACTION:
                    break
                try:
                    job = self._jobs.get_nowait()
                except Empty:
                    break
            if batch:
                self._write(batch)
            # 2. The other job.
            if isinstance(job, _End):
                self._post(self._finish, self._shut(job))
                return
            if not isinstance(job, Change):
                job()

    def _write(self, batch: list[Change]) -> None:
        disk = self._disk
        try:
            errors = disk.write(batch)
        except Exception as error:  # noqa: BLE001 - the next ones may succeed, and all are answered
            log.error("internal error in the store: %s", type(error).__name__)
            errors = [CommandError(INTERNAL_ERROR)] * len(batch)
        self._post(self._report, batch, errors, disk.sequence, disk.rows)

    def _shut(self, job: "_End") -> Exception | None:
        """Close the files; return what went wrong."""
        try:
            if self._disk is not None:
                self._disk.close()
            if job.destroyed:
                destroy(self.path)
        except Exception as error:  # noqa: BLE001 - the caller of close() gets it
            return error
        return None

    def _finish(self, error: Exception | None) -> None:
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    def _report(
        self, batch: list[Change], errors: list[CommandError | None], sequence: int, rows: int
    ) -> None:
        """Finish the changes of a transaction, in the loop."""
        self.sequence, self.rows = sequence, rows
        for change, error in zip(batch, errors, strict=True):
            change.commit.finish(error)
        self._on_written(self)
