# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd is killed a hundred times at random moments, while clients add, read and delete.

Under a real systemd, which keeps the arena and the journal, with a real client.
tests/journal/test_restore.py covers every moment of a kill within secretd's own writes.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import signal
from collections.abc import Iterator

import pytest

from secretd.client import Client, ExecInterruptedError, ExecuteError
from tests.e2e.box import Box
from tests.e2e.test_systemd import SOCKETS, drop_in, trixie

SIZES = (0, 1, 32, 32, 32, 64, 65, 1000, 5000, 70_000, 130_000)


@pytest.fixture(params=[(252, 100), (257, 20)], ids=lambda param: f"{param[0]}")
def killed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Box, int]]:
    """A box, and how often its secretd is to be killed."""
    version, times = request.param
    name = f"secretd-kill-{version}-{os.getpid()}"
    if version == 252:
        box = Box(name, request.getfixturevalue("installed"))
    else:
        box = trixie(tmp_path_factory, name)
    try:
        box.run("systemd-sysusers")
        drop_in(box, "[Service]\nRestartSec=0\n")
        box.run("systemctl", "start", *SOCKETS)
        yield box, times
    finally:
        box.close()


def content(object_id: str) -> bytes:
    """The secret of an id: unlike all others, and with its size in it."""
    return hashlib.shake_128(object_id.encode()).digest(SIZES[int(object_id.rpartition("-")[2])])


HELD = 500_000
"""Bytes that a worker holds about: 8 MiB may be locked in all."""


class Worker:
    """A client that does one thing after the other, and the answer to each."""

    def __init__(self, path: str, name: str, seed: int) -> None:
        self._client = Client(path)
        self._name = name
        self._rng = random.Random(seed)
        self._number = 0
        self.connected = asyncio.Event()
        self.there: set[str] = set()
        self.added = self.deleted = self.read = self.interrupted = 0

    async def run(self, stop: asyncio.Event) -> None:
        """Work until ``stop``."""
        async with self._client:
            self.connected.set()
            while not stop.is_set():
                await self._step()
            found = {s.id for s in await self._client.list() if s.id.startswith(self._name)}
            assert found == self.there
            for object_id in self.there:
                await self._check(object_id)

    async def _step(self) -> None:
        kind = self._rng.random()
        held = sum(len(content(object_id)) for object_id in self.there)
        if kind < (0.45 if held < HELD else 0.1) or not self.there:
            self._number += 1
            await self._add(f"{self._name}-{self._number}-{self._rng.randrange(len(SIZES))}")
        elif kind < 0.75:
            await self._check(self._rng.choice(sorted(self.there)))
        else:
            await self._delete(self._rng.choice(sorted(self.there)))

    async def _add(self, object_id: str) -> None:
        try:
            await self._client.add_bytes(object_id, memoryview(content(object_id)))
        except ExecInterruptedError:
            # Without an answer it may have been done: it is there whole, or not at all.
            self.interrupted += 1
            try:
                await self._check(object_id)
            except ExecuteError as error:
                if str(error) == f"No secret with id '{object_id}'":
                    return
                raise
        self.added += 1
        self.there.add(object_id)

    async def _check(self, object_id: str) -> None:
        with await self._client.read(object_id) as secret:
            assert secret.view == content(object_id), object_id
        self.read += 1

    async def _delete(self, object_id: str) -> None:
        try:
            await self._client.delete(object_id)
        except ExecInterruptedError:
            self.interrupted += 1
            try:
                await self._check(object_id)
            except ExecuteError as error:
                assert "No secret with id" in str(error)  # noqa: PT017 - it may be there, too
            else:
                return
        self.there.discard(object_id)
        self.deleted += 1
        with pytest.raises(ExecuteError, match="No secret with id"):
            await self._client.read(object_id)


async def kill(box: Box, times: int, rng: random.Random) -> None:
    """Kill what runs, so many times: some time after it appeared, whether it was ready or not."""
    seen: set[int] = set()
    while times:
        pid = 0
        while not pid:
            pid = next((p for p in box.processes("secretd.service") if p not in seen), 0)
            await asyncio.sleep(0)
        seen.add(pid)
        delay = rng.uniform(0, 0.35) if rng.random() < 0.5 else rng.uniform(0.3, 1)
        await asyncio.sleep(delay)  # the random moment is what is tested
        # systemd may have had a process of its own there; had secretd ended by itself, there would
        # be more restarts than kills.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            times -= 1


@pytest.mark.timeout(400)
def test_nothing_that_was_acknowledged_is_lost(killed: tuple[Box, int]) -> None:
    """Every acknowledged add is there, whole; no acknowledged delete comes back; clients
    reconnect.
    """
    box, times = killed
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"\nseed {seed}")
    path = box.path("/run/secretd/control.sock")
    workers = [Worker(path, f"w{number}", seed + number) for number in range(3)]

    def held() -> int:
        return sum(len(content(i)) for w in workers for i in w.there)

    async def main() -> None:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(worker.run(stop))
            for worker in workers:  # a client's first connection is not tried again
                await worker.connected.wait()
            while held() <= 512 << 10:  # it has grown by several segments before the first kill
                await asyncio.sleep(0.01)
            await kill(box, times, random.Random(seed))
            stop.set()

    asyncio.run(main())
    said = box.journal("secretd")
    ready = sum(line.startswith("version ") for line in said)
    restarts = int(box.show("secretd", "NRestarts"))
    total = {
        name: sum(getattr(w, name) for w in workers)
        for name in ("added", "deleted", "read", "interrupted")
    }
    print(
        f"{restarts} restarts, {restarts + 1 - ready} of them before it was ready; {total}; "
        f"{held()} bytes held"
    )
    assert restarts == times
    assert restarts + 1 - ready >= times // 20  # kills that fell into a start
    assert total["interrupted"] > 0
    assert not [line for line in said if "internal error" in line or "Traceback" in line]
