# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events about secrets: who gets them, how often, and when.

On the control door everybody does, with who did it; on the client door only who may read that
secret, without. Who did it gets none: it has the reply. They are collected and sent at the ticks of
a clock, so that when an event comes tells nothing of others; SECRET_READ and SECRET_DENIED are
throttled for each connection and id as QEMU throttles its own (monitor/monitor.c). It decides
nothing (access does) and sends through its listeners.
"""

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from secretd.access import Access
from secretd.peer import Door, Peer

EVENTS_SECONDS: Final = 0.02
"""Seconds between two ticks at which events are sent: with many connections, sending each of them
to each would take longer than what it tells of.
"""

THROTTLED_SECONDS: Final = 1.0
"""Seconds between two SECRET_READ, or SECRET_DENIED, of one id on one connection; of those between,
the last is sent.
"""

THROTTLED_IDS: Final = 256
"""Ids that are throttled at a time on one connection; events of further ones are lost."""

TICK_BYTES: Final = 512 << 10
"""Bytes of events that are sent at one tick to all connections together; the rest waits for the next ones, so
that with many connections requests still get their turn. One event is sent in any case.
"""

TURN_EVENTS: Final = 8
"""Events that are sent before requests get their turn."""

COLLECTED_EVENTS: Final = 10_000
"""Events that wait for a tick; of further ones the count is all that is kept."""

LOST_SECONDS: Final = 1.0
"""Seconds between two tellings of how many of these were lost, while they go on."""

THROTTLED: Final = frozenset({"SECRET_READ", "SECRET_DENIED"})


class Listener(Protocol):
    """A connection, as far as events go. ``actor``: what events that it causes call it; ``since``:
    the number of the last event before it listened; ``throttle``: None where nothing was throttled
    yet.
    """

    actor: object
    peer: Peer
    since: int
    throttle: "Throttle | None"

    @property
    def listening(self) -> bool:
        """True once negotiation is over."""

    def send_events(self, events: bytes, count: int) -> None:
        """Send so many events, or count them as lost."""

    def lose(self, count: int) -> None:
        """Count so many events as lost."""


class Happened(NamedTuple):
    """An event. ``full`` is for the control door, ``bare`` for the client door; ``by``: who did it."""

    name: str
    object_id: str
    full: bytes
    bare: bytes
    by: object


class Throttle:
    """What one connection gets of the events that are throttled."""

    def __init__(self, listener: Listener, may_know: Callable[[Peer, str], bool]) -> None:
        self._listener = listener
        self._may_know = may_know
        self._next: dict[
            tuple[str, str], float
        ] = {}  # when the next one may be sent, by name and id
        self._held: dict[tuple[str, str], bytes] = {}
        self._counts: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def passes(self, name: str, object_id: str, event: bytes) -> bool:
        """True if an event may be sent now; else it is kept, or lost if there are too many."""
        key = (name, object_id)
        loop = asyncio.get_running_loop()
        if key in self._next:
            self._held[key] = event
            return False
        # Each kind has room of its own: refusals of names that somebody made up do not hide reads.
        if self._counts[name] >= THROTTLED_IDS:
            self._listener.lose(1)
            return False
        self._counts[name] += 1
        self._next[key] = loop.time() + THROTTLED_SECONDS
        if self._timer is None:
            self._timer = loop.call_at(self._next[key], self._due)
        return True

    def _due(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        now = loop.time()
        # A dictionary keeps the order in which they came, and all wait for the same time.
        for key, when in list(self._next.items()):
            if when > now:
                self._timer = loop.call_at(when, self._due)
                return
            del self._next[key]
            event = self._held.pop(key, None)
            if event is None:
                self._counts[key[0]] -= 1
            else:
                self._next[key] = now + THROTTLED_SECONDS
                if self._may_know(self._listener.peer, key[1]):
                    self._listener.send_events(event, 1)
        if self._next:
            self._timer = loop.call_at(next(iter(self._next.values())), self._due)

    def close(self) -> None:
        """Forget all."""
        if self._timer is not None:
            self._timer.cancel()


class Announcer:
    """Collects events and sends them to the listeners that may know.

    ``only``: who does what the only listener does, so that nobody needs to be told of it; else None.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self.listeners: set[Listener] = set()
        self.only: object = None
        self._collected: deque[tuple[int, Happened]] = deque()
        self._scheduled = False
        self._uncollected = 0
        self._told = 0.0
        self._room = 0  # bytes that may still be sent at this tick
        self.number = 0  # of the last event

    def add(self, listener: Listener) -> None:
        """Somebody has connected."""
        self.listeners.add(listener)
        self._count()

    def remove(self, listener: Listener) -> None:
        """A connection has ended."""
        self.listeners.discard(listener)
        self._count()

    def _count(self) -> None:
        self.only = None
        if len(self.listeners) == 1:
            (only,) = self.listeners
            self.only = only.actor

    def crowded(self) -> bool:
        """True if there is no room for another event, which then counts as lost."""
        if len(self._collected) < COLLECTED_EVENTS:
            return False
        self.number += 1
        self._uncollected += 1
        return True

    def announce(self, happened: Happened) -> None:
        """Send an event at the next tick; there must be room, as `crowded` says."""
        self.number += 1
        self._collected.append((self.number, happened))
        if not self._scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._scheduled = True
        loop = asyncio.get_running_loop()
        tick = math.floor(loop.time() / EVENTS_SECONDS + 1) * EVENTS_SECONDS
        loop.call_at(tick, self._tick)

    def _tick(self) -> None:
        self._room = TICK_BYTES
        self._some()

    def _some(self) -> None:
        """Send a few; then requests get their turn."""
        self._scheduled = False
        taken: list[tuple[int, Happened]] = []
        while self._collected and len(taken) < TURN_EVENTS and (self._room > 0 or not taken):
            taken.append(self._collected.popleft())
            self._room -= len(taken[-1][1].full) * len(self.listeners)
        self._send(taken)
        if self._collected and self._room > 0:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._some)
        elif self._collected:
            self._schedule()

    def send(self) -> None:
        """Send all that was collected."""
        taken = list(self._collected)
        self._collected.clear()
        self._send(taken)

    def _lost(self) -> int:
        """Return how many events to tell of as lost now: all, once it is over or has gone on for a while."""
        now = asyncio.get_running_loop().time()
        if not self._uncollected or (self._collected and now < self._told + LOST_SECONDS):
            return 0
        self._told = now
        lost, self._uncollected = self._uncollected, 0
        return lost

    def _send(self, taken: list[tuple[int, Happened]]) -> None:
        if not taken:
            return
        special = not THROTTLED.isdisjoint([happened.name for _, happened in taken])
        collected = self._latest(taken) if special else taken
        lost = self._lost()
        together = b"".join([happened.full for _, happened in collected])
        actors = {happened.by for _, happened in collected}
        first = collected[0][0]
        visible: dict[frozenset[str], list[tuple[int, Happened]]] = {}
        for listener in list(self.listeners):
            if not listener.listening:
                continue
            peer = listener.peer
            if peer.door is not Door.CONTROL:
                # Worked out once for all connections of the same kind of client.
                if peer.identities not in visible:
                    visible[peer.identities] = self._visible(peer, collected)
                self._send_some(listener, visible[peer.identities])
            elif peer.trusted or self._access.admits(peer):
                if lost:
                    listener.lose(lost)
                if special or listener.since >= first:
                    self._send_some(listener, collected)
                elif listener.actor in actors:
                    others = [h.full for _, h in collected if h.by is not listener.actor]
                    if others:
                        listener.send_events(b"".join(others), len(others))
                else:
                    listener.send_events(together, len(collected))

    def _may_know(self, peer: Peer, object_id: str) -> bool:
        return self._access.admits(peer) and self._access.may_read(peer, object_id)

    def _visible(
        self, peer: Peer, collected: list[tuple[int, Happened]]
    ) -> list[tuple[int, Happened]]:
        """Return what a peer on the client door may know."""
        readable = set(self._access.readable(peer, {h.object_id for _, h in collected}))
        return [(number, h) for number, h in collected if h.object_id in readable]

    @staticmethod
    def _latest(taken: list[tuple[int, Happened]]) -> list[tuple[int, Happened]]:
        """Of what is throttled, only the last two by different clients can matter to anybody."""
        kept: list[tuple[int, Happened]] = []
        seen: dict[tuple[str, str], list[object]] = {}
        for number, happened in reversed(taken):
            if happened.name in THROTTLED:
                by = seen.setdefault((happened.name, happened.object_id), [])
                if len(by) == 2 or happened.by in by:
                    continue
                by.append(happened.by)
            kept.append((number, happened))
        kept.reverse()
        return kept

    def _send_some(self, listener: Listener, collected: list[tuple[int, Happened]]) -> None:
        """Send what this listener has not done itself and is not told too often."""
        control = listener.peer.door is Door.CONTROL
        events = []
        latest: dict[tuple[str, str], bytes] = {}
        for number, happened in collected:
            if number <= listener.since or happened.by is listener.actor:
                continue
            event = happened.full if control else happened.bare
            if happened.name in THROTTLED:
                latest[happened.name, happened.object_id] = event
            else:
                events.append(event)
        for (name, object_id), event in latest.items():
            if listener.throttle is None:
                listener.throttle = Throttle(listener, self._may_know)
            if listener.throttle.passes(name, object_id, event):
                events.append(event)
        if events:
            listener.send_events(b"".join(events), len(events))
