# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's start, where it needs no process of its own: the default sockets."""

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from secretd import __version__, paths
from secretd.access.peer import SocketRole
from secretd.audit import chain
from secretd.audit.log import Audit
from secretd.audit.records import Subject
from secretd.audit.sinks import Sink, open_sink
from secretd.daemon import process as daemon_process
from secretd.daemon import sockets
from secretd.daemon.announcement import say_ready
from secretd.daemon.initial_objects import InitialObjects
from secretd.errors import CommandError, UsageError
from secretd.journal.journal import Journal
from secretd.memory.arena import Arena
from secretd.net.listener import Listener
from secretd.qom.paths import Paths
from secretd.qom.registry import TYPES
from secretd.qom.tree import ObjectTree
from secretd.systemd.activation import Passed
from secretd.wire import encoder
from tests.support.daemon import add_object
from tests.support.in_loop import Served
from tests.support.needs import ARENA_LEVEL

pytestmark = pytest.mark.slow  # it starts processes, or tries many cases


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default directory, which does not exist yet."""
    made = tmp_path / "secretd"
    monkeypatch.setattr(paths, "default_directory", lambda: str(made))
    return made


def test_without_options_both_default_sockets_open(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is made, open to others where the client socket is to be reached, else private."""
    monkeypatch.setattr(paths, "has_runtime_directory", lambda: True)
    for _again in range(2):
        assert [(s.role, s.path, s.mode) for s in sockets.default_sockets()] == [
            (SocketRole.CONTROL, str(directory / "control.sock"), 0o600),
            (SocketRole.CLIENT, str(directory / "client.sock"), 0o666),
        ]
    assert directory.stat().st_mode & 0o777 == 0o755
    directory.rmdir()
    monkeypatch.setattr(paths, "has_runtime_directory", lambda: False)
    sockets.default_sockets()
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o755)
    with pytest.raises(UsageError, match="other users may enter it; run 'chmod 700"):
        sockets.default_sockets()


def test_a_default_directory_that_is_not_ours_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link, a file, or in no directory at all."""
    directory.symlink_to("/tmp")
    with pytest.raises(UsageError, match="is not a directory of uid"):
        sockets.default_sockets()
    monkeypatch.setattr(paths, "default_directory", lambda: str(directory / "no" / "no"))
    directory.unlink()
    with pytest.raises(UsageError, match="No such file or directory"):
        sockets.default_sockets()


def test_the_defaults_open_where_nothing_else_is_said(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an option nor a socket of the service manager."""
    passed = [Passed("control", 9)]
    nothing: list[tuple[SocketRole, list[str]]] = [(role, []) for role in SocketRole]
    assert sockets.wanted(nothing, passed) == []
    assert [s.path for s in sockets.wanted([(SocketRole.CREDENTIALS, ["/x"])], [])] == ["/x"]
    found = sockets.wanted(nothing, [])
    assert [s.path for s in found] == [
        str(directory / "control.sock"),
        str(directory / "client.sock"),
    ]


def test_what_to_type_next_works_as_it_is_printed(
    tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With secretctl's path where a shell would not find it, and the socket where it is not the
    default.
    """
    journal = Journal(arena)
    tree = ObjectTree(journal, arena, TYPES)
    sock = socket.socket(socket.AF_UNIX)
    path = str(tmp_path / "c")
    sock.bind(path)
    listeners = [Listener(sock, SocketRole.CONTROL, path)]
    for found, shown in (
        ("/usr/bin/secretctl", "secretctl"),
        (None, f"{Path(sys.executable).parent}/secretctl"),
    ):
        monkeypatch.setattr(shutil, "which", lambda _name, found=found: found)
        caplog.clear()
        with caplog.at_level("INFO"):
            say_ready(tree, listeners, 0, Audit())
        said = caplog.text
        assert f"try: {shown} --socket {tmp_path}/c add disk0 --prompt   or: {shown} --help" in said
        assert f"version {__version__}, 0 objects" in said
    listeners[0].close()
    journal.close()


def test_only_a_client_socket_is_fine(tmp_path: Path) -> None:
    """There is nothing to type next, then; a second socket that fails closes the first."""
    secretd = os.path.join(os.path.dirname(sys.executable), "secretd")
    process = subprocess.Popen(
        [secretd, "--client", str(tmp_path / "c")], stderr=subprocess.PIPE, text=True
    )
    said = ""
    while "memory" not in said:
        said += process.stderr.readline()
    process.terminate()
    said += process.stderr.read()
    process.stderr.close()
    assert process.wait(10) == 0
    assert "client socket      " in said
    assert "try:" not in said
    assert said.endswith("secretd: stopped; all secrets are wiped\n")
    done = subprocess.run(
        [secretd, "--client", str(tmp_path / "c"), "--client", "/nope/c"],
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert done.returncode == 1
    assert not (tmp_path / "c").exists()


def test_help_on_objects_ends_the_start(tmp_path: Path) -> None:
    """With QEMU's lists, before anything is opened; objects named before it are checked."""
    secretd = os.path.join(os.path.dirname(sys.executable), "secretd")
    (tmp_path / "list").write_text("{}")

    def run(*words: str) -> subprocess.CompletedProcess:
        options = ["--control", str(tmp_path / "c"), *words]
        return subprocess.run(
            [secretd, *options], capture_output=True, text=True, check=False, timeout=20
        )

    done = run("--object", "help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "List of user creatable objects:\n"
        "  authz-list\n  authz-listfile\n  authz-simple\n  secret\n  secret-alias\n"
        "  secret-fleet\n  secret-grant\n  secret-host\n  secret-peer\n"
        "  secret-store\n"
        "  secret_keyring\n"
    )
    made = f"authz-listfile,id=a,filename={tmp_path}/list"
    done = run("--object", made, "-object", "secret_keyring,help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("secret_keyring options:\n  format=<QCryptoSecretFormat>\n")
    done = run("--object", made, "--object", made, "--object", "help")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"secretd: --object {made}: attempt to add duplicate property 'a' to object (type "
        "'container')\n"
    )
    done = run("--object", "secret,id=1,file=/dev/null")
    assert done.stderr == (
        "secretd: --object secret,id=1,file=/dev/null: Parameter 'id' expects an identifier\n"
        "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.\n"
    )


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    """On a command line they are bytes; what shows them shows U+FFFD."""
    name = os.fsencode(tmp_path) + b"/\xff"
    with open(name, "wb") as file:
        file.write(b"letmein")
    journal = Journal(Arena(ARENA_LEVEL))
    scratch = Arena(ARENA_LEVEL)
    tree = ObjectTree(journal, scratch, TYPES)
    add_object(tree, "secret,id=s,file=" + os.fsdecode(name))
    assert Paths(tree).get("s", "file") == os.fsdecode(name)
    assert bytes(journal.plaintext("s")) == b"letmein"
    assert encoder.value(Paths(tree).get("s", "file")).endswith('/\\uFFFD"')
    journal.close()
    journal.arena.close()
    scratch.close()


# --- the audit and the sockets for others


def started(tmp_path: Path, *options: str) -> "subprocess.Popen[str]":
    """A daemon that is ready, its stderr read up to there."""
    secretd = os.path.join(os.path.dirname(sys.executable), "secretd")
    process = subprocess.Popen(
        [secretd, "--control", str(tmp_path / "c"), *options],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    for line in process.stderr:
        if "try: " in line:
            break
    return process


def ended(process: "subprocess.Popen[str]") -> str:
    process.terminate()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(10) == 0
    return said


def test_the_audit_goes_to_stderr_unless_said_otherwise(tmp_path: Path) -> None:
    """Objects of the command line are in it too."""
    process = started(tmp_path, "--object", '{"qom-type":"authz-list","id":"a"}')
    said = [json.loads(line) for line in ended(process).splitlines() if line.startswith("{")]
    assert [(r["event"], r.get("id"), r.get("door")) for r in said] == [
        ("add", "a", "command line"),
        ("stop", None, None),
    ]
    assert "{" not in ended(started(tmp_path, "--audit=none"))


def test_a_hangup_reopens_the_audit(tmp_path: Path) -> None:
    """Where it cannot, the old file goes on and the log says so."""
    (tmp_path / "d").mkdir()
    path = tmp_path / "d" / "audit"
    process = started(tmp_path, f"--audit={path}")
    path.rename(tmp_path / "d" / "audit.1")
    process.send_signal(signal.SIGHUP)
    while not path.exists() or not path.read_text().endswith("\n"):
        pass
    (tmp_path / "d").rename(tmp_path / "e")
    process.send_signal(signal.SIGHUP)
    line = process.stderr.readline()
    assert line == f"secretd: --audit={path}: No such file or directory; the old file goes on\n"
    ended(process)
    chained = chain.Verification(None)
    for name in ("audit.1", "audit"):
        lines = (tmp_path / "e" / name).read_bytes().splitlines(keepends=True)
        assert list(chained.findings(lines)) == []
    assert chained.last is not None
    assert chained.last.members["event"] == "stop"


def test_the_audits_options_are_checked(tmp_path: Path, arena: Arena) -> None:
    """Each with what is wrong."""
    journal = Journal(arena)
    tree = ObjectTree(journal, arena, TYPES)
    for text in ("secret,id=short,data=123456789012345", "secret,id=k,data=1234567890123456"):
        add_object(tree, text)
    add_object(tree, "authz-list,id=a")

    def audit(**options: str | None) -> Audit:
        given = {"audit": str(tmp_path / "audit"), "audit_policy": "best-effort", "audit_key": None}
        return daemon_process._audit(tree, argparse.Namespace(**{**given, **options}))

    for options, words in (
        ({"audit_key": "nope"}, "--audit-key=nope: No secret with id 'nope'"),
        ({"audit_key": "a"}, "--audit-key=a: Object with id 'a' is not a secret"),
        (
            {"audit_key": "short"},
            "--audit-key=short: the secret has 15 bytes; 16 at least are needed",
        ),
        ({"audit_key": "k", "audit": "none"}, "--audit-key cannot be used with --audit=none"),
        (
            {"audit": "none", "audit_policy": "require"},
            "--audit-policy=require cannot be used with --audit=none",
        ),
        ({"audit": "/nope/x"}, "--audit=/nope/x: No such file or directory"),
    ):
        with pytest.raises(UsageError) as caught:
            audit(**options)
        assert str(caught.value) == words
    made = audit(audit_key="k", audit_policy="require")
    made.append_release("read", Subject("control", None), "control socket", "k", 16)
    (line,) = (tmp_path / "audit").read_bytes().splitlines(keepends=True)
    key = memoryview(bytearray(b"1234567890123456"))
    assert next(iter(chain.Verification(key).findings([line]))).words.startswith("the chain begins")
    record = chain.read(line)
    assert record is not None
    assert record.link == chain.link(chain.GENESIS, record.body, key)
    with pytest.raises(CommandError, match="is in use, can not be deleted"):
        tree.delete("k")
    made.stop()
    journal.close()


def test_a_control_socket_for_others_has_a_mode_for_others() -> None:
    """Peers are checked at accept; a given mode counts."""
    spec = sockets.socket_spec(SocketRole.CONTROL, "/x,authz=admins")
    assert (spec.authz, spec.mode) == ("admins", 0o666)
    spec = sockets.socket_spec(SocketRole.CONTROL, "/x,authz=admins,mode=0660")
    assert (spec.authz, spec.mode) == ("admins", 0o660)
    with pytest.raises(UsageError, match="--client /x,authz=a: Parameter 'authz' is unexpected"):
        sockets.socket_spec(SocketRole.CLIENT, "/x,authz=a")


def test_an_object_that_cannot_be_replaced_stays(
    tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier process has left is there until the new one is."""
    (tmp_path / "f").write_text("one")
    journal = Journal(Arena(ARENA_LEVEL))
    tree = ObjectTree(journal, arena, TYPES)
    option = f"secret,id=s,file={tmp_path}/f"
    assert InitialObjects(tree, []).make(option)
    (tmp_path / "f").write_text("two")

    def none(*_given: object, **_named: object) -> int:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_write", none)
        with pytest.raises(OSError, match="Cannot allocate"):
            InitialObjects(tree, []).make(option)
    assert bytes(journal.plaintext("s")) == b"one"
    assert InitialObjects(tree, []).make(option)
    assert bytes(journal.plaintext("s")) == b"two"
    # One without plaintext.
    assert InitialObjects(tree, []).make("authz-list,id=a")
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_write", none)
        with pytest.raises(OSError, match="Cannot allocate"):
            InitialObjects(tree, []).make("authz-list,id=a,policy=allow")
    assert Paths(tree).get("a", "policy") == "deny"
    held = journal.arena.held
    journal.close()
    assert (held, journal.arena.held) == (3, 0)
    journal.arena.close()


def test_the_start_brings_along_nothing_that_is_not_needed() -> None:
    """What asyncio, msgspec and shutil only import where they find it; a later import gets
    it.
    """
    code = (
        "import gc, sys\n"
        "from secretd.daemon.fast_start import fast_imports\n"
        "with fast_imports():\n"
        "    import secretd.daemon.process\n"
        "unneeded = {'bz2', 'lzma', 'ssl', 'tempfile', 'typing_extensions', 'cryptography'}\n"
        "unneeded |= set() if 'coverage' in sys.modules else {'sqlite3'}\n"
        "assert not unneeded & set(sys.modules)\n"
        "assert gc.isenabled()\n"
        "import bz2, lzma, ssl, uuid\n"
        "assert ssl.OPENSSL_VERSION\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_uncaught_errors_are_logged_without_their_text(caplog: pytest.LogCaptureFixture) -> None:
    """Neither those of the exception nor the arguments of the call, which asyncio would quote."""

    def fail(text: str) -> None:
        raise ValueError(text)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(daemon_process._unexpected)
        loop.call_soon(fail, "letmein")
        await asyncio.sleep(0)
        loop.call_exception_handler({"message": "letmein"})

    asyncio.run(main())
    assert "internal error: ValueError" in caplog.text
    assert "something went wrong in the event loop" in caplog.text
    assert "in fail" in caplog.text
    assert "letmein" not in caplog.text


async def test_an_audit_file_that_cannot_be_opened_in_time_is_left(
    in_loop: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a file server that does not answer; what comes later is closed."""
    audit = Audit(str(tmp_path / "audit"))
    go_on = threading.Event()
    sink = open_sink(str(tmp_path / "late"))
    closed: list[bool] = []
    close = sink.close

    def slow() -> Sink:
        go_on.wait()
        return sink

    def note() -> None:
        close()
        closed.append(True)

    sink.close = note  # type: ignore[method-assign]
    audit.open_again = slow  # type: ignore[method-assign]
    await daemon_process._reopen(audit, in_loop.server, 0.01)
    assert "the audit file was not opened within 0.01 seconds; the old one goes on" in caplog.text
    go_on.set()
    while not closed:
        await asyncio.sleep(0)
    audit.stop()


async def test_an_audit_file_that_is_the_same_after_all_is_not_closed(in_loop: Served) -> None:
    """Though the answer comes too late."""
    audit = Audit("none")
    go_on = threading.Event()

    def slow() -> None:
        go_on.wait()

    audit.open_again = slow  # type: ignore[method-assign]
    await daemon_process._reopen(audit, in_loop.server, 0.01)
    audit.open_again = lambda: None  # type: ignore[method-assign]
    go_on.set()
    await daemon_process._reopen(audit, in_loop.server)


async def test_a_reload_that_fails_is_logged(
    in_loop: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon goes on."""
    audit = Audit("none")

    def broken() -> None:
        raise RuntimeError

    audit.open_again = broken  # type: ignore[method-assign]
    await daemon_process._reload(audit, in_loop.server)
    assert "RuntimeError" in caplog.text


def test_an_object_that_is_not_json_shows_no_value(arena: Arena) -> None:
    """What the parser quotes may be a part of the secret."""
    tree = ObjectTree(Journal(Arena(ARENA_LEVEL)), arena, TYPES)
    try:
        for text in ('{"data": "letmein"', "{'data': 'letmein'}", '{"data": letmein}'):
            with pytest.raises(UsageError) as caught:
                InitialObjects(tree, []).make(text)
            assert "letmein" not in str(caught.value)
    finally:
        tree.journal.close()
        tree.journal.arena.close()
