# SPDX-License-Identifier: LGPL-2.1-or-later
"""The transcripts against real QEMU: that what they say of it is so."""

import contextlib

import pytest

from tests.support.real_qemu import Qemu, need_qemu
from tests.support.transcript import FILES, Mismatch, load


@pytest.mark.parametrize("version", ["qemu7", "qemu10"])
def test_qemu_answers_as_the_transcripts_say(version: str) -> None:
    """Each file on one QEMU after the other; QEMU 10's answers are the reference."""
    need_qemu(version)
    wrong = []
    with contextlib.closing(Qemu(version)) as qemu:
        for path in FILES:
            for vector in load(path):
                try:
                    qemu.play(vector)
                except Mismatch as mismatch:
                    wrong.append(str(mismatch))
    assert not wrong, "\n".join(["", *wrong])
