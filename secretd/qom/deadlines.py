# SPDX-License-Identifier: LGPL-2.1-or-later
"""When objects end: deadlines, and a timer that says when one has passed.

Time is CLOCK_BOOTTIME, which nobody can set and which goes on while the machine sleeps. Python 3.11 has no
timerfd(2), hence the ctypes. It knows ids only; the tree sets deadlines, the server ends what is due.
"""

import asyncio
import contextlib
import ctypes
import heapq
import os
import time
from collections.abc import Callable
from typing import Final

LIFETIME_SECONDS: Final = 100 * 366 * 86400
"""Seconds that an object may be given at most: more than a machine runs."""

ENDED_PER_TURN: Final = 200
"""Objects that are ended before others get their turn."""

_TFD_TIMER_ABSTIME: Final = 1
_NS: Final = 1_000_000_000


def now() -> int:
    """Return the nanoseconds since the machine was started."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class _Timerspec(ctypes.Structure):
    """struct itimerspec (timerfd_settime(2))."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class Lifetimes:
    """The deadlines of those objects that have one, in nanoseconds of CLOCK_BOOTTIME."""

    def __init__(self) -> None:
        self._deadlines: dict[str, int] = {}
        self._queue: list[tuple[int, str]] = []  # of which some may be void
        self._fd = -1
        self._armed = 0
        self._end: Callable[[str], None] | None = None

    def set(self, object_id: str, deadline: int) -> None:
        """Give an object a deadline, instead of the one it may have."""
        self._deadlines[object_id] = deadline
        if len(self._queue) > 2 * len(self._deadlines) + 100:  # most of it is void
            self._queue = [(when, known) for known, when in self._deadlines.items()]
            heapq.heapify(self._queue)
        else:
            heapq.heappush(self._queue, (deadline, object_id))
        if self._fd >= 0 and (not self._armed or deadline < self._armed):
            self._arm(deadline)

    def forget(self, object_id: str) -> None:
        """An object is gone."""
        self._deadlines.pop(object_id, None)

    def ended(self, object_id: str) -> bool:
        """True if an object's time is over, whether or not it was ended already."""
        deadline = self._deadlines.get(object_id)
        return deadline is not None and now() >= deadline

    def due(self) -> list[str]:
        """Return the ids of all objects whose time is over."""
        return [object_id for object_id in self._deadlines if self.ended(object_id)]

    def remaining(self, object_id: str) -> int | None:
        """Return the seconds left, rounded up; None if the object has no deadline."""
        deadline = self._deadlines.get(object_id)
        return None if deadline is None else max(0, -(-(deadline - now()) // _NS))

    def start(self, end: Callable[[str], None]) -> None:
        """Call ``end`` with the id of each object whose time is over, from the running loop."""
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.timerfd_create(time.CLOCK_BOOTTIME, os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._settime = libc.timerfd_settime
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
        for _ in range(ENDED_PER_TURN):
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
        # All zeros would disarm it.
        value = _Timerspec(0, 0, deadline // _NS, max(1, deadline % _NS))
        self._settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(value), None)
