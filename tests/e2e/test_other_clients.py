# SPDX-License-Identifier: LGPL-2.1-or-later
"""QMP clients as they come, unmodified: each negotiates, lists the commands, adds, gets an error,
deletes and receives an event.
"""

import asyncio
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from secretd.monitor.commands import COMMANDS
from tests.e2e.conftest import BIN, Process
from tests.support.needs import need, need_program

QMP_COMMANDS = {each.name for each in COMMANDS.by_name.values() if each.only != "jsonrpc"}
CLIENTS = Path(__file__).parent / "clients"
GO_SOURCES = "/usr/share/gocode"
DUPLICATE = "attempt to add duplicate property '{}' to object (type 'container')"


def test_qmpclient(secretd: Process) -> None:
    """qemu.qmp's; it enables oob, since that is offered."""

    async def main() -> None:
        qmp = QMPClient("test")
        await qmp.connect(secretd.control)
        assert {c["name"] for c in await qmp.execute("query-commands")} == QMP_COMMANDS
        secret = {"qom-type": "secret", "id": "py", "data": "letmein"}
        assert await qmp.execute("object-add", secret) == {}
        with pytest.raises(ExecuteError) as caught:
            await qmp.execute("object-add", secret)
        assert str(caught.value) == DUPLICATE.format("py")
        assert caught.value.error_class == "GenericError"
        schema = await qmp.execute("query-qmp-schema")
        assert any(e["name"] == "object-add" for e in schema)
        listed = await qmp.execute_msg(qmp.make_execute_msg("query-secrets", oob=True))
        assert [s["id"] for s in listed] == ["py"]
        await qmp.execute("secret-events", {"enable": True})
        with qmp.listener("SECRET_ADDED") as listener:
            await asyncio.to_thread(secretd.connect().add, "other", data="x")
            event = await listener.get()
        assert event["data"]["id"] == "other"
        assert await qmp.execute("object-del", {"id": "py"}) == {}
        await qmp.disconnect()

    asyncio.run(main())


def test_go_qemu(secretd: Process, tmp_path: Path) -> None:
    """Debian's, built with Debian's Go. It reads lines of at most 64 KiB."""
    need_program("go")
    need(Path(GO_SOURCES, "src/github.com/digitalocean/go-qemu").is_dir(), "no go-qemu")
    program = str(tmp_path / "client")
    environment = os.environ | {
        "GO111MODULE": "off",
        "GOPATH": GO_SOURCES,
        "GOCACHE": str(tmp_path / "cache"),
        "GOFLAGS": "",
    }
    subprocess.run(
        ["go", "build", "-o", program, str(CLIENTS / "client.go")], check=True, env=environment
    )
    with _running([program, secretd.control]) as client:
        lines = _until(client, "added")
        assert {f"command {name}" for name in QMP_COMMANDS} <= set(lines)
        assert "schema" in lines
        assert lines[-2] == f"error {DUPLICATE.format('go')}"
        other = secretd.connect()
        other.add("other", data="x")
        client.stdin.write("\n")
        client.stdin.close()
        assert _until(client, "event")[-1] == "event SECRET_ADDED other"
        assert client.wait(20) == 0
        assert [s["id"] for s in other.secrets()] == ["other"]


def test_npms_qemu_qmp(secretd: Process) -> None:
    """In Node.js."""
    need_program("node")
    need((CLIENTS / "node_modules").is_dir(), f"run npm ci in {CLIENTS.name}")
    with _running(["node", str(CLIENTS / "client.js"), secretd.control]) as client:
        lines = _until(client, "added")
        assert lines[0] == "version 10"
        assert {f"command {name}" for name in QMP_COMMANDS} <= set(lines)
        assert lines[-2] == f"error {DUPLICATE.format('js')}"
        other = secretd.connect()
        other.add("other", data="x")
        assert _until(client, "deleted") == ["event SECRET_ADDED", "deleted"]
        assert client.wait(20) == 0
        assert [s["id"] for s in other.secrets()] == ["other"]


def _running(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def _until(client: "subprocess.Popen[str]", word: str) -> list[str]:
    """What it prints up to the line that begins with a word."""
    lines = []
    for line in client.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith(word):
            return lines
    raise AssertionError(f"it ended with {lines}")


class Terminal:
    """A program in tmux, typed to and read as by a person."""

    def __init__(self, *command: str) -> None:
        need_program("tmux")
        self._server = f"secretd-test-{uuid.uuid4()}"
        self.tmux("new-session", "-d", "-x", "200", "-y", "240", *command)

    def tmux(self, *words: str) -> str:
        """Run a command of tmux."""
        done = subprocess.run(
            ["tmux", "-L", self._server, "-f", "/dev/null", *words],
            capture_output=True, text=True, check=True, timeout=20,
        )  # fmt: skip
        return done.stdout

    def type(self, text: str, *keys: str) -> None:
        """Type a text, then press keys."""
        if text:
            self.tmux("send-keys", "-l", text)
        if keys:
            self.tmux("send-keys", *keys)

    def screen(self) -> str:
        """What it shows, and what has scrolled out."""
        return self.tmux("capture-pane", "-p", "-J", "-S", "-")

    def until(self, words: str, *keys: str) -> str:
        """Wait until it shows words, pressing keys meanwhile; return all it shows."""
        while words not in (screen := self.screen()):
            if keys:
                self.type("", *keys)
        return screen

    def close(self) -> None:
        """End it."""
        subprocess.run(
            ["tmux", "-L", self._server, "kill-server"], capture_output=True, check=False
        )


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    """Terminals that are closed at the end."""
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


def test_qmp_tui(secretd: Process, terminals: list[Terminal]) -> None:
    """In a terminal. It shows what is new at the next key only."""
    tui = Terminal(str(BIN / "qmp-tui"), secretd.control)
    terminals.append(tui)
    tui.until('"return": {}', "Left")
    tui.type("", *["Down"] * 60)  # from the history to the editor

    def send(text: str, shown: str) -> str:
        tui.type(text, "M-Enter")
        return tui.until(shown, "Left")

    screen = send('{"execute": "query-commands"}', '"name": "human-monitor-command"')
    assert '"name": "secret-read"' in screen
    add = '{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "tui", "data": "x"}}'
    send(add, '"id": "__qmp#00001"')
    send(add, "duplicate property")
    watch = '{"execute": "secret-events", "arguments": {"enable": true}}'
    send(watch, '"id": "__qmp#00003"')
    other = secretd.connect()
    other.add("other", data="x")
    tui.until('"event": "SECRET_ADDED"', "Left")
    send('{"execute": "object-del", "arguments": {"id": "tui"}}', '"id": "__qmp#00004"')
    while [s["id"] for s in other.secrets()] != ["other"]:
        pass


def test_qmp_shell(secretd: Process, terminals: list[Terminal]) -> None:
    """In a terminal: its completion knows our commands; an event is shown."""
    shell = Terminal(str(BIN / "qmp-shell"), secretd.control)
    terminals.append(shell)
    shell.until("(QEMU)")
    shell.type("secret-", "Tab", "Tab")
    screen = shell.until("secret-seal")
    assert "secret-generate" in screen
    assert "secret-read" in screen
    shell.type("", "C-u")
    shell.type("query-commands", "Enter")
    shell.until('{"name": "human-monitor-command"}')
    shell.type("object-add qom-type=secret id=sh data=letmein", "Enter")
    shell.until('{"return": {}}')
    shell.type("object-add qom-type=secret id=sh data=letmein", "Enter")
    shell.until(DUPLICATE.format("sh"))
    shell.type("secret-events enable=true", "Enter")
    shell.type("query-name", "Enter")
    while shell.screen().count('{"return": {}}') < 3:  # the replies to the add, this, and the name
        pass
    secretd.connect().add("other", data="x")
    shell.until("'event': 'SECRET_ADDED'", "Enter")
    shell.type("object-del id=sh", "Enter")
    while [s["id"] for s in secretd.connect().secrets()] != ["other"]:
        pass


def test_qmp_shell_as_a_human_monitor(secretd: Process, terminals: list[Terminal]) -> None:
    """qmp-shell -H: help and completion list our commands."""
    shell = Terminal(str(BIN / "qmp-shell"), "-H", secretd.control)
    terminals.append(shell)
    shell.until("(QEMU)")
    shell.type("object_", "Tab", "Tab")
    screen = shell.until("object_del")
    assert "object_add" in screen
    shell.type("", "C-u")
    shell.type("help", "Enter")
    screen = shell.until("quit secretd")
    assert "object_add [qom-type=]type,id=str[,prop=value][,...] -- create QOM object" in screen
    shell.type("object_add secret,id=hm,data=letmein", "Enter")
    shell.type("object_add secret,id=hm,data=letmein", "Enter")
    shell.until(f"Error: {DUPLICATE.format('hm')}")
    shell.type("info secrets", "Enter")
    shell.until("hm: secret, 7 bytes, memory")
    shell.type("object_del hm", "Enter")
    while secretd.connect().secrets():
        pass
