# SPDX-License-Identifier: LGPL-2.1-or-later
"""Socket activation: the descriptors that the service manager passes (sd_listen_fds(3)).

This module only reads the environment and names the descriptors; daemon.inherited decides about
their use.
"""

import os
from typing import Final, NamedTuple

FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START."""


class Passed(NamedTuple):
    """A descriptor that the service manager passed, and its FileDescriptorName= or FDNAME=."""

    name: str
    fd: int


def passed() -> list[Passed]:
    """Return the descriptors that the service manager passed; the caller owns them.

    They are closed on exec from now on, and the variables are removed from the environment, so that
    no child uses them (sd_listen_fds_with_names(3)). Names identify them, not numbers: the order
    differs between starts.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for number in range(int(count)):
        fd = FIRST_FD + number
        os.set_inheritable(fd, False)
        found.append(Passed(names[number] if number < len(names) else "unknown", fd))
    return found
