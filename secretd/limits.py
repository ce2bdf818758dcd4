# SPDX-License-Identifier: LGPL-2.1-or-later
"""Per-uid quotas on shared resources: limits, current use, and how often each was hit.

A `Quota` counts one resource for each uid; `Limits` has them all, and counts the hits of every
limit for query-secret-stats. `Tuning` has the times and sizes that tests change. This module
acquires and closes no resource itself.
"""

import os
import resource
from collections import Counter
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from secretd.errors import LimitReached

CONNECTIONS_PER_UID: Final = 512
"""Connections of one uid, except uid 0 and the daemon's own uid."""

REQUESTS_PER_UID: Final = 256
"""Waiting requests of one uid, with the same exceptions."""

DESCRIPTORS_PER_UID: Final = 1024
"""Descriptors that one uid has passed and that are not closed yet, with the same exceptions. Where
the process may have fewer than some 4,600, it is a quarter of the rest after RESERVED_DESCRIPTORS.
"""

RESERVED_DESCRIPTORS: Final = 512
"""Descriptors that are reserved for the daemon, uid 0 and the daemon's own uid."""

UNFINISHED_BYTES_PER_UID: Final = 64 << 10
"""Bytes of unfinished messages of one uid on the client socket."""

OBJECTS_IN_ALL: Final = 1_000_000
"""Objects in all. Each takes some 250 bytes of memory besides its plaintext."""

OBJECTS_PER_UID: Final = 10_000
"""Objects of one uid that an authz object admits to the control socket."""

OBJECT_BYTES_PER_UID: Final = 2 << 20
"""Bytes of plaintext and records of one such uid: a quarter of what an ordinary process may
lock.
"""


@dataclass(frozen=True)
class Tuning:
    """Times, in seconds, and sizes that tests change; the defaults are the ones that users get."""

    # One connection's share of the loop (net.turns)
    turn_seconds: float = 0.005
    """Time after which a connection yields that sends one request after the other."""
    shared_turn_seconds: float = 0.000_5
    """The same where there are other connections: epoll does not report those that have yielded."""
    look_seconds: float = 0.000_025
    """Time after which a connection checks whether others are ready, and then yields. It is about
    the time of one request, so that others hardly notice.
    """
    turns_seconds: float = 0.001
    """Time of work for untrusted peers between two looks at epoll, while more work waits."""
    batch_bytes: int = 32 << 10
    """Bytes of replies that are collected before they are sent together."""

    # A connection (net.transport)
    unfinished_seconds: float = 60.0
    """Time within which a message must end once it has begun. QEMU waits for ever."""
    retry_room_seconds: float = 1.0
    """Time until a connection without receive space tries again: deleted secrets also free some."""

    # The server (server.server)
    retry_accept_seconds: float = 0.5
    """Time until the next attempt when the process has no descriptor left for a connection."""
    stop_seconds: float = 12.0
    """Time for answers to requests that were sent before a stop: more than a source or a delivery
    may take.
    """

    # Descriptors (descriptors)
    delivery_seconds: float = 10.0
    """Time within which the other end must have accepted the whole secret."""
    write_seconds: float = 0.002
    """Time that a non-blocking write may take before its thread counts as blocked."""
    source_seconds: float = 10.0
    """Time within which a source must be read to its end. QEMU waits for ever."""
    stuck_seconds: float = 1.0
    """Time after which a blocking call counts as stuck. A uid whose threads are all stuck may pass
    no further descriptors.
    """

    # Events (monitor.broadcast, monitor.throttle)
    events_seconds: float = 0.02
    """Time between two ticks at which events are sent."""
    slice_seconds: float = 0.000_5
    """Time of sending events after which requests get their turn."""
    slice_pause: float = 2.0
    """The time for requests after such a slice, as a multiple of the slice's: events take at most a
    third of the time.
    """
    queued_events: int = 10_000
    """Events of the trusted that wait for a tick; further ones are only counted."""
    queued_events_per_uid: int = 1_000
    """The same for each other uid."""
    tick_events: int = 500
    """Events of the trusted that are sent at one tick."""
    log_events: int = 2_000
    """Events that have not reached every subscriber yet; at this number no further ones are
    taken.
    """
    throttled_seconds: float = 1.0
    """Time between two SECRET_READ, or SECRET_DENIED, of one id on one connection; the last one in
    between is sent at its end.
    """
    throttled_ids: int = 256
    """Ids that are throttled at a time, for each event name, on one connection; events of further
    ids are lost.
    """

    # The index of grants (access.grant_index)
    kept_identities: int = 1 << 18
    """Identities, over all peers, whose grants the index keeps."""
    kept_changes: int = 4096
    """Changes of grants whose authz object has patterns or a list file; with more, the entries of
    all peers are dropped.
    """

    # The journal (journal.journal)
    journal_bytes: int = 64 << 10
    """Bytes of a new journal file."""
    dead_bytes: int = 256 << 10
    """Bytes of dead records below which compaction does not pay."""

    # Deadlines (qom.deadlines)
    ended_per_turn: int = 200
    """Expired objects that are removed before others get their turn."""

    # The log (daemon.log)
    log_retry_seconds: float = 1.0
    """Time until the next attempt to write to stderr."""

    # The audit (audit.log, audit.refusals)
    audit_backlog: int = 4096
    """Records that may wait for the target; further ones are dropped and counted."""
    audit_retry_seconds: float = 1.0
    """Time until the next attempt to write."""
    refusals_seconds: float = 60.0
    """Time for which the refusals of one uid are counted after the first; one record then reports
    them.
    """
    refusals_uids: int = 1024
    """Uids whose refusals are counted separately; those of further uids are counted together."""


Unit = Literal["bytes", "seconds"]


class Quota:
    """One resource by uid: the limit, and each uid's current use in ``by_uid``.

    ``words``: the resource in error messages. uid 0 and the daemon's own uid, the ``trusted``, have
    no limit.
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
        """Raise LimitReached if a uid may not have ``amount`` more.

        ``besides``: what the uid holds in addition to the amount that is counted here.
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
        """Add to a uid's use, or raise LimitReached."""
        self.check(uid, amount)
        self.count(uid, amount)

    def count(self, uid: int, amount: int = 1) -> None:
        """Add to a uid's use, whatever the limit."""
        self.by_uid[uid] = self.by_uid.get(uid, 0) + amount

    def release(self, uid: int, amount: int = 1) -> None:
        """Subtract from a uid's use."""
        left = self.by_uid.get(uid, 0) - amount
        if left:
            self.by_uid[uid] = left
        else:
            self.by_uid.pop(uid, None)

    def held(self, uid: int) -> int:
        """Return a uid's use."""
        return self.by_uid.get(uid, 0)

    @property
    def largest(self) -> int:
        """The largest use of any uid."""
        return max(self.by_uid.values(), default=0)


class SharedQuota(Quota):
    """A Quota of a resource with a common limit; ``others`` is the use of all but the trusted."""

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
    """One figure: ``instant`` is the present value, ``cumulative`` counts since the start."""

    name: str
    type: Literal["instant", "cumulative"]
    unit: Unit | None
    value: int


class Limits:
    """All quotas of a daemon, and the number of hits of each limit."""

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
        """Raise LimitReached if too few descriptors would be left for the trusted.

        ``waiting``: the number of descriptors that wait to be closed; ``more``: the number of new
        ones.
        """
        held = self.connections.others + self.descriptors.others + waiting
        if held + more > self._room:
            raise LimitReached(
                "descriptors",
                f"The clients have {self._room} descriptors, which is the limit (descriptors: "
                f"RLIMIT_NOFILE less {RESERVED_DESCRIPTORS}); try again later",
            )

    def note_hit(self, name: str) -> None:
        """Count a hit of a limit."""
        self._hits[name] += 1

    def stats(self) -> list[Stat]:
        """Return current use, limits, and numbers of hits."""
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
