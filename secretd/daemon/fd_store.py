# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager's descriptor store, which keeps secrets over restarts, kill -9 and upgrades.

It holds the arena and the journal's files, and the next process continues with them. Without a
store, secrets end with the process, as QEMU's do. daemon.process calls this module; systemd.notify
has the protocol.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from typing import Final

from secretd.daemon.inherited import ARENA, JOURNAL
from secretd.journal.journal import Journal
from secretd.systemd.notify import KeptDescriptors, NotifySocket, has_ended

log = logging.getLogger("secretd")

PROBE_SECONDS: Final = 2.0
"""Seconds after which a descriptor counts as stored: systemd closes descriptors without room in the
background.
"""


class DescriptorStore(KeptDescriptors):
    """What the service manager stores for the next process.

    ``kept``: everything is stored, as far as is known. ``holds``: the store may have a part of it,
    so nothing is wiped when this process ends.
    """

    def __init__(self, manager: NotifySocket, journal: Journal, *, restored: bool) -> None:
        super().__init__(manager, kept=restored)
        self.holds = restored
        self._journal = journal
        self._was_kept = restored
        self._source = -1  # our end of the present probe
        self._sure: asyncio.TimerHandle | None = None  # fires when the probe has stayed open
        self._said = False
        self._given_up = False
        if not restored:
            self._forget()
            if self._offer(wait=True) and manager.barrier() and not has_ended(self._source):
                self.kept = True
            else:
                self._lost()

    def _offer(self, *, wait: bool) -> bool:
        """Send all descriptors and a probe to the store (duplicates are ignored).

        Returns False if the messages could not be sent.
        """
        self.holds = True
        sent = self.manager.keep(ARENA, [self._journal.arena.fileno()], wait=wait)
        sent = self.manager.keep(JOURNAL, [self._journal.fileno()], wait=wait) and sent
        self._source = self.manager.probe(wait=wait)
        return sent

    def watch(self, changed: Callable[[], None]) -> None:
        """Find out, in the running loop, whether there was room; then call ``changed``."""
        if self._source < 0:
            return
        loop = asyncio.get_running_loop()

        def ended() -> None:
            self._lost()
            changed()

        def stays() -> None:
            self.close()
            self.kept = self._was_kept = True
            self._said = False
            changed()

        self._sure = loop.call_later(PROBE_SECONDS, stays)
        loop.add_reader(self._source, ended)

    def again(self, changed: Callable[[], None]) -> None:
        """Offer everything again: a daemon-reload may have emptied the store."""
        if self._source < 0 and not self._given_up:
            if self._offer(wait=False):
                self.watch(changed)
            else:
                self._lost()

    def _lost(self) -> None:
        self.close()
        self.kept = False
        if not self._was_kept:
            # Store nothing, rather than a part that the next process could not use.
            self._forget()
            self.holds = False
        if self._said:
            return
        self._said = True
        if self._was_kept:
            log.error(
                "the service manager has no room for another descriptor; raise "
                "FileDescriptorStoreMax= in the unit, or secrets may end with this process"
            )
        else:
            log.error(
                "the service manager keeps no descriptors, so secrets end with this process; "
                "FileDescriptorStoreMax=512 and NotifyAccess=main in the unit change that"
            )

    def give_up(self) -> None:
        """Store nothing any longer; on return that is certain, if the service manager answers."""
        self._given_up = True
        self.kept = self.holds = False
        self.close()
        self._forget()
        self.manager.barrier()

    def _forget(self) -> None:
        self.manager.drop(ARENA)
        self.manager.drop(JOURNAL)

    def close(self) -> None:
        """Stop watching."""
        if self._sure is not None:
            self._sure.cancel()
        if self._source >= 0:
            with contextlib.suppress(
                RuntimeError
            ):  # there is no loop before the end of the start, nor after the end
                asyncio.get_running_loop().remove_reader(self._source)
            os.close(self._source)
            self._source = -1
            self.manager.drop("probe", wait=False)
