# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command human-monitor-command (qapi/misc.json); monitor.hmp executes it."""

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
    cpu_index: int | UnsetType = UNSET,  # noqa: ARG001 - secretd has no CPU
) -> str | Awaitable[str]:
    """Execute a line of the human monitor and return its output."""
    text = memoryview(command_line)
    with monitor.scratch.allocate(len(text)) as line:
        line.view[:] = text
        return hmp.execute(monitor, line.view)
