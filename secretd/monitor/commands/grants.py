# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own commands about grants: list them, and explain a decision."""

from collections.abc import Coroutine
from typing import Any, Final, NotRequired, TypedDict

from msgspec import UNSET, UnsetType

from secretd.access.grant_list import GrantInfo
from secretd.monitor.commands.pages import Page, fill_later
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands
from secretd.wire.encoder import JSONText

command: Final = Commands()

EXPLAINED_GRANTS: Final = 100
"""Grants that secret-explain lists."""


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
    page: Page[GrantInfo] = Page()
    return page.text if page.fill(found) else fill_later(page, monitor, found)
