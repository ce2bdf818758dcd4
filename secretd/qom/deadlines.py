# SPDX-License-Identifier: LGPL-2.1-or-later
"""The deadlines of objects, and the timer that fires at the next one.

Time is CLOCK_BOOTTIME, which cannot be set and includes suspended time. This module knows ids only:
the tree sets deadlines, and the server ends the due objects.
"""

import asyncio
import contextlib
import heapq
import os
import time
from collections.abc import Callable
from typing import Final

from secretd.limits import Tuning
from secretd.linux import timerfd

LIFETIME_SECONDS: Final = 100 * 366 * 86400
"""The longest lifetime of an object in seconds: longer than any machine runs."""

DEADLINE: Final = "deadline"
"""The journal's name for an object's deadline, beside its properties: nanoseconds of
CLOCK_BOOTTIME.
"""

_NS: Final = 1_000_000_000


def now() -> int:
    """Return the nanoseconds since the machine was started."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Deadlines:
    """The deadlines of objects, in nanoseconds of CLOCK_BOOTTIME."""

    def __init__(self, ended_per_turn: int = Tuning.ended_per_turn) -> None:
        self._ended_per_turn = ended_per_turn
        self._deadlines: dict[str, int] = {}
        self._queue: list[tuple[int, str]] = []  # some entries may be void
        self._fd = -1
        self._armed = 0
        self._end: Callable[[str], None] | None = None

    def set(self, object_id: str, deadline: int) -> None:
        """Set an object's deadline, replacing an earlier one."""
        self._deadlines[object_id] = deadline
        if len(self._queue) > 2 * len(self._deadlines) + 100:  # most entries are void
            self._queue = [(when, known) for known, when in self._deadlines.items()]
            heapq.heapify(self._queue)
        else:
            heapq.heappush(self._queue, (deadline, object_id))
        if self._fd >= 0 and (not self._armed or deadline < self._armed):
            self._arm(deadline)

    def forget(self, object_id: str) -> None:
        """Remove an object's deadline, if it has one."""
        self._deadlines.pop(object_id, None)

    def expired(self, object_id: str) -> bool:
        """Return True if an object's deadline has passed, even if the timer has not ended it
        yet.
        """
        deadline = self._deadlines.get(object_id)
        return deadline is not None and now() >= deadline

    def due(self) -> list[str]:
        """Return the ids of all objects whose deadline has passed."""
        return [object_id for object_id in self._deadlines if self.expired(object_id)]

    def remaining(self, object_id: str) -> int | None:
        """Return the seconds left, rounded up; None if the object has no deadline."""
        deadline = self._deadlines.get(object_id)
        return None if deadline is None else max(0, -(-(deadline - now()) // _NS))

    def start(self, end: Callable[[str], None]) -> None:
        """Call ``end`` in the running loop with the id of each object whose deadline has passed."""
        self._fd = timerfd.create()
        self._end = end
        asyncio.get_running_loop().add_reader(self._fd, self._due)
        self._arm_next()

    def stop(self) -> None:
        """Undo `start`."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _due(self) -> None:
        if self._fd < 0:
            return
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        self._armed = 0
        assert self._end is not None
        for _ in range(self._ended_per_turn):
            self._drop_void()
            if not self._queue or self._queue[0][0] > now():
                self._arm_next()
                return
            self._end(heapq.heappop(self._queue)[1])
        asyncio.get_running_loop().call_soon(self._due)

    def _arm_next(self) -> None:
        self._drop_void()
        if self._queue:
            self._arm(self._queue[0][0])

    def _drop_void(self) -> None:
        while self._queue and self._deadlines.get(self._queue[0][1]) != self._queue[0][0]:
            heapq.heappop(self._queue)

    def _arm(self, deadline: int) -> None:
        self._armed = deadline
        timerfd.arm(self._fd, deadline)
