# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is said to a service manager, and read of what it passes; with a socket at the other end."""

import logging
import os
import socket
from pathlib import Path

import pytest

from secretd.systemd import activation, notify, stderr_journal
from secretd.systemd.activation import Passed
from secretd.systemd.credential_address import CredentialAddress, credential_address
from secretd.systemd.notify import NotifySocket
from secretd.systemd.stderr_journal import JournalFormatter
from tests.support.service_manager import Manager as Other


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without anything that a service manager of this test run may have said."""
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC",
                 "WATCHDOG_PID", "JOURNAL_STREAM"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_descriptors_are_known_by_their_names(environment: pytest.MonkeyPatch) -> None:
    """From FIRST_FD on; a child does not inherit them or the words."""
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    first = min(fds)
    assert fds == [first, first + 1, first + 2]
    for fd in fds:
        os.set_inheritable(fd, True)
    environment.setattr(activation, "FIRST_FD", first)
    environment.setenv("LISTEN_PID", str(os.getpid()))
    environment.setenv("LISTEN_FDS", "3")
    environment.setenv("LISTEN_FDNAMES", "b:a")
    assert activation.passed() == [
        Passed("b", first),
        Passed("a", first + 1),
        Passed("unknown", first + 2),
    ]
    assert not any(os.get_inheritable(fd) for fd in fds)
    assert not {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} & os.environ.keys()
    assert activation.passed() == []
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize(("pid", "count"), [("1", "3"), ("", "3"), ("self", "x"), ("self", "")])
def test_descriptors_for_another_process_are_not_ours(
    environment: pytest.MonkeyPatch, pid: str, count: str
) -> None:
    """Nor what is no number."""
    environment.setenv("LISTEN_PID", pid.replace("self", str(os.getpid())))
    environment.setenv("LISTEN_FDS", count)
    assert activation.passed() == []
    assert "LISTEN_PID" not in os.environ


def test_the_service_manager_is_the_one_that_started_us(environment: pytest.MonkeyPatch) -> None:
    """If it wants to hear from us, and as often as it says."""
    assert NotifySocket.from_environment() is None
    environment.setenv("NOTIFY_SOCKET", "vsock:2:1")
    assert NotifySocket.from_environment() is None
    for usec, pid, seconds in (
        ("3000000", "", 3.0),
        ("3000000", str(os.getpid()), 3.0),
        ("3000000", "1", None),
        ("0", "", None),
        ("x", "", None),
    ):
        environment.setenv("NOTIFY_SOCKET", "/nowhere")
        environment.setenv("WATCHDOG_USEC", usec)
        environment.setenv("WATCHDOG_PID", pid)
        manager = NotifySocket.from_environment()
        assert manager is not None
        assert manager.watchdog == seconds
        assert "NOTIFY_SOCKET" not in os.environ
        assert not manager.notify("READY=1")
        manager.close()


def test_messages_have_systemds_form(tmp_path: Path) -> None:
    """At an address in the file system or an abstract one."""
    with Other(tmp_path) as other:
        manager = NotifySocket(other.path)
        manager.ready("3 secrets")
        manager.reloading()
        manager.alive()
        assert manager.status("4 secrets")
        manager.stopping("done")
        other.wait("STATUS=3 secrets")
        other.wait("RELOADING=1")
        assert other.said[0].startswith("MONOTONIC_USEC=")
        assert other.said[0].partition("=")[2].isdecimal()
        other.wait("WATCHDOG=1")
        other.wait("STATUS=4 secrets")
        other.wait("STOPPING=1")
        other.wait("STATUS=done")
        manager.close()
    name = f"secretd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        manager = NotifySocket(f"@{name}")
        manager.alive()
        assert sock.recv(100) == b"WATCHDOG=1"
        manager.close()


def kept(manager: NotifySocket) -> bool:
    """Whether there was room for a probe."""
    source = manager.probe()
    done = manager.barrier() and not notify.has_ended(source)
    os.close(source)
    manager.drop("probe")
    return done


def test_what_is_kept_is_known(tmp_path: Path) -> None:
    """Though the service manager does not report a full store."""
    one, two, three = (os.memfd_create("x") for _ in range(3))
    with Other(tmp_path, room=3) as other:
        manager = NotifySocket(other.path)
        manager.keep("a", [one, two])
        assert kept(manager)
        other.wait_for_store("a", "a")
        assert manager.keep("b", [three], wait=False)
        assert not kept(manager)
        other.wait_for_store("a", "a", "b")
        manager.drop("a")
        other.wait_for_store("b")
        assert kept(manager)
        manager.close()
    for fd in (one, two, three):
        os.close(fd)


def test_a_silent_service_manager_is_given_up(
    tmp_path: Path,
) -> None:
    """Then nothing counts as kept; nor with one that is not there."""
    with Other(tmp_path, deaf=True) as other:
        manager = NotifySocket(other.path, barrier_seconds=0.01)
        assert not kept(manager)
        manager.close()
    manager = NotifySocket(str(tmp_path / "nobody"))
    assert not manager.barrier()
    assert not kept(manager)
    manager.close()


def test_stderr_is_the_journal_if_that_is_where_it_goes(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By device and inode; a child whose stderr goes elsewhere is not fooled."""
    assert not stderr_journal.journal_on_stderr()
    status = os.fstat(2)
    environment.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    assert stderr_journal.journal_on_stderr()
    environment.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
    assert not stderr_journal.journal_on_stderr()
    closed = os.open("/dev/null", os.O_RDONLY)
    os.close(closed)
    real = os.fstat
    with environment.context() as patched:
        patched.setattr(os, "fstat", lambda _fd: real(closed))
        assert not stderr_journal.journal_on_stderr()


def test_each_line_of_the_log_has_its_priority() -> None:
    """Also those of a traceback."""
    formatter = JournalFormatter()
    for level, text in (
        (logging.DEBUG, "<7>a"),
        (logging.INFO, "<6>a"),
        (logging.WARNING, "<4>a"),
        (logging.ERROR, "<3>a"),
        (logging.CRITICAL, "<2>a"),
    ):
        record = logging.LogRecord("x", level, "", 0, "%s", ("a",), None)
        assert formatter.format(record) == text
    record = logging.LogRecord("x", logging.ERROR, "", 0, "a\nb\nc", (), None)
    assert formatter.format(record) == "<3>a\n<3>b\n<3>c"


@pytest.mark.parametrize(
    ("address", "claimed"),
    [
        (b"\0a425825acb4f5eb9/unit/a.service/x", CredentialAddress("a.service", "x")),
        (
            b"\0f/unit/tpl@a\\x2db.service/db.password",
            CredentialAddress("tpl@a\\x2db.service", "db.password"),
        ),
        ("\0f/unit/ü.service/ä".encode(), CredentialAddress("ü.service", "ä")),
        (b"", None),
        ("", None),
        ("/run/x.sock", None),
        (b"\0/unit/a.service/x", None),
        (b"\0a425825acb4f5eb90/unit/a.service/x", None),
        (b"\0A/unit/a.service/x", None),
        (b"\0a/unit/a.service", None),
        (b"\0a/unit/a.service/", None),
        (b"\0a/unit//x", None),
        (b"\0a/unit/a.service/x/y", None),
        (b"\0a/slice/a.service/x", None),
        (b"a/unit/a.service/x", None),
        (b"\0a/unit/a.service/x\n", None),
        (b"\0a/unit/a.serv\x1bice/x", None),
        (b"\0a/unit/a.service/x\0", None),
        (b"\0a/unit/a.service/\xff", None),
    ],
)
def test_the_address_has_four_parts(
    address: bytes | str, claimed: CredentialAddress | None
) -> None:
    """And nothing else in it that could confuse a log."""
    assert credential_address(address) == claimed
