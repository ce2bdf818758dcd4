# SPDX-License-Identifier: LGPL-2.1-or-later
"""Transcripts of real QEMU, played against the daemon and against the codec without a socket."""

import asyncio
import contextlib
import os
from collections.abc import Coroutine
from pathlib import Path

import pytest

from secretd.access.peer import Peer, SocketRole
from secretd.audit.log import Audit
from secretd.journal.journal import Journal
from secretd.limits import Tuning
from secretd.memory.arena import Arena
from secretd.monitor.commands import COMMANDS
from secretd.monitor.commits import Stored
from secretd.monitor.core import Core
from secretd.monitor.monitor import Monitor
from secretd.net.receiver import Locked
from secretd.qom.registry import TYPES
from secretd.qom.tree import ObjectTree
from secretd.wire import messages as wire
from secretd.wire.lexer import NeedData
from tests.support.daemon import Daemon
from tests.support.needs import ARENA_LEVEL, need_program
from tests.support.transcript import (
    FILES,
    Mismatch,
    Scene,
    SocketPeer,
    Vector,
    load,
    play,
)

DIFFERENCES = (Path(__file__).parent.parent.parent / "docs" / "protocol.md").read_text()
DIFFERENCES = DIFFERENCES[DIFFERENCES.index("## Differences from QEMU") :]
DIFFERENCES = DIFFERENCES[: DIFFERENCES.index("\n## ", 5)]


class Codec:
    """The codec and a monitor in memory: bytes in, bytes out. A Peer of transcripts."""

    def __init__(self) -> None:
        self.scratch = Arena(ARENA_LEVEL)
        self.journal = Journal(Arena(ARENA_LEVEL))
        tree = ObjectTree(self.journal, self.scratch, TYPES)
        self.runner = asyncio.Runner()
        self._ended = False

        def start(coroutine: Coroutine[object, object, None]) -> asyncio.Task[None]:
            raise AssertionError(coroutine)

        shared = Core(
            tree, COMMANDS.by_name.values(), "secretd test", Audit(), self.quit, start, Tuning()
        )
        peer = Peer(os.getuid(), os.getgid(), os.getpid(), SocketRole.CONTROL)
        table = shared.tables[SocketRole.CONTROL, "qmp"]
        self.monitor = Monitor(shared, peer, table, self._negotiated)
        self.codec = table.codec()
        self._input = bytearray()
        self._position = 0
        self._output = self.monitor.greeting()

    def quit(self, data: str) -> None:
        """See secretd.monitor.core.Core."""
        self._output += wire.event("SHUTDOWN", data, 1, 2)
        self._ended = True

    def _negotiated(self) -> None:
        self.codec.oob = self.monitor.oob

    def send(self, data: bytes, fds: list[int]) -> None:
        """See Peer."""
        self.runner.run(self._send(data, fds))

    async def _send(self, data: bytes, fds: list[int]) -> None:
        if fds:
            self.monitor.receive([os.dup(fd) for fd in fds])
        # All that was ever sent stays in place, so that offsets do.
        self._input += data
        view = memoryview(bytearray(self._input))
        while not self._ended:
            self._position, request = self.codec.next(view, self._position, len(view))
            if isinstance(request, NeedData):
                break
            reply = self.monitor.handle(request)
            assert not isinstance(reply, Stored)  # there is no store
            if isinstance(reply, Locked):
                self._output += bytes(reply.buffer.view[: reply.length])
                reply.buffer.free()
            else:
                self._output += reply if isinstance(reply, bytes) else await reply

    def line(self) -> bytes:
        """See Peer."""
        line, newline, self._output = self._output.partition(b"\n")
        return line + newline

    def end(self) -> bytes:
        """See Peer."""
        return self._output

    def close(self) -> None:
        """Nothing may be left over."""
        self.monitor.close()
        self.runner.close()
        held = self.scratch.held
        self.journal.close()
        self.journal.arena.close()
        self.scratch.close()
        assert held == 0


def played(vector: Vector, peer: Codec | SocketPeer) -> str:
    """Play a vector and close the peer; return what was not as it should be."""
    with contextlib.closing(peer), contextlib.closing(Scene(vector)) as scene:
        try:
            play(vector, peer, scene, server="secretd")
        except Mismatch as mismatch:
            return str(mismatch)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_codec_answers_as_qemu_does(path: Path) -> None:
    """Without a socket, byte for byte but for the differences that the page names."""
    if path.stem == "keyring":
        need_program("keyctl")
    wrong = [mismatch for vector in load(path) if (mismatch := played(vector, Codec()))]
    assert not wrong, "\n".join(["", *wrong])


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_daemon_answers_as_qemu_does(tmp_path: Path, path: Path) -> None:
    """Over its socket."""
    if path.stem == "keyring":
        need_program("keyctl")
    wrong = []
    daemon = Daemon(tmp_path)
    try:
        for vector in load(path):
            wrong.append(played(vector, SocketPeer(daemon.control)))
            if vector.has("quits"):
                daemon.stop()
                daemon = Daemon(tmp_path)
            daemon.empty()
    finally:
        daemon.stop()
    assert not any(wrong), "\n".join(["", *filter(None, wrong)])


def test_every_difference_has_its_row_and_its_reason() -> None:
    """And every row that transcripts can show is shown by one."""
    rows = [line[2:] for line in DIFFERENCES.splitlines() if line.startswith("| ")][1:]
    for path in FILES:
        for vector in load(path):
            for step in vector.steps:
                for reply in step.replies:
                    if reply.ours is not None:
                        row = reply.ours[2]
                        assert any(r.startswith(row) for r in rows), f"{vector}: {row}"


def test_there_are_enough_transcripts() -> None:
    """So that no file gets lost."""
    steps = [step for path in FILES for vector in load(path) for step in vector.steps]
    assert len(steps) >= 1780
