# SPDX-License-Identifier: LGPL-2.1-or-later
"""What has to be so before the daemon begins: standard descriptors, binding, ids, directories, its
environment.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from secretd.access import peer
from secretd.access.peer import SocketRole, identify
from secretd.daemon import argv, main
from secretd.errors import UsageError
from secretd.linux import user_namespace
from secretd.linux.user_namespace import IdMap, read_id_map
from secretd.net import listener
from secretd.net.listener import listen
from tests.support.daemon import Daemon
from tests.support.needs import need_program, need_root
from tests.support.qmp import Client
from tests.support.secretctl import SECRETCTL
from tests.support.users import connect_as

pytestmark = pytest.mark.slow  # it starts processes, or tries many cases

SECRETD = str(Path(sys.executable).parent / "secretd")


def run_secretd(*words: str, **more: object) -> "subprocess.Popen[str]":
    return subprocess.Popen([SECRETD, *words], stderr=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload]


def ready(process: "subprocess.Popen[str]") -> str:
    """What it says until it is ready."""
    said = ""
    assert process.stderr is not None
    for line in process.stderr:
        said += line
        if "try: " in line:
            break
    return said


# --- standard descriptors


@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_closed_descriptors_are_not_taken_for_others(
    tmp_path: Path, closed: tuple[int, ...]
) -> None:
    """The daemon writes its audit to the file, and its journal stays as it is."""
    audit = tmp_path / "audit"
    control = str(tmp_path / "s")
    redirect = " ".join(f"{fd}>&-" if fd else "<&-" for fd in closed)
    command = f'exec "$0" --control "$1" --audit "$2" {redirect}'
    process = subprocess.Popen(["sh", "-c", command, SECRETD, control, str(audit)], cwd=tmp_path)
    try:
        while True:
            try:
                client = Client(control)
                break
            except OSError:
                assert process.poll() is None
        for number in range(50):
            assert client.add(f"s{number}", data="letmein") == {"return": {}}
        client.close()
        if os.getuid() == 0:  # only root sees that of a process that is not dumpable
            for fd in closed:
                assert os.readlink(f"/proc/{process.pid}/fd/{fd}") == os.devnull
    finally:
        process.terminate()
        assert process.wait(20) == 0
    records = [json.loads(line) for line in audit.read_text().splitlines()]
    assert sum(r["event"] == "add" for r in records) == 50


def test_an_audit_on_a_stderr_that_is_closed_is_refused(tmp_path: Path) -> None:
    """It would be written nowhere."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" --control "$1" 2>&-', SECRETD, str(tmp_path / "s")],
        check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("verb", "words"),
    [("read", ["s"]), ("list", []), ("status", []), ("export", ["--keyid", "k"]), ("doctor", [])],
)
def test_output_to_a_closed_or_full_descriptor_is_an_error(
    daemon: Daemon, qmp: Client, verb: str, words: list[str]
) -> None:
    """With words, and never a traceback; a secret that is not written is not lost in silence."""
    qmp.add("s", data="letmein")
    qmp.ok("secret-generate", {"id": "k", "size": 32})
    for redirect, reason in (
        (">&-", "Bad file descriptor"),
        ("<&- >&-", "Bad file descriptor"),
        (">/dev/full", "No space left on device"),
    ):
        done = subprocess.run(
            ["sh", "-c", f'exec "$0" "$@" {redirect}', SECRETCTL, "--socket", daemon.control, verb,
            *words],
            stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.endswith(f"secretctl: standard output: {reason}\n")
        assert "Traceback" not in done.stderr
        assert "Errno" not in done.stderr


def test_opening_what_is_closed_opens_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, put back afterwards."""
    saved = os.dup(0)
    os.close(0)
    try:
        assert main.open_closed() == [0]
        assert os.get_inheritable(0)
        assert main.open_closed() == []
    finally:
        os.dup2(saved, 0)
        os.close(saved)


# --- binding


def test_functions_are_bound_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started without LD_BIND_NOW it starts itself anew, with the same arguments and process."""
    environment = {n: v for n, v in os.environ.items() if n != main.BIND_NOW}
    process = run_secretd("--control", str(tmp_path / "s"), "--audit=none", env=environment)
    try:
        assert "control socket" in ready(process)
        if os.getuid() == 0:  # only root sees that of a process that is not dumpable
            with open(f"/proc/{process.pid}/environ", "rb") as file:
                assert b"LD_BIND_NOW=1" in file.read().split(b"\0")
    finally:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0
    calls: list[object] = []
    monkeypatch.setattr(os, "execv", lambda *given: calls.append(given))
    monkeypatch.setenv(main.BIND_NOW, "1")
    main.bind_now()
    assert calls == []
    monkeypatch.delenv(main.BIND_NOW)
    main.bind_now()
    assert calls == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]


# --- ids


def test_the_maps_of_a_user_namespace_are_read(tmp_path: Path) -> None:
    """All ids, some, or none; where /proc shows little of the system, too."""
    (tmp_path / "self").mkdir()
    (tmp_path / "sys" / "kernel").mkdir(parents=True)
    (tmp_path / "self" / "uid_map").write_text("         0          0 4294967295\n")
    (tmp_path / "sys" / "kernel" / "overflowuid").write_text("65534\n")
    whole = read_id_map("uid", str(tmp_path))
    assert whole.overflow is None
    assert whole.is_mapped(65534)
    (tmp_path / "self" / "uid_map").write_text("0 1000 1\n1 100000 65535\n")
    assert read_id_map("uid", str(tmp_path)).overflow == 65534
    os.unlink(tmp_path / "sys" / "kernel" / "overflowuid")
    some = read_id_map("uid", str(tmp_path))
    assert some.overflow == 65534
    assert some.is_mapped(1)
    assert not some.is_mapped(70_000)
    os.unlink(tmp_path / "self" / "uid_map")
    assert read_id_map("uid", str(tmp_path)).overflow is None


def test_what_is_not_mapped_is_no_identity(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A uid that stands for many is refused, on each socket; such a group is left out."""
    need_root()
    monkeypatch.setattr("secretd.access.peer.UIDS", IdMap((), 65534))
    monkeypatch.setattr("secretd.access.peer.GIDS", IdMap((), 65534))
    for path in (daemon.client, daemon.admins):
        with connect_as(path, 65534, 65534) as sock:
            reply = json.loads(sock.recv(1 << 16))
            assert "uid 65534 stands for every uid" in reply["error"]["desc"]
    with connect_as(daemon.client, 1000, 65534, (65534, 5)) as sock:
        found = identify(peer_socket(daemon, sock), SocketRole.CLIENT)
    assert {i for i in found.identities if i.startswith(("uid:", "gid:"))} == {"uid:1000", "gid:5"}


def peer_socket(daemon: Daemon, sock: socket.socket) -> socket.socket:
    """The daemon's end of a connection."""
    sock.recv(1 << 16)
    while not (found := [s for s in list(daemon.server.sessions) if s.peer.uid == 1000]):
        pass
    return found[0].transport._sock


def test_a_daemon_whose_own_uid_is_not_mapped_does_not_start(tmp_path: Path) -> None:
    """It would take every unmapped uid for its own."""
    need_program("unshare")
    done = subprocess.run(
        ["unshare", "--user", SECRETD, "--control", str(tmp_path / "s"), "--audit=none"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "stands for every uid that this user namespace does not map" in done.stderr
    with pytest.raises(UsageError, match="run it under one that is mapped"):
        peer.check_own_uid(IdMap((), os.getuid()))


def test_a_namespace_that_maps_one_uid_is_said_at_start(tmp_path: Path) -> None:
    """As in a rootless container."""
    need_program("unshare")
    process = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", SECRETD, "--control", str(tmp_path / "s"),
        "--audit=none"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = ready(process)
    process.terminate()
    process.communicate(timeout=20)
    assert "this user namespace does not map all ids: uid 65534 stands for all that are not" in said
    assert user_namespace.unmapped_words(IdMap((), None), IdMap((), None)) == ""


# --- sockets' files


def test_a_link_in_the_sockets_place_is_not_followed(tmp_path: Path) -> None:
    """The mode comes with the socket."""
    listener = listen(str(tmp_path / "s"), SocketRole.CLIENT, 0o640)
    assert os.stat(tmp_path / "s").st_mode & 0o777 == 0o640
    listener.close()
    for mode in (0o600, 0o666, 0o660):
        made = listen(str(tmp_path / "m"), SocketRole.CONTROL, mode, os.getgid())
        assert os.stat(tmp_path / "m").st_mode & 0o777 == mode
        made.close()


def test_directories_that_others_can_write_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anywhere on the way, but for those with the sticky bit; abstract sockets too."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    os.chmod(tmp_path / "a", 0o777)
    with pytest.raises(UsageError, match=r"a: other users can replace what is in it .*mode 0777"):
        listen(str(inner / "s"), SocketRole.CLIENT, 0o666)
    os.chmod(tmp_path / "a", 0o1777)
    listen(str(inner / "s"), SocketRole.CLIENT, 0o666).close()
    with pytest.raises(UsageError, match="abstract sockets have no mode"):
        listen("@secretd", SocketRole.CONTROL, 0o600)
    with pytest.raises(UsageError, match="none/s: No such file or directory"):
        listen(str(tmp_path / "none" / "s"), SocketRole.CONTROL, 0o600)
    if os.getuid() == 0:
        os.chown(tmp_path, 1234, -1)
    owner = os.stat(tmp_path).st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(UsageError, match="other users can replace"):
        listener.check_directory(str(tmp_path))


@pytest.mark.parametrize("how", ["noticed", "reload"])
def test_a_socket_that_was_removed_is_made_again(
    daemon: Daemon, qmp: Client, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its mode; connections that are open stay."""
    if how == "reload":
        daemon.call(lambda: daemon.loop.remove_reader(daemon.server._files.fileno()))
    for path in (daemon.client, daemon.admins, daemon.control):
        mode = os.stat(path).st_mode
        os.unlink(path)
        if how == "reload":
            daemon.call(daemon.server.make_again)
        while not os.path.exists(path):
            pass
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                client = Client(path)
                break
        assert client.ok("query-version")
        client.close()
        assert os.stat(path).st_mode == mode
    assert qmp.ok("query-name") == {}
    if how == "noticed":
        return
    os.unlink(daemon.client)
    os.mkdir(daemon.client)
    daemon.call(daemon.server.make_again)
    os.rmdir(daemon.client)
    daemon.call(daemon.server.make_again)
    while not os.path.exists(daemon.client):
        pass


# --- the environment and the end


def test_variables_with_a_hidden_value_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value alone, with commas doubled, or behind data=; short ones only then."""
    environment = {
        b"ARGS": b"--object secret,id=a,data=hunter2hunter2",
        b"PASS": b"hunter2hunter2",
        b"COMMA": b"data=a,,b",
        b"SHORT": b"x",
        b"SHORT_ARGS": b"--object secret,id=s,data=x",
        b"PATH": b"/usr/bin:/box",
    }
    monkeypatch.setattr(os, "environb", environment)
    argv._clean_environment([b"hunter2hunter2", b"a,b", b"x", b""])
    assert environment == {b"SHORT": b"x", b"PATH": b"/usr/bin:/box"}


def test_an_unread_stderr_stops_nothing(tmp_path: Path) -> None:
    """Neither what goes on, nor the end."""
    control = str(tmp_path / "s")
    process = run_secretd("--control", control, f"--audit={tmp_path / 'audit'}")
    ready(process)
    assert process.stderr is not None
    filling = os.open(f"/proc/self/fd/{process.stderr.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(filling, b"x" * 512)
    os.close(filling)
    os.rename(tmp_path / "audit", tmp_path / "audit.1")
    os.mkdir(tmp_path / "audit")
    client = Client(control)
    for _ in range(100):
        process.send_signal(signal.SIGHUP)
        assert client.ok("query-name") == {}
    while stat(client, "log-dropped") == 0:
        process.send_signal(signal.SIGHUP)
    client.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    process.stderr.close()


def stat(client: Client, name: str) -> int:
    parts = client.ok("query-secret-stats")
    return {s["name"]: s["value"] for part in parts for s in part["stats"]}[name]
