# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions on a running server: framing, backpressure, hostile clients, sockets, the end."""

import asyncio
import contextlib
import errno
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secretd.access.peer import SocketRole
from secretd.errors import LockedMemoryExhausted, PeerUnknown, UsageError
from secretd.limits import Tuning
from secretd.memory.arena import Arena, LockedBuffer
from secretd.monitor.failures import safely
from secretd.monitor.session import Session
from secretd.net.listener import listen
from secretd.net.pause import Pause
from secretd.net.receiver import Locked
from secretd.net.sender import BACKLOG_BYTES, Sender
from secretd.server import server
from tests.support.daemon import Daemon
from tests.support.in_loop import served
from tests.support.qmp import Client

NAME = b'{"execute":"query-name"}'


def test_the_greeting_comes_in_one_write(daemon: Daemon) -> None:
    """A client may read it with one recv."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(daemon.control)
        line = sock.recv(4096)
    assert line.startswith(b'{"QMP": ')
    assert line.endswith(b"}\r\n")
    assert line.count(b"\n") == 1


@pytest.mark.parametrize("seed", range(8))
def test_commands_in_any_pieces_get_the_same_replies(
    daemon: Daemon, qmp: Client, seed: int
) -> None:
    """Several in one write, one over several, pretty-printed, single-quoted, without newlines."""
    rng = random.Random(seed)
    messages, expected = [], []
    for number in range(40):
        kind = rng.randrange(6)
        if kind == 0:
            messages.append(b'{"execute":"query-name","id":%d}' % number)
            expected.append({"return": {}, "id": number})
        elif kind == 1:
            messages.append(b"{ 'execute' :\n\t'query-name',\r\n'id': '%d' }" % number)
            expected.append({"return": {}, "id": str(number)})
        elif kind == 2:
            data = json.dumps('x\u00e9"' * rng.randrange(300)).encode()
            messages.append(
                b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s%d","data":%s}}'
                % (number, data)
            )
            expected.append({"return": {}})
        elif kind == 3:
            messages.append(b"\xff")
            expected.append(
                {"error": {"class": "GenericError", "desc": "JSON parse error, stray '\ufffd'"}}
            )
        elif kind == 4:
            messages.append(b'{"execute":"nope","id":null}\n')
            expected.append(
                {"id": None, "error": {"class": "CommandNotFound",
                                       "desc": "The command nope has not been found"}}
            )  # fmt: skip
        else:
            messages.append(b'{"execute":"object-del","arguments":{"id":"none"}}\r\n')
            expected.append({"error": {"class": "GenericError", "desc": "object 'none' not found"}})
    stream = b"".join(message + rng.choice([b"", b"\n", b"\r\n", b" "]) for message in messages)
    at = 0
    while at < len(stream):
        size = rng.choice([1, 2, 7, 100, 3000, len(stream)])
        qmp.send(stream[at : at + size])
        at += size
        if rng.random() < 0.05:
            daemon.connect().cmd("query-name")
    assert [qmp.reply() for _ in expected] == expected


def test_a_half_close_is_answered_and_half_a_message_dropped(daemon: Daemon, qmp: Client) -> None:
    """Commands already sent are answered, then comes the end."""
    qmp.send(NAME * 3 + b'{"execute":')
    qmp.sock.shutdown(socket.SHUT_WR)
    assert [qmp.reply() for _ in range(3)] == [{"return": {}}] * 3
    assert qmp.line() == b""
    assert daemon.connect().cmd("query-name") == {"return": {}}


def test_a_half_close_waits_for_the_command_that_runs(
    daemon: Daemon, qmp: Client, tmp_path: Path
) -> None:
    """Its reply is sent before the end."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    qmp.send(
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","file":"%s"}}'
        % fifo.encode()
    )
    qmp.sock.shutdown(socket.SHUT_WR)
    with open(fifo, "wb"):
        pass
    assert qmp.reply() == {"return": {}}
    assert qmp.line() == b""


def test_a_client_that_does_not_read_stalls_only_itself(daemon: Daemon, qmp: Client) -> None:
    """Its replies stop at a bound; when it reads, all of them come, in order."""
    silent = daemon.connect()
    silent.sock.setblocking(False)
    sent = 0

    def stalls() -> bool:
        return any(session.transport.backlogged for session in daemon.server.sessions)

    while True:
        message = b'{"execute":"query-commands","id":%d}\n' % sent
        try:
            if silent.sock.send(message) < len(message):
                break
            sent += 1
        except BlockingIOError:
            if daemon.call(stalls):
                break
    while not daemon.call(stalls):
        pass
    assert qmp.cmd("query-name") == {"return": {}}
    (session,) = [s for s in daemon.server.sessions if s.transport.sender.backlog]
    assert session.transport.sender.backlog < BACKLOG_BYTES + Tuning.batch_bytes + 4096
    silent.sock.setblocking(True)
    silent.sock.settimeout(20)
    for number in range(sent):
        assert silent.reply()["id"] == number


@pytest.mark.slow
@pytest.mark.tuning(unfinished_seconds=0.1)
def test_unfinished_messages_are_limited_in_time(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gets an error; one that finishes messages now and then is not affected."""
    slow = daemon.connect()
    slow.send(NAME + b'{"execute":')
    assert slow.reply() == {"return": {}}
    assert slow.reply()["error"]["desc"] == (
        "No end of the message within 0.1 seconds; connection closed"
    )
    assert slow.line() == b""
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        assert qmp.ask(b'{"execute":"query-name"}{"execute":') == {"return": {}}
        assert qmp.ask(b'"query-name"}') == {"return": {}}
    assert qmp.cmd("query-name") == {"return": {}}


@pytest.mark.tuning(unfinished_seconds=0.1)
def test_a_pause_does_not_forget_the_time_limit(
    daemon: Daemon, qmp: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is unfinished behind a command that waits is timed from when that is done."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    qmp.send(
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","file":"%s"}} {"exec'
        % fifo.encode()
    )
    with open(fifo, "wb"):
        pass
    assert qmp.reply() == {"return": {}}
    assert qmp.reply()["error"]["desc"].startswith("No end of the message")


def test_large_messages_grow_and_leave_no_memory_behind(daemon: Daemon, qmp: Client) -> None:
    """A secret of 1 MiB inline; then the receive space is as before."""
    before = daemon.call(lambda: daemon.scratch.held)
    data = b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","data":"%s"}}' % (
        b"x" * (1 << 20)
    )
    assert qmp.ask(data) == {"return": {}}
    assert qmp.read("s") == b"x" * (1 << 20)
    assert daemon.call(lambda: daemon.scratch.held) == before


def test_a_too_large_message_is_refused_and_the_next_answered(qmp: Client) -> None:
    """2 MiB, in QEMU's words."""
    qmp.send(b'{"execute":"' + b"x" * ((2 << 20) + 1) + b"\n\xff\n")
    assert qmp.reply()["error"]["desc"] == "JSON token size limit exceeded"
    qmp.send(b'{"execute":"query-name","id":"after"}')
    while qmp.reply().get("id") != "after":
        pass


class StarvedArena(Arena):
    """An arena that has no room for large buffers while the test says so."""

    starved: bool | str = False

    def allocate(self, size: int) -> LockedBuffer:
        """Refuse what is larger than half a window."""
        if self.starved and size > (64 << 10 if self.starved == "large" else 0):
            raise LockedMemoryExhausted("No locked memory left")
        return super().allocate(size)


@pytest.fixture
def starving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuning: Tuning) -> Iterator[Daemon]:
    """A server whose scratch memory can be made to run out."""
    from tests.support import daemon

    monkeypatch.setattr(daemon, "Arena", StarvedArena)
    made = Daemon(tmp_path, tuning=tuning)
    yield made
    made.stop()


def send_until_starved(starving: Daemon, large: Client) -> bytes:
    """Send a large message as far as there is room for it; return the rest."""
    message = b'{"execute":"%s","id":"large"}' % (b"x" * 200000)
    large.sock.setblocking(False)
    sent = 0
    while not starving.call(lambda: starving.server.space.starved):
        with contextlib.suppress(BlockingIOError):
            sent += large.sock.send(message[sent:])
    large.sock.settimeout(20)
    return message[sent:]


def test_large_messages_wait_for_receive_space(starving: Daemon) -> None:
    """Small ones go on; the large one continues when another connection frees its space."""
    other = starving.connect()
    other.send(b'{"x": "' + b"y" * 3000)
    large = starving.connect()
    starving.scratch.starved = "large"
    rest = send_until_starved(starving, large)
    assert starving.connect().cmd("query-name") == {"return": {}}
    starving.scratch.starved = False
    assert other.ask(b'"}')["error"]["desc"] == "QMP input member 'x' is unexpected"
    large.send(rest)
    assert large.reply()["id"] == "large"


@pytest.mark.slow
@pytest.mark.tuning(turn_seconds=-1.0, shared_turn_seconds=-1.0, look_seconds=-1.0)
def test_requests_that_wait_for_their_turn_need_no_more_room(starving: Daemon) -> None:
    """What is whole and only waits is no unfinished message, however much of it there is."""
    client = starving.connect()
    starving.scratch.starved = "large"
    client.send(b"".join(b'{"execute":"query-name","id":%d}\n' % n for n in range(5000)))
    assert [client.reply()["id"] for _ in range(5000)] == list(range(5000))


def test_large_messages_of_many_clients_at_once_all_arrive(daemon: Daemon, qmp: Client) -> None:
    """More than receive space holds together: one goes on, the others after it."""
    data = b"x" * 500_000  # all five, twice, are less than a user may lock
    replies: list[dict] = []

    def add(number: int) -> None:
        client = Client(daemon.control)
        client.send(
            b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"big%d","data":"%s"}}'
            % (number, data)
        )
        replies.append(client.reply())
        client.ok("object-del", {"id": f"big{number}"})
        client.close()

    threads = [threading.Thread(target=add, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert replies == [{"return": {}}] * 5
    while daemon.call(lambda: daemon.server.space.held):
        pass
    assert daemon.server.space._beyond is None


@pytest.mark.slow
@pytest.mark.tuning(shared_turn_seconds=1000.0)
def test_one_that_pipelines_lets_another_that_waits_go_first(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It checks between two requests, and an idle connection is no reason to
    stop.
    """
    other = daemon.connect()
    handled: list[Session] = []
    gave_way: list[Session] = []
    for session in daemon.server.sessions:

        def handle(request: Any, session: Session = session, before: Any = session._handle) -> Any:
            handled.append(session)
            return before(request)

        def yield_turn(
            session: Session = session, before: Any = session.transport.yield_turn
        ) -> None:
            gave_way.append(session)
            before()

        monkeypatch.setattr(session, "_handle", handle)
        monkeypatch.setattr(session._turn, "_yield", yield_turn)
    many = b'{"execute":"query-name"}' * 2000
    qmp.send(many)
    assert [qmp.reply() for _ in range(2000)] == [{"return": {}}] * 2000
    assert not gave_way
    handled.clear()
    go_on = threading.Event()
    daemon.loop.call_soon_threadsafe(go_on.wait, 20)
    qmp.send(many)
    other.send(b'{"execute":"query-name"}')
    go_on.set()
    assert other.reply() == {"return": {}}
    assert [qmp.reply() for _ in range(2000)] == [{"return": {}}] * 2000
    (first,) = [number for number, session in enumerate(handled) if session is not handled[-1]]
    assert first < 1000
    assert 1 <= len(gave_way) < 10  # what wakes the loop counts, too


@pytest.mark.slow
@pytest.mark.tuning(turn_seconds=0.0005)
def test_many_that_pipeline_at_once_are_all_answered(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for its turn always finds room."""
    requests = b"".join(b'{"execute":"query-name","id":%d}\n' % n for n in range(1500))
    clients = [daemon.connect() for _ in range(60)]
    senders = [threading.Thread(target=client.send, args=(requests,)) for client in clients]
    for sender in senders:
        sender.start()
    for client in clients:
        assert [client.reply()["id"] for _ in range(1500)] == list(range(1500))
    for sender in senders:
        sender.join(20)


@pytest.mark.tuning(retry_room_seconds=0.02)
def test_room_that_comes_from_elsewhere_is_found(starving: Daemon) -> None:
    """Such as from a deleted secret; no connection tells of it."""
    large = starving.connect()
    starving.scratch.starved = "large"
    rest = send_until_starved(starving, large)
    starving.scratch.starved = False
    large.send(rest)
    assert large.reply()["id"] == "large"


@pytest.mark.slow
@pytest.mark.tuning(unfinished_seconds=1.0)
def test_a_starved_connection_is_closed_when_its_time_is_up(starving: Daemon) -> None:
    """It does not hold its space for ever, and one that still finds no room waits on."""
    other = starving.connect()
    other.send(b'{"x": "' + b"y" * 3000)
    large = starving.connect()
    starving.scratch.starved = "large"
    large.sock.setblocking(False)
    large.send(b'"')
    while not starving.call(lambda: starving.server.space.starved):
        with contextlib.suppress(BlockingIOError):
            large.send(b"x" * 1000)
    other.send(b'"}')
    large.sock.settimeout(20)
    with contextlib.suppress(ConnectionError):
        assert "No end of the message" in large.reply()["error"]["desc"]
        assert large.line() == b""


def test_a_connection_without_room_gets_an_error_and_is_closed(starving: Daemon) -> None:
    """Nothing else can be done with bytes that have nowhere to lie."""
    client = starving.connect()
    starving.scratch.starved = True
    client.send(b'{"half": ')
    assert client.reply()["error"]["desc"] == "No locked memory left"
    assert client.line() == b""
    starving.scratch.starved = False


def test_an_error_that_quotes_the_sender_is_cut(qmp: Client) -> None:
    """At 1024 bytes, in locked memory, wherever it stands among other replies."""
    qmp.send(NAME + b'{"a": "' + b"z" * 100000 + b"\n" + NAME)
    assert qmp.reply() == {"return": {}}
    words = qmp.reply()["error"]["desc"]
    assert words == "JSON parse error, stray '\"" + "z" * 1023 + "'"
    assert qmp.reply() == {"return": {}}


@pytest.mark.slow
def test_quoted_errors_wait_for_a_client_that_does_not_read(daemon: Daemon) -> None:
    """They wait in locked memory, which is freed when they are sent or the client leaves."""
    for leaves in (False, True):
        client = daemon.connect()
        message = b'"' + b"q" * 4000 + b"\n\n"
        client.sock.setblocking(False)
        sent = 0
        while True:
            try:
                sent += client.sock.send((message * 20)[sent % len(message) :])
            except BlockingIOError:
                if daemon.call(
                    lambda: [s for s in daemon.server.sessions if s.transport.sender.waiting]
                ):
                    break
        if leaves:
            client.close()
        else:
            client.sock.settimeout(20)
            for _ in range(sent // len(message)):
                assert client.reply()["error"]["desc"].startswith("JSON parse error, stray '\"qqq")
            client.close()
    while daemon.call(lambda: len(daemon.server.sessions)):
        pass


def test_unread_errors_of_many_clients_hold_little_locked_memory(
    daemon: Daemon, qmp: Client
) -> None:
    """One quoted error each waits at most, whatever they send; the client socket is open to
    many.
    """
    before = daemon.call(lambda: daemon.scratch.held)
    crowd = []
    for _ in range(40):
        client = daemon.connect(role="client", negotiate=False)
        client.sock.setblocking(False)
        crowd.append(client)
        with contextlib.suppress(BlockingIOError):
            for _ in range(2000):
                client.sock.send((b'"' + b"A" * 3000 + b"\x01\x01") * 20)
    assert qmp.cmd("query-name") == {"return": {}}
    assert daemon.call(lambda: daemon.scratch.held) - before < 40 * (16 << 10)
    assert qmp.add("s", data="x" * 300000) == {"return": {}}


def test_descriptors_without_bytes_to_spare_do_not_leak(daemon: Daemon, qmp: Client) -> None:
    """253 in a message, again and again; the daemon keeps one."""
    with open("/dev/null") as file:
        many = tuple([file.fileno()] * 253)
        for _ in range(20):
            assert qmp.ask(NAME, many) == {"return": {}}
    count = len(os.listdir("/proc/self/fd"))
    assert qmp.ask(NAME, many[:0]) == {"return": {}}
    assert len(os.listdir("/proc/self/fd")) == count


@pytest.mark.slow
def test_clients_that_misbehave_together_disturb_no_other(daemon: Daemon, qmp: Client) -> None:
    """Silent, half-way, flooding, never reading, passing many descriptors, closing at any byte."""
    rng = random.Random(7)
    qmp.add("s", data="x")
    script = b'{"execute":"qmp_capabilities"}\n{"execute":"secret-read","arguments":{"id":"s"}}\n'
    crowd: list[socket.socket] = []
    with open("/dev/null") as null:
        for number in range(120):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(daemon.control)
            sock.setblocking(False)
            crowd.append(sock)
            with contextlib.suppress(OSError):
                kind = number % 6
                if kind == 1:
                    sock.send(b'{"execute":"qmp_cap')
                elif kind == 2:
                    sock.send(script * 500)
                elif kind == 3:
                    for _ in range(3):
                        socket.send_fds(sock, [script], [null.fileno()] * 253)
                elif kind == 4:
                    sock.send(script[: rng.randrange(len(script))])
                    crowd.pop().close()
                elif kind == 5:
                    sock.send(rng.randbytes(5000))
            if number % 10 == 0:
                assert qmp.read("s") == b"x"
    for sock in crowd:
        sock.close()
    assert qmp.read("s") == b"x"
    while daemon.call(lambda: len(daemon.server.sessions)) > 1:
        pass


def test_quit_stops_the_daemon_in_order(daemon: Daemon, qmp: Client) -> None:
    """The event to all administrators, then the reply, then the end; nothing pipelined is
    answered.
    """
    other = daemon.connect()
    waiting = daemon.connect(negotiate=False)
    waiting.reply()
    client = daemon.connect(role="client")
    qmp.send(b'{"execute":"quit","id":1}' + NAME)
    event = qmp.reply()
    assert event["event"] == "SHUTDOWN"
    assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}
    assert abs(event["timestamp"]["seconds"] - time.time()) < 60
    assert qmp.reply() == {"return": {}, "id": 1}
    assert qmp.line() == b""
    assert other.reply()["event"] == "SHUTDOWN"
    assert other.line() == b""
    assert waiting.line() == client.line() == b""
    daemon._thread.join(20)
    assert not os.path.exists(daemon.control)


def test_the_control_socket_is_for_root_and_the_own_uid(daemon: Daemon) -> None:
    """Others get an error and are closed; the client socket admits them."""
    client = daemon.connect(negotiate=False, uid=1000)
    assert client.reply()["error"]["desc"] == (
        "uid 1000 may not use the control socket; connect to the client socket"
    )
    assert client.line() == b""
    client.close()
    allowed = daemon.connect(role="client", uid=1000)
    fd = os.memfd_create("x")
    allowed.ok("getfd", {"fdname": "a"}, (fd,))
    allowed.ok("getfd", {"fdname": "a"}, (fd,))
    allowed.ok("add-fd", None, (fd, fd, fd))
    os.close(fd)
    assert allowed.cmd("closefd", {"fdname": "a"}) == {"return": {}}
    allowed.close()
    while daemon.call(lambda: not daemon.server.core.threads.idle() or daemon.server.sessions):
        pass


def test_only_root_and_the_own_uid_may_name_a_path(daemon: Daemon, qmp: Client) -> None:
    """The daemon would open it with its own rights; whoever else an authz object admits may not."""
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": "admins", "identity": "uid:1000"})
    other = daemon.connect(role="admins", uid=1000)
    assert other.add("s", file="/etc/hostname")["error"]["desc"] == (
        "Only uid 0 and the daemon's own uid may name a file"
    )
    assert other.add("mine", data="x") == {"return": {}}
    assert qmp.add("s", file="/etc/passwd") == {"return": {}}
    other.close()
    while daemon.call(
        lambda: not daemon.server.core.threads.idle() or len(daemon.server.sessions) > 1
    ):
        pass


def test_internal_errors_are_logged_without_their_text(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No reply is lost, and no secret reaches the log."""

    def broken(*_args: object) -> None:
        raise ValueError("let" + "mein")

    async def broken_later(_name: str) -> None:
        await asyncio.sleep(0)
        broken()

    monkeypatch.setattr(daemon.tree.types, "listed", lambda *_a, **_k: broken())
    monkeypatch.setattr(daemon.tree, "add", lambda *_a: broken_later("x"))
    words = "Internal error; the log of secretd has the details"
    assert qmp.fail("qom-list-types") == words
    assert qmp.add("s", data="x")["error"]["desc"] == words
    assert "ValueError" in caplog.text
    assert "test_server.py" in caplog.text
    assert "letmein" not in caplog.text


def test_a_failure_while_reading_closes_the_connection_and_wipes(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error outside of any command ends that connection only."""
    other = daemon.connect()

    def broken(*_args: object) -> None:
        raise RuntimeError

    (session,) = [s for s in daemon.server.sessions if s.transport._sock.fileno() >= 0][:1]
    monkeypatch.setattr(session, "_next", broken)
    clients = (qmp, other)
    ended = [c for c in clients if ask_or_end(c) is None]
    assert len(ended) == 1
    shared = daemon.call(lambda: bytes(daemon.server.space.shared.view[:100]))
    assert shared == bytes(100)
    assert len(daemon.errors) == 1
    daemon.errors.clear()


def ask_or_end(client: Client) -> dict | None:
    client.send(NAME)
    line = client.line()
    return json.loads(line) if line else None


@pytest.mark.tuning(retry_accept_seconds=0.05)
def test_out_of_descriptors_accepting_pauses_and_goes_on(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EMFILE is not the end, and no busy loop."""
    failures = [errno.EMFILE, errno.ENFILE]
    (listener, *_rest) = daemon.server._listeners
    real = listener.sock

    class Socket:
        """A listening socket that fails a few times."""

        def fileno(self) -> int:
            return real.fileno()

        def accept(self) -> object:
            if failures:
                raise OSError(failures.pop(), "x")
            return real.accept()

        def detach(self) -> int:
            return real.detach()

    listener.sock = Socket()  # type: ignore[assignment]  # all of a socket that it uses
    assert daemon.connect().cmd("query-name") == {"return": {}}
    assert not failures
    failures.append(errno.EBADF)
    with contextlib.suppress(TimeoutError):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(daemon.control)
        while not daemon.errors:
            pass
        sock.close()
    assert daemon.errors.pop()["exception"].errno == errno.EBADF
    while daemon.call(lambda: len(daemon.server.sessions)) > 1:
        pass


def test_a_peer_that_is_gone_at_accept_is_forgotten(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the kernel no longer knows it, or it does not take the greeting."""

    def gone(*_args: object) -> None:
        raise PeerUnknown("the process has ended")

    with monkeypatch.context() as patch:
        patch.setattr(server, "identify", gone)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(daemon.control)
            assert b"Cannot identify the peer completely: the process" in sock.recv(500)
            assert sock.recv(1) == b""
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "send", lambda self, _data: self._failed())
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(daemon.control)
            assert sock.recv(1) == b""
    assert daemon.call(lambda: len(daemon.server.sessions)) == 0


def only_session(daemon: Daemon) -> Session:
    (session,) = daemon.server.sessions
    return session


def test_a_closed_connection_takes_nothing_any_more(daemon: Daemon, qmp: Client) -> None:
    """Late calls, from a task or a timer, do no harm, and what is locked is freed."""
    session = only_session(daemon)

    def late() -> None:
        own = session.transport
        own.pause(Pause.BUSY)
        own._timed_out()
        assert not own.is_closed
        own._readable()
        own.resume(Pause.BUSY)
        own.close()
        own.close()
        own._on_room()
        own.resume(Pause.BUSY)
        own.send(b"x")
        own.send(Locked(daemon.scratch.allocate(10), 10))

    daemon.call(late)
    assert qmp.line() == b""


def test_a_uid_with_too_many_descriptors_is_shut_out(daemon: Daemon, qmp: Client) -> None:
    """Its connection ends when it brings more, with a word why; a new one is refused; others go
    on.
    """
    share = daemon.server.core.limits.descriptors
    share.limit = 4
    words = "uid 1000 has %d descriptors open here, and the limit is 4 (descriptors-per-uid)"
    holder = daemon.connect(role="client", uid=1000)
    other = daemon.connect(role="client", uid=1000)
    with open("/dev/null") as file:
        for name in "abcd":
            holder.ok("getfd", {"fdname": name}, (file.fileno(),))
        other.send(NAME, (file.fileno(),))
        assert other.reply()["error"]["desc"] == words % 4
        assert other.line() == b""
        closing = daemon.server.core.threads.closing
        refused = daemon.connect(role="client", uid=1000, negotiate=False)
        # The connection that was ended counts until it is closed: a descriptor lies in it.
        assert refused.reply()["error"]["desc"] in (words % 4, words % 5)
        assert refused.line() == b""
        daemon.connect(role="client", uid=1001).ok("getfd", {"fdname": "a"}, (file.fileno(),))
        qmp.ok("getfd", {"fdname": "a"}, (file.fileno(),))
    holder.ok("closefd", {"fdname": "a"})
    while share.held(1000) != 3 or closing(1000):
        pass
    assert daemon.connect(role="client", uid=1000).ok("query-version")


def test_reads_give_the_share_of_descriptors_back(daemon: Daemon, qmp: Client) -> None:
    """Whichever thread closes them."""
    share = daemon.server.core.limits.descriptors
    share.limit = 4
    qmp.add("a", data="letmein")
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": "z", "identity": "uid:1000"})
    qmp.ok("object-add", {"qom-type": "secret-grant", "id": "g", "secret": "a", "authz": "z"})
    reader = daemon.connect(role="client", uid=1000)
    for _ in range(10):
        assert reader.read("a") == b"letmein"
        while daemon.server.core.threads.closing(1000):
            pass
    assert share.held(1000) == 0


def test_a_failure_after_a_close_touches_no_freed_memory(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own buffer is gone by then."""
    qmp.send(b'{"half": "' + b"x" * 100)
    session = only_session(daemon)
    while not daemon.call(lambda: session.transport._tail.fill):
        pass

    def broken(*_args: object) -> None:
        session.transport.close()
        raise RuntimeError

    monkeypatch.setattr(session, "_next", broken)
    qmp.send(b"more")
    assert qmp.line() == b""
    while not daemon.errors:
        pass
    daemon.errors.clear()


def test_a_failure_after_a_wait_ends_only_its_connection(
    daemon: Daemon, qmp: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It happens in a task, and must not take the server's other tasks with it."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    session = only_session(daemon)
    qmp.send(
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","file":"%s"}}%s'
        % (fifo.encode(), NAME)
    )
    while not daemon.call(lambda: session._pending):
        pass

    def broken(*_args: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(session, "_next", broken)
    with open(fifo, "wb"):
        pass
    assert qmp.reply() == {"return": {}}
    assert qmp.line() == b""
    assert daemon.connect().cmd("query-name") == {"return": {}}


def test_a_client_that_reads_again_is_answered_on(daemon: Daemon, qmp: Client) -> None:
    """Whoever empties the queue of replies also ends the pause."""
    session = only_session(daemon)

    def fill() -> None:
        session.transport.send(b"x" * (4 << 20) + b"\r\n")
        assert session.transport._paused & Pause.BACKLOG
        session.transport.resume(Pause.BACKLOG)
        assert session.transport._paused & Pause.BACKLOG

    daemon.call(fill)
    qmp.send(NAME)
    assert len(qmp.line()) == (4 << 20) + 2
    assert qmp.reply() == {"return": {}}


@pytest.mark.tuning(turn_seconds=-1.0, shared_turn_seconds=-1.0, look_seconds=-1.0)
def test_a_long_series_of_requests_lets_others_go_on(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request a turn here; all are answered, in order."""
    other = daemon.connect()
    qmp.send(b"".join(b'{"execute":"query-name","id":%d}\n' % n for n in range(2000)))
    assert other.cmd("query-name") == {"return": {}}
    assert [qmp.reply()["id"] for _ in range(2000)] == list(range(2000))


def test_a_connection_is_not_read_on_while_a_command_waits(daemon: Daemon, qmp: Client) -> None:
    """Without oob: what it passes later must not take the place of what it has passed before."""
    qmp.add("A", data="letmein")
    slow, go_on = os.pipe()
    added = qmp.ok("add-fd", None, (slow,))
    os.close(slow)
    words = {"qom-type": "secret", "id": "s", "file": f"/dev/fdset/{added['fdset-id']}"}
    qmp.send(json.dumps({"execute": "object-add", "arguments": words}).encode())
    pipes = [os.pipe() for _ in range(2)]
    for number, (_, sink) in enumerate(pipes):
        qmp.send(b'{"execute":"getfd","arguments":{"fdname":"p%d"}}' % number, (sink,))
        os.close(sink)
    qmp.send(b'{"execute":"secret-read","arguments":{"id":"A","fdname":"p0"}}')
    os.write(go_on, b"x")
    os.close(go_on)
    assert [qmp.reply() for _ in range(4)] == [{"return": {}}] * 3 + [{"return": {"size": 7}}]
    qmp.ok("closefd", {"fdname": "p1"})
    assert [os.read(source, 100) for source, _ in pipes] == [b"letmein", b""]
    for source, _ in pipes:
        os.close(source)


def test_a_listener_is_not_watched_again_once_the_server_stops(daemon: Daemon) -> None:
    """The retry after EMFILE may come late."""

    def late() -> None:
        (listener, *_rest) = daemon.server._listeners
        daemon.server.stop()
        daemon.loop.remove_reader(listener.sock.fileno())
        daemon.server._watch(listener)
        assert not daemon.loop.remove_reader(listener.sock.fileno())

    daemon.call(late)


# --- the end


def ended(client: Client) -> bool:
    """True if the connection ends without another line."""
    try:
        return client.line() == b""
    except ConnectionResetError:  # something that it sent was not read
        return True


@pytest.mark.tuning(turn_seconds=-1.0, shared_turn_seconds=-1.0, look_seconds=-1.0)
def test_what_was_sent_before_a_stop_is_answered(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, though it takes many turns; an idle connection is closed at once."""
    idle = daemon.connect()

    def send_and_stop() -> None:
        # From the loop itself, so that nothing of it was read before.
        qmp.send(b"".join(b'{"execute":"query-name","id":%d}\n' % n for n in range(1000)))
        daemon.server.stop()

    daemon.call(send_and_stop)
    assert ended(idle)
    assert [qmp.reply()["id"] for _ in range(1000)] == list(range(1000))
    assert ended(qmp)


def test_a_waiting_request_is_answered_after_a_stop(daemon: Daemon) -> None:
    """And what is queued behind it, out of band or not; half a message is not."""
    qmp = daemon.connect(negotiate=False)
    qmp.reply()
    qmp.cmd("qmp_capabilities", {"enable": ["oob"]})
    source, sink = os.pipe()
    added = qmp.ok("add-fd", None, (source,))
    os.close(source)
    slow = {"qom-type": "secret", "id": "s", "file": f"/dev/fdset/{added['fdset-id']}"}
    qmp.send(json.dumps({"execute": "object-add", "arguments": slow, "id": 1}).encode())
    qmp.send(b'{"execute":"query-name","id":2}{"execute":"que')
    half = daemon.connect()
    half.send(b'{"execute"')
    assert "return" in qmp.ask(b'ry-name","id":3}{"exec-oob":"query-secrets"}{"execu')
    daemon.call(daemon.server.stop)
    assert ended(half)
    os.write(sink, b"letmein")
    os.close(sink)
    assert [qmp.reply()["id"] for _ in range(3)] == [1, 2, 3]
    assert ended(qmp)


def test_a_client_that_reads_late_gets_its_answers_after_a_stop(
    daemon: Daemon, qmp: Client
) -> None:
    """As long as there is time."""
    session = only_session(daemon)

    def fill_and_stop() -> None:
        session.transport.send(b"x" * (4 << 20) + b"\r\n")
        daemon.server.stop()

    daemon.call(fill_and_stop)
    assert len(qmp.line()) == (4 << 20) + 2
    assert ended(qmp)


@pytest.mark.parametrize(
    "hurry", [pytest.param(False, marks=pytest.mark.tuning(stop_seconds=0.01)), True]
)
def test_a_stop_does_not_wait_for_ever(daemon: Daemon, qmp: Client, hurry: bool) -> None:
    """For what never comes; and not at all when it is asked for again."""
    fd = os.memfd_create("x")
    os.write(fd, bytes(200_000))
    added = qmp.ok("add-fd", None, (fd,))
    os.close(fd)
    qmp.add("s", file=f"/dev/fd/{added['fd']}")
    source, sink = os.pipe()  # it takes a part, and there is no reader
    qmp.send(b'{"execute":"secret-read","arguments":{"id":"s"}}', (sink,))
    os.close(sink)
    while not daemon.call(lambda: only_session(daemon).busy):
        pass
    daemon.call(daemon.server.stop)
    if hurry:
        daemon.call(daemon.server.stop)
    assert ended(qmp)
    os.close(source)


def test_quit_answers_what_was_begun_and_nothing_else(daemon: Daemon, qmp: Client) -> None:
    """Of others, too."""
    other = daemon.connect()
    source, sink = os.pipe()
    added = other.ok("add-fd", None, (source,))
    os.close(source)
    slow = {"qom-type": "secret", "id": "s", "file": f"/dev/fdset/{added['fdset-id']}"}
    other.send(json.dumps({"execute": "object-add", "arguments": slow, "id": 1}).encode())
    while not any(session.busy for session in daemon.server.sessions):
        pass
    other.send(b'{"execute":"query-name","id":2}')
    qmp.send(b'{"execute":"quit"}{"execute":"query-name","id":3}')
    assert qmp.reply()["event"] == "SHUTDOWN"
    assert qmp.reply() == {"return": {}}
    assert ended(qmp)
    os.write(sink, b"letmein")
    os.close(sink)
    assert other.message()["event"] == "SHUTDOWN"
    assert other.reply() == {"return": {}, "id": 1}
    assert ended(other)


# --- many


def test_many_that_connect_at_once_are_all_greeted(daemon: Daemon) -> None:
    """More than are accepted in one turn."""
    crowd: list[socket.socket] = []

    def connect() -> None:
        for _ in range(server.ACCEPTS_PER_TURN + 8):
            crowd.append(socket.socket(socket.AF_UNIX))
            crowd[-1].connect(daemon.control)

    daemon.call(connect)
    for sock in crowd:
        assert sock.recv(1000).startswith(b'{"QMP"')
        sock.close()
    while daemon.call(lambda: len(daemon.server.sessions)):
        pass


# --- listening


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(daemon: Daemon, tmp_path: Path) -> None:
    """As with other daemons; another file is not touched."""
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    listener = listen(str(stale), SocketRole.CONTROL, 0o600)
    assert stale.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="another process is listening there"):
        listen(str(stale), SocketRole.CONTROL, 0o600)
    backlog = []
    for _ in range(200):
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        backlog.append(sock)
        if sock.connect_ex(str(stale)):
            break
    with pytest.raises(UsageError, match="another process is listening there"):
        listen(str(stale), SocketRole.CONTROL, 0o600)
    for sock in backlog:
        sock.close()
    listener.close()
    assert not stale.exists()
    stale.write_text("x")
    with pytest.raises(UsageError, match="exists and is not a socket"):
        listen(str(stale), SocketRole.CONTROL, 0o600)
    assert stale.read_text() == "x"


def test_paths_that_cannot_be_bound_are_named(tmp_path: Path) -> None:
    """Too long, or in no directory."""
    with pytest.raises(UsageError, match="107 bytes at most"):
        listen(str(tmp_path / ("x" * 120)), SocketRole.CONTROL, 0o600)
    with pytest.raises(UsageError, match="No such file or directory"):
        listen(str(tmp_path / "no" / "s"), SocketRole.CONTROL, 0o600)


def test_another_processs_socket_file_stays(tmp_path: Path) -> None:
    """At the end only what is still ours is removed."""
    path = str(tmp_path / "s")
    first = listen(path, SocketRole.CLIENT, 0o666)
    os.rename(path, str(tmp_path / "moved"))
    second = listen(path, SocketRole.CLIENT, 0o666)
    first.close()
    assert os.path.exists(path)
    os.unlink(path)
    second.close()
    assert not os.path.exists(path)


def test_a_client_that_left_before_a_wait_leaves_nothing(daemon: Daemon, tmp_path: Path) -> None:
    """Its going is noticed when the replies before are sent; the wait ends then, not at its time
    limit.
    """
    os.mkfifo(tmp_path / "fifo")
    leaving = daemon.connect()
    others_gone = threading.Event()
    daemon.loop.call_soon_threadsafe(others_gone.wait, 20)
    leaving.send(
        b'{"execute":"query-name"}{"execute":"object-add","arguments":{"qom-type":"secret","id":"s",'
        b'"file":"%s/fifo"}}' % os.fsencode(tmp_path)
    )
    leaving.close()
    others_gone.set()
    while daemon.call(lambda: daemon.server.sessions or daemon.tree.reserved):
        pass
    while not daemon.server.core.threads.idle():
        with contextlib.suppress(OSError):  # ENXIO without a reader
            os.close(os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK))
    assert daemon.connect().add("s", data="x") == {"return": {}}


@pytest.mark.tuning(retry_room_seconds=3600.0)
def test_a_connection_without_room_has_one_timer(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often room that others give back does not suffice."""
    (session,) = daemon.server.sessions
    starved = session.transport

    def starve() -> int:
        for _ in range(50):
            starved._tail.wait_for_room()
        return sum(handle._when - daemon.loop.time() > 1000 for handle in daemon.loop._scheduled)

    assert daemon.call(starve) == 1
    daemon.call(daemon.server.space.starved.clear)
    assert qmp.ok("query-name") == {}


def test_what_lies_unread_at_a_stop_is_answered_before_the_end(daemon: Daemon, qmp: Client) -> None:
    """The connection is not closed while there is something of the client's to read."""

    def stop() -> None:
        qmp.send(b'{"execute": "query-name", "id": "last"}\n')
        (session,) = daemon.server.sessions
        session.transport.finish(read=True)
        assert not session.transport.is_closed

    daemon.call(stop)
    assert b'"id": "last"' in qmp.line()
    assert qmp.line() == b""


def test_a_type_of_object_that_cannot_be_asked_for_is_answered(qmp: Client) -> None:
    """Whatever stands beside it, and the connection goes on."""
    for more in (b"", b',"id":"x"'):
        for tail in (b"", b',"id":1'):
            arguments = b'{"qom-type":"\\u0000"' + more + b"}"
            reply = qmp.ask(b'{"execute":"object-add","arguments":' + arguments + tail + b"}\n")
            assert "does not accept value" in reply["error"]["desc"]
    assert qmp.cmd("query-name") == {"return": {}}


async def test_without_inotify_the_sockets_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a user watches too many directories already."""

    def none() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("secretd.server.server.DirectoryWatch", none)
    async with served(tmp_path, Tuning()) as running:
        client = await running.connect()
        assert await client.ok("query-name") == {}


def test_a_connection_that_cannot_be_closed_is_logged(
    daemon: Daemon, qmp: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """The daemon goes on."""
    session = only_session(daemon)

    def broken() -> None:
        raise RuntimeError("first")

    real = session.transport.close
    session.transport.close = broken  # type: ignore[method-assign]
    daemon.call(lambda: safely(session.transport, broken))
    assert [r.levelname for r in caplog.records] == ["ERROR", "ERROR"]
    session.transport.close = real  # type: ignore[method-assign]
    assert daemon.connect().ok("query-name") == {}
