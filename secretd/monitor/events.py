# SPDX-License-Identifier: LGPL-2.1-or-later
"""The events that secretd sends: what their data is.

broadcast decides which connections get them, commands when they happen. The schema is made from
here.
"""

from typing import Final, Literal, NotRequired, TypedDict


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
    """Who did it: SO_PEERCRED of the connection, and its systemd unit if it has one."""

    uid: int
    gid: int
    pid: int
    unit: NotRequired[str]


class AboutSecret(TypedDict):
    """What happened to the secret ``id``; on the control socket also who did it, if anybody did."""

    id: str
    peer: NotRequired[PeerInfo]


class EventsLost(TypedDict):
    """How many events this connection did not get since it did not read."""

    count: int


EventName = Literal[
    "SECRET_ADDED", "SECRET_DELETED", "SECRET_EXPIRED", "SECRET_READ", "SECRET_DENIED"
]
"""The events that `secret-events` can choose among."""

EVENTS: Final[dict[str, type]] = {
    "SHUTDOWN": Shutdown,
    "SECRET_ADDED": AboutSecret,
    "SECRET_DELETED": AboutSecret,
    "SECRET_EXPIRED": AboutSecret,
    "SECRET_READ": AboutSecret,
    "SECRET_DENIED": AboutSecret,
    "SECRET_EVENTS_LOST": EventsLost,
}
