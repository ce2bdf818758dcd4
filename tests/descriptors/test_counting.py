# SPDX-License-Identifier: LGPL-2.1-or-later
"""A read is counted and recorded exactly when a byte was taken: each kind of descriptor, each
error, each byte.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from secretd.audit.log import Audit
from secretd.descriptors import target
from secretd.limits import Tuning
from tests.support.credentials import address, fetch
from tests.support.daemon import Daemon
from tests.support.grants import allow, grant
from tests.support.needs import need_root
from tests.support.qmp import Client

SECRET = b"letmein-" * 4
UID = 1000


@pytest.fixture
def audited(tmp_path: Path, tuning: Tuning) -> Iterator[Daemon]:
    """A daemon whose audit is a file."""
    need_root()
    made = Daemon(tmp_path, make_audit=lambda: Audit(str(tmp_path / "audit")), tuning=tuning)
    yield made
    made.stop()
    made.server.core.audit.stop()


@pytest.fixture
def limited(audited: Daemon) -> Client:
    """Secret s, and a grant of 100 reads for UID."""
    qmp = audited.connect()
    qmp.add("s", data=SECRET.decode())
    allow(qmp, "who", f"uid:{UID}")
    grant(qmp, "g", "s", "who", **{"max-reads": 100})
    return qmp


def counted(qmp: Client) -> int:
    return qmp.ok("qom-get", {"path": "/objects/g", "property": "reads"})


def recorded(directory: Path, event: str) -> int:
    lines = (directory / "audit").read_text().splitlines()
    return sum(json.loads(line)["event"] == event for line in lines)


def pipe() -> tuple[int, int]:
    return os.pipe()


def pair() -> tuple[int, int]:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def memfd() -> tuple[int, int]:
    fd = os.memfd_create("x")
    os.posix_fallocate(fd, 0, 4096)
    return fd, os.dup(fd)


@pytest.mark.parametrize("error", [errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("make", [pipe, pair, memfd])
def test_an_error_behind_any_byte_counts_from_the_first(
    audited: Daemon,
    limited: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], tuple[int, int]],
    error: int,
) -> None:
    """In the middle of a write too: what was taken before counts, and nothing else does."""
    client = audited.connect(role="client", uid=UID)
    reads = 0
    for limit in (0, 1, 2, 31):
        for kind in (target.PipeTarget, target.SocketTarget, target.MemfdTarget):
            if "_write_some" in vars(kind):
                monkeypatch.setattr(kind, "_write_some", failing(kind, limit, error))
        ours, theirs = make()
        words = client.fail("secret-read", {"id": "s"}, (theirs,))
        assert words == f"Unable to write the secret: {os.strerror(error)}"
        os.close(ours)
        os.close(theirs)
        reads += limit > 0
        assert counted(limited) == reads
        monkeypatch.undo()
    assert recorded(tmp_path, "read") == 4
    assert recorded(tmp_path, "withheld") == 1


def failing(kind: type[target.Target], limit: int, error: int) -> Callable[..., int]:
    """A write that really writes up to so many bytes of all, and fails then."""
    real = vars(kind)["_write_some"]

    def write(self: target.Target, data: memoryview, position: int) -> int:
        if position >= limit:
            raise OSError(error, os.strerror(error))
        written: int = real(self, data[: limit - position], position)
        return written

    return write


def test_a_reader_that_leaves_is_counted_by_what_it_took(
    audited: Daemon, limited: Client, tmp_path: Path
) -> None:
    """A pipe and a pair without a reader take nothing; the client may leave as well."""
    client = audited.connect(role="client", uid=UID)
    for make in (pipe, pair):
        ours, theirs = make()
        os.close(ours)
        assert "Broken pipe" in client.fail("secret-read", {"id": "s"}, (theirs,))
        os.close(theirs)
        assert counted(limited) == 0
    source, sink = os.pipe()
    fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, 4096)
    os.write(sink, b"x" * 4096)
    client.send(b'{"execute":"secret-read","arguments":{"id":"s"}}', (sink,))
    while counted(limited) == 0:
        pass
    sessions = audited.server.sessions
    audited.call(lambda: [s.transport.close() for s in list(sessions) if s.peer.uid == UID])
    while counted(limited) == 1:
        pass
    assert os.read(source, 8192) == b"x" * 4096
    os.close(sink)
    assert os.read(source, 10) == b""
    os.close(source)
    assert recorded(tmp_path, "read") == recorded(tmp_path, "withheld") == 3


def test_a_write_that_was_begun_is_settled_when_it_returns(
    audited: Daemon, limited: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it counts: the time limit cannot know whether it takes a byte."""
    import threading

    begun, go_on = threading.Event(), threading.Event()
    taken: list[int] = []
    real = vars(target.PipeTarget)["_write_some"]

    def stuck(self: target.Target, data: memoryview, position: int) -> int:
        if not self.may_block:
            return int(real(self, data, position))
        begun.set()
        go_on.wait(20)
        if not taken:
            raise BlockingIOError
        return taken.pop()

    monkeypatch.setattr(target.PipeTarget, "_write_some", stuck)
    for result, reads in ((0, 0), (1, 1)):
        taken[:] = [1] * result
        begun.clear()
        go_on.clear()
        client = audited.connect(role="client", uid=UID)
        source, sink = os.pipe()
        client.send(b'{"execute":"secret-read","arguments":{"id":"s"}}', (sink,))
        begun.wait(20)
        limited.ok("object-del", {"id": "s"})
        assert "was withdrawn" in client.reply()["error"]["desc"]
        limited.add("s", data=SECRET.decode())
        assert counted(limited) == reads + (0 if result else 1)  # not taken back yet
        go_on.set()
        while not audited.server.core.threads.idle():
            pass
        while counted(limited) != reads:
            pass
        os.close(source)
        os.close(sink)
    assert recorded(tmp_path, "withheld") == 1


def test_a_grant_that_was_made_anew_is_not_given_a_read(audited: Daemon, limited: Client) -> None:
    """What is taken back was another one's."""
    client = audited.connect(role="client", uid=UID)
    source, sink = os.pipe()
    fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, 4096)
    os.write(sink, b"x" * 4096)
    client.send(b'{"execute":"secret-read","arguments":{"id":"s"}}', (sink,))
    while counted(limited) == 0:
        pass
    limited.ok("object-del", {"id": "g"})
    grant(limited, "g", "s", "who", **{"max-reads": 100})
    assert "was withdrawn" in client.reply()["error"]["desc"]
    assert counted(limited) == 0
    os.close(source)
    os.close(sink)


def test_a_memfd_of_an_untrusted_peer_has_its_own_memory(audited: Daemon, limited: Client) -> None:
    """Or is refused before a page is allocated; an unlinked file of another tmpfs is no memfd."""
    client = audited.connect(role="client", uid=UID)
    fd = os.memfd_create("x")
    words = "The memfd has 0 bytes of memory and the secret has 32; call fallocate(2) on it first"
    assert client.fail("secret-read", {"id": "s"}, (fd,)) == words
    assert os.fstat(fd).st_blocks == 0
    assert counted(limited) == 0
    os.posix_fallocate(fd, 0, 100_000)
    assert client.ok("secret-read", {"id": "s"}, (fd,)) == {"size": 32}
    assert os.pread(fd, 100, 0) == SECRET
    os.close(fd)
    path = f"/dev/shm/secretd-test-{os.getpid()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.unlink(path)
    assert "is a regular file" in client.fail("secret-read", {"id": "s"}, (fd,))
    os.close(fd)


def test_a_credential_is_counted_in_the_same_way(
    audited: Daemon, limited: Client, tmp_path: Path, app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the unit took before the error."""
    for limit, withheld in ((0, 1), (1, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(
                target.SocketTarget, "_write_some", failing(target.SocketTarget, limit, errno.EIO)
            )
            allow(limited, f"unit{limit}", "unit:app.service")
            grant(limited, f"u{limit}", "s", f"unit{limit}")
            assert len(fetch(audited, app, address("app.service", "s"))) > 1 << 20
        assert recorded(tmp_path, "credential") == limit + 1
        assert recorded(tmp_path, "withheld") == withheld
