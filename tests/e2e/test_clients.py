# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients as they come: qemu.qmp's QMPClient, qmp-shell from a pipe and in a terminal, socat by
hand.
"""

import asyncio
import os
import shutil
import subprocess
import uuid
from pathlib import Path

from qemu.qmp import QMPClient

from tests.e2e.conftest import BIN, Process
from tests.support.needs import need_program

QMP_SHELL = str(BIN / "qmp-shell")


def test_qmpclient_adds_by_fdset_and_reads_by_getfd(secretd: Process) -> None:
    """Its send_fd_scm sends the descriptor ahead of the command, with a lone space."""

    async def main() -> None:
        qmp = QMPClient("test")
        await qmp.connect(secretd.control)
        fd = os.memfd_create("x")
        os.write(fd, b"letmein")
        qmp.send_fd_scm(fd)
        os.close(fd)
        added = await qmp.execute("add-fd", {"opaque": "from a test"})
        await qmp.execute(
            "object-add",
            {"qom-type": "secret", "id": "s", "file": f"/dev/fdset/{added['fdset-id']}"},
        )
        await qmp.execute("remove-fd", {"fdset-id": added["fdset-id"]})
        source, sink = os.pipe()
        qmp.send_fd_scm(sink)
        os.close(sink)
        await qmp.execute("getfd", {"fdname": "out"})
        assert await qmp.execute("secret-read", {"id": "s", "fdname": "out"}) == {"size": 7}
        assert os.read(source, 100) == b"letmein"
        assert os.read(source, 100) == b""
        os.close(source)
        await qmp.disconnect()

    asyncio.run(main())


def test_qmp_shell_fed_from_a_pipe_adds_lists_and_deletes(secretd: Process) -> None:
    """One line each; errors are shown as they come."""
    done = subprocess.run(
        [QMP_SHELL, secretd.control],
        input="object-add qom-type=secret id=s data=letmein\nqom-list path=/objects\n"
        "object-del id=s\nobject-del id=s\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert "child<secret>" in done.stdout
    assert "object 's' not found" in done.stdout
    assert secretd.connect().ok("query-secrets") == []


def test_qmp_shell_in_a_terminal_adds_lists_and_deletes(secretd: Process, tmp_path: Path) -> None:
    """In tmux, typed and read as a person does."""
    need_program("tmux")
    server = f"secretd-test-{uuid.uuid4()}"

    def tmux(*words: str) -> str:
        done = subprocess.run(
            ["tmux", "-L", server, "-f", "/dev/null", *words],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
        return done.stdout

    def until(words: str) -> None:
        while words not in tmux("capture-pane", "-p", "-J"):
            pass

    tmux("new-session", "-d", "-x", "150", "-y", "50", QMP_SHELL, secretd.control)
    try:
        until("(QEMU)")
        tmux("send-keys", "object-add qom-type=secret id=sec0 data=letmein", "Enter")
        until('{"return": {}}')
        tmux("send-keys", "query-secrets", "Enter")
        until('"id": "sec0"')
        tmux("send-keys", "object-del id=sec0", "Enter", "object-del id=sec0", "Enter")
        until("object 'sec0' not found")
        tmux("send-keys", "C-d")
    finally:
        subprocess.run(["tmux", "-L", server, "kill-server"], capture_output=True, check=False)


def test_socat_by_hand_with_single_quotes(secretd: Process) -> None:
    """As in QEMU's documentation, and without a newline at the end."""
    need_program("socat")
    done = subprocess.run(
        ["socat", "-", f"UNIX-CONNECT:{secretd.control}"],
        input=b"{ 'execute': 'qmp_capabilities' }\n{ 'execute': 'object-add',\n  'arguments': { "
        b"'qom-type': 'secret', 'id': 's', 'data': 'let\"mein' } }\n{ 'execute': 'query-secrets' }",
        capture_output=True,
        check=True,
        timeout=30,
    )
    greeting, *replies = done.stdout.splitlines()
    assert greeting.startswith(b'{"QMP"')
    assert replies[:2] == [b'{"return": {}}'] * 2
    assert b'"size": 8' in replies[2]
    assert secretd.connect().read("s") == b'let"mein'


def test_everything_needed_comes_with_the_package() -> None:
    """qmp-shell stands beside secretctl."""
    assert shutil.which(QMP_SHELL)
