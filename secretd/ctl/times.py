# SPDX-License-Identifier: LGPL-2.1-or-later
"""Times on the command line, such as 90s or 8h."""

import re
from typing import Final

from secretd.errors import UsageError

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"([0-9]{1,10})([smhd])")

TIME: Final = "such as 90s, 15m, 8h or 30d"


def seconds(text: str) -> int:
    """Return the seconds of a time such as 90s, 15m, 8h or 30d. Raises UsageError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        unit = "a time needs its unit" if text.isdecimal() else "a time is expected"
        raise UsageError(f"'{text}': {unit}, such as 90s, 15m, 8h or 30d")
    return int(match[1]) * _SECONDS[match[2]]
