# SPDX-License-Identifier: LGPL-2.1-or-later
"""Peers: uids, groups and units, as the real kernel reports them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from secretd.access import peer as module
from secretd.access import units
from secretd.access.peer import Peer, SocketRole, identify
from secretd.access.units import cgroup_of, units_of
from secretd.errors import PeerUnknown
from secretd.linux import peercred
from tests.support.cgroups import accepted, cgroup, process_in
from tests.support.daemon import Daemon
from tests.support.needs import need
from tests.support.qmp import Client


def test_a_peer_has_its_uid_and_all_its_groups(tmp_path: Path) -> None:
    """As they are at connect."""
    with accepted(tmp_path, uid=1000, gid=1001, groups=(33, 44)) as sock:
        peer = identify(sock, SocketRole.CLIENT)
    assert (peer.uid, peer.gid, peer.pid) == (1000, 1001, os.getpid())
    assert {"uid:1000", "gid:1001", "gid:33", "gid:44"} <= peer.identities
    assert not {i for i in peer.identities if i.startswith("uid:")} - {"uid:1000"}
    assert not peer.trusted


@pytest.mark.parametrize("count", [255, 256, 257, 399])
def test_many_groups_are_read_in_full(tmp_path: Path, count: int) -> None:
    """Python's getsockopt has room for 256."""
    with accepted(tmp_path, uid=1000, gid=1000, groups=tuple(range(5000, 5000 + count))) as sock:
        identities = identify(sock, SocketRole.CLIENT).identities
    assert {f"gid:{n}" for n in range(5000, 5000 + count)} <= identities


def test_groups_that_do_not_fit_are_not_left_out(tmp_path: Path) -> None:
    """Half an answer is none."""
    with accepted(tmp_path, uid=1000, gid=1000, groups=tuple(range(5000, 9098))) as sock:
        with pytest.raises(PeerUnknown, match="it is in more than 4096 groups"):
            identify(sock, SocketRole.CLIENT)


@pytest.mark.parametrize(
    ("path", "units"),
    [
        ("/system.slice/nginx.service", ["unit:nginx.service"]),
        ("/system.slice/system-tpl.slice/tpl@a\\x2db.service", ["unit:tpl@a\\x2db.service"]),
        ("/system.slice/app.service/payload/nginx.service", ["unit:app.service"]),
        ("/init.scope", ["unit:init.scope"]),
        ("/user.slice/user-1000.slice/session-3.scope", ["unit:session-3.scope"]),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/nginx.service",
            ["unit:user@1000.service", "user-unit:1000/nginx.service"],
        ),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.slice/a.scope/b.service",
            ["unit:user@1000.service", "user-unit:1000/a.scope"],
        ),
        ("/user.slice/user-1000.slice/user@1000.service", ["unit:user@1000.service"]),
        ("/user.slice/user-0.slice/user@0.service/init.scope",
         ["unit:user@0.service", "user-unit:0/init.scope"]),
        ("/user.slice/user@x.service/app.slice/nginx.service", ["unit:user@x.service"]),
        ("/system.slice/_cgroup.service", ["unit:cgroup.service"]),
        ("/", []),
        ("/system.slice", []),
        ("/docker/0123", []),
        ("/system.slice/nginx.service.d", []),
        ("/system.slice/a b.service", []),
        ("/system.slice/\udcff.service", []),
        ("/machine.slice/systemd-nspawn@x.service/payload/system.slice/nginx.service",
         ["unit:systemd-nspawn@x.service"]),
        (None, []),
    ],
)  # fmt: skip
def test_the_unit_is_that_of_the_whole_path(path: str | None, units: list[str]) -> None:
    """The first that is no slice, as systemd reads it; a user's own stands behind their uid."""
    assert units_of(path) == units


NAMES = (
    f"/secretd-test-{os.getpid()}.slice/web.service",
    f"/secretd-test-{os.getpid()}.slice/user@1000.service/app.slice/web.service",
)


@pytest.mark.parametrize("way", ["kernel", "walk", "proc"])
def test_the_unit_is_read_through_the_pidfd(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the cgroup's number, with /proc or without it; or by /proc, where the kernel tells no
    number.
    """
    if way == "walk":
        monkeypatch.setattr(units, "_read_proc", lambda _pid: None)
    if way == "proc":
        monkeypatch.setattr(peercred, "PIDFD_GET_INFO", 0xC040FFFE)
    wanted = (["unit:web.service"], ["unit:user@1000.service", "user-unit:1000/web.service"])
    for number, (name, expected) in enumerate(zip(NAMES, wanted, strict=True)):
        directory = tmp_path / str(number)
        directory.mkdir()
        with cgroup(name) as path, process_in(path, directory) as sock:
            peer = identify(sock, SocketRole.CLIENT)
        assert set(expected) <= peer.identities
        assert peer.unit == expected[-1]


@pytest.mark.parametrize("way", ["kernel", "proc"])
def test_a_process_that_has_ended_is_not_known(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is refused on the client socket, and has no unit on the control socket."""
    if way == "proc":
        monkeypatch.setattr(peercred, "PIDFD_GET_INFO", 0xC040FFFE)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    code = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])"
    subprocess.run([sys.executable, "-S", "-c", code, str(tmp_path / "s")], check=True)
    server, _ = listener.accept()
    with server, listener:
        with pytest.raises(PeerUnknown, match="the process has ended"):
            identify(server, SocketRole.CLIENT)
        peer = identify(server, SocketRole.CONTROL)
    assert (peer.uid, peer.unit) == (os.getuid(), None)


def test_a_peer_that_has_ended_is_refused_in_words(daemon: Daemon, tmp_path: Path) -> None:
    """It may have passed its socket to another process."""
    code = (
        "import os,socket,sys; s=socket.socket(socket.AF_UNIX); s.set_inheritable(True)\n"
        "d=s.fileno(); t=socket.socket(fileno=os.dup(int(sys.argv[2])))\n"
        "s.connect(sys.argv[1]); socket.send_fds(t,[b'x'],[d])"
    )
    ours, theirs = socket.socketpair()
    # The daemon must not accept before the process has ended.
    blocked = daemon.call(
        lambda: daemon.loop.remove_reader(daemon.server._listeners[1].sock.fileno())
    )
    assert blocked is True
    subprocess.run(
        [sys.executable, "-S", "-c", code, daemon.client, str(theirs.fileno())],
        pass_fds=[theirs.fileno()], check=True,
    )  # fmt: skip
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    daemon.call(lambda: daemon.server._watch(daemon.server._listeners[1]))
    ours.close()
    theirs.close()
    client = Client(daemon.client, negotiate=False, sock=socket.socket(fileno=fds[0]))
    words = client.reply()["error"]["desc"]
    assert words == (
        "Cannot identify the peer completely: the process has ended, or is in a PID namespace "
        "that secretd does not see; connection refused"
    )
    assert client.line() == b""
    client.close()


def test_without_pidfds_the_client_socket_is_closed(tmp_path: Path) -> None:
    """As on Linux before 6.5; the control socket needs no more than the uid."""
    with accepted(tmp_path) as sock, pytest.MonkeyPatch.context() as patch:
        patch.setattr(peercred, "SO_PEERPIDFD", 999)
        with pytest.raises(PeerUnknown, match=r"this kernel has no SO_PEERPIDFD; Linux 6\.5 has"):
            identify(sock, SocketRole.CLIENT)
        assert identify(sock, SocketRole.CONTROL).uid == os.getuid()
        patch.undo()
        patch.setattr(peercred, "pid_and_cgroup", lambda _pidfd: None)
        with pytest.raises(PeerUnknown, match="the process has ended"):
            identify(sock, SocketRole.CLIENT)
        patch.undo()
        patch.setattr(peercred, "SO_PEERGROUPS", 999)
        with pytest.raises(PeerUnknown, match="Protocol not available"):
            identify(sock, SocketRole.CLIENT)


def test_what_cannot_be_looked_up_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as with no descriptor left."""

    def none(_pidfd: int) -> str | None:
        raise OSError(24, "x")

    monkeypatch.setattr("secretd.access.peer.cgroup_of", none)
    with accepted(tmp_path) as sock:
        with pytest.raises(PeerUnknown, match="Too many open files"):
            identify(sock, SocketRole.CLIENT)
        assert identify(sock, SocketRole.CONTROL).uid == os.getuid()


def test_what_is_no_socket_of_ours_is_not_known() -> None:
    """No uid, no peer."""
    with socket.socket(socket.AF_UNIX) as sock:
        with pytest.raises(PeerUnknown):
            identify(sock, SocketRole.CLIENT)
        with pytest.raises(PeerUnknown):
            module._cgroup(sock, -1)
    with pytest.raises(PeerUnknown, match="Bad file descriptor"):
        identify(sock, SocketRole.CONTROL)
    with pytest.raises(PeerUnknown, match="Bad file descriptor"):
        cgroup_of(9999)


def test_cgroups_outside_ours_or_none_give_no_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel shows them with dots; and there may be none of version 2."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        monkeypatch.setattr(units, "_read_proc", lambda _pid: "/../other.slice/nginx.service")
        assert cgroup_of(pidfd) is None
        monkeypatch.setattr(peercred, "PIDFD_GET_INFO", 0xC040FFFE)
        assert cgroup_of(pidfd) is None
        monkeypatch.setattr(units, "_read_proc", lambda _pid: None)
        with pytest.raises(PeerUnknown, match="/cgroup cannot be read"):
            cgroup_of(pidfd)
        monkeypatch.undo()
        monkeypatch.setattr(units, "_mount", lambda: None)
        assert cgroup_of(pidfd) is None
    finally:
        os.close(pidfd)


def test_a_cgroup_that_is_not_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search has a limit."""
    mount = units._mount()
    need(mount is not None, "there are no version 2 cgroups")
    assert mount is not None
    with pytest.raises(PeerUnknown, match="its cgroup was not found"):
        units._walk("/nonexistent", 1)
    monkeypatch.setattr(units, "_CGROUPS_WALKED", 1)
    with pytest.raises(PeerUnknown, match="its cgroup was not found"):
        units._walk(mount, 1 << 60)
    with pytest.raises(PeerUnknown, match="its cgroup was not found"):
        units._walk("/nonexistent", 1)
    assert units._number_of("/nonexistent") is None
    assert units._read_proc(1 << 30) is None


def test_a_pidfd_that_is_none_is_not_known() -> None:
    """Nothing is guessed."""
    with open("/dev/null") as file, pytest.raises((PeerUnknown, StopIteration)):
        cgroup_of(file.fileno())


def test_trust_is_for_uid_0_and_the_daemons_own() -> None:
    """Whatever the socket."""
    assert Peer(0, 5, 1, SocketRole.CLIENT).trusted
    assert Peer(os.getuid(), 5, 1, SocketRole.CLIENT).trusted
    assert not Peer(os.getuid() + 1, 0, 1, SocketRole.CONTROL).trusted


def test_a_process_that_was_waited_for_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its pidfd and by /proc."""
    process = subprocess.Popen(["sleep", "1000"])
    pidfd = os.pidfd_open(process.pid)
    try:
        process.kill()
        process.wait()
        with pytest.raises(PeerUnknown, match="the process has ended"):
            cgroup_of(pidfd)
        monkeypatch.setattr(units, "_is_zombie", lambda _pidfd: False)
        with pytest.raises(PeerUnknown, match="the process has ended"):
            cgroup_of(pidfd)
        monkeypatch.setattr(peercred, "PIDFD_GET_INFO", 0xC040FFFE)
        with pytest.raises(PeerUnknown, match="the process has ended"):
            cgroup_of(pidfd)
    finally:
        os.close(pidfd)


def test_few_numbers_of_missing_cgroups_are_kept() -> None:
    """The oldest is looked for again."""
    for number in range(units.MISSES_KEPT + 1):
        with pytest.raises(PeerUnknown):
            units._walk("/nonexistent", (1 << 61) + number)
    assert len(units._missed) == units.MISSES_KEPT
    assert 1 << 61 not in units._missed
