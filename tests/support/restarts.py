# SPDX-License-Identifier: LGPL-2.1-or-later
"""Servers that end connections, and come back."""

from pathlib import Path

from tests.support.daemon import Daemon


def restarted(daemon: Daemon, directory: Path) -> Daemon:
    """Another server at the same place, with nothing of the first one."""
    daemon.stop()
    return Daemon(directory)


def cut(daemon: Daemon) -> None:
    """Have the next object that comes or goes end all connections before that is answered."""

    def close() -> None:
        daemon.tree._on_count.remove(close)
        for session in list(daemon.server.sessions):
            session.transport.close()

    daemon.tree.subscribe(count=close)
