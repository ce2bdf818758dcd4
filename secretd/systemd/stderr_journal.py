# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal as standard error: detection, and the priority of each line (sd-daemon(3)).

daemon.log and audit.log use it.
"""

import contextlib
import logging
import os
from typing import Final

_PRIORITIES: Final = {
    logging.DEBUG: "<7>",
    logging.INFO: "<6>",
    logging.WARNING: "<4>",
    logging.ERROR: "<3>",
    logging.CRITICAL: "<2>",
}


def journal_on_stderr() -> bool:
    """Return True if stderr is the journal, which reads a priority at the start of each line."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    with contextlib.suppress(OSError):
        status = os.fstat(2)
        return (device, inode) == (str(status.st_dev), str(status.st_ino))
    return False


class JournalFormatter(logging.Formatter):
    """Formats lines for the journal: each with its priority, without the program's name."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        priority = _PRIORITIES[record.levelno]
        return priority + super().format(record).replace("\n", f"\n{priority}")
