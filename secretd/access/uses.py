# SPDX-License-Identifier: LGPL-2.1-or-later
"""How often each secret was released since the daemon started, and to whom last.

It counts what decision permits. The counts are lost with the process; the audit has every release.
"""

import time
from typing import Final, NamedTuple

from secretd.audit.records import Subject

COUNTED_SECRETS: Final = 1 << 16
"""Secrets whose releases are counted; beyond it those that were not released for longest are
forgotten.
"""


class Use(NamedTuple):
    """The releases of one secret: their number, and time and recipient of the last one.

    ``time``: nanoseconds since the epoch.
    """

    releases: int
    time: int
    subject: Subject | None


_NEVER: Final = Use(0, 0, None)


class Uses:
    """The releases by secret."""

    def __init__(self, counted: int = COUNTED_SECRETS) -> None:
        self._counted = counted
        self._uses: dict[str, Use] = {}  # the latest last

    def note(self, object_id: str, subject: Subject) -> None:
        """Count a release."""
        uses = self._uses
        before = uses.pop(object_id, _NEVER)
        if len(uses) >= self._counted:
            del uses[next(iter(uses))]
        uses[object_id] = Use(before.releases + 1, time.time_ns(), subject)

    def take_back(self, object_id: str) -> None:
        """Subtract a release that delivered nothing; its time and recipient stay."""
        use = self._uses.get(object_id)
        if use is not None:
            self._uses[object_id] = use._replace(releases=max(0, use.releases - 1))

    def forget(self, object_id: str) -> None:
        """Forget a secret that is removed."""
        self._uses.pop(object_id, None)

    def of(self, object_id: str) -> Use:
        """Return the releases of a secret."""
        return self._uses.get(object_id, _NEVER)
