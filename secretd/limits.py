# SPDX-License-Identifier: LGPL-2.1-or-later
"""Per-uid quotas on shared resources: limits, current use, and how often each was hit.

A `Quota` counts one resource for each uid; `Limits` has them all, and counts hits for query-secret-stats.
Limits that are defined beside what they limit are counted here by name. This module acquires and closes
nothing itself.
"""

import os
import resource
from collections import Counter
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
"""Bytes of unfinished messages of one uid on the client door."""

OBJECTS_IN_ALL: Final = 1_000_000
"""Objects in all. Beside their plaintext some 250 bytes of memory each."""

OBJECTS_PER_UID: Final = 10_000
"""Objects of one uid that an authz object admits to the control door."""

OBJECT_BYTES_PER_UID: Final = 2 << 20
"""Bytes of plaintext of one such uid: a quarter of the memory that systems let an ordinary process lock."""

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
        """Raise LimitReached if a uid, which has ``besides`` more than is counted here, may not have so
        much more.
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
    """A Quota of what there is only so much of in all; ``others`` is what all but the trusted hold."""

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
        """Raise LimitReached if all others together would have so many that none are left for the trusted.

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
