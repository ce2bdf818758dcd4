# SPDX-License-Identifier: LGPL-2.1-or-later
"""A short run of the fuzzer that compares secretd with QEMU 10; scripts/fuzz-qemu makes long ones."""

import subprocess
import sys

from tests.real_qemu import ROOT, need_qemu


def test_no_difference_is_unexplained() -> None:
    """Other messages each time; what differed, and the seed, are printed."""
    need_qemu("qemu10")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--cases", "6000", "--options", "100"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 0 differences unexplained") == 2
