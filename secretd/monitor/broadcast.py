# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events about secrets: which connections get them, how often, and when.

A connection gets events after `secret-events` has turned them on. Control connections receive every
event, including the peer that caused it. Client connections receive only events about secrets that
they may read, without the peer. The connection that caused an event does not receive it: it has the
reply. access decides, core publishes, and the subscribers send.

Theory of operation. An event passes three places:

1. `publish` puts it into the queue of the uid that caused it. All trusted peers share one queue;
   each other uid has a small one of its own, and its refusals are reduced before. So a flooding uid
   fills only its own queue.
2. At each tick of a clock, a fair share of every queue moves to the log, where each event has a
   position. Fixed ticks keep the time of one event from revealing others.
3. Each subscriber has a position in the log. `_deliver` sends to one subscriber after the other the
   events after its position, for ``slice_seconds`` at a time, and then leaves requests twice that
   time. An event leaves the log when every subscriber has received it.

What can go wrong: a queue or the log is full, or a subscriber does not read. Then events are
counted instead, and control connections learn how many they lost. Memory is bounded by the queues,
the log, and the backlog of each connection.
"""

import asyncio
import math
from collections import deque
from itertools import islice
from time import monotonic
from typing import Final, NamedTuple

from secretd.access.decision import Access
from secretd.access.peer import Peer, SocketRole
from secretd.limits import Tuning
from secretd.monitor.throttle import THROTTLED, Subscriber, Throttle

TICK_EVENTS_PER_UID: Final = 20
"""Events of each untrusted uid that are sent at one tick."""

DENIED_IDS_PER_UID: Final = 16
"""Ids for which SECRET_DENIED is sent within DENIED_SECONDS for one untrusted uid; the audit counts
further ones.
"""

DENIED_SECONDS: Final = 1.0
"""Seconds within which all refusals of one id to one untrusted uid make only one event."""

BATCH_EVENTS: Final = 250
"""Events that a subscriber is sent at once; then the others have their turn."""

LOST_SECONDS: Final = 1.0
"""Seconds between two SECRET_EVENTS_LOST while a queue stays full."""


class SecretEvent(NamedTuple):
    """An event.

    ``full``: the text for control connections; ``bare``: the text for client connections.
    ``origin``: the session that caused it, None without one. ``number``: its place in the order of
    publishing.
    """

    number: int
    name: str
    object_id: str
    full: bytes
    bare: bytes
    origin: object


class Broadcaster:
    """Collects events and sends them to the subscribers that may know them.

    ``subscribers``: the connections that have turned events on.
    """

    def __init__(self, access: Access, tuning: Tuning) -> None:
        self._tuning = tuning
        self._access = access
        self.subscribers: dict[Subscriber, None] = {}
        self._trusted: deque[SecretEvent] = deque()
        self._by_uid: dict[int, deque[SecretEvent]] = {}
        self._denied: dict[int, set[str]] = {}
        self._denied_until = 0.0
        self._published = 0
        self._log: deque[SecretEvent] = deque()
        self._first = 1  # the number of the first event in the log
        self._waiting: deque[Subscriber] = deque()  # those with unsent events in the log
        self._delivering = False  # `_deliver` is scheduled
        self._batch: _Batch | None = None  # the latest, which the next subscriber may need, too
        self._resumes = 0.0  # the time before which nothing is sent
        self._ticking = False
        self._overflowed = 0
        self._overflow_sent = 0.0

    @property
    def _last(self) -> int:
        """The position of the last event in the log, which is not its SecretEvent.number."""
        return self._first + len(self._log) - 1

    def subscribe(self, subscriber: Subscriber) -> None:
        """Send a connection the events from now on."""
        subscriber.since = self._published
        subscriber.position = self._last
        self.subscribers[subscriber] = None

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Send a connection no further events."""
        self.subscribers.pop(subscriber, None)
        if not self.subscribers:
            self._forget()

    def _forget(self) -> None:
        """Drop all events: there is no subscriber left."""
        self._first = self._last + 1
        self._batch = None
        for queue in (self._log, self._trusted, self._by_uid, self._denied, self._waiting):
            queue.clear()
        self._overflowed = 0

    # --- in

    def accepts(self, name: str, object_id: str, uid: int | None, origin: object) -> bool:
        """Return True if a subscriber may get such an event and there is room for it; otherwise
        drop or count it.

        ``uid``: that of an untrusted peer that caused it, None for a trusted peer or without a
        peer.
        """
        if not self.subscribers or (len(self.subscribers) == 1 and self._is_only(origin)):
            return False
        if uid is None:
            room = len(self._trusted) < self._tuning.queued_events
        elif name == "SECRET_DENIED":
            return self._is_news(uid, object_id)
        else:
            room = len(self._by_uid.get(uid, ())) < self._tuning.queued_events_per_uid
        self._overflowed += not room
        return room

    def _is_only(self, origin: object) -> bool:
        return next(iter(self.subscribers)).origin is origin

    def _is_news(self, uid: int, object_id: str) -> bool:
        """Return False if this refusal, or enough others of the uid, are events already."""
        now = monotonic()
        if now > self._denied_until:
            self._denied.clear()
            self._denied_until = now + DENIED_SECONDS
        ids = self._denied.setdefault(uid, set())
        if object_id in ids or len(ids) >= DENIED_IDS_PER_UID:
            return False
        ids.add(object_id)
        return True

    def publish(  # noqa: PLR0917 - the members of a SecretEvent
        self, name: str, object_id: str, full: bytes, bare: bytes, origin: object, uid: int | None
    ) -> None:
        """Send an event at the next tick, after `accepts` has returned True. See SecretEvent."""
        self._published += 1
        event = SecretEvent(self._published, name, object_id, full, bare, origin)
        if uid is None:
            self._trusted.append(event)
        else:
            self._by_uid.setdefault(uid, deque()).append(event)
        self._schedule()

    def _schedule(self) -> None:
        if not self._ticking:
            self._ticking = True
            loop = asyncio.get_running_loop()
            tick = (
                math.floor(loop.time() / self._tuning.events_seconds + 1)
                * self._tuning.events_seconds
            )
            loop.call_at(tick, self._tick)

    # --- from the queues to the log

    def _tick(self) -> None:
        self._ticking = False
        self._take(self._tuning.tick_events, TICK_EVENTS_PER_UID)
        if self._trusted or self._by_uid or self._overflowed:
            self._schedule()
        self._start()

    def _take(self, of_trusted: int, of_each: int) -> None:
        """Move events from each queue to the log, unless the log is too long.

        A long log leaves them in the queues, which count what they cannot hold.
        """
        log = self._log
        if len(log) >= self._tuning.log_events:
            return
        for _ in range(min(of_trusted, len(self._trusted))):
            log.append(self._trusted.popleft())
        for uid, queue in list(self._by_uid.items()):
            for _ in range(min(of_each, len(queue))):
                log.append(queue.popleft())
            if not queue:
                del self._by_uid[uid]

    def flush(self) -> None:
        """Send all events now."""
        self._take(len(self._trusted), self._tuning.queued_events_per_uid)
        self._start()
        while self._trusted or self._by_uid or self._waiting:
            self._take(len(self._trusted), self._tuning.queued_events_per_uid)
            self._start()
            self._deliver()

    # --- from the log to the subscribers

    def _start(self) -> None:
        """Start to send new events, or continue."""
        self._report_lost()
        if not self._log:
            return
        last = self._last
        known = set(self._waiting)
        self._waiting += [s for s in self.subscribers if s.position < last and s not in known]
        if self._delivering:
            return
        if monotonic() < self._resumes:
            self._deliver_at(self._resumes)
        else:
            self._deliver()

    def _deliver_at(self, when: float) -> None:
        self._delivering = True
        asyncio.get_running_loop().call_at(when, self._deliver)

    def _deliver(self) -> None:
        """Send to one subscriber after the other, until ``slice_seconds`` have passed."""
        self._delivering = False
        began = monotonic()
        end = began + self._tuning.slice_seconds
        try:
            while self._waiting:
                subscriber = self._waiting.popleft()
                # It may have ended, or subscribed again, since it was noted.
                if subscriber not in self.subscribers or subscriber.position >= self._last:
                    continue
                batch = self._batch
                if batch is None or batch.after != subscriber.position:
                    self._trim(subscriber.position)
                    skipped = subscriber.position + 1 - self._first
                    events = list(islice(self._log, skipped, skipped + BATCH_EVENTS))
                    batch = self._batch = _Batch(subscriber.position, events)
                subscriber.position = batch.last
                self._send(subscriber, batch)
                if batch.last < self._last and subscriber in self.subscribers:
                    self._waiting.append(subscriber)
                if monotonic() > end:
                    return
        finally:
            if not self._waiting:
                self._batch = None
                self._trim(self._last)
            # Requests have their share of the time, however many subscribers there are.
            now = monotonic()
            self._resumes = now + self._tuning.slice_pause * (now - began)
            if self._waiting and not self._delivering:
                self._deliver_at(self._resumes)

    def _trim(self, position: int) -> None:
        """Remove the events that every subscriber has received; ``position`` is that of one."""
        positions = [s.position for s in self._waiting if s in self.subscribers]
        for _ in range(min([position, *positions]) + 1 - self._first):
            self._log.popleft()
            self._first += 1

    def _report_lost(self) -> None:
        """Report lost events to the control connections, regularly and once the loss has ended."""
        if not self._overflowed:
            return
        now = monotonic()
        queued = self._trusted or self._by_uid
        if queued and now < self._overflow_sent + LOST_SECONDS:
            return
        self._overflow_sent = now
        lost, self._overflowed = self._overflowed, 0
        for subscriber in self.subscribers:
            if subscriber.peer.role is SocketRole.CONTROL:
                subscriber.lose(lost)

    def _may_know(self, peer: Peer, object_id: str) -> bool:
        return self._access.admits(peer) and self._access.may_read(peer, object_id)

    def _send(self, subscriber: Subscriber, batch: "_Batch") -> None:
        """Send the events that this subscriber may know, did not cause and does not get too
        often.
        """
        peer, origin, wanted = subscriber.peer, subscriber.origin, subscriber.wanted
        control = peer.role is SocketRole.CONTROL
        if not self._access.admits(peer):
            return
        # 1. The whole batch, as one text that control connections share.
        if (
            control
            and wanted is None
            and batch.plain
            and origin not in batch.origins
            and batch.lowest > subscriber.since
        ):
            subscriber.send_events(batch.joined, len(batch.events))
            return
        # 2. Otherwise each event by itself; of throttled ones only the latest.
        sent: list[bytes] = []
        latest: dict[tuple[str, str], bytes] = {}
        readable: dict[str, bool] = {}
        for event in batch.events:
            number, name, object_id, full, bare, by = event
            if by is origin or number <= subscriber.since:
                continue
            if (wanted is not None and name not in wanted) or not (bare or control):
                continue
            if not control:
                if object_id not in readable:
                    readable[object_id] = self._access.may_read(peer, object_id)
                if not readable[object_id]:
                    continue
            if name in THROTTLED:
                latest[name, object_id] = full if control else bare
            else:
                sent.append(full if control else bare)
        # 3. The throttle decides about these.
        for (name, object_id), text in latest.items():
            if subscriber.throttle is None:
                subscriber.throttle = Throttle(subscriber, self._may_know, self._tuning)
            if subscriber.throttle.passes(name, object_id, text):
                sent.append(text)
        if sent:
            subscriber.send_events(b"".join(sent), len(sent))


class _Batch:
    """The events after a position, with the text that all control connections share.

    ``plain``: True if none of them is throttled.
    """

    def __init__(self, after: int, events: list[SecretEvent]) -> None:
        self.after = after
        self.last = after + len(events)
        self.events = events
        self.plain = all(event.name not in THROTTLED for event in events)
        self.origins = {event.origin for event in events}
        self.lowest = min(event.number for event in events)
        self.joined = b"".join([event.full for event in events])
