# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own commands about grants: list them, and explain a decision."""

from collections.abc import Coroutine, Iterator
from typing import Any, Final, NotRequired, TypedDict

from msgspec import UNSET, UnsetType

from secretd.access.grant_list import GrantInfo
from secretd.monitor.monitor import Monitor
from secretd.net.loop import turn
from secretd.qapi.command import Commands
from secretd.wire import encoder
from secretd.wire.encoder import JSONText

command: Final = Commands()

EXPLAINED_GRANTS: Final = 100
"""Grants that secret-explain lists."""

GRANTS_BYTES: Final = 48 << 10
"""Bytes of JSON text in one reply of query-secret-grants; a single grant may have more."""


class ConsideredGrant(TypedDict):
    """The verdict of a secret-grant about a client, with its reason."""

    grant: str
    allowed: bool
    reason: str


class Explanation(TypedDict):
    """The result of secret-explain. ``grant``: one that lets the client read the secret.
    ``version``: the current version of an alias, whose grants are listed, too.
    """

    allowed: bool
    exists: bool
    grant: NotRequired[str]
    version: NotRequired[str]
    grants: list[ConsideredGrant]


@command()
def secret_explain(monitor: Monitor, id: str, peer: list[str]) -> Explanation:  # noqa: A002
    """Return whether a client with the identities ``peer`` may read a secret on the client socket.

    ``grants`` lists the verdict of each secret-grant that names the secret.
    """
    access, identities = monitor.core.access, frozenset(peer)
    considered = access.explain(identities, id)
    allowed = next((c for c in considered if c.allowed), None)
    version = monitor.tree.resolved(id)
    if version is not id and access.is_denied(identities, id, version):
        allowed = None
    found: Explanation = {
        "allowed": allowed is not None,
        "exists": monitor.tree.names_secret(id),
        "grants": [c._asdict() for c in considered[:EXPLAINED_GRANTS]],  # type: ignore[misc]
    }
    if allowed is not None:
        found["grant"] = allowed.grant
    if version is not id:
        found["version"] = version
    return found


@command(waits=True)
def query_secret_grants(
    monitor: Monitor,
    secret: str | UnsetType = UNSET,
    peer: list[str] | UnsetType = UNSET,
    after: str | UnsetType = UNSET,
) -> JSONText[list[GrantInfo]] | Coroutine[Any, Any, JSONText[list[GrantInfo]]]:
    """List the grants by id: which secrets, to whom, and the reads and seconds that are left.

    ``secret``: only grants for this id; ``peer``: only grants that allow a client with these
    identities. ``after`` continues after that id, until the list is empty.
    """
    found = monitor.core.access.grants_after(
        "" if after is UNSET else after,
        None if secret is UNSET else secret,
        None if peer is UNSET else frozenset(peer),
    )
    page = _Page()
    return page.text if page.fill(found) else _fill_later(page, monitor, found)


async def _fill_later(
    page: "_Page", monitor: Monitor, found: Iterator[GrantInfo | None]
) -> JSONText[list[GrantInfo]]:
    done = False
    while not done:
        await turn(None if monitor.trusted else monitor.peer.uid)
        done = page.fill(found)
    return page.text


class _Page:
    """One reply of query-secret-grants."""

    def __init__(self) -> None:
        self._grants: list[str] = []
        self._room = GRANTS_BYTES

    @property
    def text(self) -> JSONText[list[GrantInfo]]:
        """The list as JSON."""
        return JSONText(f"[{', '.join(self._grants)}]")

    def fill(self, found: Iterator[GrantInfo | None]) -> bool:
        """List found grants until the page is full or none is left; return False to let others
        have their turn.
        """
        for grant in found:
            if grant is None:
                return False
            text = encoder.value(grant)
            self._room -= len(text) + 2
            if self._grants and self._room < 0:
                break
            self._grants.append(text)
        return True
