# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands: one short typed function each, grouped as QEMU's qapi/*.json.

The signature is the schema (qapi.command), and the docstring the documentation. A function takes
the session's Monitor and returns JSON, None for an empty object, or a coroutine if it must wait; it
raises CommandError. These functions call the part of the daemon that does the work. The commands
are those of QEMU 10's qapi/ unless their docstring says that they are secretd's own.
"""

from typing import Final

from secretd.monitor.commands import (
    aliases,
    arrivals,
    base,
    descriptors,
    fleet,
    fleet_signing,
    grants,
    human,
    known_hosts,
    objects,
    records,
    secrets,
    stats,
    store,
)
from secretd.qapi.command import Commands

COMMANDS: Final = Commands(
    base.command,
    objects.command,
    descriptors.command,
    secrets.command,
    grants.command,
    aliases.command,
    known_hosts.command,
    records.command,
    arrivals.command,
    fleet.command,
    fleet_signing.command,
    stats.command,
    store.command,
    human.command,
)
"""All commands, in the order in which query-commands lists them."""
