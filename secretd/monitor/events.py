# SPDX-License-Identifier: LGPL-2.1-or-later
"""The events that secretd sends, and their data.

broadcast decides which connections get them; commands, monitor, core and server cause them. The
schema is derived from this module.
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
    """The peer that caused an event: SO_PEERCRED of its connection, and its systemd unit if it has
    one.
    """

    uid: int
    gid: int
    pid: int
    unit: NotRequired[str]


class AboutSecret(TypedDict):
    """An event of the secret ``id``; on the control socket with the peer that caused it, if there
    is one. ``version``: what was read, where ``id`` is an alias.
    """

    id: str
    version: NotRequired[str]
    peer: NotRequired[PeerInfo]


class AboutAlias(TypedDict):
    """An event of the secret-alias ``id``: ``version`` is its current version from now on."""

    id: str
    version: str
    peer: NotRequired[PeerInfo]


class AboutGrant(TypedDict):
    """An event of the secret-grant ``id``, for control connections only. ``secret``: the ids that
    a new one names.
    """

    id: str
    secret: NotRequired[str]
    peer: NotRequired[PeerInfo]


class AboutStore(TypedDict):
    """An event of the secret-store ``id``, for control connections only. ``reason``: why it has
    failed.
    """

    id: str
    state: Literal["locked", "open", "failed"]
    reason: NotRequired[str]


class AboutFleet(TypedDict):
    """An event of the secret-fleet ``id``, for control connections only. ``since``: seconds since
    the epoch. ``reason``: why the last roster, manifest or record was refused.
    """

    id: str
    state: Literal["live", "stale", "refused"]
    since: int
    reason: NotRequired[str]


class EventsLost(TypedDict):
    """The number of lost events: the client did not read, a queue was full, or too many ids were
    throttled.
    """

    count: int


EventName = Literal[
    "SECRET_ADDED",
    "SECRET_DELETED",
    "SECRET_EXPIRED",
    "SECRET_READ",
    "SECRET_DENIED",
    "SECRET_ROTATED",
    "SECRET_GRANTED",
    "SECRET_REVOKED",
    "SECRET_STORE",
    "FLEET_STATE",
]
"""The events that `secret-events` can select."""

EVENTS: Final[dict[str, type]] = {
    "SHUTDOWN": Shutdown,
    "SECRET_ADDED": AboutSecret,
    "SECRET_DELETED": AboutSecret,
    "SECRET_EXPIRED": AboutSecret,
    "SECRET_READ": AboutSecret,
    "SECRET_DENIED": AboutSecret,
    "SECRET_ROTATED": AboutAlias,
    "SECRET_GRANTED": AboutGrant,
    "SECRET_REVOKED": AboutGrant,
    "SECRET_STORE": AboutStore,
    "FLEET_STATE": AboutFleet,
    "SECRET_EVENTS_LOST": EventsLost,
}
