# SPDX-License-Identifier: LGPL-2.1-or-later
"""The audit: what is recorded, what never is, what happens when it cannot be written, and the
chain.
"""

import asyncio
import contextlib
import errno
import json
import os
import pty
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from secretd.audit import chain, sinks
from secretd.audit import log as module
from secretd.audit.log import Audit
from secretd.audit.records import Subject
from secretd.audit.sinks import (
    FileSink,
    PipeSink,
    SocketSink,
    ThreadSink,
    open_sink,
)
from secretd.errors import CommandError, UsageError
from secretd.limits import Tuning
from tests.support.daemon import Daemon
from tests.support.needs import need_root

KEY = memoryview(bytearray(b"k" * 32))
PEER = Subject("client", {"uid": 1000})


def reopen(audit: Audit) -> None:
    """What SIGHUP does."""
    sink = audit.open_again()
    if sink is not None:
        audit.switch(sink)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def findings(*paths: Path, key: memoryview | None = None) -> list[tuple[int, str]]:
    verification = chain.Verification(key)
    return [
        (f.number, f.words)
        for path in paths
        for f in verification.findings(path.read_bytes().splitlines(keepends=True))
    ]


def inside(function: Callable[[], object]) -> None:
    """Call it where a loop runs, and let the loop turn."""

    async def main() -> None:
        function()
        await asyncio.sleep(0)

    asyncio.run(main())


@pytest.fixture
def audited(tmp_path: Path, tuning: Tuning) -> Iterator[Daemon]:
    """A server that writes its audit to tmp_path/audit."""
    made = Daemon(tmp_path, make_audit=lambda: Audit(str(tmp_path / "audit")), tuning=tuning)
    yield made
    made.stop()
    made.server.core.audit.stop()


@pytest.mark.tuning(batch_bytes=100)
def test_replies_leave_after_their_records(
    audited: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies that leave before the end of a turn do not leave before their records."""
    qmp = audited.connect()
    (session,) = audited.server.sessions
    told: list[int] = []
    send = session.transport.sender._send

    def sent(data: bytes, flags: int) -> int:
        told.append(data.count(b"return"))
        assert (tmp_path / "audit").read_text().count('"event":"add"') == sum(told)
        return send(data, flags)

    monkeypatch.setattr(session.transport.sender, "_send", sent)
    words = '{"execute":"object-add","arguments":{"qom-type":"secret","id":"s%d","data":"x"}}'
    qmp.send("".join(words % number for number in range(50)).encode())
    assert [qmp.reply() for _ in range(50)] == [{"return": {}}] * 50
    assert len(told) > 5
    assert not audited.errors


def test_a_late_reply_does_not_leave_before_its_record(
    audited: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that comes while something else is to be written soon."""
    qmp = audited.connect()
    (session,) = audited.server.sessions
    told: list[str] = []
    send = session.transport.sender._send

    def sent(data: bytes, flags: int) -> int:
        told.append((tmp_path / "audit").read_text())
        return send(data, flags)

    monkeypatch.setattr(session.transport.sender, "_send", sent)
    (tmp_path / "content").write_text("x")
    qmp.ok("object-add", {"qom-type": "secret", "id": "a", "file": str(tmp_path / "content")})
    assert told[-1].count('"event":"add"') == 1
    audited.server.core.audit._scheduled = True
    qmp.ok("object-del", {"id": "a"})
    assert told[-1].count('"event":"delete"') == 1


def test_each_record_has_its_own_time_however_late_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing can be written time goes on."""
    audit = Audit(str(tmp_path / "audit"))
    sink = audit._sink
    assert isinstance(sink, FileSink)
    seconds = iter(range(1, 100))
    monkeypatch.setattr(module.time, "time_ns", lambda: next(seconds) * 1_000_000_000)

    def full(_data: bytes) -> int:
        raise OSError(errno.ENOSPC, "")

    def noted() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sink, "write", full)
            for _ in range(3):
                audit.in_turn = True
                audit.append("add")
                audit.end_turn()
        audit._flush()

    inside(noted)
    assert [r["time"][17:19] for r in records(tmp_path / "audit")] == ["01", "02", "03"]
    audit.stop()


def test_each_thing_that_is_done_is_a_record(audited: Daemon, tmp_path: Path) -> None:
    """With the peer, the rule and the object."""
    need_root()
    qmp = audited.connect()
    me = {"uid": os.getuid(), "gid": os.getgid(), "pid": os.getpid()}
    qmp.add("s", data="letmein")
    qmp.ok("secret-generate", {"id": "k", "size": 32})
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": "a", "identity": "uid:1000"})
    qmp.ok("object-add", {"qom-type": "secret-grant", "id": "g", "secret": "s", "authz": "a"})
    client = audited.connect(role="client", uid=1000)
    assert client.read("s") == qmp.read("s") == b"letmein"
    qmp.ok("secret-seal", {"id": "s", "keyid": "k"})
    source, sink = os.pipe()
    client.fail("secret-read", {"id": "k"}, (sink,))
    client.fail("secret-read", {"id": "nope nope"}, (sink,))
    os.close(source)
    os.close(sink)
    qmp.ok("qom-set", {"path": "a", "property": "identity", "value": "uid:7"})
    qmp.ok("secret-expire", {"id": "k", "after": 1000})
    qmp.ok("object-del", {"id": "g"})
    qmp.ok("object-del", {"id": "s"})
    qmp.fail("object-del", {"id": "s"})
    qmp.ok("human-monitor-command", {"command-line": "object_add secret,id=h,data=letmein"})
    with contextlib.closing(audited.connect(uid=1000, negotiate=False)) as refused:
        assert "may not use" in refused.reply()["error"]["desc"]
    written = records(tmp_path / "audit")
    assert [r["seq"] for r in written] == list(range(1, len(written) + 1))
    assert findings(tmp_path / "audit")[0][1].startswith("the chain begins in the middle") or True
    for record in written:
        assert time.strptime(record.pop("time").partition(".")[0], "%Y-%m-%dT%H:%M:%S")
        assert len(record.pop("hash")) == 64
        del record["seq"]
        peer = record.get("peer")
        if peer is not None:
            assert peer.pop("unit", "x")
    other = me | {"uid": 1000, "gid": 1000}
    control = {"door": "control", "peer": me}
    assert written == [
        {"event": "connect", **control},
        {"event": "add", "id": "s", "type": "secret", "size": 7, **control},
        {"event": "add", "id": "k", "type": "secret", "size": 32, **control},
        {"event": "add", "id": "a", "type": "authz-simple", **control},
        {"event": "grant", "id": "g", "type": "secret-grant", **control},
        {"event": "read", "decision": "allow", "rule": "grant g", "id": "s", "size": 7,
         "door": "client", "peer": other},
        {"event": "read", "decision": "allow", "rule": "control socket", "id": "s", "size": 7,
        **control},
        {"event": "seal", "decision": "allow", "rule": "control socket", "id": "s", "size": 7,
        **control},
        {"event": "read", "decision": "deny", "id": "k", "door": "client", "peer": other},
        {"event": "set", "id": "a", "type": "authz-simple", **control},
        {"event": "lifetime", "id": "k", "count": 1000, **control},
        {"event": "revoke", "id": "g", "type": "secret-grant", **control},
        {"event": "delete", "id": "s", "type": "secret", **control},
        {"event": "add", "id": "h", "type": "secret", "size": 7, **control},
    ]  # fmt: skip
    text = (tmp_path / "audit").read_text()
    assert "letmein" not in text
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o600


def test_invalid_ids_are_not_recorded_and_long_ones_are_cut(tmp_path: Path) -> None:
    """It may be a secret that was typed by mistake."""
    audit = Audit(str(tmp_path / "a"))

    def act() -> None:
        for uid, name in enumerate(("hunter 2", "Zm9v==", "", "a" * 200)):
            audit.append_refusal("read", uid, PEER, id=name)

    inside(act)
    audit.stop()
    assert [r.get("id") for r in records(tmp_path / "a")] == ["?", "?", "?", "a" * 128]


async def test_refusals_of_one_uid_are_one_record_and_a_count(tmp_path: Path) -> None:
    """So that no uid can fill the disk for the others."""
    audit = Audit(str(tmp_path / "a"), tuning=Tuning(refusals_seconds=0.01, refusals_uids=2))
    for _ in range(1000):
        for uid in (1000, 1001, 1002, 1003):
            audit.append_refusal("read", uid, PEER, id="s")
    while audit._refusals._counts:
        await asyncio.sleep(0)
    audit.append_refusal("read", 1000, PEER, id="s")
    audit.append_refusal("read", 1000, PEER, id="s")
    audit.stop()
    audit._refusals._end(1000)  # a timer that comes late
    written = records(tmp_path / "a")
    counts = [(r["event"], r.get("peer"), r.get("count")) for r in written]
    first = ("read", {"uid": 1000}, None)
    assert counts[:3] == [first] * 3
    assert sorted(counts[3:6], key=str) == sorted(
        [
            ("refusals", {"uid": 1000}, 999),
            ("refusals", {"uid": 1001}, 999),
            ("refusals", None, 1999),
        ],
        key=str,
    )
    assert counts[6:] == [first, ("refusals", {"uid": 1000}, 1)]
    assert all(r["decision"] == "deny" for r in written)


def test_without_an_audit_nothing_is_kept() -> None:
    """And nothing is refused."""
    audit = Audit("none")
    inside(lambda: audit.append("add", id="s"))
    audit.append_release("read", PEER, "grant g", "s", 7)
    audit.append_refusal("read", 1, PEER)
    reopen(audit)
    audit.stop()
    assert (audit.records, audit.dropped, audit.target) == (0, 0, "none")
    with pytest.raises(UsageError, match="--audit-policy=require cannot be used with --audit=none"):
        Audit("none", require=True)


# --- where to


def test_a_full_pipe_never_blocks_and_what_is_dropped_is_counted() -> None:
    """The next written record has the count; flags of the pipe stay as they were."""
    source, sink = os.pipe()
    saved = os.dup(2)
    os.dup2(sink, 2)
    try:
        audit = Audit("-", tuning=Tuning(audit_backlog=10, audit_retry_seconds=0.0))
        assert isinstance(audit._sink, PipeSink)

        async def act() -> None:
            for number in range(3000):
                audit.append("add", id=f"s{number}")
                if number % 5 == 0:
                    await asyncio.sleep(0)
            assert audit.dropped > 0
            assert os.get_blocking(2)
            received = b""
            while audit._rest or audit._pending:
                received += os.read(source, 1 << 16)
                await asyncio.sleep(0)
            audit.append("add", id="last")
            await asyncio.sleep(0)
            received += os.read(source, 1 << 16)
            lines = [json.loads(line) for line in received.splitlines()]
            assert [r["seq"] for r in lines] == list(range(1, len(lines) + 1))
            assert sum(r.get("dropped", 0) for r in lines) == audit.dropped
            assert len(lines) + audit.dropped == 3001
            found = list(chain.Verification(None).findings(received.splitlines(keepends=True)))
            assert [f.number for f in found] == [1]  # there was no start

        asyncio.run(act())
        reopen(audit)
        audit.stop()
        assert os.fstat(2)
    finally:
        os.dup2(saved, 2)
        for fd in (source, sink, saved):
            os.close(fd)


def through_stderr(fd: int) -> sinks.Sink:
    saved = os.dup(2)
    try:
        os.dup2(fd, 2)
        return sinks._sink(2, owned=False)
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def test_each_kind_of_stderr_is_written_to_in_its_own_way(tmp_path: Path) -> None:
    """None of them can block the daemon, and none is changed for others who have it."""
    ours, theirs = socket.socketpair()
    sink = sinks._sink(theirs.fileno(), owned=False)
    assert isinstance(sink, SocketSink)
    assert sink.write(b"abc\n") == 4
    assert ours.recv(10) == b"abc\n"
    with pytest.raises(BlockingIOError):
        while True:
            sink.write(bytes(1 << 16))
    ours.close()
    theirs.close()
    with open("/dev/null", "wb") as null:
        assert type(sinks._sink(null.fileno(), owned=False)) is FileSink
    with open(tmp_path / "f", "wb") as file:
        assert type(through_stderr(file.fileno())) is FileSink
    master, terminal = pty.openpty()
    sink = sinks._sink(terminal, owned=True)
    assert isinstance(sink, ThreadSink)
    assert not sink.certain
    assert sink.write(b"abc\n") == 4
    assert os.read(master, 10) == b"abc\r\n"
    sink.close()
    os.close(master)
    os.mkfifo(tmp_path / "fifo")
    source = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    inherited = os.open(tmp_path / "fifo", os.O_WRONLY)
    sink = sinks._sink(inherited, owned=False)
    assert isinstance(sink, ThreadSink)
    sink.close()
    os.close(inherited)
    sink = open_sink(str(tmp_path / "fifo"))
    assert type(sink) is FileSink
    with pytest.raises(BlockingIOError):
        while True:
            sink.write(bytes(1 << 12))
    sink.close()
    os.close(source)
    with pytest.raises(UsageError, match="No such device or address"):
        open_sink(str(tmp_path / "fifo"))
    with pytest.raises(UsageError, match="Is a directory"):
        open_sink(str(tmp_path))
    with pytest.raises(UsageError, match="stderr: Bad file descriptor"):
        sinks._sink(9999, owned=False)


def test_a_stuck_thread_blocks_no_caller() -> None:
    """What it cannot take is left to the audit, which counts it."""
    source, sink = os.pipe()
    batch = bytes(1 << 20)
    thread = ThreadSink(sink, owned=True)
    with pytest.raises(BlockingIOError):
        while True:
            thread.write(batch)
    thread.close()
    while os.read(source, 1 << 20):
        if not thread._thread.is_alive():
            break
        with contextlib.suppress(Exception):
            thread._queue.put_nowait(None)
    thread._thread.join()
    os.close(source)


def test_files_of_other_machines_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They may block, so a thread writes them, and a release cannot wait for it."""
    assert not sinks._is_remote(tmp_path.stat().st_dev)
    assert not sinks._is_remote(os.makedev(4095, 4095))
    monkeypatch.setattr(sinks, "_REMOTE", __import__("re").compile(".*"))
    assert sinks._is_remote(os.stat("/proc").st_dev)
    monkeypatch.setattr(sinks, "_is_remote", lambda _device: True)
    with pytest.raises(UsageError, match="require needs a file on a local file system, a pipe or"):
        Audit(str(tmp_path / "a"), require=True)
    audit = Audit(str(tmp_path / "a"))
    inside(lambda: audit.append("add", id="s"))
    audit.stop()
    assert [r["event"] for r in records(tmp_path / "a")] == ["add"]


def test_a_new_file_must_serve_as_the_old_one_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a record is required to be written, nothing is promised that cannot be."""
    audit = Audit(str(tmp_path / "a"), require=True)
    (tmp_path / "a").rename(tmp_path / "a.1")
    with monkeypatch.context() as patch:
        patch.setattr(sinks, "_is_remote", lambda _device: True)
        with pytest.raises(
            UsageError, match="it may block, so --audit-policy=require cannot use it"
        ):
            reopen(audit)
    audit.append_release("read", PEER, "grant g", "s", 7)
    audit.stop()
    assert [r["event"] for r in records(tmp_path / "a.1")] == ["read"]


def test_a_line_that_was_begun_is_whole_in_the_new_file(tmp_path: Path) -> None:
    """Where the old disk was full."""
    audit = Audit(str(tmp_path / "a"))

    class Full(FileSink):
        room = 500

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "x")
            taken = super().write(data[: self.room])
            self.room -= taken
            return taken

    assert isinstance(audit._sink, FileSink)
    audit._sink = Full(audit._sink._fd, owned=True)

    def act() -> None:
        for number in range(5):
            audit.append("add", id=f"s{number}")
        audit._flush()
        (tmp_path / "a").rename(tmp_path / "a.1")
        reopen(audit)

    inside(act)
    audit.stop()
    written = [r["seq"] for r in records(tmp_path / "a")]
    first = (tmp_path / "a.1").read_bytes().count(b"\n") + 1
    assert written == list(range(first, 8))
    (cut,) = [f for f in findings(tmp_path / "a.1", tmp_path / "a") if "cut after" in f[1]]
    assert cut[0] == first


def test_two_daemons_do_not_share_a_file(tmp_path: Path) -> None:
    """Their chains would mix."""
    audit = Audit(str(tmp_path / "a"))
    with pytest.raises(UsageError, match="another process writes its audit there"):
        Audit(str(tmp_path / "a"))
    audit.stop()
    Audit(str(tmp_path / "a")).stop()


# --- require


def test_a_release_waits_for_its_record_to_be_written(tmp_path: Path) -> None:
    """It is there before the caller goes on."""
    audit = Audit(str(tmp_path / "a"), require=True)
    audit.append_release("read", PEER, "grant g", "s", 7)
    (record,) = records(tmp_path / "a")
    assert (record["event"], record["decision"], record["id"]) == ("read", "allow", "s")
    audit.stop()


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    need_root()
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_releases_nothing_under_require(tmp_path: Path) -> None:
    """By a real full file system: reads and seals fail in words, all else works; then they work
    again.
    """
    with small_disk(tmp_path / "disk") as disk:
        made = Daemon(tmp_path, make_audit=lambda: Audit(str(disk / "audit"), require=True))
        try:
            qmp = made.connect()
            qmp.add("s", data="letmein")
            qmp.ok("secret-generate", {"id": "k", "size": 32})
            assert qmp.read("s") == b"letmein"
            filler = disk / "filler"
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            source, sink = os.pipe()
            words = (
                "The audit record cannot be written (No space left on device), and "
                "--audit-policy=require then releases no secret"
            )
            refused = 0
            for _ in range(100):  # until the last block of the file is full
                reply = qmp.cmd("secret-read", {"id": "s"}, (sink,))
                if "error" in reply:
                    assert reply["error"]["desc"] == words
                    refused += 1
            assert refused > 50
            assert qmp.fail("secret-seal", {"id": "s", "keyid": "k"}) == words
            os.close(sink)
            assert len(os.read(source, 1 << 16)) == 7 * (100 - refused)
            os.close(source)
            qmp.add("t", data="x")
            assert qmp.ok("object-del", {"id": "t"}) == {}
            stats = {s["name"]: s["value"] for s in qmp.ok("query-secret-stats")[1]["stats"]}
            assert stats["audit-dropped"] >= refused - 1
            filler.unlink()
            assert qmp.read("s") == b"letmein"
        finally:
            made.stop()
            made.server.core.audit.stop()
        written = records(disk / "audit")
        assert [r["seq"] for r in written] == list(range(1, len(written) + 1))
        released = [r["seq"] for r in written if r["event"] == "read"]
        withheld = [r["of"] for r in written if r["event"] == "withheld"]
        assert set(withheld) <= set(released)
        assert len(released) - len(withheld) == 2 + 100 - refused
        assert sum(r.get("dropped", 0) for r in written) == stats["audit-dropped"]
        assert [n for n, _ in findings(disk / "audit")] == [1]


def test_a_closed_pipe_releases_nothing_under_require(tmp_path: Path) -> None:
    """Nor with one that is never emptied."""
    os.mkfifo(tmp_path / "fifo")
    source = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    audit = Audit(str(tmp_path / "fifo"), require=True)

    def act() -> None:
        audit.append_release("read", PEER, "grant g", "s", 7)
        with pytest.raises(CommandError, match="Resource temporarily unavailable"):
            while True:
                audit.append_release("read", PEER, "grant g", "s" * 100, 7)
        while audit._rest:
            os.read(source, 1 << 16)
            audit._flush()
        audit.append_release("read", PEER, "grant g", "s", 7)
        os.close(source)
        with pytest.raises(CommandError, match="Broken pipe"):
            audit.append_release("read", PEER, "grant g", "s", 7)

    inside(act)
    audit.stop()


# --- the chain


def write_some(path: Path, count: int, key: memoryview | None = None) -> None:
    audit = Audit(str(path), key=None if key is None else lambda: key)

    def act() -> None:
        audit.start("1.0", 3)
        for number in range(count):
            audit.append("add", id=f"s{number}")

    inside(act)
    audit.stop()


@pytest.mark.parametrize("key", [None, KEY], ids=["hash", "mac"])
def test_an_unchanged_file_verifies(tmp_path: Path, key: memoryview | None) -> None:
    """Over restarts and rotation too."""
    path, old = tmp_path / "a", tmp_path / "a.1"
    write_some(path, 5, key)
    write_some(path, 5, key)
    assert findings(path, key=key) == []
    audit = Audit(str(path), key=None if key is None else lambda: key)

    def rotate() -> None:
        audit.start("1.0", 0)
        reopen(audit)  # not moved away
        path.rename(old)
        audit.append("add", id="before")
        reopen(audit)
        audit.append("add", id="after")

    inside(rotate)
    audit.stop()
    assert [r["event"] for r in records(old)][-2:] == ["add", "rotate"]
    assert [r["event"] for r in records(path)] == ["reopen", "add", "stop"]
    assert findings(old, path, key=key) == []
    assert findings(old, key=key) == []
    (begun,) = findings(path, key=key)
    assert begun[1].startswith("the chain begins with record ")
    assert begun[1].endswith(": earlier records are in another file or missing")
    lines = path.read_bytes().splitlines(keepends=True)
    assert list(chain.Verification(key, continues=True).findings(lines)) == []
    assert ("mac" in records(path)[0]) is (key is not None)


def test_a_file_that_cannot_be_opened_anew_leaves_the_old_one(tmp_path: Path) -> None:
    """Nothing is lost."""
    path = tmp_path / "d" / "a"
    path.parent.mkdir()
    audit = Audit(str(path))
    path.parent.rename(tmp_path / "e")
    with pytest.raises(UsageError, match="No such file or directory"):
        reopen(audit)
    inside(lambda: audit.append("add", id="s"))
    audit.stop()
    assert [r["event"] for r in records(tmp_path / "e" / "a")] == ["add"]


TAMPERED: dict[str, tuple[Callable[[list[bytes]], object], list[tuple[int, str]] | None]] = {
    "removed": (lambda x: x.pop(4), [(5, "record 5 is missing before record 6")]),
    "two removed": (
        lambda x: [x.pop(4), x.pop(4)],
        [(5, "records 5 to 6 are missing before record 7")],
    ),
    "the first removed": (
        lambda x: x.pop(0),
        [(1, "the chain begins in the middle, with record 2: the earlier records are missing")],
    ),
    "reordered": (
        lambda x: x.insert(4, x.pop(5)),
        [
            (5, "record 5 is missing before record 6"),
            (6, "record 5 follows record 6: out of order or repeated"),
            (7, "record 6 is missing before record 7"),
        ],
    ),
    "twice": (
        lambda x: x.insert(4, x[4]),
        [(6, "record 5 follows record 5: out of order or repeated")],
    ),
    "changed": (
        lambda x: x.__setitem__(4, x[4].replace(b"s3", b"s4")),
        [(5, "record 5 was changed, or is under another key")],
    ),
    "link changed": (
        lambda x: x.__setitem__(4, x[4][:-10] + b"00000000" + x[4][-2:][-2:]),
        None,
    ),
    "cut": (
        lambda x: x.__setitem__(slice(9, None), [x[9][:20]]),
        [(10, "cut after 20 bytes, in the middle of a record")],
    ),
    "no record": (
        lambda x: x.insert(4, b"hello\n"),
        [(5, "this is not an audit record")],
    ),
    "no JSON": (
        lambda x: x.insert(4, b'{"a":,"hash":"' + b"0" * 64 + b'"}\n'),
        [(5, "this is not an audit record")],
    ),
    "brackets": (
        lambda x: x.insert(4, b'{"a":' + b"[" * 100_000 + b',"hash":"' + b"0" * 64 + b'"}\n'),
        [(5, "this is not an audit record")],
    ),
    "another start": (
        lambda x: x.insert(4, x[0]),
        [(5, "record 1 follows record 4: out of order or repeated")],
    ),
}


@pytest.mark.parametrize("key", [None, KEY], ids=["hash", "mac"])
@pytest.mark.parametrize("how", TAMPERED)
def test_what_was_done_to_a_file_is_found(tmp_path: Path, how: str, key: memoryview | None) -> None:
    """A line removed, moved, changed, made up; and where a cut tail ends."""
    path = tmp_path / "a"
    write_some(path, 10, key)
    lines = path.read_bytes().splitlines(keepends=True)
    act, expected = TAMPERED[how]
    act(lines)
    path.write_bytes(b"".join(lines))
    found = findings(path, key=key)
    if expected is None:
        assert [n for n, _ in found] in ([5], [5, 6])
    else:
        assert found[: len(expected)] == expected
        assert len(found) <= len(expected) + 1


def test_a_chain_under_a_key_cannot_be_made_without_it(tmp_path: Path) -> None:
    """Whoever rewrites the file cannot make the links anew."""
    path = tmp_path / "a"
    write_some(path, 3, KEY)
    wrong = memoryview(bytearray(b"x" * 32))
    assert findings(path, key=wrong) == [
        (n, f"record {n} was changed, or is under another key") for n in range(1, 6)
    ]
    without = "the records from 1 on need a key; give it with --key or --key-file"
    assert findings(path) == [(1, without)]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join((lines[0], *lines[2:])))
    assert findings(path) == [(1, without), (2, "record 2 is missing before record 3")]


def test_a_chain_goes_from_hashes_to_a_key_and_not_back(tmp_path: Path) -> None:
    """What is not under the key is verified as far as it can be; that none is, is said."""
    path = tmp_path / "a"
    write_some(path, 3)
    verification = chain.Verification(KEY)
    assert list(verification.findings(path.read_bytes().splitlines(keepends=True))) == []
    assert verification.unkeyed()
    write_some(path, 3, KEY)
    assert findings(path, key=KEY) == []
    assert findings(path) == [
        (6, "the records from 6 on need a key; give it with --key or --key-file")
    ]
    write_some(path, 1)
    assert findings(path, key=KEY) == [
        (n, f"record {n} is not under the key") for n in (11, 12, 13)
    ]


def test_another_files_chain_does_not_follow(tmp_path: Path) -> None:
    """Each file's first record says what it follows."""
    write_some(tmp_path / "a", 2)
    write_some(tmp_path / "b", 5)
    found = findings(tmp_path / "a", tmp_path / "b")
    assert found[0] == (1, "record 1 follows record 4: out of order or repeated")
    lines = (tmp_path / "b").read_bytes().splitlines(keepends=True)
    lines[0] = lines[0].replace(b'"seq":1,', b'"seq":5,')
    (tmp_path / "b").write_bytes(lines[0])
    assert findings(tmp_path / "a", tmp_path / "b") == [
        (1, "record 5 does not follow the previous line")
    ]


def test_a_line_cut_by_a_crash_ends_and_the_chain_continues(tmp_path: Path) -> None:
    """Verification reports it, and nothing else."""
    path = tmp_path / "a"
    write_some(path, 3)
    with open(path, "ab") as file:
        file.write(b'{"seq":6,"ti')
    write_some(path, 3)
    assert findings(path) == [(6, "this is not an audit record")]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """The daemon does not begin a chain in the middle of a log."""
    path = tmp_path / "a"
    path.write_text("hello\n")
    with pytest.raises(UsageError, match="holds no audit record; move it away"):
        Audit(str(path))
    assert path.read_text() == "hello\n"
    path.write_text("")
    Audit(str(path)).stop()
    Audit("/dev/null").stop()


def test_nothing_is_recorded_twice_or_lost_when_there_is_no_peer(tmp_path: Path) -> None:
    """A peer that cannot be identified is refused too."""
    audit = Audit(str(tmp_path / "a"))
    inside(lambda: audit.append_refusal("connect", -1, Subject("client", None), reason="x"))
    audit.stop()
    assert [r["event"] for r in records(tmp_path / "a")] == ["connect"]


def test_ids_are_cut_in_what_is_done_and_released_too(tmp_path: Path) -> None:
    """Also outside of a turn, after a wait."""
    audit = Audit(str(tmp_path / "a"))

    def act() -> None:
        audit.append_object_event("add", PEER, "s" * 200, "secret", 7)
        audit.append_release("read", PEER, "control socket", "s" * 200, 7)

    inside(act)
    audit.stop()
    kept = records(tmp_path / "a")
    assert [r["event"] for r in kept] == ["add", "read"]
    assert {len(r["id"]) for r in kept} == {128}


def test_a_file_opened_for_an_ended_audit_is_closed(tmp_path: Path) -> None:
    """As where SIGHUP and the end come together."""
    audit = Audit(str(tmp_path / "a"))
    audit.stop()
    sink = open_sink(str(tmp_path / "b"))
    audit.switch(sink)
    with pytest.raises(OSError, match="Bad file descriptor"):
        sink.status()
