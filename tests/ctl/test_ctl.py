# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretctl against a running server: what it does, prints and returns."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.needs import ARENA_LEVEL
from tests.support.qmp import Client
from tests.support.secretctl import SECRETCTL, Ctl, in_terminal

pytestmark = pytest.mark.slow  # it starts processes, or tries many cases


def test_a_secret_is_added_from_a_file_and_read_to_a_pipe(run: Ctl, tmp_path: Path) -> None:
    """A newline at the end is kept, with a warning; base64 has none of that."""
    plain, newline, empty = tmp_path / "plain", tmp_path / "newline", tmp_path / "empty"
    plain.write_text("letmein")
    newline.write_text("bGV0bWVpbg==\n")
    empty.touch()
    assert run("add", "a", "--file", str(plain)) == ("added a, 7 bytes\n", "")
    _, err = run("add", "b", "--file", str(newline))
    assert "warning: the secret ends in a newline" in err
    assert run("add", "c", "--file", str(newline), "--format", "base64")[0] == "added c, 7 bytes\n"
    assert run("add", "d", "--file", str(empty))[1] == "secretctl: warning: the secret is empty\n"
    assert run("read", "a") == ("letmein", "")
    assert run("read", "b") == ("bGV0bWVpbg==\n", "")
    assert run("read", "c") == ("letmein", "")
    assert run("read", "c", "--format", "base64") == ("bGV0bWVpbg==", "")
    assert run("read", "d") == ("", "")


def test_a_secret_is_added_from_a_pipe(run: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """By --fd, --stdin or by default; the newline is noticed here too; too much is refused."""
    writers = []

    def write(sink: int, content: bytes) -> None:
        with contextlib.suppress(BrokenPipeError), open(sink, "wb") as writer:
            writer.write(content)

    def piped(content: bytes) -> int:
        source, sink = os.pipe()
        writers.append(threading.Thread(target=write, args=(sink, content)))
        writers[-1].start()
        return source

    source = piped(b"letmein")
    assert run("add", "a", "--fd", str(source)) == ("added a, 7 bytes\n", "")
    os.close(source)
    assert run("read", "a") == ("letmein", "")
    source = piped(b"x" * (3 << 20))
    _, err = run("add", "b", "--fd", str(source), status=1)
    assert (
        err == "secretctl: more than 2,097,152 bytes were given, and a secret may have 1,048,576\n"
    )
    os.close(source)
    saved = os.dup(0)
    for words in (["--stdin"], []):
        source = piped(b"line\n")
        os.dup2(source, 0)
        os.close(source)
        _, err = run("add", f"s{len(words)}", *words)
        assert "newline" in err
    os.dup2(saved, 0)
    os.close(saved)
    assert run("read", "s0") == run("read", "s1") == ("line\n", "")
    for writer in writers:
        writer.join(10)


@pytest.mark.parametrize("words", [["--prompt"], []])
def test_a_secret_is_asked_for_on_the_terminal_without_echo(
    daemon: Daemon, qmp: Client, words: list[str]
) -> None:
    """It does not show, and its newline does not count."""
    status, seen = in_terminal(
        ["--socket", daemon.control, "add", "asked", *words], b"letmein\n",
        expect=b"Secret asked: ",
        again=b"letmein\n",
    )  # fmt: skip
    assert status == 0
    assert b"letmein" not in seen
    assert b"added asked, 7 bytes" in seen
    assert qmp.read("asked") == b"letmein"


def test_a_secret_is_not_printed_on_a_terminal_unless_forced(daemon: Daemon, qmp: Client) -> None:
    """The way out is in the message."""
    qmp.add("s", data="letmein")
    words = ["--socket", daemon.control, "read", "s"]
    status, seen = in_terminal(words, b"", expect=b"--force")
    assert status == 1
    assert b"stdout is a terminal; send the secret to a pipe or a file, or use --force" in seen
    status, seen = in_terminal([*words, "--force"], b"", expect=b"letmein")
    assert status == 0


def test_lists_and_status_for_people_and_programs(run: Ctl, qmp: Client) -> None:
    """A table, or JSON in the words of query-secrets."""
    out, _ = run("status")
    assert "secrets  0" in out
    assert "memory   -" in out
    qmp.add("disk0", data="letmein")
    out, _ = run("list")
    assert out == f"ID     TYPE    BYTES  MEMORY\ndisk0  secret      7  {ARENA_LEVEL}\n"
    out, _ = run("list", "--json")
    assert json.loads(out) == [
        {"id": "disk0", "qom-type": "secret", "size": 7, "memory": ARENA_LEVEL}
    ]
    out, _ = run("status", "--json")
    facts = json.loads(out)
    assert (facts["daemon"], facts["secrets"], facts["bytes"]) == ("secretd test", 1, 7)


def test_secrets_are_generated_sealed_and_deleted(run: Ctl, qmp: Client) -> None:
    """And errors are the daemon's own words."""
    assert run("generate", "k") == ("", "")
    assert run("generate", "s", "--bytes", "5") == ("", "")
    sealed = json.loads(run("seal", "s", "--keyid", "k")[0])
    assert qmp.add("again", keyid="k", format="base64", **sealed) == {"return": {}}
    assert qmp.read("again") == qmp.read("s")
    assert run("del", "s") == ("", "")
    assert run("del", "s", status=1) == (
        "", "secretctl: object 's' not found\nsecretctl: 'secretctl list' shows all secrets\n",
    )  # fmt: skip
    _, err = run("add", "s", "--file", "/nope", status=1)
    assert err == "secretctl: /nope: No such file or directory\n"
    _, err = run("add", "s", "--file", "/tmp", status=1)
    assert err == "secretctl: /tmp: Is a directory\n"
    _, err = run("add", "s", "--fd", "77", status=1)
    assert err == "secretctl: descriptor 77: Bad file descriptor\n"
    _, err = run("add", "s", "--iv", "AAAA", "--file", "/dev/null", status=1)
    assert err == "secretctl: --iv needs --keyid, the secret that it is encrypted under\n"
    _, err = run("run", "--secret", "k", "--", "true", status=1)
    assert err == "secretctl: {k} does not occur in the command\n"


def test_a_secret_is_pushed_into_another_qmp_server(run: Ctl, qmp: Client, tmp_path: Path) -> None:
    """Here a second secretd; with QEMU in tests/e2e."""
    (tmp_path / "other").mkdir()
    other = Daemon(tmp_path / "other")
    try:
        qmp.ok("secret-generate", {"id": "k", "size": 32})
        qmp.add("s", data="letmein")
        sealed = qmp.ok("secret-seal", {"id": "k", "keyid": "k"})
        assert "data" in sealed
        key = qmp.read("k")
        there = other.connect()
        fd = os.memfd_create("x")
        os.write(fd, key)
        added = there.ok("add-fd", None, (fd,))
        os.close(fd)
        assert there.add("master", file=f"/dev/fd/{added['fd']}") == {"return": {}}
        words = ["push", "s", "--keyid", "k", "--qmp", other.control]
        assert run(*words, "--as", "disk", "--qemu-keyid", "master") == ("", "")
        assert there.read("disk") == b"letmein"
        assert run(*words, status=1) == ("", "secretctl: QEMU says: No secret with id 'k'\n")
        _, err = run("push", "s", "--keyid", "k", "--qmp", str(tmp_path / "no"), status=1)
        assert err == (
            f"secretctl: cannot connect to {tmp_path / 'no'}: No such file or directory; "
            "is QEMU running?\n"
        )
    finally:
        other.stop()


@pytest.mark.parametrize("via", ["memfd", "pipe"])
def test_a_command_is_run_with_secrets_as_descriptors(
    daemon: Daemon, qmp: Client, via: str
) -> None:
    """{NAME} becomes a path that reads as the secret; the command's status is returned."""
    qmp.add("s", data="letmein")
    qmp.ok("secret-generate", {"id": "big", "size": 1 << 20})
    command = [SECRETCTL, "--socket", daemon.control, "run", "--via", via]
    done = subprocess.run(
        [*command, "--secret", "s", "--secret", "big=key", "--",
         "sh", "-c", "cat ${0#x} && wc -c < ${1#x}; exit 7", "x{s}", "x{key}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 7
    assert "letmein" in done.stdout
    done = subprocess.run(
        [*command, "--secret", "s", "--secret", "big=key", "--", "sh", "-c",
         "cat $0; wc -c < $1", "{s}", "{key}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "letmein1048576\n"
    for name, status in (("/nope", 127), ("/tmp", 126)):
        done = subprocess.run(
            [*command, "--secret", "s", "--", name, "{s}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status
        assert done.stderr.startswith(f"secretctl: {name}: ")
    done = subprocess.run(
        [*command, "--secret", "none", "--", "true", "{none}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "secretctl: No secret with id 'none'\nsecretctl: 'secretctl list' shows all secrets\n"
    )


def test_shell_is_qmp_shell_on_the_socket(daemon: Daemon, qmp: Client) -> None:
    """With its options passed on."""
    done = subprocess.run(
        [SECRETCTL, "--socket", daemon.control, "shell"],
        input="object-add qom-type=secret id=s data=letmein\nquery-secrets\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Welcome to the QMP low-level shell!" in done.stdout
    assert qmp.read("s") == b"letmein"


def test_shell_without_qmp_shell_says_where_it_comes_from(
    run: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is part of a dependency, but may be missing."""
    monkeypatch.setattr(os, "access", lambda *_args: False)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    _, err = run("shell", status=1)
    assert err == (
        "secretctl: qmp-shell was not found; it comes with the Python package qemu.qmp\n"
    )
    _, err = run("check-config", status=1)
    assert err == "secretctl: secretd was not found; it comes with secretctl\n"


def test_a_daemon_that_is_not_there_is_said_with_the_next_step(run: Ctl, tmp_path: Path) -> None:
    """Which socket, why, and what to do."""
    none = str(tmp_path / "none")
    _, err = run("list", status=1, socket=none)
    assert err == (
        f"secretctl: cannot connect to {none}: No such file or directory; is it running?\n"
        "secretctl: start it with 'secretd', or name its socket with --socket; "
        "'secretctl doctor' finds the reason\n"
    )
    (tmp_path / "file").touch()
    _, err = run("list", status=1, socket=str(tmp_path / "file"))
    assert "Connection refused; is it running?" in err
    _, err = run("list", status=1, socket=str(tmp_path))
    assert f"cannot connect to {tmp_path}: " in err


def test_a_daemon_that_goes_away_is_said(
    run: Ctl, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it does so in the middle."""
    monkeypatch.setattr(
        daemon.tree.types,
        "listed",
        lambda *_a, **_k: [s.transport.close() for s in daemon.server.sessions.copy()],
    )
    monkeypatch.setattr(
        "secretd.client.SyncClient.list", lambda self: self.execute("qom-list-types")
    )
    _, err = run("list", "--timeout", "0.2", status=1)
    assert err.startswith(f"secretctl: {daemon.control}: The connection was closed")


def test_an_interrupt_is_status_130(run: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell has it."""

    def interrupted(_client: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("secretd.client.SyncClient.list", interrupted)
    run("list", status=130)


def test_usage_errors_are_status_2_and_say_where_help_is(run: Ctl) -> None:
    """From click, in one line and the next step."""
    assert run("add", status=2)[1] == (
        "secretctl: missing argument 'ID'.\nsecretctl: 'secretctl add --help' explains it\n"
    )
    assert "exclude each other" in run("add", "n", "--stdin", "--prompt", status=2)[1]
    assert (
        "exclude each other" in run("audit", "verify", "f", "--key=k", "--key-file=f", status=2)[1]
    )
    assert "there is no such verb" in run("ad", status=2)[1]
    assert "missing command" in run(status=2)[1].lower()


def test_an_unknown_argument_is_not_printed(run: Ctl) -> None:
    """It may be a secret."""
    for words in (
        ["add", "n", "hunter2"],
        ["add", "n", "--data", "hunter2"],
        ["add", "n", "--d=hunter2"],
        ["hunter2"],
    ):
        assert "hunter2" not in "".join(run(*words, status=2))
    assert "'nope' is not one of" in run("audit", "nope", "f", status=2)[1]
    of_add = "(secrets must not be passed as arguments)"
    assert f"too many arguments {of_add}" in run("add", "n", "hunter2", status=2)[1]
    assert of_add not in run("read", "a", "b", status=2)[1]
    assert "unknown option --jso; --json or --socket?" in run("list", "--jso", status=2)[1]


def test_the_socket_may_be_named_after_the_verb(run: Ctl, daemon: Daemon, tmp_path: Path) -> None:
    """People type it there."""
    out, _ = run("list", "--socket", daemon.control, socket=str(tmp_path / "none"))
    assert out.startswith("ID ")


@pytest.mark.parametrize("typed", [b"\n", b"\x04"])
def test_nothing_typed_adds_nothing(daemon: Daemon, qmp: Client, typed: bytes) -> None:
    """Return or Ctrl-D at the prompt is no secret."""
    status, seen = in_terminal(
        ["--socket", daemon.control, "add", "asked"], typed, expect=b"Secret asked: "
    )
    assert status == 1
    assert b"nothing was typed" in seen
    assert qmp.ok("query-secrets") == []


def test_ctrl_c_at_the_prompt_ends_it_and_gives_the_echo_back(daemon: Daemon, qmp: Client) -> None:
    """At the first try."""
    words = ["--socket", daemon.control, "add", "asked"]
    status, _ = in_terminal(words, b"\x03", expect=b"Secret asked: ")
    assert status == 130
    assert qmp.ok("query-secrets") == []
