# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command human-monitor-command (qapi/misc.json); monitor.hmp carries it out."""

from collections.abc import Awaitable
from typing import Final

from msgspec import UNSET, Raw, UnsetType

from secretd.monitor import hmp
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands

command: Final = Commands()


@command(waits=True)
def human_monitor_command(
    monitor: Monitor,
    command_line: Raw,
    cpu_index: int | UnsetType = UNSET,  # noqa: ARG001 - there is no CPU, whichever is meant
) -> str | Awaitable[str]:
    """Carry out a line of the human monitor and return what it prints."""
    text = memoryview(command_line)
    with monitor.scratch.allocate(len(text)) as line:
        line.view[:] = text
        return hmp.execute(monitor, line.view)
