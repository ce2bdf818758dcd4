# SPDX-License-Identifier: LGPL-2.1-or-later
"""Out-of-band execution, and the queue that goes with it."""

import contextlib
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from secretd.errors import LockedMemoryExhausted
from tests.support.daemon import Daemon
from tests.support.qmp import Client

LIST = b'{"exec-oob": "query-secrets", "id": "oob"}'


@pytest.fixture
def oob(daemon: Daemon) -> Client:
    """A client that has enabled oob."""
    client = daemon.connect(negotiate=False)
    client.reply()
    assert client.cmd("qmp_capabilities", {"enable": ["oob"]}) == {"return": {}}
    return client


class Stuck:
    """An object-add that waits for a FIFO's writer."""

    def __init__(self, client: Client, path: str, name: bytes = b"stuck") -> None:
        os.mkfifo(path)
        self._path = path
        client.send(
            b'{"execute": "object-add", "id": "%s", "arguments": {"qom-type": "secret", "id": "%s",'
            b' "file": "%s"}}' % (name, name, path.encode())
        )

    def release(self) -> None:
        """Let it go on."""
        with open(self._path, "wb") as writer:
            writer.write(b"letmein")


@pytest.fixture
def stuck(oob: Client, tmp_path: Path) -> Stuck:
    """A queue that is stuck."""
    return Stuck(oob, str(tmp_path / "fifo"))


def name(number: int) -> bytes:
    """A command that waits for its turn."""
    return b'{"execute": "query-name", "id": %d}' % number


def test_an_out_of_band_command_overtakes_what_is_stuck(oob: Client, stuck: Stuck) -> None:
    """It is answered at once; the others later, in order."""
    oob.send(name(1) + name(2) + LIST)
    assert oob.reply() == {"return": [], "id": "oob"}
    oob.send(name(3))
    assert oob.ask(LIST)["id"] == "oob"
    stuck.release()
    assert [oob.reply()["id"] for _ in range(4)] == ["stuck", 1, 2, 3]
    assert [s["id"] for s in oob.ok("query-secrets")] == ["stuck"]


def test_others_do_not_overtake_and_errors_keep_their_place(oob: Client, stuck: Stuck) -> None:
    """Neither what is malformed nor what may not be executed out of band.

    That one is refused at once.
    """
    oob.send(b'{"execute": 3, "id": "a"}' + b"{]" + b"'stray\x01" + name(4))
    refused = oob.ask(b'{"exec-oob": "query-name", "id": "no"}')
    assert refused["error"]["desc"] == "The command query-name does not support OOB"
    assert refused["id"] == "no"
    stuck.release()
    replies = [oob.reply() for _ in range(5)]
    assert [r.get("id") for r in replies] == ["stuck", "a", None, None, 4]
    assert replies[3]["error"]["desc"] == "JSON parse error, stray ''stray\1'"


def test_behind_eight_requests_nothing_is_read(oob: Client, stuck: Stuck) -> None:
    """As in QEMU: what comes then waits, out of band or not, and is answered in its turn."""
    oob.send(b"".join(map(name, range(7))))
    assert oob.ask(LIST)["id"] == "oob"
    oob.send(name(7) + LIST + b"@\n" + name(8))
    stuck.release()
    assert [oob.reply()["id"] for _ in range(10)] == ["stuck", *range(8), "oob"]
    assert oob.reply()["error"]["desc"] == "JSON parse error, stray '@'"
    assert oob.reply()["id"] == 8


@pytest.mark.parametrize("junk", [b"@abc ", b"@'abc ", b'@ "\xc3 ', b"01 x\t"])
def test_what_is_skipped_after_an_error_is_not_part_of_what_waits(
    oob: Client, stuck: Stuck, junk: bytes
) -> None:
    """One error for the junk, and the request behind it in its turn."""
    oob.send(junk + name(1) + name(2))
    assert oob.ask(LIST)["id"] == "oob"
    stuck.release()
    assert oob.reply()["id"] == "stuck"
    assert "JSON parse error, stray" in oob.reply()["error"]["desc"]
    assert [oob.reply()["id"] for _ in range(2)] == [1, 2]


def test_several_that_wait_stand_in_one_queue(oob: Client, stuck: Stuck, tmp_path: Path) -> None:
    """The second goes on waiting when the first is done; what is out of band still overtakes."""
    second = Stuck(oob, str(tmp_path / "second"), b"second")
    oob.send(name(1))
    stuck.release()
    assert oob.reply() == {"return": {}, "id": "stuck"}
    assert [s["id"] for s in oob.ask(LIST)["return"]] == ["stuck"]
    second.release()
    assert [oob.reply()["id"] for _ in range(2)] == ["second", 1]


def test_a_secret_in_the_queue_is_added_in_its_turn(oob: Client, stuck: Stuck) -> None:
    """It waits in locked memory, also where it is large or in escapes."""
    for object_id, data in ((b"a", b"letme\\u0069n"), (b"b", b"x" * 100_000)):
        oob.send(
            b'{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "%s", "data": "%s"}}\n'
            % (object_id, data)
        )
    assert oob.ask(LIST)["return"] == []
    stuck.release()
    assert [oob.reply().get("id") for _ in range(3)] == ["stuck", None, None]
    assert oob.read("a") == b"letmein"
    assert oob.read("b") == b"x" * 100_000


def test_a_client_that_leaves_takes_its_queue_along(
    oob: Client, stuck: Stuck, daemon: Daemon
) -> None:
    """Nothing of it is carried out, and no locked memory stays (the daemon's end checks that)."""
    oob.send(name(1) + b"{]'\x01" + b'{"execute": "object-add", "arguments": {"qom-type": "secret",'
             b' "id": "late", "data": "x"}}')  # fmt: skip
    assert oob.ask(LIST)["id"] == "oob"
    oob.close()
    stuck.release()
    other = daemon.connect()
    while daemon.call(lambda: len(daemon.server.sessions)) > 1:
        pass
    assert "late" not in [s["id"] for s in other.ok("query-secrets")]


def test_what_was_sent_before_the_end_is_answered(oob: Client, stuck: Stuck) -> None:
    """Also what is queued. QEMU drops it."""
    oob.send(name(1) + name(2))
    assert oob.ask(LIST)["id"] == "oob"
    oob.sock.shutdown(socket.SHUT_WR)
    stuck.release()
    assert [oob.reply()["id"] for _ in range(3)] == ["stuck", 1, 2]
    assert oob.line() == b""


def test_where_locked_memory_is_short_the_queue_is_too(
    oob: Client, stuck: Stuck, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What finds no room is not read until there is some."""
    assert oob.ask(LIST)["id"] == "oob"
    with _no_room(daemon, monkeypatch):
        oob.send(name(1) + LIST)
        while not daemon.call(lambda: [s for s in daemon.server.sessions if s.transport._paused]):
            pass
    stuck.release()
    assert [oob.reply()["id"] for _ in range(3)] == ["stuck", 1, "oob"]


@contextlib.contextmanager
def _no_room(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = daemon.scratch.allocate

    def allocate(size: int) -> object:
        if size == len(name(1)):
            raise LockedMemoryExhausted("none left")
        return real(size)

    with monkeypatch.context() as patch:
        patch.setattr(daemon.scratch, "allocate", allocate)
        yield


@pytest.mark.slow
def test_a_flood_of_out_of_band_commands_lets_others_go_on(
    oob: Client, stuck: Stuck, daemon: Daemon
) -> None:
    """All are answered, and another connection in between."""
    oob.send(LIST * 2000)
    other = daemon.connect()
    assert other.ok("query-name") == {}
    for _ in range(2000):
        assert oob.reply()["id"] == "oob"
    stuck.release()
    assert oob.reply()["id"] == "stuck"


PIECES = [
    *(name(1), name(2), b'{"execute": "nope", "id": "n"}', b'{"execute": 3}', b"[1]", b'{"id": 5}'),
    *(b"@", b"@'abc ", b"{]", b"}", b"01", b"\xff", b"\n", b" ", b'"a\nb"', b"nul ", b"[[", b"'x"),
    b"{'execute': 'query-name', 'id': 'single'}",
]


def answer(client: Client) -> bytes:
    """The next line that is no event: those come when their time is."""
    while (line := client.line()).startswith(b'{"timestamp"'):
        pass
    return line


@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes_meanwhile_is_answered_as_if_nothing_were_stuck(
    oob: Client, stuck: Stuck, qmp: Client, seed: int
) -> None:
    """The same answers in the same order, of good and bad messages in any mixture."""
    rng = random.Random(seed)
    data = b"".join(rng.choice(PIECES) for _ in range(rng.randint(1, 25)))
    data += b'\xff{"execute": "query-name", "id": "end"}'
    while data:
        piece, data = data[: (size := rng.choice([1, 7, 50, 1000]))], data[size:]
        oob.send(piece)
        qmp.send(piece)
    stuck.release()
    assert oob.reply()["id"] == "stuck"
    wanted = b""
    while b'"id": "end"' not in wanted:
        wanted = answer(qmp)
        assert answer(oob) == wanted


@pytest.mark.slow
@pytest.mark.tuning(look_seconds=1000.0)
def test_who_does_not_read_what_it_asks_out_of_band_is_not_read_either(
    daemon: Daemon, qmp: Client, oob: Client, stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies do not pile up, however long its turn is; all come once it reads again."""
    for number in range(300):
        qmp.add(f"secret{number}", data="letmein")
    oob.send(LIST * 100)
    (session,) = [s for s in daemon.server.sessions if s.monitor.oob]
    while not daemon.call(lambda: session.transport.backlogged):
        pass
    assert daemon.call(lambda: session.transport.sender.backlog) < 512 << 10
    assert all(len(oob.reply()["return"]) == 300 for _ in range(100))
    stuck.release()
    while oob.reply().get("id") != "stuck":
        pass
