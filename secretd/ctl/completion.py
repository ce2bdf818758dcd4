# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion in shells: ids of secrets. The verb that prints the script is in main."""

from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from secretd.client import SyncClient
from secretd.client.types import before

COMPLETION_SECONDS: Final = 1.0
"""Seconds within which secretd must return the ids, while the user types."""


def complete_ids(
    context: click.Context, _param: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Return the ids of secrets with a prefix; none if secretd does not answer soon."""
    parent = context.parent
    socket = context.params.get("socket") or (parent.params.get("socket") if parent else None)

    try:
        with SyncClient(socket, retry_seconds=0, timeout=COMPLETION_SECONDS) as client:
            found: Any = client.execute("query-secrets", {"after": before(begun)})
    except Exception:  # noqa: BLE001 - completion must not disturb the shell
        return []
    return [CompletionItem(each["id"]) for each in found if each["id"].startswith(begun)]
