# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own commands about the store: its state, its keys, copies and its end."""

import asyncio
import contextlib
import os
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Final, Literal, NotRequired, TypedDict

from msgspec import UNSET, UnsetType

from secretd.errors import AccessDenied, CommandError, DeviceNotFound, StoreError
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands

if TYPE_CHECKING:
    from secretd.qom.keeper import Keeper

command: Final = Commands()

_COPIED_BYTES: Final = 64 << 10


class StoreInfo(TypedDict):
    """A secret-store. ``rows``, and ``sequence``, the number of its last transaction, are known
    while it is open; ``reason`` says why it has failed.
    """

    id: str
    path: str
    keyid: str
    secrets: str
    state: Literal["locked", "open", "failed"]
    reason: NotRequired[str]
    rows: NotRequired[int]
    sequence: NotRequired[int]


class Verified(TypedDict):
    """The result of secret-store-verify: the number of rows."""

    rows: int


class Copied(TypedDict):
    """The result of secret-store-backup: the number of bytes written."""

    size: int


@command()
def query_secret_store(monitor: Monitor) -> list[StoreInfo]:
    """Return the store that is declared, if there is one."""
    keeper = monitor.tree.keeper
    if keeper is None:
        return []
    info: StoreInfo = {
        "id": keeper.id,
        "path": keeper.path,
        "keyid": keeper.keyid,
        "secrets": keeper.pattern,
        "state": keeper.state,
    }
    if keeper.reason:
        info["reason"] = keeper.reason
    if keeper.store is not None:
        info["rows"] = keeper.store.rows
        info["sequence"] = keeper.store.sequence
    return [info]


def _own(monitor: Monitor, store_id: str) -> "Keeper":
    """Return the store, for what only the trusted may do. Raises CommandError."""
    if not monitor.trusted:
        raise AccessDenied("Only uid 0 and the daemon's own uid may do this")
    return _keeper(monitor, store_id)


def _keeper(monitor: Monitor, store_id: str) -> "Keeper":
    keeper = monitor.tree.keeper
    if keeper is None or keeper.id != store_id:
        raise DeviceNotFound(f"Store '{store_id}' not found")
    return keeper


@command(waits=True)
async def secret_store_unlock(monitor: Monitor, id: str) -> None:  # noqa: A002 - the wire's name
    """Open a store whose key exists, or wait until it is open; the reply says why it cannot be
    opened.
    """
    keeper = _own(monitor, id)
    await _whole(monitor, keeper.unlock())
    keeper.check()


@command(waits=True)
async def secret_store_rekey(
    monitor: Monitor,
    id: str,  # noqa: A002
    keyid: str,
    only: bool | UnsetType = UNSET,
    data: bool | UnsetType = UNSET,
) -> None:
    """Let the secret ``keyid`` open the store, too.

    With ``only`` no other key opens it from then on. With ``data`` all rows are encrypted anew,
    under a new data key, and no other key opens them.
    """
    keeper = _own(monitor, id)
    with _words(keeper):
        await _whole(monitor, keeper.rekey(keyid, only=only is True, data=data is True))
    monitor.core.audit.append("rekey", monitor.subject, id=id)


@command(waits=True)
async def secret_store_verify(monitor: Monitor, id: str) -> Verified:  # noqa: A002
    """Open every row of the store, and compare all of them with its head."""
    keeper = _own(monitor, id)
    with _words(keeper):
        return {"rows": await keeper.check().call(lambda disk: disk.verify())}


@command(waits=True)
async def secret_store_backup(monitor: Monitor, id: str, fdname: str) -> Copied:  # noqa: A002
    """Write a copy of the store's database to the descriptor that getfd called ``fdname``, which is
    closed. The copy is as the store is at one moment, and opens with the same key.
    """
    fd = monitor.named.take(fdname)
    try:
        keeper = _own(monitor, id)
        with _words(keeper):
            copy = await keeper.check().call(lambda disk: disk.copy(), os.close)
    except BaseException:
        fd.close()
        raise

    def write() -> int:
        try:
            return _copy(copy, fd.fileno())
        finally:
            os.close(copy)

    try:
        size = await monitor.core.threads.run(
            monitor.peer.uid, lambda _size: None, write, lambda: os.close(copy), fd
        )
    except OSError as error:
        raise CommandError(f"Unable to write the copy: {os.strerror(error.errno or 0)}") from None
    monitor.core.audit.append("backup", monitor.subject, id=id, size=size)
    return {"size": size}


def _copy(source: int, target: int) -> int:
    """Copy one descriptor's bytes to another, in a thread; return their number."""
    size = 0
    while piece := os.pread(source, _COPIED_BYTES, size):
        written = 0
        while written < len(piece):
            written += os.write(target, piece[written:])
        size += len(piece)
    return size


@command(waits=True)
async def secret_store_destroy(monitor: Monitor, id: str) -> None:  # noqa: A002
    """Destroy the store's key and files, and wipe the objects that it keeps from memory."""
    keeper = _own(monitor, id)
    with _words(keeper):
        await _whole(monitor, keeper.destroy())
    monitor.core.audit.append("destroy", monitor.subject, id=id)


async def _whole(monitor: Monitor, step: Coroutine[object, object, None]) -> None:
    """Take a step to its end, even if the client leaves. Raises what it raises."""
    outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        failure: Exception | None = None
        try:
            await step
        except Exception as error:  # noqa: BLE001 - it is raised below
            failure = error
        if outcome.cancelled():
            return
        if failure is None:
            outcome.set_result(None)
        else:
            outcome.set_exception(failure)

    monitor.core.background(run())
    await outcome


@contextlib.contextmanager
def _words(keeper: "Keeper") -> Iterator[None]:
    """Turn StoreError into a command's error."""
    try:
        yield
    except StoreError as error:
        raise CommandError(f"Store '{keeper.id}': {error}") from None
