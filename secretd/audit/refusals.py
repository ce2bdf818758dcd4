# SPDX-License-Identifier: LGPL-2.1-or-later
"""Counting the refusals of each uid, so that no uid can fill the disk with records.

The first refusal within a window is a record of its own. Further ones are counted, and the count
becomes one record at the window's end. log asks before it appends a refusal.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import Final

from msgspec import UNSET, Raw, UnsetType

from secretd.limits import Tuning

_OTHERS: Final = -2


class Refusals:
    """The open windows, by uid.

    ``report`` is called with the members of a record of counted refusals.
    """

    def __init__(self, report: Callable[[dict[str, object]], object], tuning: Tuning) -> None:
        self._report = report
        self._seconds = tuning.refusals_seconds
        self._uids = tuning.refusals_uids
        self._counts: dict[int, int] = {}  # by uid

    def is_first(self, uid: int) -> bool:
        """Return True if this refusal is a record of its own; otherwise count it."""
        if uid not in self._counts and len(self._counts) >= self._uids:
            uid = _OTHERS
        if uid in self._counts:
            self._counts[uid] += 1
            return False
        self._counts[uid] = 0
        asyncio.get_running_loop().call_later(self._seconds, self._end, uid)
        return True

    def _end(self, uid: int) -> None:
        if not self._counts.get(uid):
            self._counts.pop(uid, None)
            return
        members = _members(uid, self._counts[uid])
        self._counts[uid] = 0
        self._report(members)
        asyncio.get_running_loop().call_later(self._seconds, self._end, uid)

    def close(self) -> Iterator[dict[str, object]]:
        """End all windows; yield the members of the due records."""
        counts, self._counts = self._counts, {}
        return (_members(uid, count) for uid, count in counts.items() if count)


def _members(uid: int, count: int) -> dict[str, object]:
    peer: Raw | UnsetType = UNSET if uid == _OTHERS else Raw(b'{"uid":%d}' % uid)
    return {"decision": "deny", "peer": peer, "count": count}
