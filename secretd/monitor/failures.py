# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unknown failures: they are logged without their text, and end one connection at most.

monitor, server and daemon call this module.
"""

import logging
import traceback
from collections.abc import Callable

from secretd.net.transport import Transport

log = logging.getLogger("secretd")


def log_internal(error: Exception) -> None:
    """Log an unknown exception by its type and place only: its text may quote its input."""
    place = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    log.error("internal error: %s\n%s", type(error).__name__, place)


def safely(transport: Transport, step: Callable[[], object]) -> None:
    """Take a step whose failure ends its connection, and not the daemon."""
    try:
        step()
    except Exception as error:  # noqa: BLE001 - see above
        log_internal(error)
        try:
            transport.close()
        except Exception as again:  # noqa: BLE001 - closing has gone as far as possible
            log_internal(again)
