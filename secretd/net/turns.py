# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work for untrusted peers, done in turn by uid.

Each turn is short, and the loop looks at epoll between turns. So neither the number of a uid's
connections nor the cost of their messages delays other peers by more than a few messages. net.loop
runs it.
"""

from collections.abc import Callable
from time import monotonic

from secretd.limits import Tuning


class Turns:
    """Work in turn by uid, and in order within a uid. The same work waits only once.

    ``failed``: called with the exception of a piece of work. ``seconds``: the time of work for
    untrusted peers between two looks at epoll, while more waits. ``waiting``: the work, by uid.
    """

    def __init__(
        self, failed: Callable[[Exception], None], seconds: float = Tuning.turns_seconds
    ) -> None:
        self.seconds = seconds
        self.waiting: dict[int, dict[Callable[[], None], None]] = {}
        self._failed = failed

    def add(self, uid: int, work: Callable[[], None]) -> None:
        """Do a piece of work for a uid in its next turn."""
        self.waiting.setdefault(uid, {})[work] = None

    def run(self) -> None:
        """Do one piece for each uid in turn, until ``seconds`` have passed."""
        by_uid = self.waiting
        end = monotonic() + self.seconds
        while by_uid:
            uid = next(iter(by_uid))
            waiting = by_uid.pop(uid)
            work = next(iter(waiting))
            del waiting[work]
            if waiting:
                by_uid[uid] = waiting  # behind the others
            try:
                work()
            except Exception as error:  # noqa: BLE001 - as asyncio does with a callback
                self._failed(error)
            if monotonic() > end:
                return


class Turn:
    """The time for which one connection may handle its requests before it yields.

    ``alone()``: True while there is no other connection. ``others_ready()``: True if another one
    has sent something. ``yield_turn()``: lets others go first. ``began``: the time of the first
    check, 0.0 at the start of a turn. A connection with a single request never checks.
    """

    __slots__ = (
        "_alone",
        "_longest",
        "_longest_shared",
        "_look",
        "_looked",
        "_others_ready",
        "_yield",
        "began",
    )  # fmt: skip

    def __init__(
        self,
        alone: Callable[[], bool],
        others_ready: Callable[[], bool],
        yield_turn: Callable[[], None],
        tuning: Tuning,
    ) -> None:
        self._alone = alone
        self._others_ready = others_ready
        self._yield = yield_turn
        self._look = tuning.look_seconds
        self._longest, self._longest_shared = tuning.turn_seconds, tuning.shared_turn_seconds
        self.began = self._looked = 0.0

    def is_alone(self) -> bool:
        """Return True while no other connection waits: a long piece of work may go on."""
        return self._alone() or not self._others_ready()

    def yield_if_due(self) -> bool:
        """Yield if the turn has lasted long enough or others are ready; return True if so."""
        now = monotonic()
        if not self.began:
            self.began = self._looked = now
        elif now - self._looked > self._look:
            self._looked = now
            alone = self._alone()
            longest = self._longest if alone else self._longest_shared
            if now - self.began > longest or (not alone and self._others_ready()):
                self._yield()
                return True
        return False
