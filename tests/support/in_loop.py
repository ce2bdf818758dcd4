# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server in the loop of the test itself, for clients that do not block."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from secretd.access.peer import SocketRole
from secretd.journal.journal import Journal
from secretd.limits import Tuning
from secretd.memory.arena import SCRATCH_RESERVE, SCRATCH_WINDOW, Arena
from secretd.monitor.commands import COMMANDS
from secretd.net.listener import listen
from secretd.qom.registry import TYPES
from secretd.qom.tree import ObjectTree
from secretd.server.server import Server
from tests.support.needs import ARENA_LEVEL


class Served(NamedTuple):
    """A server that runs, and the paths of its sockets."""

    server: Server
    tree: ObjectTree
    control: str
    client: str


@asynccontextmanager
async def served(directory: Path, tuning: Tuning) -> AsyncIterator[Served]:
    """Run a server in this loop until the context ends; no locked memory may be left over then."""
    scratch = Arena(ARENA_LEVEL, window=SCRATCH_WINDOW, reserve=SCRATCH_RESERVE)
    journal = Journal(Arena(ARENA_LEVEL))
    tree = ObjectTree(journal, scratch, TYPES)
    server = Server(tree, COMMANDS.by_name.values(), "secretd test", tuning=tuning)
    control, client = str(directory / "control.sock"), str(directory / "client.sock")
    server.add(listen(control, SocketRole.CONTROL, 0o600))
    server.add(listen(client, SocketRole.CLIENT, 0o666))
    ready = asyncio.Event()
    running = asyncio.create_task(server.run(ready.set))
    await ready.wait()
    try:
        yield Served(server, tree, control, client)
    finally:
        server.stop()
        await running
        while not server.core.threads.idle():  # noqa: ASYNC110 - threads tell no event
            await asyncio.sleep(0)
        held = scratch.held
        journal.close()
        journal.arena.close()
        scratch.close()
    assert held == 0, "scratch memory was not freed"
