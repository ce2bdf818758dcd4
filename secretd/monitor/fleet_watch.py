# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state of the fleet over time, and what follows from what was accepted.

Core has one. The commands say what came; this module records and announces what changes by it.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from secretd.monitor.failures import log
from secretd.qom import fleet_rules
from secretd.store.commit import Commit

if TYPE_CHECKING:
    from secretd.monitor.core import Core

_REASON_CHARACTERS = 200
_LONGEST_TIMER_SECONDS = 3600.0


class FleetWatch:
    """The state of the tree's fleet; ``since``: the time of the last change, in seconds since the
    epoch.
    """

    def __init__(self, core: "Core") -> None:
        self._core = core
        self._fleet = core.tree.fleet
        self._known = ("", "")
        self._timer: asyncio.TimerHandle | None = None
        self.since = int(time.time())

    def start(self) -> None:
        """Finish what an earlier process had accepted, and watch."""
        for publisher in list(self._fleet.manifests):
            self.settle(publisher)
        self.update()

    def accepted(self) -> None:
        """A roster, a manifest or a record was accepted."""
        self._fleet.refused = ""
        self.update()

    def refused(self, reason: str) -> None:
        """One was refused."""
        self._fleet.refused = reason[:_REASON_CHARACTERS]
        self.update()

    def update(self) -> None:
        """Announce the state if it has changed, and look again when it may."""
        fleet = self._fleet
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not fleet.id:
            self._known = ("", "")
            return
        known = (fleet.state, fleet.refused)
        if known != self._known:
            self._known, self.since = known, int(time.time())
            members: dict[str, object] = {"id": fleet.id, "state": fleet.state, "since": self.since}
            if fleet.refused:
                members["reason"] = fleet.refused
            level = log.info if fleet.state == "live" else log.warning
            level(
                "fleet '%s' is %s%s",
                fleet.id,
                fleet.state,
                f": {fleet.refused}"[:300] * bool(fleet.refused),
            )
            self._core.announce_to_control("FLEET_STATE", members, None, None)
        stale_at = fleet.stale_at
        if stale_at is not None and stale_at > time.time():
            # The calendar may be set: look at it now and then.
            wait = min(stale_at - time.time() + 0.1, _LONGEST_TIMER_SECONDS)
            self._timer = asyncio.get_running_loop().call_later(wait, self.update)

    def settle(self, publisher: str) -> list[Commit]:
        """Move aliases, and remove what was withdrawn; see fleet_rules.settle. Returns what waits
        for the disk.
        """
        commits = []
        for what, object_id, commit in fleet_rules.settle(self._core.tree, publisher):
            done = partial(self._settled, what, object_id, fleet_rules.origin(publisher))
            if commit is None:
                done()
            else:
                commit.then(partial(_unless_failed, done))
                commits.append(commit)
        return commits

    def _settled(self, what: str, object_id: str, origin: str) -> None:
        core = self._core
        if what == "del":
            core.audit.append("withdraw", None, id=object_id, origin=origin)
            core.announce("SECRET_DELETED", object_id, None, None)
            return
        after = core.tree.aliases.get(object_id)
        if after is not None:
            core.audit.append("alias", None, id=object_id, current=after.current, origin=origin)
            if what == "flip":
                core.announce("SECRET_ROTATED", object_id, None, None, {"version": after.current})


def _unless_failed(done: Callable[[], None], error: object) -> None:
    if error is None:
        done()
