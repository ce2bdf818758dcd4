# SPDX-License-Identifier: LGPL-2.1-or-later
"""The peer: the process at the other end of a connection, as the kernel describes it.

`identify` asks the kernel once, when a connection is accepted; the answers are those of the moment
when the peer connected. linux.peercred makes the system calls, and units finds the systemd unit of
a process. This module decides nothing: access.decision does. server calls it.
"""

import errno
import os
import socket
from collections.abc import Iterable
from enum import Enum
from typing import Final, NamedTuple

from secretd.access.units import cgroup_of, reason, units_of
from secretd.errors import PeerUnknown, UsageError
from secretd.linux import peercred
from secretd.linux.user_namespace import GIDS, UIDS, IdMap

GROUPS_MAX: Final = 4096
"""Groups of a peer; a peer with more is refused, since reading them takes the loop's time. The
kernel allows 65,536, and a user with a range of subordinate gids can be in all of them.
"""


def check_own_uid(uids: IdMap = UIDS) -> None:
    """Raise UsageError if the daemon's own uid is the overflow uid: all unmapped peers would be
    trusted.
    """
    if os.getuid() == uids.overflow:
        raise UsageError(
            f"uid {os.getuid()}, under which secretd runs, stands for every uid that this user "
            "namespace does not map; run it under one that is mapped and is not the overflow uid "
            "(user_namespaces(7))"
        )


_TRUSTED: Final = (0, os.getuid())
"""uid 0 and the daemon's own uid, which never changes."""


class SocketRole(Enum):
    """The role of a listening socket: its dialect and rights."""

    CONTROL = "control"
    CLIENT = "client"
    CREDENTIALS = "credentials"


class Peer(NamedTuple):
    """The process at the other end, at the time it connected.

    ``uid``, ``gid``, ``pid``: SO_PEERCRED (unix(7)). ``identities``: everything that authz objects
    may name, such as ``uid:33``, ``gid:33``, ``unit:nginx.service``,
    ``user-unit:1000/foo.service``. ``unit``: the innermost unit among these. ``authz``: the id of
    the object that admits other peers than uid 0 and the daemon's own uid to this socket.
    """

    uid: int
    gid: int
    pid: int
    role: SocketRole
    identities: frozenset[str] = frozenset()
    unit: str | None = None
    authz: str | None = None

    @property
    def info(self) -> dict[str, object]:
        """The peer's ids and unit, for audit records and events."""
        info: dict[str, object] = {"uid": self.uid, "gid": self.gid, "pid": self.pid}
        if self.unit is not None:
            info["unit"] = self.unit
        return info

    @property
    def trusted(self) -> bool:
        """True for uid 0 and the daemon's own uid, which could kill the daemon anyway."""
        return self.uid in _TRUSTED


def identify(sock: socket.socket, role: SocketRole, authz: str | None = None) -> Peer:
    """Return the peer of a connected AF_UNIX socket.

    ``role``, ``authz``: those of the listener. Raises PeerUnknown if the kernel does not identify
    the peer completely. On the control socket uid 0 and the daemon's own uid are never refused:
    there the unit and groups serve the audit only.
    """
    try:
        pid, uid, gid = peercred.credentials(sock)
    except OSError as error:
        raise PeerUnknown(reason(error)) from None
    if uid == UIDS.overflow:
        raise PeerUnknown(
            f"uid {uid} stands for every uid that the daemon's user namespace does not map", uid
        )
    own = frozenset((f"uid:{uid}",) if gid == GIDS.overflow else (f"uid:{uid}", f"gid:{gid}"))
    peer = Peer(uid, gid, pid, role, own, None, authz)
    try:
        identities = [f"gid:{group}" for group in _groups(sock) if group != GIDS.overflow]
        units = units_of(_cgroup(sock, pid if role is SocketRole.CREDENTIALS and uid == 0 else -1))
    except (PeerUnknown, OSError) as error:
        if role is SocketRole.CONTROL and peer.trusted:
            return peer
        words = reason(error) if isinstance(error, OSError) else str(error)
        raise PeerUnknown(words, uid) from None
    identities += units
    return peer._replace(
        identities=peer.identities.union(identities), unit=units[-1] if units else None
    )


def _groups(sock: socket.socket) -> Iterable[int]:
    try:
        return peercred.groups(sock, GROUPS_MAX)
    except OSError as error:
        if error.errno == errno.ERANGE:
            raise PeerUnknown(f"it is in more than {GROUPS_MAX} groups") from None
        raise PeerUnknown(reason(error)) from None


def _cgroup(sock: socket.socket, pid: int) -> str | None:
    """Return the path of the peer's cgroup, None if it has none that we can name.

    ``pid``: on kernels without pidfds of peers, look at the process that has this number now; -1 to
    refuse instead. The number may belong to another process only if the peer has ended. That is
    acceptable for root, which connects as a service manager and waits for the answer.
    """
    try:
        pidfd = _peer_pidfd(sock, pid)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            raise PeerUnknown("this kernel has no SO_PEERPIDFD; Linux 6.5 has") from None
        raise PeerUnknown(reason(error)) from None
    try:
        return cgroup_of(pidfd)
    finally:
        os.close(pidfd)


def _peer_pidfd(sock: socket.socket, pid: int) -> int:
    try:
        return peercred.pidfd(sock)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT or pid <= 0:
            raise
        return os.pidfd_open(pid)
