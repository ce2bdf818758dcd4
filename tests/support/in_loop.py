# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server in the loop of the test itself, for clients that do not block."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from secretd.access.peer import SocketRole
from secretd.audit.log import Audit
from secretd.journal.journal import Journal
from secretd.limits import Tuning
from secretd.memory.arena import SCRATCH_RESERVE, SCRATCH_WINDOW, Arena
from secretd.monitor.commands import COMMANDS
from secretd.net.listener import listen
from secretd.qom.registry import TYPES
from secretd.qom.tree import ObjectTree
from secretd.server.server import Server
from tests.support.async_qmp import AsyncClient
from tests.support.needs import ARENA_LEVEL
from tests.support.users import connect_as


class Served:
    """A server that runs in this loop, and the paths of its sockets; ``admins`` is a control socket
    with authz=admins.
    """

    def __init__(self, directory: Path, tuning: Tuning) -> None:
        self.scratch = Arena(ARENA_LEVEL, window=SCRATCH_WINDOW, reserve=SCRATCH_RESERVE)
        self.journal = Journal(Arena(ARENA_LEVEL))
        self.tree = ObjectTree(self.journal, self.scratch, TYPES)
        commands = COMMANDS.by_name.values()
        self.server = Server(self.tree, commands, "secretd test", Audit(), tuning=tuning)
        self.errors: list[dict] = []
        self.clients: list[AsyncClient] = []
        self.control = str(directory / "control.sock")
        self.client = str(directory / "client.sock")
        self.admins = str(directory / "admins.sock")
        self.server.add(listen(self.control, SocketRole.CONTROL, 0o600))
        self.server.add(listen(self.client, SocketRole.CLIENT, 0o666))
        self.server.add(listen(self.admins, SocketRole.CONTROL, 0o666, authz="admins"))

    async def connect(
        self,
        *,
        role: str = "control",
        negotiate: bool = True,
        uid: int | None = None,
        groups: tuple[int, ...] = (),
    ) -> AsyncClient:
        """Connect, as another user if there is a uid; the client is closed with the server."""
        path = {"control": self.control, "client": self.client, "admins": self.admins}[role]
        sock = None if uid is None else connect_as(path, uid, uid, groups)
        client = await AsyncClient.connect(path, negotiate=negotiate, sock=sock)
        self.clients.append(client)
        return client


@asynccontextmanager
async def served(directory: Path, tuning: Tuning) -> AsyncIterator[Served]:
    """Run a server in this loop until the context ends; no locked memory may be left over then."""
    made = Served(directory, tuning)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: made.errors.append(context))
    ready = asyncio.Event()
    running = asyncio.create_task(made.server.run(ready.set))
    await ready.wait()
    try:
        yield made
    finally:
        for client in made.clients:
            client.close()
        made.server.stop()
        await running
        while not made.server.core.threads.idle():
            await asyncio.sleep(0)
        held = made.scratch.held
        made.journal.close()
        made.journal.arena.close()
        made.scratch.close()
    assert made.errors == []
    assert held == 0, "scratch memory was not freed"
