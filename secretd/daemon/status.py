# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages to the service manager while the daemon runs: ready, watchdog, status line.

daemon.process calls it.
"""

import asyncio
from typing import Final

from secretd.daemon.fd_store import DescriptorStore
from secretd.qom.tree import ObjectTree

STATUS_SECONDS: Final = 1.0
"""Seconds after a change within which `systemctl status` shows it; changes in between share a
message.
"""


class StatusReporter:
    """Reports to the service manager: signs of life, and the status line."""

    def __init__(self, store: DescriptorStore, tree: ObjectTree) -> None:
        self._store = store
        self._manager = store.manager
        self._tree = tree
        self._due: asyncio.TimerHandle | None = None
        self._stopping = False

    def start(self) -> None:
        """Report that the daemon is ready, and continue to report."""
        self._tree.subscribe(count=self._changed)
        self._manager.ready(self.status())
        self._store.watch(self._changed)
        if self._manager.watchdog is not None:
            self._beat(self._manager.watchdog / 2)

    def status(self) -> str:
        """Return the status line of `systemctl status`."""
        secrets = len(self._tree.journal) - len(self._tree.deciding)
        level = self._tree.journal.arena.level
        kept = "kept over restarts" if self._store.kept else "not kept over restarts"
        return f"{secrets} secret{'' if secrets == 1 else 's'}, memory: {level}, {kept}"

    def reloading(self) -> None:
        """Report the begin of a reload."""
        self._manager.reloading()

    def reloaded(self) -> None:
        """Report the end of a reload."""
        self._manager.ready(self.status())

    def stopping(self) -> None:
        """Report the begin of the end."""
        self._stopping = True
        if self._due is not None:
            self._due.cancel()
        self._manager.stopping(self.status())

    def _beat(self, seconds: float) -> None:
        self._manager.alive()
        self._store.again(self._changed)
        asyncio.get_running_loop().call_later(seconds, self._beat, seconds)

    def _changed(self) -> None:
        if self._due is None and not self._stopping:
            self._due = asyncio.get_running_loop().call_later(STATUS_SECONDS, self._tell)

    def _tell(self) -> None:
        self._due = None
        if not self._manager.status(self.status()):
            self._changed()
