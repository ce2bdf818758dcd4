# SPDX-License-Identifier: LGPL-2.1-or-later
"""A declared store: locked, open or failed, and what the journal knows of it.

monitor.core makes it, as a qom.keeper.Keeper, when a secret-store is declared. qom.store_rows takes
its rows over, and store.store has them.

Theory of operation. A store is locked, open or failed.

- Locked: the secret that ``keyid`` names does not exist, or its rows are being read. Additions and
  changes of the objects that it covers are refused.
- Adding that secret opens it, deleting it locks it again; the objects stay in memory.
- Failed: it cannot be used, and the reason is known. Adding the key again is another attempt.

The journal has the number of the last transaction, and the ids whose removal is not in the store
yet. So after a restart

- an equal number means that nothing has to be read;
- a higher number in the store means that the process ended between the store and the journal: the
  store wins;
- a lower one means that an older copy was put in its place: the store fails, and memory stays.

Objects of the command line, the store's key, and the secrets by which that one is encrypted are
never rows.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, cast

from secretd.crypto.aead import KEY_BYTES
from secretd.errors import CommandError, StoreError
from secretd.memory.arena import LockedBuffer
from secretd.qom.patterns import matcher
from secretd.qom.secret_store import COVERAGE, DOOMED, UNLOCK_SECONDS, UUID, StoreState
from secretd.qom.store_rows import TakingOver, Winner, dropping_order
from secretd.store.commit import Commit
from secretd.store.disk import Disk
from secretd.store.store import Store

if TYPE_CHECKING:
    from secretd.qom.tree import ObjectTree

log = logging.getLogger("secretd")

NEXT: Final = ".new"
"""What follows ``keyid`` in the id of the key that replaces it; that one is no row, either."""


class DeclaredStore:
    """The store of the secret-store object ``store_id``.

    ``on_state``: called after each change of ``state``. ``start``: runs a coroutine beside others;
    None before the loop serves. ``reason``: why it has failed. ``loaded``: the number of objects
    that were read when it was opened.
    """

    def __init__(self, tree: "ObjectTree", store_id: str) -> None:
        record = tree.journal.get(store_id)
        assert record is not None
        given = record.properties
        self.id = store_id
        self.path, self.keyid = str(given["path"]), str(given["keyid"])
        self.pattern = str(given.get("secrets", "*"))
        self.state: StoreState = "locked"
        self.reason = ""
        self.loaded = 0
        self.store: Store | None = None
        self._tree = tree
        self.on_state: Callable[[], object] = lambda: None
        self._matches = matcher(self.pattern)
        self._create = given.get("create") is True
        self._not_rows = {store_id, self.keyid, f"{self.keyid}{NEXT}"}
        tree.own_keys |= {self.keyid, f"{self.keyid}{NEXT}"}
        self._doomed: dict[str, None] = dict.fromkeys(cast("list[str]", given.get(DOOMED, [])))
        self._until = time.monotonic() + cast(int, given.get("unlock-timeout", UNLOCK_SECONDS))
        self._settled = asyncio.Event()  # not locked
        self._changing = asyncio.Lock()  # held while it is opened
        self._dropping = ""
        self._ended = False  # it was destroyed
        self._closing: asyncio.Task[None] | None = None
        self.start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]] | None = None
        self._note(state="locked")

    def covers(self, object_id: str) -> bool:
        """Return True if the store keeps an object of this id."""
        return (
            self._matches(object_id)
            and object_id not in self._not_rows
            and object_id not in self._tree.fixed
        )

    def check(self) -> Store:
        """Return the open store. Raises CommandError."""
        if self.store is not None:
            return self.store
        if self.state == "locked":
            raise CommandError(f"Store '{self.id}' is locked; add its key '{self.keyid}' first")
        raise CommandError(f"Store '{self.id}' has failed: {self.reason}")

    # --- locked, open, failed

    def placed(self, object_id: str) -> None:
        """An object was added to the tree: if it is the key, open the store."""
        if object_id == self.keyid and self.store is None and self.start is not None:
            self.start(self.unlock())

    def lock(self) -> None:
        """Close the store, once what waits is written; its objects stay in memory."""
        store, self.store = self.store, None
        if store is not None:
            assert self.start is not None
            self._closing = self.start(store.close())
            self._set_state("locked")

    @property
    def is_busy(self) -> bool:
        """True while the store's files are open, or are being opened or closed."""
        closing = self._closing is not None and not self._closing.done()
        return self.store is not None or self._changing.locked() or closing

    async def unlock(self) -> None:
        """Open the store if its key exists, and take over its objects; see ``state`` then."""
        async with self._changing:
            if self.store is None and not self._ended and self.keyid in self._tree.journal:
                if self._closing is not None:
                    await self._closing
                await self._open()

    async def _open(self) -> None:
        store: Store | None = None
        try:
            store = Store(self.path, self._tree.scratch, self._note_written)
            if self._create and not await store.exists():
                await store.create(self._key(self.keyid))
            else:
                await store.open(self._key(self.keyid))
            self._not_rows |= {*self._key_chain()}
            await self._take_over(store)
        except Exception as error:  # noqa: BLE001 - the store has failed, and not the daemon
            if store is not None:
                await store.close()
            known = isinstance(error, (CommandError, StoreError))
            reason = str(error) if known else f"internal error: {type(error).__name__}"
            log.error("store '%s' (%s) cannot be used: %s", self.id, self.path, reason)
            self._set_state("failed", reason)
        else:
            self.store = store
            self._note_written(store)
            self._remove_doomed(store)  # what was removed meanwhile, too
            self._set_state("open")

    async def rekey(self, keyid: str, *, only: bool, data: bool) -> None:
        """Let another key open the store. Raises CommandError and StoreError."""
        store = self.check()
        if self.keyid in self._tree.fixed:
            raise CommandError(
                f"key '{self.keyid}' is an object of the command line, so that a new key would be "
                "lost at the next start"
            )
        await store.rekey(self._key(keyid), only=only, data=data)
        self._note_written(store)

    async def destroy(self) -> None:
        """Destroy the store and wipe the objects that it keeps. Raises CommandError and StoreError;
        without its files the store is not opened again.
        """
        async with self._changing:
            store = self.check()
            self.store, self._ended = None, True
            for object_id in dropping_order(self._tree, list(self._tree.journal)):
                if self.covers(object_id) and object_id not in self._tree.pinned:
                    self.drop(object_id)
            try:
                await store.close(destroyed=True)
            except StoreError as error:
                self._ended = False  # its files may still be whole
                self._set_state("failed", f"it was not destroyed: {error}")
                raise
            self._set_state("failed", "it was destroyed")

    def _key(self, keyid: str) -> LockedBuffer:
        """Return a copy of a key in scratch memory. Raises CommandError and StoreError."""
        plaintext = self._tree.plaintext(keyid)
        if len(plaintext) != KEY_BYTES:
            raise StoreError(
                f"key '{keyid}' has {len(plaintext)} bytes, and {KEY_BYTES} are needed"
            )
        key = self._tree.scratch.allocate(KEY_BYTES)
        key.view[:] = plaintext
        return key

    def _key_chain(self) -> list[str]:
        """Return the ids of the key, and of the secrets by which it was encrypted."""
        chain = [self.keyid]
        while (record := self._tree.journal.get(chain[-1])) is not None:
            keyid = record.properties.get("keyid")
            if not isinstance(keyid, str) or keyid in chain:
                break
            chain.append(keyid)
        return chain

    async def settled(self) -> bool:
        """Wait until the store is open or has failed, for ``unlock-timeout`` after it was declared.

        Returns True if there was something to wait for.
        """
        if self._settled.is_set():
            return False
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                await self._settled.wait()
        except TimeoutError:
            return False
        return True

    def _set_state(self, state: StoreState, reason: str = "") -> None:
        self.state, self.reason = state, reason
        if state == "locked":
            self._settled.clear()
        else:
            self._settled.set()
        self._note(state=state)
        self.on_state()

    # --- the journal's part

    def _note_written(self, store: Store) -> None:
        """Note the number of a store's last transaction."""
        if self.id in self._tree.journal and self._tree.keeper is self:
            self._note(sequence=store.sequence, **{UUID: store.uuid, COVERAGE: self._coverage()})

    def _coverage(self) -> str:
        """Return what decides which objects are rows, in a few bytes."""
        told = "\n".join((self.pattern, *sorted(self._tree.fixed)))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def _note(self, **changes: object) -> None:
        """Note in the journal what must survive the process."""
        record = self._tree.journal.get(self.id)
        assert record is not None
        properties = record.properties | changes
        properties.pop(DOOMED, None)
        if self._doomed:
            properties[DOOMED] = list(self._doomed)
        if properties != record.properties:
            self._tree.replace_properties(self.id, properties)

    # --- taking over what the store has

    async def _take_over(self, store: Store) -> None:
        """Make memory and store equal. Raises StoreError; memory is as before then."""
        record = self._tree.journal.get(self.id)
        assert record is not None
        known = record.properties
        is_known = known.get(UUID) == store.uuid
        number = cast(int, known.get("sequence", 0)) if is_known else None
        if number is not None and number > store.sequence:
            raise StoreError(
                f"it was rolled back from {number} to {store.sequence}: an older copy was put in "
                "its place"
            )
        self.loaded = 0
        is_equal = number == store.sequence
        if is_equal and known.get(COVERAGE) == self._coverage():
            return
        await store.call(Disk.check)
        # Where the numbers are equal, other ids are rows than before, and memory is newer.
        wins: Winner = "memory" if is_equal else "store" if is_known else "neither"
        taking = TakingOver(self._tree, store, self._is_row, self.drop, wins)
        self.loaded = await taking.run()

    def _is_row(self, object_id: str) -> bool:
        return self.covers(object_id) and object_id not in self._doomed

    def _remove_doomed(self, store: Store) -> None:
        """Delete the rows of what was removed from memory only."""
        for object_id in list(self._doomed):
            if object_id in self._tree.journal:  # the process ended before it had wiped it
                self.drop(object_id)
            self._delete_row(store, object_id)

    def _delete_row(self, store: Store, object_id: str) -> Commit:
        """Delete the row of an object that is no longer in memory."""
        commit = store.delete(object_id)
        commit.then(lambda error: error or self._doomed.pop(object_id, None))
        return commit

    def drop(self, object_id: str) -> None:
        """Remove an object from the tree only."""
        self._dropping = object_id
        try:
            self._tree.delete(object_id)
        finally:
            self._dropping = ""
