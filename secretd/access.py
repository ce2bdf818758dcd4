# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may read what. The one place where that is decided.

A `Peer` is what the kernel says of the other end when it connects. `check` returns the `Grant` that
deliver demands, or refuses; nothing else makes one. server makes peers, commands asks.

On the control door everything is allowed. On the client door reading needs a grant, and as
long as there are no grant objects it refuses every read.
"""

import os
import socket
import struct
from collections.abc import Iterable
from enum import Enum
from typing import Final, NamedTuple

from secretd.errors import AccessDenied

_UCRED = struct.Struct("=iII")


class Door(Enum):
    """A listening socket's dialect and rights."""

    CONTROL = "control"
    CLIENT = "client"


class Peer(NamedTuple):
    """The process at the other end, by SO_PEERCRED (unix(7)) at the time it connected."""

    uid: int
    gid: int
    pid: int
    door: Door

    @property
    def trusted(self) -> bool:
        """True for uid 0 and the daemon's own uid, who could kill the daemon anyway."""
        return self.uid in (0, os.getuid())


class Grant:
    """Permission to deliver one secret to one peer, as `check` gave it."""

    __slots__ = ("object_id", "peer")

    def __init__(self, key: object, peer: Peer, object_id: str) -> None:
        if key is not _KEY:
            raise TypeError("only access.check() makes a Grant")
        self.peer = peer
        self.object_id = object_id


_KEY: Final = object()


def identify(sock: socket.socket, door: Door) -> Peer:
    """Return the peer of a connected AF_UNIX socket."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(credentials)
    return Peer(uid, gid, pid, door)


def admits(peer: Peer) -> bool:
    """May this peer connect? The control door is for uid 0 and the daemon's own uid only."""
    return peer.door is Door.CLIENT or peer.trusted


def check(peer: Peer, object_id: str) -> Grant:
    """Return leave to read a secret, or raise AccessDenied, which tells nothing of whether it exists."""
    if peer.door is not Door.CONTROL:
        raise AccessDenied(f"Reading secret '{object_id}' is not permitted")
    return Grant(_KEY, peer, object_id)


def readable(peer: Peer, object_ids: Iterable[str]) -> Iterable[str]:
    """Return those that this peer may know of: the ones that it may read."""
    return object_ids if peer.door is Door.CONTROL else ()
