# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors that block whoever touches them, from another uid: everybody else is served as ever.

Nothing is timed: while the hostile client holds on, others have hundreds of commands answered, one
after the other. A daemon that waits for what never comes is a test that does not end.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from secretd.linux.sockopt import SO_PASSRIGHTS
from tests.e2e import hostile as hostile_module
from tests.e2e.conftest import Process
from tests.support.needs import need, need_root
from tests.support.qmp import Client
from tests.support.users import connect_as

HOSTILE = Path(__file__).parent / "hostile.py"
UID, OTHER = 65534, 1001
SECRET = b"letmein-" * 4


@pytest.fixture
def tmp_path(reachable: Path) -> Path:
    """Where `start` makes the sockets: hostile clients have uids of their own."""
    return reachable


@pytest.fixture
def guarded(start: Callable[..., Process], tmp_path: Path) -> Process:
    """A daemon with a client socket, and a control socket for the hostile uid too."""
    need_root()
    admins, client = tmp_path / "admins.sock", tmp_path / "client.sock"
    daemon = start("--client", str(client), "--control", f"{admins},authz=admins", "--audit=none")
    qmp = daemon.connect()
    for uid, name in ((UID, "granted"), (OTHER, "theirs")):
        qmp.add(name, data=SECRET.decode())
        qmp.ok(
            "object-add", {"qom-type": "authz-simple", "id": f"a-{name}", "identity": f"uid:{uid}"}
        )
        qmp.ok(
            "object-add",
            {"qom-type": "secret-grant", "id": f"g-{name}", "secret": name, "authz": f"a-{name}"},
        )
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": "admins", "identity": f"uid:{UID}"})
    return daemon


@contextlib.contextmanager
def hostile(
    daemon: Process, kind: str, act: str, *more: str, role: str = "client", uid: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A hostile client that has done its worst and holds on."""
    role = "admins.sock" if act == "read" or role == "admins" else "client.sock"
    uid = UID if uid is None else uid
    process = subprocess.Popen(
        [sys.executable, "-S", str(HOSTILE), str(daemon.directory / role), kind, act, str(uid),
        *more],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"done\n"
        yield process
    finally:
        if kind in ("fuse", "locked"):
            # By force, which ends all that waits for an answer, also of the processes' ends.
            for how in ("-f", "-l"):
                subprocess.run(["umount", how, more[0]], check=False, capture_output=True)
        process.kill()
        process.communicate()


def served(daemon: Process) -> None:
    """Root and another uid have all their commands answered."""
    qmp = daemon.connect()
    path = str(daemon.directory / "client.sock")
    with contextlib.ExitStack() as stack:
        other = Client(path, sock=connect_as(path, OTHER, OTHER))
        stack.callback(other.close)
        for number in range(100):
            assert qmp.add(f"n{number}", data="x") == {"return": {}}
            assert other.read("theirs") == SECRET
            assert qmp.read("theirs") == SECRET
            assert qmp.ok("object-del", {"id": f"n{number}"}) == {}


@pytest.mark.parametrize("act", ["write", "read", "drop"])
@pytest.mark.parametrize("kind", ["mutex", "linger", "fuse"])
def test_a_blocking_descriptor_delays_no_other(
    guarded: Process, tmp_path: Path, kind: str, act: str
) -> None:
    """Written to, read from, or passed and dropped, 253 at a time."""
    more: tuple[str, ...] = ()
    if kind == "fuse":
        need(os.path.exists("/dev/fuse"), "there is no /dev/fuse")
        (tmp_path / "mnt").mkdir()
        more = (str(tmp_path / "mnt"),)
    with hostile(guarded, kind, act, *more):
        served(guarded)
        if kind != "fuse":
            assert threads_of(guarded) <= 4 + 4 + 8
    served(guarded)


def need_socket(kind: str) -> None:
    """Skip or fail where the kernel has no such sockets, or no loopback for them."""
    if kind in hostile_module.SOCKETS:
        family, protocol, address = hostile_module.SOCKETS[kind]
        try:
            with (
                socket.socket(family, socket.SOCK_STREAM, protocol) as listener,
                socket.socket(family, socket.SOCK_STREAM, protocol) as client,
            ):
                listener.bind(address)
                listener.listen()
                name = listener.getsockname()
                client.connect((1, name[1]) if kind == "vsock" else name)
        except OSError as error:
            pytest.skip(f"this kernel has no {kind} loopback: {error.strerror}")


@pytest.mark.parametrize("role", ["client", "admins"])
@pytest.mark.parametrize("act", ["oob", "crowd", "drop", "write"])
@pytest.mark.parametrize("kind", ["linger", "mptcp", "vsock"])
def test_a_lingering_socket_stops_no_other_client(
    guarded: Process, kind: str, act: str, role: str
) -> None:
    """With an urgent byte, by the hundred, dropped, or written to; on both sockets that others
    reach.
    """
    need_socket(kind)
    before = guarded.fds()
    with hostile(guarded, kind, act, role=role):
        served(guarded)
        assert guarded.fds() - before < 1500  # what one uid may hold, and its connections
    served(guarded)


@pytest.mark.parametrize("uid", [UID, OTHER])
def test_knocking_leaves_nothing_in_the_descriptor_table(guarded: Process, uid: int) -> None:
    """A uid that is admitted, and one that is refused, with descriptors that block when they are
    closed.
    """
    need(permits_no_rights(), "this kernel has no SO_PASSRIGHTS (6.16)")
    before = guarded.fds()
    with hostile(guarded, "linger", "knock", role="admins", uid=uid):
        served(guarded)
        assert guarded.fds() - before < 100
    served(guarded)


def permits_no_rights() -> bool:
    """Whether a socket can refuse descriptors."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError:
            return False
    return True


def test_a_socket_whose_lock_is_held_stops_no_other_client(
    guarded: Process, tmp_path: Path
) -> None:
    """Not even its name is asked for, which takes the lock."""
    need(os.path.exists("/dev/fuse"), "there is no /dev/fuse")
    (tmp_path / "mnt").mkdir()
    with hostile(guarded, "locked", "write", str(tmp_path / "mnt")):
        served(guarded)
    served(guarded)


def test_a_stop_does_not_wait_for_unaccepted_descriptors(
    guarded: Process,
) -> None:
    """They lie in connections of the backlog; nor for a client that goes on sending."""
    guarded.popen.send_signal(signal.SIGSTOP)
    with hostile(guarded, "linger", "knock"):
        guarded.popen.send_signal(signal.SIGCONT)
        path = str(guarded.directory / "client.sock")
        client = Client(path, sock=connect_as(path, UID, UID))
        stop = threading.Event()

        def flood() -> None:
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    client.send(b'{"execute":"query-version"}\n' * 50)

        def drain() -> None:
            with contextlib.suppress(OSError):
                while client.sock.recv(1 << 16):
                    pass

        threads = [threading.Thread(target=each) for each in (flood, drain)]
        for thread in threads:
            thread.start()
        guarded.popen.send_signal(signal.SIGTERM)
        try:
            guarded.popen.wait(8)  # less than STOP_SECONDS, which it would take to wait for them
        finally:
            stop.set()
            client.sock.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)
            client.close()


def threads_of(daemon: Process) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/task"))


def test_a_uid_whose_threads_are_stuck_is_refused_more_in_words(guarded: Process) -> None:
    """And only that uid."""
    path = str(guarded.directory / "client.sock")
    with hostile(guarded, "mutex", "write"):
        client = Client(path, sock=connect_as(path, UID, UID))
        guarded._clients.append(client)
        qmp = guarded.connect()
        words = ""
        with open("/dev/null") as file:
            while "threads-per-uid" not in words:
                for _ in range(100):  # each descriptor that is passed counts, so not too many
                    qmp.ok("query-name")
                reply = client.cmd("getfd", {"fdname": "a"}, (file.fileno(),))
                words = reply.get("error", {}).get("desc", "")
        assert words == (
            "uid 65534 has 4 descriptors that block, and that is the limit (threads-per-uid)"
        )
        assert client.ok("query-version")
        served(guarded)
        client.close()
    served(guarded)


def test_an_opath_descriptor_is_not_read_with_the_daemons_rights(
    guarded: Process, tmp_path: Path
) -> None:
    """Of a file that its sender cannot read; nor written to."""
    secret_file = tmp_path / "shadow"
    secret_file.write_text("root:letmein")
    os.chmod(secret_file, 0o600)
    for act in ("read", "write", "drop"):
        with hostile(guarded, "opath", act, str(secret_file)):
            served(guarded)
    path = str(guarded.directory / "admins.sock")
    client = Client(path, sock=connect_as(path, UID, UID))
    fd = os.open(secret_file, os.O_PATH)
    added = client.ok("add-fd", None, (fd,))
    for name in (f"/dev/fdset/{added['fdset-id']}", f"/dev/fd/{added['fd']}"):
        words = client.add("h", file=name)["error"]["desc"]
        assert words.endswith("the descriptor is not open for reading")
    assert "is a regular file" in client.fail("secret-read", {"id": "granted"}, (fd,))
    os.close(fd)
    client.close()
    names = [s["id"] for s in guarded.connect().secrets()]
    assert names == ["granted", "theirs"]
    assert secret_file.read_text() == "root:letmein"


@pytest.mark.parametrize("withdrawn", [True, False])
def test_a_delivery_that_is_stuck_never_shows_another_secret(
    guarded: Process, withdrawn: bool
) -> None:
    """What a thread was writing when it got stuck is wiped, and its buffer serves nothing else
    meanwhile.
    """
    qmp = guarded.connect()
    with hostile(guarded, "mutex", "write") as process:
        if withdrawn:
            assert qmp.ok("object-del", {"id": "granted"}) == {}
        served(guarded)
        for number in range(200):
            qmp.add(f"after{number}", data="otherone" * 4)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"release\n")
        process.stdin.flush()
        received = bytes.fromhex(process.stdout.readline().decode())
    text = received.replace(b"\n", b"")
    if withdrawn:
        assert not text.strip(b"\0")
    else:
        assert text == SECRET * 8
    served(guarded)
