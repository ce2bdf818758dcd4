# SPDX-License-Identifier: LGPL-2.1-or-later
"""The readers of an alias: which of them have the current version, and waiting for the others.

The verb rotate calls this module. It asks secretd again and again: a reader that reads is shown
within a second.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from secretd.client import AliasInfo, SyncClient
from secretd.ctl.identities import named_identity
from secretd.ctl.output import Common, count, duration, note, table, warn

ASKED_SECONDS: Final = 0.5
"""Seconds between two questions about the readers."""


class Patience(NamedTuple):
    """How long to wait for readers, None for no limit, and what to do with units: "restart",
    "reload" or nothing.
    """

    seconds: int | None
    units: str


class Readers:
    """The readers of the alias ``object_id``."""

    def __init__(self, common: Common, client: SyncClient, object_id: str) -> None:
        self._common = common
        self._client = client
        self._object_id = object_id
        self._done: set[str] = set()
        self._drawn = 0

    def show(self, alias: AliasInfo) -> None:
        """Print a table of the readers."""
        if not alias.readers:
            note(f"no reader of '{alias.id}' is known")
            return
        rows = [
            (named_identity(each), _shown(alias, read), "yes" if each in alias.missing else "-")
            for each, read in alias.readers.items()
        ]
        table(["READER", "HAS READ", "AWAITED"], rows)

    def wait(self, patience: Patience) -> None:
        """Return once all have read the current version, or after the time is over."""
        until = None if patience.seconds is None else time.monotonic() + patience.seconds
        alias = self._client.alias(self._object_id)
        if not self._is_complete(alias):
            self._about_units(alias, patience.units)
        while not self._is_complete(alias := self._client.alias(self._object_id)):
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                self._draw(alias, left)
                warn(self._overdue(alias))
                return
            self._draw(alias, left)
            time.sleep(ASKED_SECONDS if left is None else min(ASKED_SECONDS, left))
        self._draw(alias, None)

    @staticmethod
    def _is_complete(alias: AliasInfo) -> bool:
        return not alias.missing and (not alias.more or bool(alias.consumers))

    def _overdue(self, alias: AliasInfo) -> str:
        names = [named_identity(each) for each in alias.missing]
        names += ["readers that secretd does not remember"] * alias.more
        return f"retired all the same, though {', '.join(names)} may still hold the version before"

    # --- units

    def _about_units(self, alias: AliasInfo, action: str) -> None:
        """Restart or reload the units that hold the version before, or name them."""
        commands = [
            command for each in alias.missing if (command := _systemctl(each, action or "restart"))
        ]
        if not commands:
            return
        if not action:
            words = "; ".join(" ".join(command) for command in commands)
            note(f"units that hold {alias.previous}: {words} (or --restart-units)")
            return
        for command in commands:
            note(" ".join(command))
            try:
                done = subprocess.run(command, check=False, capture_output=True, text=True)
            except FileNotFoundError:
                warn("there is no systemctl here, so no unit was restarted")
                return
            if done.returncode:
                warn(f"{' '.join(command)}: {done.stderr.strip() or 'it failed'}")

    # --- live

    def _draw(self, alias: AliasInfo, left: float | None) -> None:
        """Show the readers: a table that changes in place on a terminal, lines elsewhere."""
        if self._common.json:
            return
        if not sys.stdout.isatty():
            self._lines(alias)
            return
        if self._drawn:
            sys.stdout.write(f"\x1b[{self._drawn}F\x1b[J")
        size = os.get_terminal_size(sys.stdout.fileno())
        width = max([len(named_identity(each)) for each in alias.readers] + [6])
        # Those that are waited for first, and no more than fit.
        order = sorted(alias.readers, key=lambda each: (each not in alias.missing, each))
        rows = []
        for each in order:
            mark = "waiting" if each in alias.missing else "done"
            read = _shown(alias, alias.readers[each])
            rows.append(f"  {named_identity(each):<{width}}  {mark:<7}  {read}")
        room = max(1, size.lines - 4)
        if len(rows) > room:
            rows = [*rows[: room - 1], f"  and {len(rows) - room + 1} more"]
        if not self._is_complete(alias):
            limit = "" if left is None else f", {duration(max(0, int(left)))} left"
            which = count(len(alias.missing), "reader") if alias.missing else "unknown readers"
            rows.append(f"waiting for {which}{limit}; Ctrl-C stops it")
        sys.stdout.write("".join(f"{row[: size.columns - 1]}\n" for row in rows))
        sys.stdout.flush()
        self._drawn = len(rows)

    def _lines(self, alias: AliasInfo) -> None:
        """Print what is new since the last question."""
        if not self._drawn:
            self._drawn = 1
            for each in alias.missing:
                print(f"waiting: {named_identity(each)}", flush=True)
            self._done = set(alias.readers) - set(alias.missing)
        for each in alias.readers:
            if each not in alias.missing and each not in self._done:
                self._done.add(each)
                print(f"read: {named_identity(each)}", flush=True)


def _shown(alias: AliasInfo, read: str) -> str:
    versions = {"current": alias.current, "previous": alias.previous}
    return versions.get(read, "nothing yet")


def _systemctl(identity: str, action: str) -> Sequence[str]:
    """Return the command that makes a unit read its secrets again; none for other identities."""
    kind, _, name = identity.partition(":")
    if kind == "unit":
        return ("systemctl", action, name)
    if kind == "user-unit":
        uid, _, unit = name.partition("/")
        return ("systemctl", "--user", f"--machine={uid}@.host", action, unit)
    return ()
