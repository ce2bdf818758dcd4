# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretctl in this process, and in a terminal."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from secretd.ctl.main import main
from tests.support.daemon import Daemon

BIN = os.path.dirname(sys.executable)


SECRETCTL = os.path.join(BIN, "secretctl")


class Ctl:
    """Runs secretctl in this process."""

    def __init__(
        self, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
    ):
        self._socket = daemon.control
        self._monkeypatch = monkeypatch
        self._capfd = capfd

    def __call__(self, *words: str, status: int = 0, socket: str | None = None) -> tuple[str, str]:
        """Run; return stdout and stderr."""
        monkeypatch = self._monkeypatch
        monkeypatch.setattr(sys, "argv", ["secretctl", "--socket", socket or self._socket, *words])
        self._capfd.readouterr()
        assert main() == status
        captured = self._capfd.readouterr()
        return captured.out, captured.err


def in_terminal(
    words: list[str],
    typed: bytes,
    *,
    expect: bytes,
    again: bytes = b"",
    hidden: bool = True,
    columns: int = 80,
) -> tuple[int, bytes]:
    """Run secretctl in a terminal of its own; type when it has printed what is expected, and once
    more when it asks for it. ``hidden``: what is typed is not shown.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    process = subprocess.Popen(
        # What was started in the background ignores interrupts, and so do its children.
        ["env", "--default-signal=INT", "setsid", "--ctty", "--wait", SECRETCTL, *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    try:
        while expect not in seen:
            seen += os.read(ours, 1000)
        # The prompt is written before the echo is switched off: wait for that.
        while typed and hidden and termios.tcgetattr(ours)[3] & termios.ECHO:
            pass
        os.write(ours, typed)
        while again and b"Again: " not in seen:
            seen += os.read(ours, 1000)
        os.write(ours, again)
        while True:
            seen += os.read(ours, 1000)
    except OSError:  # EIO: no process has the terminal open
        pass
    finally:
        os.close(ours)
        status = process.wait(20)
    return status, seen
