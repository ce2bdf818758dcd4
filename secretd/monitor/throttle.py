# SPDX-License-Identifier: LGPL-2.1-or-later
"""Throttling of frequent events, per connection and id.

Of SECRET_READ and SECRET_DENIED one connection gets the first of each id at once, and then the last
of those within each interval. broadcast makes a `Throttle` for a subscriber when the first such
event comes.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection
from typing import Final, Protocol

from secretd.access.peer import Peer
from secretd.limits import Tuning

THROTTLED: Final = frozenset({"SECRET_READ", "SECRET_DENIED"})


class Subscriber(Protocol):
    """A connection that has turned events on.

    ``origin``: the origin of the events that it causes. ``wanted``: the names of the events that it
    gets, None for all. ``since``: the number of the last event before it subscribed. ``position``:
    the number of the last event up to which it was served. ``throttle``: None while nothing was
    throttled.
    """

    origin: object
    peer: Peer
    wanted: Collection[str] | None
    since: int
    position: int
    throttle: "Throttle | None"

    def send_events(self, events: bytes, count: int) -> None:
        """Send ``count`` events, or count them as lost."""

    def lose(self, count: int) -> None:
        """Count ``count`` events as lost."""


class Throttle:
    """The throttled events of one connection."""

    def __init__(
        self,
        subscriber: Subscriber,
        may_know: Callable[[Peer, str], bool],
        tuning: Tuning,
    ) -> None:
        self._seconds, self._ids = tuning.throttled_seconds, tuning.throttled_ids
        self._subscriber = subscriber
        self._may_know = may_know
        # By name and id: the time at which the next event may be sent.
        self._next: dict[tuple[str, str], float] = {}
        self._held: dict[tuple[str, str], bytes] = {}
        self._counts: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def passes(self, name: str, object_id: str, event: bytes) -> bool:
        """Return True if an event may be sent now; otherwise hold it, or lose it if there are too
        many.
        """
        key = (name, object_id)
        loop = asyncio.get_running_loop()
        if key in self._next:
            self._held[key] = event
            return False
        # Each kind has room of its own: refusals of invented names do not hide reads.
        if self._counts[name] >= self._ids:
            self._subscriber.lose(1)
            return False
        self._counts[name] += 1
        self._next[key] = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(self._next[key], self._due)
        return True

    def _due(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        now = loop.time()
        # The dictionary keeps the order of arrival, and all wait for the same time.
        for key, when in list(self._next.items()):
            if key not in self._next:  # sending ended the connection, which closed this throttle
                return
            if when > now:
                self._timer = loop.call_at(when, self._due)
                return
            del self._next[key]
            event = self._held.pop(key, None)
            if event is None:
                self._counts[key[0]] -= 1
            else:
                self._next[key] = now + self._seconds
                if self._may_know(self._subscriber.peer, key[1]):
                    self._subscriber.send_events(event, 1)
        if self._next:
            self._timer = loop.call_at(next(iter(self._next.values())), self._due)

    def close(self) -> None:
        """Drop all held events, and the timer."""
        self._next.clear()
        self._held.clear()
        if self._timer is not None:
            self._timer.cancel()
