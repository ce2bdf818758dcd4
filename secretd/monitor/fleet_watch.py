# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state of the fleet over time, and what follows from what was accepted.

Core has one. The commands say what came; this module records and announces what changes by it.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

from secretd.monitor.failures import log
from secretd.qom import fleet_rules, fleet_settling
from secretd.store.commit import Commit

if TYPE_CHECKING:
    from secretd.monitor.core import Core

_REASON_CHARACTERS = 200
_LONGEST_TIMER_SECONDS = 3600.0
_REFUSED_SECONDS = 1.0

Kind = Literal["roster", "manifest", "record", "alias"]

SETTLED_AT_ONCE = 32
"""Objects that are removed or moved in one turn of the loop."""

SETTLE_SECONDS = 5.0
"""Seconds after which what could not be removed is tried again."""


class FleetWatch:
    """The state of the tree's fleet; ``since``: the time of the last change, in seconds since the
    epoch.
    """

    def __init__(self, core: "Core") -> None:
        self._core = core
        self._fleet = core.tree.fleet
        self._known = ("", "")
        self._timer: asyncio.TimerHandle | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._refused_at = float("-inf")
        self._kind: Kind = "roster"
        self.since = int(time.time())

    def start(self) -> None:
        """Finish what an earlier process had accepted, and watch."""
        for publisher in list(self._fleet.manifests):
            self.settle(publisher)
        self.update()

    def accepted(self, kind: Kind, *, is_new: bool = False) -> None:
        """A roster, a manifest or a record was accepted: what was refused of its kind is past, and
        with one that is new all of it may be.
        """
        if is_new or kind == self._kind:
            self._fleet.refused = ""
        self.update()

    def refused(self, kind: Kind, reason: str) -> None:
        """One was refused. Of many within a second the first and the last are announced."""
        self._kind = kind
        was, self._fleet.refused = self._fleet.refused, reason[:_REASON_CHARACTERS]
        ago = time.monotonic() - self._refused_at
        if not was or ago >= _REFUSED_SECONDS:
            self._refused_at = time.monotonic()
            self.update()
            return
        loop, left = asyncio.get_running_loop(), _REFUSED_SECONDS - ago
        if self._timer is None or self._timer.when() > loop.time() + left:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_later(left, self.update)

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
            reason = fleet.reason
            if reason:
                members["reason"] = reason
            level = log.info if fleet.state == "live" else log.warning
            level(
                "fleet '%s' is %s%s",
                fleet.id,
                fleet.state,
                f": {reason}" * bool(reason),
            )
            self._core.announce_to_control("FLEET_STATE", members, None, None)
        stale_at = fleet.stale_at
        if stale_at is not None and stale_at > time.time():
            # The calendar may be set: look at it now and then.
            wait = min(stale_at - time.time() + 0.1, _LONGEST_TIMER_SECONDS)
            self._timer = asyncio.get_running_loop().call_later(wait, self.update)

    def settle(self, publisher: str) -> list[Commit]:
        """Move aliases, and remove what was withdrawn; see qom.fleet_settling. Returns what waits
        for the disk.
        """
        commits: list[Commit] = []
        mine = fleet_rules.origin(publisher)
        settling = fleet_settling.settle(self._core.tree, publisher)
        for what, object_id, commit in islice(settling, SETTLED_AT_ONCE):
            if what == "blocked":
                self.refused(
                    "alias",
                    f"Alias '{object_id}' of {mine} cannot be made: the object with this id did "
                    "not come from it",
                )
                continue
            done = partial(self._settled, what, object_id, mine)
            if commit is None:
                done()
            else:
                commit.then(partial(_unless_failed, done))
                commits.append(commit)
        if fleet_settling.pending(self._core.tree, publisher):
            more = self._fleet.withdrawn.get(publisher) and commits
            self._settle_later(0.0 if more else SETTLE_SECONDS)
        return commits

    def _settle_later(self, wait: float) -> None:
        """Go on, or try again what was in use."""
        loop = asyncio.get_running_loop()
        if self._settling is not None:
            if self._settling.when() <= loop.time() + wait:
                return
            self._settling.cancel()
        self._settling = loop.call_later(wait, self._settle_all)

    def _settle_all(self) -> None:
        self._settling = None
        for publisher in list(self._fleet.manifests):
            self.settle(publisher)

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
