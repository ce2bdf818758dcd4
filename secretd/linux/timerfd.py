# SPDX-License-Identifier: LGPL-2.1-or-later
"""timerfd(2), which Python 3.11 lacks, on CLOCK_BOOTTIME.

That clock cannot be set, and it includes suspended time. qom.deadlines uses this module.
"""

import ctypes
import os
import time
from typing import Final

_TFD_TIMER_ABSTIME: Final = 1
_NS: Final = 1_000_000_000

_libc = ctypes.CDLL(None, use_errno=True)


class _Timerspec(ctypes.Structure):
    """struct itimerspec (timerfd_settime(2))."""

    _fields_ = (
        ("interval_seconds", ctypes.c_long),
        ("interval_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


def create() -> int:
    """Return the descriptor of a new non-blocking timer, which the caller closes. Raises
    OSError.
    """
    fd: int = _libc.timerfd_create(time.CLOCK_BOOTTIME, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    return fd


def arm(fd: int, deadline: int) -> None:
    """Make a timer readable at ``deadline``, in nanoseconds of CLOCK_BOOTTIME."""
    # All zeros would disarm the timer.
    value = _Timerspec(0, 0, deadline // _NS, max(1, deadline % _NS))
    _libc.timerfd_settime(fd, _TFD_TIMER_ABSTIME, ctypes.byref(value), None)
