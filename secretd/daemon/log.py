# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's log on stderr, written without waiting.

A full pipe, or a stopped journald, must not stop the daemon. A line without room is kept; beyond
KEPT_LINES lines are counted, and the count is written once there is room. daemon.process installs
the handler, and query-secret-stats reads its count.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from secretd.audit.sinks import Sink, open_sink
from secretd.errors import UsageError
from secretd.limits import Tuning
from secretd.systemd.stderr_journal import JournalFormatter, journal_on_stderr

KEPT_LINES: Final = 64
"""Lines that wait until stderr accepts them."""

LINE_BYTES: Final = 4000
"""Bytes of a line, so that a pipe accepts it whole or not at all (PIPE_BUF of pipe(7))."""


class LogHandler(logging.Handler):
    """Writes log records to stderr. ``lost``: the number of dropped lines.

    ``is_held()``: True while another writer has an unfinished line there.
    """

    def __init__(self, retry_seconds: float = Tuning.log_retry_seconds) -> None:
        super().__init__()
        self._retry_seconds = retry_seconds
        self.lost = 0
        self.is_held: Callable[[], bool] = lambda: False
        self._unreported = 0
        self._waiting: deque[bytes] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._sink: Sink | None = None
        with contextlib.suppress(UsageError, OSError):
            self._sink = open_sink("-")
        self.setFormatter(
            JournalFormatter() if journal_on_stderr() else logging.Formatter("secretd: %(message)s")
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or keep it, or count it."""
        line = self.format(record).encode(errors="backslashreplace")[:LINE_BYTES] + b"\n"
        if len(self._waiting) >= KEPT_LINES:
            self.lost += 1
            self._unreported += 1
        else:
            self._waiting.append(line)
        self._write()
        if self._unreported and not self._waiting:
            words = f"{self._unreported} lines of the log were lost, since stderr took none"
            self._unreported = 0
            self.emit(logging.LogRecord(record.name, logging.WARNING, "", 0, words, None, None))

    def _write(self) -> None:
        sink = self._sink
        while self._waiting and sink is not None and not self.is_held():
            try:
                sink.write(self._waiting[0])
            except BlockingIOError:
                self._try_later()
                return
            except OSError:  # a full disk, or a reader that ended
                self.lost += len(self._waiting)
                self._waiting.clear()
                return
            self._waiting.popleft()
        if sink is None:
            self._waiting.clear()

    def _try_later(self) -> None:
        if self._timer is None:
            with contextlib.suppress(
                RuntimeError
            ):  # there is no loop before the start or after the end
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._retry_seconds, self._retry)

    def _retry(self) -> None:
        self._timer = None
        self._write()

    def flush(self) -> None:
        """Write the waiting lines, as far as there is room."""
        self._write()

    def close(self) -> None:
        """Write the waiting lines, and end."""
        self._write()
        if self._sink is not None:
            self._sink.close()
            self._sink = None
        super().close()
