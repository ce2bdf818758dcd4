# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion in shells: secrets, grants, identities and commands. frame has the verb that prints
the script.

Nothing here may disturb the shell: what cannot be found out soon is not completed.
"""

import grp
import os
import pwd
import subprocess
from collections.abc import Callable, Iterable
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from secretd.client import SyncClient
from secretd.client.types import before

COMPLETION_SECONDS: Final = 1.0
"""Seconds within which secretd and systemd must answer, while the user types."""

Completion = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

_KINDS: Final = {
    "unit:": "a unit of the system",
    "user:": "a user",
    "group:": "a group",
    "uid:": "a user's number",
    "gid:": "a group's number",
    "user-unit:": "a unit of a user, as USER/NAME",
}


def _asked(context: click.Context, command: str, arguments: dict[str, object]) -> Any:
    """Return what secretd returns, an empty list if it does not answer soon."""
    parent = context.parent
    socket = context.params.get("socket") or (parent.params.get("socket") if parent else None)
    try:
        with SyncClient(socket, retry_seconds=0, timeout=COMPLETION_SECONDS) as client:
            return client.execute(command, arguments)
    except Exception:  # noqa: BLE001 - see above
        return []


def _secrets(context: click.Context, _param: click.Parameter, begun: str) -> list[CompletionItem]:
    found = _asked(context, "query-secrets", {"after": before(begun)})
    return [CompletionItem(each["id"]) for each in found if each["id"].startswith(begun)]


def _grants(context: click.Context, _param: click.Parameter, begun: str) -> list[CompletionItem]:
    found = _asked(context, "query-secret-grants", {"after": before(begun)})
    return [
        CompletionItem(each["id"], help=f"{each['secret']} to {', '.join(each['allows'])}")
        for each in found
        if each["id"].startswith(begun)
    ]


def _identities(
    _context: click.Context, _param: click.Parameter, begun: str
) -> list[CompletionItem]:
    kind, colon, name = begun.partition(":")
    if not colon:
        return [
            CompletionItem(known, help=words)
            for known, words in _KINDS.items()
            if known.startswith(begun)
        ]
    names: Iterable[str] = ()
    if kind == "user":
        names = (entry.pw_name for entry in pwd.getpwall())
    elif kind == "group":
        names = (entry.gr_name for entry in grp.getgrall())
    elif kind == "unit":
        names = _units(name)
    return [CompletionItem(f"{kind}:{each}") for each in names if each.startswith(name)]


def _units(begun: str) -> list[str]:
    """Return the names of the services that systemd knows."""
    command = [
        "systemctl", "list-unit-files", "--type=service", "--plain", "--no-legend", "--no-pager",
        f"{begun}*",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPLETION_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted(line.split()[0] for line in done.stdout.splitlines() if line.strip())


def _commands(context: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete the command of `run --` from PATH, and its arguments as files."""
    if context.params.get(param.name or "") or "/" in begun:
        return [CompletionItem(begun, type="file")]
    found: set[str] = set()
    for directory in os.environ.get("PATH", os.defpath).split(":"):
        try:
            with os.scandir(directory or ".") as entries:
                found.update(
                    each.name
                    for each in entries
                    if each.name.startswith(begun) and os.access(each.path, os.X_OK)
                )
        except OSError:
            continue
    return [CompletionItem(each) for each in sorted(found)]


COMPLETIONS: Final[dict[str, Completion]] = {
    "secrets": _secrets,
    "grants": _grants,
    "identities": _identities,
    "commands": _commands,
}
"""The functions that complete a parameter, by the name in its ``completes``."""
