# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all connections share: the tree, the commands of each socket, access, deliveries, events.

`Core` creates and holds them, and answers nothing itself: each connection's Monitor does. server
creates it.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping
from types import MappingProxyType
from typing import Final, Literal

from secretd.access.decision import Access, Grant
from secretd.access.peer import Peer
from secretd.audit.log import Audit
from secretd.audit.records import AUDIT_ID_CHARACTERS
from secretd.descriptors.deliveries import Deliveries
from secretd.descriptors.threads import BlockingCalls
from secretd.limits import Tuning
from secretd.monitor.broadcast import Broadcaster
from secretd.monitor.failures import log_internal
from secretd.monitor.fleet_watch import FleetWatch
from secretd.monitor.tables import tables
from secretd.qapi.command import Command
from secretd.qom.paths import Paths
from secretd.qom.tree import ObjectTree
from secretd.wire import encoder
from secretd.wire import messages as wire
from secretd.wire.encoder import JSONText
from secretd.wire.messages import VersionInfo

QEMU_VERSION: Final = (10, 0, 0)
"""The QEMU version that secretd follows, as the greeting says it."""


class Core:
    """What all sessions share.

    ``quit``: called with the data of SHUTDOWN as JSON text; it ends the daemon with all secrets.
    ``start``: runs a coroutine that ends with the server at the latest. ``log_dropped``: returns
    the number of lost log lines. ``stopping``: True once new requests are no longer answered.
    """

    def __init__(  # noqa: PLR0917 - what a server consists of
        self,
        tree: ObjectTree,
        commands: Iterable[Command],
        package: str,
        audit: Audit,
        quit: Callable[[str], None],  # noqa: A002 - the command's name
        start: Callable[[Coroutine[object, object, None]], "asyncio.Task[None]"],
        tuning: Tuning,
    ) -> None:
        # 1. The parts that the server supplies.
        self.tree = tree
        self.paths = Paths(tree)
        self.limits = tree.limits
        self.package = package
        self.version: JSONText[VersionInfo] = JSONText(
            encoder.value(wire.version(QEMU_VERSION, package))
        )
        self.audit = audit
        self.quit = quit
        self.start = start
        self.tuning = tuning
        self.instance = int.from_bytes(os.urandom(8)) >> 11  # JSON numbers are exact up to there
        self.start_time = int(time.time())
        self.stopping = False
        self.serving = False
        self._background: set[asyncio.Task[None]] = set()
        self.used_offers: dict[bytes, int] = {}  # nonces of other hosts, with their ends
        self.offer_tries: Counter[str] = Counter()
        self.has_one_session: Callable[[], bool] = lambda: False
        self.log_dropped: Callable[[], int] = lambda: 0
        # 2. The parts that depend on the tree.
        self.access = Access(tree, audit, tuning)
        self.broadcaster = Broadcaster(self.access, tuning)
        self.threads = BlockingCalls(tuning.stuck_seconds)
        self.deliveries = Deliveries(tree.scratch, self.threads, self.access.take_back, tuning)
        # This must follow the index of grants, which subscribed when access was created.
        tree.subscribe(decision=self._recheck_deliveries, removal=self.deliveries.withdraw)
        # 3. The store, if one is declared.
        tree.subscribe(store=self._declared)
        for store_id in tree.declared:
            self._declared(store_id)
        # 4. The fleet, if there is one.
        self.fleet = FleetWatch(self)
        # 5. The commands of each kind of socket.
        self.tables = tables(list(commands))

    @property
    def memory(self) -> Literal["secretmem", "mlock", "none"]:
        """The protection level of secrets' memory."""
        return self.tree.journal.arena.level

    def _recheck_deliveries(self, _object_id: str) -> None:
        self.deliveries.recheck(self.access.holds)

    def delivered(self, grant: Grant, origin: object) -> None:
        """Note and announce that a secret has reached its reader; ``origin``: its session."""
        self.access.delivered(grant)
        if self.broadcaster.subscribers:  # usually there are none
            members = {"version": grant.object_id} if grant.alias else {}
            name = grant.alias or grant.object_id
            self.announce("SECRET_READ", name, grant.peer, origin, members)

    def announce(
        self,
        name: str,
        object_id: str,
        peer: Peer | None,
        origin: object,
        members: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Publish an event about a secret.

        ``peer``: the peer that caused it, None without one; ``origin``: its session. ``members``:
        further ids that its data has.
        """
        uid = None if peer is None or peer.trusted else peer.uid
        if not self.broadcaster.accepts(name, object_id, uid, origin):
            return
        # An identifier is plain ASCII; a requested id may be anything, and is cut as in the audit.
        shown = object_id[:AUDIT_ID_CHARACTERS] if name == "SECRET_DENIED" else object_id
        quoted = encoder.value(shown)
        data = f'"id": {quoted}'
        for member, value in members.items():
            data += f', "{member}": {encoder.value(value)}'
        bare = wire_event(name, f"{{{data}}}")
        full = bare
        if peer is not None:
            full = wire_event(name, f'{{{data}, "peer": {encoder.value(peer.info)}}}')
        self.broadcaster.publish(name, object_id, full, bare, origin, uid)

    def announce_to_control(
        self, name: str, members: dict[str, object], peer: Peer | None, origin: object
    ) -> None:
        """Publish an event to control connections only; ``members``: those of its data but the
        peer.
        """
        object_id = str(members["id"])
        uid = None if peer is None or peer.trusted else peer.uid
        if self.broadcaster.accepts(name, object_id, uid, origin):
            data = members if peer is None else members | {"peer": peer.info}
            event = wire_event(name, encoder.value(data))
            self.broadcaster.publish(name, object_id, event, b"", origin, uid)

    def expire(self, object_id: str) -> None:
        """End the deliveries of an expired object, wipe it, and announce that."""
        kind, _ = self.tree.delete(object_id)  # a row that stays has expired, too
        self.audit.append("expire", id=object_id, type=kind.info.name)
        if kind.number in self.tree.types.secrets:
            self.announce("SECRET_EXPIRED", object_id, None, None)
        elif kind.decides:
            self.announce_to_control("SECRET_REVOKED", {"id": object_id}, None, None)

    # --- the store

    def _declared(self, store_id: str) -> None:
        """A secret-store was added: keep objects in it from now on."""
        from secretd.qom.keeper import Keeper  # it imports SQLite, which most daemons never need

        keeper = self.tree.keeper = Keeper(self.tree, store_id)
        if self.serving:
            self.serve_store()
            self.background(keeper.unlock())

    async def open_store(self) -> None:
        """Open the store before the first connection, if it answers within some seconds."""
        if self.tree.keeper is not None:
            opening = self.background(self.tree.keeper.unlock())
            await asyncio.wait({opening}, timeout=self.tuning.source_seconds)

    def background(self, coroutine: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        """Run a step of the store. Neither its failure nor its disk ends or holds up the server."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background_ended)
        return task

    def _background_ended(self, task: "asyncio.Task[None]") -> None:
        self._background.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            log_internal(error)

    def serve_store(self) -> None:
        """From now on, record and announce the store's state."""
        self.serving = True
        keeper = self.tree.keeper
        if keeper is not None:
            keeper.start = self.background
            keeper.on_state = self._note_store
            self._note_store()

    def _note_store(self) -> None:
        keeper = self.tree.keeper
        assert keeper is not None
        members: dict[str, object] = {"id": keeper.id, "state": keeper.state}
        if keeper.reason:
            members["reason"] = keeper.reason
        self.audit.append("store", None, count=keeper.loaded, **members)
        self.announce_to_control("SECRET_STORE", members, None, None)
        if keeper.state == "open":
            self.fleet.start()

    async def close_store(self) -> None:
        """Write what waits and close the store, at the end of the process."""
        keeper = self.tree.keeper
        if keeper is not None and keeper.store is not None:
            self.background(keeper.store.close())
        if self._background:
            waiting = set(self._background)
            await asyncio.wait(waiting, timeout=self.tuning.stop_seconds)
            for task in waiting:
                task.cancel()


def wire_event(name: str, data: str) -> bytes:
    """Return an event with the present time; ``data`` is JSON text."""
    now = time.time_ns() // 1000
    return wire.event(name, data, now // 1_000_000, now % 1_000_000)
