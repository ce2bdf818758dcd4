# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reasons for which a connection is not read for a while; transport keeps those in force."""

from enum import IntFlag
from typing import Final


class Pause(IntFlag):
    """Reasons not to read from a connection, nor to handle what it has sent."""

    BUSY = 1
    """The session waits for a command, or cannot queue another request."""
    ASIDE = 2
    """The session waits for an out-of-band command."""
    TURN = 4
    """The connection has yielded: other connections, or other uids, come first."""
    BACKLOG = 8
    """The client does not read its replies."""
    STARVED = 16
    """The unfinished message fills its buffer, and there is no room for a larger one."""


# Plain numbers: an operation on a flag costs as much as a system call.
TURN: Final = int(Pause.TURN)
BACKLOG: Final = int(Pause.BACKLOG)
STARVED: Final = int(Pause.STARVED)
CLOCK_STOPPED: Final = int(Pause.BUSY | Pause.ASIDE | Pause.TURN)
"""Pauses that stop the clock of an unfinished message.

In the others the client holds memory at its own pace.
"""
