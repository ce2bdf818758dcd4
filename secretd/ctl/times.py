# SPDX-License-Identifier: LGPL-2.1-or-later
"""Times on the command line: a duration such as 90s or 1d12h, or a time such as 18:00."""

import math
import re
from typing import TYPE_CHECKING, Final

from secretd.errors import UsageError

if TYPE_CHECKING:
    import datetime

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
MAX_SECONDS: Final = 100 * 366 * 86400
"""The longest lifetime that secretd accepts (qom.deadlines)."""

_PART: Final = r"([0-9]{1,10})([smhdw])"
_DURATION: Final = re.compile(rf"(?:{_PART})+")
_CLOCK: Final = re.compile(r"([0-9]{1,2}):([0-9]{2})")

TIME: Final = "after a time such as 90s, 8h or 30d, or at one such as 18:00 or 2030-12-24"


def seconds(text: str) -> int:
    """Return the seconds from now until a time: a duration, a local time, or a local date.

    Raises UsageError.
    """
    if _DURATION.fullmatch(text):
        return _limited(text, _duration(text))
    now = _now()
    until = _moment(text, now)
    if until is None:
        unit = "a time needs its unit" if text.isdecimal() else "a time is expected"
        raise UsageError(f"'{text}': {unit}, such as 90s, 15m, 8h, 30d, 18:00 or 2030-12-24")
    left = math.ceil((until - now).total_seconds())
    if left <= 0:
        raise UsageError(f"'{text}': this time is in the past")
    return _limited(text, left)


def _duration(text: str) -> int:
    return sum(int(number) * _SECONDS[unit] for number, unit in re.findall(_PART, text))


def _limited(text: str, left: int) -> int:
    """Return the seconds if secretd accepts them. Raises UsageError."""
    if not 1 <= left <= MAX_SECONDS:
        raise UsageError(f"'{text}': a time between one second and 100 years from now is expected")
    return left


def moment(text: str) -> float:
    """Return the seconds since the epoch at a past time: a duration before now, a local time or
    date. Raises UsageError.
    """
    now = _now()
    if _DURATION.fullmatch(text):
        return now.timestamp() - _duration(text)
    since = _moment(text, now)
    if since is None:
        raise UsageError(f"'{text}': a time is expected, such as 2h, 18:00 or 2030-12-24")
    seconds_since = since.timestamp()
    return seconds_since - 86400 if _CLOCK.fullmatch(text) and since > now else seconds_since


def _now() -> "datetime.datetime":
    import datetime  # late: most verbs need no time

    return datetime.datetime.now().astimezone()


def _moment(text: str, now: "datetime.datetime") -> "datetime.datetime | None":
    """Return the local time that a text names; a clock time is the next one."""
    import datetime

    clock = _CLOCK.fullmatch(text)
    try:
        if clock is None:
            given = datetime.datetime.fromisoformat(text)
            return given if given.tzinfo is not None else given.astimezone()
        hour, minute = int(clock[1]), int(clock[2])
        then = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    except ValueError:
        return None
    return then if then > now else then + datetime.timedelta(days=1)
