# SPDX-License-Identifier: LGPL-2.1-or-later
"""A short run of the fuzzer that compares secretd with QEMU 10; scripts/dev/fuzz-qemu makes long
ones.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import against_qemu
from tests.support.daemon import Daemon
from tests.support.real_qemu import ROOT, Qemu, need_qemu


def test_no_difference_is_unexplained() -> None:
    """Other messages each time; what differed, and the seed, are printed."""
    need_qemu("qemu10")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.against_qemu", "--cases", "6000", "--options", "100"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 0 differences unexplained") == 2


def test_a_reference_that_dies_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As QEMU 10.0.2 dies of one write with more than eight parse errors, with oob."""
    need_qemu("qemu10")
    daemon = Daemon(tmp_path)
    play = against_qemu.Side.play
    killed: list[int] = []
    with contextlib.closing(Qemu("qemu10")) as qemu:

        def killing(self: against_qemu.Side, *given: object, **named: object) -> object:
            if self._path == qemu.path and not killed:
                killed.append(qemu._pid)
                os.kill(qemu._pid, signal.SIGKILL)
                while not qemu.has_died:
                    pass
            return play(self, *given, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(against_qemu.Side, "play", killing)
        ours = against_qemu.Side(daemon.control)
        try:
            assert against_qemu.fuzz(600, 7, qemu, ours) == 0
        finally:
            ours.close()
            daemon.stop()
    assert "QEMU has died, and was started again" in capsys.readouterr().out
