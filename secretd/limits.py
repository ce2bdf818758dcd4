# SPDX-License-Identifier: LGPL-2.1-or-later
"""Per-uid quotas on shared resources: limits, current use, and how often each was hit.

A `Quota` counts one resource for each uid; `Limits` has them all, and counts hits for
query-secret-stats. Limits that are defined beside what they limit are counted here by name. This
module acquires and closes nothing itself.
"""

import os
import resource
from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from secretd.errors import LimitReached

CONNECTIONS_PER_UID: Final = 512
"""Connections of one uid, uid 0 and the daemon's own uid aside."""

REQUESTS_PER_UID: Final = 256
"""Requests of one uid that wait for something at a time, the same aside."""

DESCRIPTORS_PER_UID: Final = 1024
"""Descriptors that one uid has passed and that are not closed yet, the same aside; less where the
process may have fewer than some 4,600: a quarter of what RESERVED_DESCRIPTORS leaves.
"""

RESERVED_DESCRIPTORS: Final = 512
"""Descriptors that are kept for the daemon, uid 0 and the daemon's own uid."""

UNFINISHED_BYTES_PER_UID: Final = 64 << 10
"""Bytes of unfinished messages of one uid on the client socket."""

OBJECTS_IN_ALL: Final = 1_000_000
"""Objects in all. Beside their plaintext some 250 bytes of memory each."""

OBJECTS_PER_UID: Final = 10_000
"""Objects of one uid that an authz object admits to the control socket."""

OBJECT_BYTES_PER_UID: Final = 2 << 20
"""Bytes of plaintext of one such uid: a quarter of the memory that systems let an ordinary process
lock.
"""


@dataclass(frozen=True)
class Tuning:
    """Times, in seconds, and sizes that tests change; the defaults are what users get."""

    # One connection's share of the loop (net.turns)
    turn_seconds: float = 0.005
    """Time after which a connection that sends one request after the other yields."""
    shared_turn_seconds: float = 0.000_5
    """The same where there are other connections: those that yielded themselves are not seen by
    looking.
    """
    look_seconds: float = 0.000_025
    """Time after which it looks whether others are ready, and then yields: about what one request
    takes, so that the others hardly notice.
    """
    turns_seconds: float = 0.001
    """Time of work for untrusted peers between two looks at epoll, where more work waits."""
    batch_bytes: int = 32 << 10
    """Bytes of replies that are collected before they are sent together."""

    # A connection (net.transport)
    unfinished_seconds: float = 60.0
    """Time within which a message that was begun must be finished. QEMU waits for ever."""
    retry_room_seconds: float = 1.0
    """Time until a connection without room tries again: room may also come from deleted secrets."""

    # The server (server.server)
    retry_accept_seconds: float = 0.5
    """Time until the next try when the process has no descriptor left for a connection."""
    stop_seconds: float = 12.0
    """Time that requests which were sent before a stop have to be answered: more than a source or a
    delivery may take.
    """

    # Descriptors (descriptors)
    delivery_seconds: float = 10.0
    """Time within which the other end must have taken the whole secret."""
    write_seconds: float = 0.002
    """Time that a write which does not wait may take before its thread counts as held up."""
    source_seconds: float = 10.0
    """Time within which a source must be read to its end. QEMU waits for ever."""
    stuck_seconds: float = 1.0
    """Time after which a blocking call counts as stuck: a uid all of whose threads are stuck may
    pass no more descriptors.
    """

    # Events (monitor.broadcast, monitor.throttle)
    events_seconds: float = 0.02
    """Time between two ticks at which events are sent."""
    slice_seconds: float = 0.000_5
    """Time of sending events after which requests get their turn."""
    queued_events: int = 10_000
    """Events of the trusted that wait for a tick; of further ones only the count is kept."""
    queued_events_per_uid: int = 1_000
    """The same for each other uid."""
    tick_events: int = 500
    """Events of the trusted that are sent at one tick."""
    log_events: int = 2_000
    """Events that are sent and have not reached every subscriber, above which none is added."""
    throttled_seconds: float = 1.0
    """Time between two SECRET_READ, or SECRET_DENIED, of one id on one connection; of those
    between, the last is sent.
    """
    throttled_ids: int = 256
    """Ids that are throttled at a time on one connection; events of further ones are lost."""

    # The index of grants (access.grant_index)
    kept_identities: int = 1 << 18
    """Identities of all peers together for which the index keeps what they are granted."""
    kept_changes: int = 4096
    """Changes of grants to patterns and list files after which the index is built anew."""

    # The journal (journal.journal)
    journal_bytes: int = 64 << 10
    """Bytes of a new journal file."""
    dead_bytes: int = 256 << 10
    """Bytes of dead records below which compaction is not worth its while."""

    # Deadlines (qom.deadlines)
    ended_per_turn: int = 200
    """Objects that are ended before others get their turn."""

    # The log (daemon.log)
    log_retry_seconds: float = 1.0
    """Time until writing to stderr is tried again."""

    # The audit (audit.log, audit.refusals)
    audit_backlog: int = 4096
    """Records that may wait until they can be written; further ones are dropped and counted."""
    audit_retry_seconds: float = 1.0
    """Time until writing is tried again."""
    refusals_seconds: float = 60.0
    """Time for which the refusals of one uid are counted, after the first, and then reported in one
    record.
    """
    refusals_uids: int = 1024
    """Uids whose refusals are counted apart; those of further ones together."""


Unit = Literal["bytes", "seconds"]


class Quota:
    """What each uid holds of one resource, ``by_uid``. ``words``: what errors call it.

    uid 0 and the daemon's own uid, the ``trusted``, have no limit.
    """

    def __init__(
        self,
        name: str,
        limit: int,
        words: str,
        *,
        unit: Unit | None = None,
    ) -> None:
        self.name = name
        self.limit = limit
        self.unit = unit
        self._words = words
        self.trusted = (0, os.getuid())
        self.by_uid: dict[int, int] = {}

    def check(self, uid: int, amount: int = 1, besides: int = 0) -> None:
        """Raise LimitReached if a uid, which has ``besides`` more than is counted here, may not
        have so much more.
        """
        if uid in self.trusted:
            return
        held = self.by_uid.get(uid, 0) + besides
        if held + amount > self.limit:
            raise LimitReached(
                self.name,
                f"uid {uid} has {held} {self._words}, and the limit is {self.limit} ({self.name})",
            )

    def acquire(self, uid: int, amount: int = 1) -> None:
        """Count what a uid has from now on, or raise LimitReached."""
        self.check(uid, amount)
        self.count(uid, amount)

    def count(self, uid: int, amount: int = 1) -> None:
        """Count what a uid has already, whatever the limit."""
        self.by_uid[uid] = self.by_uid.get(uid, 0) + amount

    def release(self, uid: int, amount: int = 1) -> None:
        """Count what it no longer has."""
        left = self.by_uid.get(uid, 0) - amount
        if left:
            self.by_uid[uid] = left
        else:
            self.by_uid.pop(uid, None)

    def held(self, uid: int) -> int:
        """Return what a uid has."""
        return self.by_uid.get(uid, 0)

    @property
    def largest(self) -> int:
        """The most that any uid has."""
        return max(self.by_uid.values(), default=0)


class SharedQuota(Quota):
    """A Quota of what there is only so much of in all; ``others`` is what all but the trusted
    hold.
    """

    others = 0

    def count(self, uid: int, amount: int = 1) -> None:
        """See Quota."""
        super().count(uid, amount)
        if uid not in self.trusted:
            self.others += amount

    def release(self, uid: int, amount: int = 1) -> None:
        """See Quota."""
        super().release(uid, amount)
        if uid not in self.trusted:
            self.others -= amount


class Stat(NamedTuple):
    """One figure: ``instant`` is as of now, ``cumulative`` counts since the start."""

    name: str
    type: Literal["instant", "cumulative"]
    unit: Unit | None
    value: int


class Limits:
    """All quotas of a daemon, and how often which limit was hit."""

    def __init__(self) -> None:
        self._files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        room = max(64, self._files - RESERVED_DESCRIPTORS)
        self.connections = SharedQuota("connections-per-uid", CONNECTIONS_PER_UID, "connections")
        self.requests = Quota("requests-per-uid", REQUESTS_PER_UID, "requests in flight")
        self.descriptors = SharedQuota(
            "descriptors-per-uid", min(DESCRIPTORS_PER_UID, room // 4), "descriptors open here"
        )
        self.unfinished = Quota(
            "unfinished-bytes-per-uid",
            UNFINISHED_BYTES_PER_UID,
            "bytes of unfinished messages",
            unit="bytes",
        )
        self.objects = Quota("objects-per-uid", OBJECTS_PER_UID, "objects")
        self.object_bytes = Quota(
            "object-bytes-per-uid", OBJECT_BYTES_PER_UID, "bytes of objects", unit="bytes"
        )
        self._quotas = (
            self.connections, self.requests, self.descriptors, self.unfinished, self.objects,
            self.object_bytes,
        )  # fmt: skip
        self.trusted = self.objects.trusted
        self._room = room
        self.objects_in_all = OBJECTS_IN_ALL
        self._hits: Counter[str] = Counter()

    def check_descriptors(self, waiting: int, more: int = 1) -> None:
        """Raise LimitReached if all others together would have so many that none are left for the
        trusted.

        ``waiting``: how many wait to be closed.
        """
        held = self.connections.others + self.descriptors.others + waiting
        if held + more > self._room:
            raise LimitReached(
                "descriptors",
                f"The clients have {self._room} descriptors, which is the limit (descriptors: "
                f"RLIMIT_NOFILE less {RESERVED_DESCRIPTORS}); try again later",
            )

    def note_hit(self, name: str) -> None:
        """A limit was reached."""
        self._hits[name] += 1

    def stats(self) -> list[Stat]:
        """Return what is held, what the limits are, and how often they were hit."""
        listed = [
            Stat("descriptors", "instant", None, self.connections.others + self.descriptors.others)
        ]
        listed.append(Stat("descriptors-limit", "instant", None, self._room))
        for quota in self._quotas:
            listed.append(Stat(quota.name, "instant", quota.unit, quota.largest))
            listed.append(Stat(f"{quota.name}-limit", "instant", quota.unit, quota.limit))
        names = sorted({*self._hits, "descriptors", *(quota.name for quota in self._quotas)})
        listed += [Stat(f"{name}-hits", "cumulative", None, self._hits[name]) for name in names]
        return listed
