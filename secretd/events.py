# SPDX-License-Identifier: LGPL-2.1-or-later
"""The events that secretd sends: what their data is.

Who gets them is said in server, when they happen in commands. The schema is made from here.
"""

from typing import Final, Literal, TypedDict


class Shutdown(TypedDict):
    """QEMU's SHUTDOWN (qapi/run-state.json)."""

    guest: bool
    reason: Literal[
        "none",
        "host-error",
        "host-qmp-quit",
        "host-qmp-system-reset",
        "host-signal",
        "host-ui",
        "guest-shutdown",
        "guest-reset",
        "guest-panic",
        "subsystem-reset",
        "snapshot-load",
    ]


class PeerInfo(TypedDict):
    """Who did it: SO_PEERCRED of the connection."""

    uid: int
    gid: int
    pid: int


class AboutSecret(TypedDict):
    """What happened to the secret ``id``, and who did it."""

    id: str
    peer: PeerInfo


class EventsLost(TypedDict):
    """How many events this connection did not get since it did not read."""

    count: int


EVENTS: Final[dict[str, type]] = {
    "SHUTDOWN": Shutdown,
    "SECRET_ADDED": AboutSecret,
    "SECRET_DELETED": AboutSecret,
    "SECRET_EVENTS_LOST": EventsLost,
}
