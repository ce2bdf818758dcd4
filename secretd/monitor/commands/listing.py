# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own command query-secrets, which lists secrets page by page."""

from collections.abc import Iterator
from typing import Final, Literal, NotRequired, TypedDict

from secretd.monitor.monitor import Monitor
from secretd.net.loop import turn

SECRETS_PER_REPLY: Final = 400
"""Secrets that query-secrets lists in one reply, with SECRETS_BYTES for their ids. Each takes some
100 bytes besides the id, so the line stays under MAX_REPLY_BYTES.
"""

SECRETS_BYTES: Final = 16 << 10
"""Bytes of the ids in one reply of query-secrets."""

SecretInfo = TypedDict(
    "SecretInfo",
    {
        "id": str,
        "qom-type": str,
        "size": int,
        "memory": Literal["secretmem", "mlock", "none"],
        "expires-in": NotRequired[int],
        "version": NotRequired[str],
        "origin": NotRequired[str],
    },
)
"""An entry of query-secrets: the size in bytes, the time left in seconds if it is limited. An alias
has these of its current version, which ``version`` names. ``origin``: the host that it came from.
"""


async def fill_later(page: "Page", found: Iterator[str | None]) -> list[SecretInfo]:
    """Search many secrets of which few may be listed, a block at a time."""
    monitor = page.monitor
    done = False
    while not done:
        await turn(None if monitor.trusted else monitor.peer.uid)
        done = page.fill(found)
    return page.listed


class Page:
    """One reply of query-secrets."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.listed: list[SecretInfo] = []
        self._room = SECRETS_BYTES

    def fill(self, found: Iterator[str | None]) -> bool:
        """List found secrets until the page is full or none is left; return False to let others
        have their turn.
        """
        memory, listed = self.monitor.core.memory, self.listed
        tree = self.monitor.tree
        secret, remaining, aliases = tree.secret, tree.deadlines.remaining, tree.aliases
        for object_id in found:
            if object_id is None:
                return False
            self._room -= len(object_id)
            if listed and (self._room < 0 or len(listed) == SECRETS_PER_REPLY):
                break
            qom_type, size = secret(object_id)
            info: SecretInfo = {
                "id": object_id, "qom-type": qom_type, "size": size, "memory": memory,
            }  # fmt: skip
            version = object_id
            if object_id in aliases:
                version = info["version"] = tree.resolved(object_id)
            if origin := tree.origins.get(object_id):
                info["origin"] = origin if ":" in origin else f"host:{origin}"
            left = remaining(version)
            if left is not None:
                info["expires-in"] = left
            listed.append(info)
        return True
