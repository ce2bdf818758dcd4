# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretctl where people and scripts use it: terminals, pipes and files in any combination, odd
input, silence.
"""

import contextlib
import fcntl
import json
import os
import pty
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from secretd import paths
from secretd.client import SyncClient
from secretd.ctl import prompt, verb
from secretd.ctl.frame import cli as frame
from secretd.ctl.main import main
from secretd.errors import UsageError
from tests.support.daemon import Daemon
from tests.support.needs import need_locked_memory
from tests.support.qmp import Client
from tests.support.scripted import server
from tests.support.secretctl import SECRETCTL, Ctl

pytestmark = pytest.mark.slow  # it starts processes, or tries many cases


def with_terminals(
    words: list[str], tmp_path: Path, *, stdin: str, stdout: str, stderr: str
) -> tuple[int, bytes, bytes]:
    """Run secretctl with each standard descriptor a terminal, a pipe, a file or /dev/null; return
    its status and what it wrote to stdout and stderr.
    """
    ours: dict[str, int] = {}
    theirs: dict[str, int] = {}
    for name, kind in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
        if kind == "terminal":
            ours[name], theirs[name] = pty.openpty()
        elif kind == "pipe":
            source, sink = os.pipe()
            ours[name], theirs[name] = (sink, source) if name == "stdin" else (source, sink)
        else:
            path = os.devnull if name == "stdin" else str(tmp_path / f"out-{name}")
            theirs[name] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    if stdin == "pipe":
        os.close(ours.pop("stdin"))
    process = subprocess.Popen([SECRETCTL, *words], **theirs)  # type: ignore[call-overload]
    for fd in theirs.values():
        os.close(fd)
    written = {"stdout": b"", "stderr": b""}
    # Nothing here fills a pipe or terminal before the other is read: one after the other will do.
    for name in ("stdout", "stderr"):
        if name in ours:
            try:
                while data := os.read(ours[name], 1 << 16):
                    written[name] += data
            except OSError:  # EIO: the terminal has no other end any more
                pass
    status = process.wait(30)
    for fd in ours.values():
        os.close(fd)
    for name, kind in (("stdout", stdout), ("stderr", stderr)):
        if kind == "file":
            written[name] = (tmp_path / f"out-{name}").read_bytes()
    return status, written["stdout"], written["stderr"]


@pytest.mark.parametrize("stderr", ["terminal", "pipe", "file"])
@pytest.mark.parametrize("stdout", ["terminal", "pipe", "file"])
@pytest.mark.parametrize("stdin", ["terminal", "pipe", "file"])
def test_export_writes_all_of_it_wherever_it_goes(
    daemon: Daemon, qmp: Client, tmp_path: Path, stdin: str, stdout: str, stderr: str
) -> None:
    """Its progress is for the terminal, its lines for what reads them."""
    qmp.ok("secret-generate", {"id": "k", "size": 32})
    for number in range(5):
        qmp.add(f"s{number}", data="letmein")
    words = ["--socket", daemon.control, "export", "--keyid", "k"]
    status, out, err = with_terminals(words, tmp_path, stdin=stdin, stdout=stdout, stderr=stderr)
    assert status == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["id"] for line in lines] == [f"s{n}" for n in range(5)]
    if stderr != "terminal":
        assert err == b""


def test_what_cannot_be_exported_is_named_and_the_rest_follows(
    run: Ctl, qmp: Client, tmp_path: Path
) -> None:
    """The exit status says that it is not complete; the largest secrets are exported, too."""
    need_locked_memory(16 << 20)
    qmp.ok("secret-generate", {"id": "k", "size": 32})
    qmp.add("a", data="letmein")
    qmp.ok("secret-generate", {"id": "z", "size": 1 << 20})
    out, err = run("export", "a", "none", "z", "--keyid", "k", status=1)
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["a", "z"]
    assert err.splitlines() == [
        "secretctl: none: No secret with id 'none'",
        "secretctl: 'secretctl list' shows all secrets",
        "secretctl: 2 exported, 1 not: the export is not complete",
    ]
    (tmp_path / "lines").write_text(out)
    key = qmp.read("k")
    for name in ("a", "z"):
        qmp.ok("object-del", {"id": name})
    assert run("import", str(tmp_path / "lines"))[0] == "2 added\n"
    assert qmp.read("a") == b"letmein"
    assert key == qmp.read("k")


def test_an_import_of_nothing_is_an_error(run: Ctl, tmp_path: Path) -> None:
    """Most likely it was not meant."""
    (tmp_path / "empty").write_text("\n\n")
    _, err = run("import", str(tmp_path / "empty"), status=1)
    assert (
        err == f"secretctl: {tmp_path}/empty: it has no line with a secret, so nothing was added\n"
    )


# --- the prompt


def prompted(
    daemon: Daemon,
    first: bytes | list[bytes],
    second: bytes | list[bytes] | None = None,
) -> tuple[int, bytes]:
    """Type at both prompts of `add asked`, in pieces if it is a list.

    Returns the status and the output of the terminal.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", SECRETCTL, "--socket", daemon.control, "add", "asked",
        "--prompt"],
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    seen = b""
    try:
        for typed, prompt in ((first, b"Secret asked: "), (second, b"Again: ")):
            if typed is None:
                break
            while prompt not in seen:
                seen += os.read(ours, 1 << 16)
            while termios.tcgetattr(ours)[3] & termios.ECHO:
                pass
            for piece in typed if isinstance(typed, list) else [typed]:
                rest = piece
                while rest:  # more than the terminal takes at once
                    rest = rest[os.write(ours, rest[:1024]) :]
                while isinstance(typed, list) and unread(theirs):
                    pass
        os.close(theirs)
        theirs = -1
        while True:
            seen += os.read(ours, 1 << 16)
    except OSError:  # EIO: it has ended
        pass
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)
        status = process.wait(30)
    return status, seen


def unread(fd: int) -> int:
    """The bytes that were typed and that nothing has read yet."""
    count = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return int.from_bytes(count, sys.byteorder)


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        (b"letmein\n", b"letmein"),
        (b"letmein\r", b"letmein"),
        (b"x" * 10_000 + b"\n", b"x" * 10_000),
        (b"one\ntwo\n", b"one\ntwo"),
        (b"\x1b[200~one\rtwo\r\x1b[201~\n", b"one\ntwo\n"),
        (b"let\xc3\xa9\x7fmex\x08in\n", b"letmein"),
        (b"wrong\x15letmein\n", b"letmein"),
        (b"letmein\x04", b"letmein"),
        (b"\x7fletmein\n", b"letmein"),
    ],
)
def test_typed_and_pasted_secrets_are_stored_whole(
    daemon: Daemon, qmp: Client, typed: bytes, stored: bytes
) -> None:
    """Of any length, with several lines, corrected; twice the same."""
    status, seen = prompted(daemon, typed, typed)
    assert status == 0, seen
    assert f"added asked, {len(stored):,} bytes".encode() in seen
    assert qmp.read("asked") == stored


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (b"letmein\n", b"letmeout\n", b"the two entries differ, so nothing was added"),
        (b"\n", None, b"nothing was typed, so nothing was added"),
        (b"let\x1b[Dmein\n", None, b"a key without a character was pressed"),
        (b"x" * ((1 << 20) + 1), None, b"more than 1,048,576 bytes were given"),
    ],
)
def test_what_was_not_meant_adds_nothing(
    daemon: Daemon, qmp: Client, first: bytes, second: bytes | None, words: bytes
) -> None:
    """In words."""
    status, seen = prompted(daemon, first, second)
    assert status == 1
    assert words in seen
    assert qmp.secrets() == []


# --- odd input


def test_odd_input_is_refused_in_words(
    run: Ctl, daemon: Daemon, qmp: Client, tmp_path: Path
) -> None:
    """Never a traceback, a number of an error, or silence."""
    for words, expected in (
        (["add", "z", "--file", "/dev/zero"], "more than 2,097,152 bytes were given"),
        (["list", "--socket", "@x"], "--socket @x: abstract sockets are not supported"),
        (["read", "disk-\udce4"], r"'disk-\udce4' is not UTF-8 text"),
        (["del", "disk-\udce4"], r"'disk-\udce4' is not UTF-8 text"),
    ):
        _, err = run(*words, status=1)
        assert expected in err
        assert "Errno" not in err
    run_empty = subprocess.run(
        [SECRETCTL, "--socket", "", "list"], capture_output=True, text=True, check=False
    )
    assert run_empty.returncode == 1
    assert run_empty.stderr == "secretctl: --socket: the path is empty\n"
    with open(os.devnull) as null:
        done = subprocess.run(
            [SECRETCTL, "--socket", daemon.control, "add", "e", "--stdin"],
            stdin=null, capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert done.stderr == "secretctl: warning: the secret is empty\n"
    assert done.stdout == "added e, 0 bytes\n"
    done = subprocess.run(
        f"{SECRETCTL} --socket {daemon.control} list | true",
        shell=True, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""


def test_a_taken_id_is_never_answered_with_deletion(run: Ctl, qmp: Client, tmp_path: Path) -> None:
    """The hint says that nothing was changed."""
    qmp.add("s", data="x")
    (tmp_path / "f").write_text("y")
    _, err = run("add", "s", "--file", str(tmp_path / "f"), status=1)
    assert err.endswith(
        "secretctl: the id is taken; choose another one, or 'secretctl add --replace' replaces the "
        "secret\n"
    )
    assert "del" not in err


# --- which daemon answers, and whether it does


def test_a_qemu_is_recognised(run: Ctl, tmp_path: Path) -> None:
    """By its greeting."""
    greeting = (
        b'{"QMP": {"version": {"qemu": {}, "package": "Debian 1:7.2"}, "capabilities": []}}\n'
    )
    path = str(tmp_path / "qemu")
    with server(path, greeting, b'{"return": {}}\n', b""):
        _, err = run("list", status=1, socket=path)
        assert "this is the monitor of a QEMU, not a socket of secretd" in err
        out, _ = run("doctor", status=1, socket=path)
        assert "is the monitor of a QEMU" in out


@pytest.mark.parametrize(
    "words", [["list"], ["read", "s"], ["push", "s", "--keyid", "k", "--qmp", "q"]]
)
def test_silence_is_broken_by_words(run: Ctl, tmp_path: Path, words: list[str]) -> None:
    """Each verb says what it waits for, and gives up after --timeout."""
    path = str(tmp_path / "s")
    with silent_server(path):
        _, err = run(*words, "--timeout", "2.2", status=1, socket=path)
        assert f"secretctl: waiting for an answer on {path} ..." in err
        assert "No answer within 2.2 seconds" in err


def test_doctor_gives_up_by_itself(run: Ctl, tmp_path: Path) -> None:
    """Without --timeout, after 3 seconds."""
    path = str(tmp_path / "s")
    with silent_server(path):
        out, _ = run("doctor", status=1, socket=path)
    assert "no answer: No answer within 3 seconds" in out


@contextlib.contextmanager
def silent_server(path: str) -> Iterator[None]:
    """A server that accepts no connection."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        yield


def test_the_client_socket_does_not_answer_unnamed(
    run: Ctl, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the control socket is gone, whoever asks learns which socket answers."""
    control = f"{os.path.dirname(daemon.control)}/gone.sock"
    monkeypatch.setattr(paths, "control_path", lambda: control)
    monkeypatch.setattr(paths, "client_path", lambda: daemon.client)
    monkeypatch.delenv("SECRETD_SOCKET", raising=False)
    monkeypatch.setattr(verb, "_check_socket", lambda _path: None)
    monkeypatch.setattr("sys.argv", ["secretctl", "list"])
    run._capfd.readouterr()
    assert main() == 0
    _, err = run._capfd.readouterr()
    assert (
        err == f"secretctl: no usable control socket at {control}; asking the client socket "
        f"{daemon.client}\n"
    )
    monkeypatch.setattr("sys.argv", ["secretctl", "doctor"])
    assert main() == 0
    out, _ = run._capfd.readouterr()
    assert f"{daemon.client}, which is not the control socket {control}" in out


def test_denials_that_are_not_certain_are_named(run: Ctl, qmp: Client) -> None:
    """By explain and by doctor: a process can drop a group, and leave a unit."""
    rules = [
        {"match": "gid:5", "policy": "deny"},
        {"match": "uid:6", "policy": "deny"},
        {"match": "uid:7", "policy": "allow"},
    ]
    qmp.ok("object-add", {"qom-type": "authz-list", "id": "a", "rules": rules})
    qmp.ok("object-add", {"qom-type": "secret-grant", "id": "g", "secret": "s", "authz": "a"})
    qmp.add("s", data="x")
    _, err = run("explain", "s", "--as", "uid:7")
    assert err == "secretctl: 'a' denies 'gid:5', which a process can drop; only uid:N is certain\n"
    out, _ = run("doctor")
    assert "'a' denies 'gid:5', which a process can drop" in out
    assert "uid:6" not in out


def test_the_memfd_of_run_cannot_be_changed_or_opened_by_others(
    daemon: Daemon, qmp: Client
) -> None:
    """Mode 0600, sealed; programs that demand it take it."""
    qmp.add("s", data="letmein")
    script = "stat -L -c %a $0; echo y > $0 || echo sealed; cat $0"
    done = subprocess.run(
        [SECRETCTL, "--socket", daemon.control, "run", "--secret", "s", "--", "sh", "-c", script,
        "{s}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "600\nsealed\nletmein"


def test_a_terminal_that_cannot_be_asked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the ways that remain."""

    def no_terminal(*_given: object) -> None:
        raise termios.error(25, "Inappropriate ioctl for device")

    opened: list[int] = []
    real: Callable[..., int] = os.open

    def opening(path: str, flags: int) -> int:
        opened.append(real(os.devnull, flags))
        return opened[-1]

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(termios, "tcgetattr", no_terminal)
    with (
        pytest.raises(UsageError, match="give --stdin or --file"),
        prompt.ask_twice(None, ""),  # type: ignore[arg-type]
    ):
        pass


def test_a_mark_that_comes_in_pieces_is_put_together(daemon: Daemon, qmp: Client) -> None:
    """A slow line splits the marks of a paste anywhere."""
    pieces = [b"\x1b", b"[20", b"0~let", b"mein\x1b[2", b"01~\n"]
    status, seen = prompted(daemon, *(pieces, pieces))
    assert status == 0, seen
    assert qmp.read("asked") == b"letmein"


def test_the_control_socket_answers_by_default(
    run: Ctl, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No word about which one it is, then."""
    monkeypatch.setattr(paths, "control_path", lambda: daemon.control)
    monkeypatch.delenv("SECRETD_SOCKET", raising=False)
    monkeypatch.setattr(verb, "_check_socket", lambda _path: None)
    for words in (["list"], ["doctor"]):
        monkeypatch.setattr("sys.argv", ["secretctl", *words])
        run._capfd.readouterr()
        assert main() == 0
        out, err = run._capfd.readouterr()
        assert err == ""
        assert "its socket" not in out


def test_what_a_server_says_in_place_of_a_greeting_is_printed(run: Ctl, tmp_path: Path) -> None:
    """And a reply that is an error is doctor's finding."""
    path = str(tmp_path / "s")
    refusal = b'{"error": {"class": "GenericError", "desc": "not for you"}}\n'
    with server(path, refusal):
        assert run("list", status=1, socket=path)[1] == f"secretctl: {path}: not for you\n"
    path = str(tmp_path / "t")
    greeting = b'{"QMP": {"version": {"package": "secretd 9"}, "capabilities": []}}\n'
    with server(path, greeting, b'{"return": {}}\n', refusal):
        assert "not for you" in run("doctor", status=1, socket=path)[0]


def test_a_server_that_takes_no_secret_fails_the_push(
    run: Ctl, qmp: Client, tmp_path: Path
) -> None:
    """It refuses, stays silent, or hangs up."""
    qmp.ok("secret-generate", {"id": "k", "size": 32})
    qmp.add("s", data="letmein")
    greeting, ready = b'{"QMP": {"version": {}, "capabilities": []}}\n', b'{"return": {}}\n'
    scripts: list[tuple[list[bytes], str]] = [
        ([b'{"error": {"desc": "busy"}}\n'], "busy"),
        ([b"\n"], "No answer within 0.3 seconds: waited for an answer on "),
        ([greeting, ready, b""], "QEMU did not answer: The connection was closed; it may have "
                                 "the secret"),
        ([greeting, ready, b"\n"], "QEMU did not answer: No answer within 0.3 seconds"),
    ]  # fmt: skip
    for number, (script, words) in enumerate(scripts):
        path = str(tmp_path / str(number))
        with server(path, *script):
            push = ["push", "s", "--keyid", "k", "--qmp", path, "--timeout", "0.3"]
            assert words in run(*push, status=1)[1]


def test_a_pipe_that_cannot_be_read_is_named(run: Ctl) -> None:
    """Its other end was given."""
    source, sink = os.pipe()
    try:
        assert run("add", "a", "--fd", str(sink), status=1)[1] == (
            f"secretctl: descriptor {sink}: Bad file descriptor\n"
        )
    finally:
        os.close(source)
        os.close(sink)


def test_without_a_reader_or_stderr_it_ends_with_its_status(daemon: Daemon) -> None:
    """As behind 'head'."""
    for redirect in ("2>&-", "| true"):
        done = subprocess.run(
            ["sh", "-c", f'"$0" "$@" {redirect}', SECRETCTL, "--socket", daemon.control, "list"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")


def test_an_output_without_a_reader_is_status_1(run: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process."""

    def broken(*_args: object, **_named: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(frame, "main", broken)
    saved = os.dup(1)
    try:
        monkeypatch.setattr("sys.argv", ["secretctl", "list"])
        assert main() == 1
    finally:
        os.dup2(saved, 1)
        os.close(saved)


@pytest.mark.parametrize("typed", [b"", b"\x1b"])
def test_a_terminal_that_is_hung_up_adds_nothing(
    daemon: Daemon, qmp: Client, tmp_path: Path, typed: bytes
) -> None:
    """Also in the middle of a key; a program may ignore the signal for it."""
    ours, theirs = pty.openpty()
    command = ["setsid", "--ctty", "--wait", SECRETCTL, "--socket", daemon.control, "add", "asked"]
    with open(tmp_path / "err", "wb") as stderr:
        process = subprocess.Popen(
            ["env", "--ignore-signal=HUP", *command], stdin=theirs, stdout=theirs, stderr=stderr
        )
    seen = b""
    while b"Secret asked: " not in seen:
        seen += os.read(ours, 1000)
    while termios.tcgetattr(ours)[3] & termios.ECHO:
        pass
    os.write(ours, typed)
    while unread(theirs):
        pass
    os.close(theirs)
    os.close(ours)
    assert process.wait(20) == 1
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert qmp.secrets() == []


def test_the_end_of_a_terminal_is_the_end_of_what_is_typed() -> None:
    """Such as one that was hung up before a key was pressed."""
    ours, theirs = socket.socketpair()
    with ours, theirs, SyncClientWithoutServer("/nonexistent") as client:
        ours.shutdown(socket.SHUT_WR)
        with prompt._Entry(client, theirs.fileno(), "Secret: ") as entry:
            entry.read()
            assert entry.fill == 0
        assert ours.recv(100) == b"Secret: \n"


class SyncClientWithoutServer(SyncClient):
    """It has locked memory, and no connection."""

    def connect(self, *, retry_seconds: float = 0) -> None:
        """See SyncClient."""
