# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands about descriptors that the client passes (qapi/misc.json)."""

from typing import Final

from msgspec import UNSET, UnsetType

from secretd.descriptors.passed import AddfdInfo, FdsetInfo
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands

command: Final = Commands()


@command(client=True)
def add_fd(
    monitor: Monitor, fdset_id: int | UnsetType = UNSET, opaque: str | UnsetType = UNSET
) -> AddfdInfo:
    """Add the passed descriptor to a set."""
    fd = monitor.take_descriptor()
    return monitor.fdsets.add(
        fd, None if fdset_id is UNSET else fdset_id, None if opaque is UNSET else opaque
    )


@command(client=True)
def remove_fd(monitor: Monitor, fdset_id: int, fd: int | UnsetType = UNSET) -> None:
    """Close one descriptor of a set, or all of them."""
    monitor.fdsets.remove(fdset_id, None if fd is UNSET else fd)


@command(client=True)
def query_fdsets(monitor: Monitor) -> list[FdsetInfo]:
    """List this connection's sets."""
    return monitor.fdsets.query()


@command(client=True)
def getfd(monitor: Monitor, fdname: str) -> None:
    """Name the passed descriptor."""
    monitor.named.add(fdname, monitor.take_descriptor())


@command(client=True)
def closefd(monitor: Monitor, fdname: str) -> None:
    """Close a named descriptor."""
    monitor.named.take(fdname).close()
