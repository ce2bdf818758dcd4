# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all verbs of secretctl have in common: help, tables, JSON, completion, and how soon it
starts.
"""

import json
import os
import pty
import re
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest

from secretd.client import ConnectError
from secretd.ctl.completion import COMPLETIONS
from secretd.ctl.frame import SECTIONS, cli
from tests.support.daemon import Daemon
from tests.support.needs import need_program
from tests.support.qmp import Client
from tests.support.secretctl import SECRETCTL, Ctl

pytestmark = pytest.mark.slow  # it starts processes, or tries many cases


def test_each_verb_is_listed_once_and_has_help_that_fits(run: Ctl) -> None:
    """In the help of all, each with a whole sentence; its own help has more."""
    out, _ = run("--help")
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(cli.commands)
    assert len(set(listed)) == len(listed)
    for name in listed:
        assert re.search(rf"\n  {name} +[A-Z{{].*\.\n", out), name
        assert "..." not in cli.commands[name].get_short_help_str(66), name
        assert "--json" in run(name, "--help")[0]


def test_json_says_what_was_done(run: Ctl, qmp: Client, tmp_path: Path) -> None:
    """Every verb has it, also those that are silent otherwise."""
    (tmp_path / "f").write_text("letmein")
    given = (
        ["add", "a", "--file", str(tmp_path / "f")],
        ["generate", "k", "--bytes", "32"],
        ["expire", "a", "--after", "1h"],
        ["grant", "a", "--to", "uid:5", "--id", "g"],
        ["revoke", "g"],
        ["read", "a"],
        ["del", "a"],
    )
    assert [json.loads(run(*words, "--json")[0]) for words in given] == [
        {"id": "a", "size": 7},
        {"id": "k", "size": 32},
        {"id": "a", "after": 3600},
        {"id": "g"},
        {"id": "g"},
        {"id": "a", "format": "base64", "data": "bGV0bWVpbg=="},
        {"id": "a"},
    ]


def test_tables_are_drawn_on_a_terminal_and_plain_in_a_pipe(daemon: Daemon, qmp: Client) -> None:
    """The same cells."""
    qmp.add("a", data="letmein")
    command = [SECRETCTL, "--socket", daemon.control, "list"]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        drawn = b""
        try:
            while chunk := os.read(ours, 1000):
                drawn += chunk
        except OSError:  # EIO: no process has the terminal open
            pass
        assert process.wait() == 0
    os.close(ours)
    assert b"\x1b[" in drawn
    assert "\x1b[" not in plain
    stripped = re.sub(rb"\x1b\[[0-9;]*m", b"", drawn).decode()
    assert plain.split() == stripped.split()


def test_ids_are_completed(
    daemon: Daemon, qmp: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every shell that click knows; none where secretd does not answer."""
    for name in ("disk0", "disk1", "dis", "vnc"):
        qmp.add(name, data="letmein")

    def completed(socket_path: str, *words: str) -> list[str]:
        line = ["secretctl", "--socket", socket_path, *words]
        environment = os.environ | {
            "_SECRETCTL_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(line),
            "COMP_CWORD": str(len(line) - 1),
        }
        done = subprocess.run(
            [SECRETCTL], env=environment, capture_output=True, text=True, check=False
        )
        return [entry.partition(",")[2] for entry in done.stdout.split()]

    assert completed(daemon.control, "read", "disk") == ["disk0", "disk1"]
    assert completed(daemon.control, "seal", "vnc", "--keyid", "d") == ["dis", "disk0", "disk1"]
    assert completed(daemon.control, "rea") == ["read"]
    assert completed(str(tmp_path / "no"), "read", "d") == []
    with socket.socket(socket.AF_UNIX) as silent:  # takes connections and says nothing
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        assert completed(str(tmp_path / "s"), "read", "d") == []


def test_every_id_is_offered_where_nothing_was_begun(daemon: Daemon, qmp: Client) -> None:
    """In the process itself."""
    qmp.add("a", data="letmein")
    context = cli.make_context("secretctl", ["--socket", daemon.control, "list"])
    verb = cli.commands["read"].make_context("read", [], parent=context, resilient_parsing=True)
    assert [i.value for i in COMPLETIONS["secrets"](verb, verb.command.params[0], "")] == ["a"]
    assert COMPLETIONS["secrets"](verb, verb.command.params[0], "b") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_each_shell_is_one_that_it_takes(
    run: Ctl, tmp_path: Path, shell: str
) -> None:
    """By its own check; zsh and fish where they are installed."""
    script, _ = run("completion", shell)
    assert "_SECRETCTL_COMPLETE" in script
    path = tmp_path / "script"
    path.write_text(script)
    if shell != "bash":
        need_program(shell)
    subprocess.run([shell, "-n", str(path)], check=True)


def test_usual_verbs_import_only_what_they_need(daemon: Daemon) -> None:
    """A script calls them often: no click, asyncio or qemu.qmp, and rich on terminals only."""
    code = (
        "import sys; from secretd.ctl import main\n"
        "main.main()\n"
        "heavy = {'asyncio', 'click', 'cryptography', 'dataclasses', 'qemu.qmp', 'rich',\n"
        "    'subprocess', 'secretd.monitor.monitor', 'secretd.audit.log'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    socket = ["--socket", daemon.control]
    # Measuring coverage imports much.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
    for words in (
        ["generate", "a"],
        ["list"],
        ["read", "a"],
        ["add", "b", "--stdin"],
        ["del", "a"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *words, *socket],
            input=b"letmein",
            env=environment,
            capture_output=True,
            check=True,
        )
        assert done.stdout.endswith(b"[]\n"), done
        assert not done.stderr


def test_a_refused_connection_names_the_permitted_users(
    run: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the file's permissions have it."""

    def refused(_client: object, **_named: object) -> None:
        raise ConnectError("no", PermissionError(13, "Permission denied"))

    monkeypatch.setattr("secretd.client.SyncClient.connect", refused)
    _, err = run("list", status=1)
    assert "Permission denied\nsecretctl: only root and secretd's own user may" in err


def test_an_abort_is_status_130(run: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ctrl-C is."""

    def abort(*_args: object, **_named: object) -> None:
        raise click.Abort

    monkeypatch.setattr(cli, "main", abort)
    run("list", "--socket=/no", status=130)

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secretd.ctl.main.carry_out", interrupt)
    assert run("list", status=130) == ("", "\n")
