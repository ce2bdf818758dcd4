# SPDX-License-Identifier: LGPL-2.1-or-later
"""Out-of-band execution, and the queue that goes with it."""

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from secretd.errors import LockedMemoryExhausted
from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served

LIST = b'{"exec-oob": "query-secrets", "id": "oob"}'


@pytest.fixture
async def oob(in_loop: Served) -> AsyncClient:
    """A client that has enabled oob."""
    client = await in_loop.connect(negotiate=False)
    await client.reply()
    assert await client.cmd("qmp_capabilities", {"enable": ["oob"]}) == {"return": {}}
    return client


class Stuck:
    """An object-add that waits for a FIFO's writer."""

    def __init__(self, path: str) -> None:
        self._path = path

    @classmethod
    async def begin(cls, client: AsyncClient, path: str, name: bytes = b"stuck") -> "Stuck":
        """Let a client add a secret from a FIFO."""
        os.mkfifo(path)
        await client.send(
            b'{"execute": "object-add", "id": "%s", "arguments": {"qom-type": "secret", "id": "%s",'
            b' "file": "%s"}}' % (name, name, path.encode())
        )
        return cls(path)

    async def release(self) -> None:
        """Let it go on."""
        await asyncio.to_thread(Path(self._path).write_bytes, b"letmein")


@pytest.fixture
async def stuck(oob: AsyncClient, tmp_path: Path) -> Stuck:
    """A queue that is stuck."""
    return await Stuck.begin(oob, str(tmp_path / "fifo"))


def name(number: int) -> bytes:
    """A command that waits for its turn."""
    return b'{"execute": "query-name", "id": %d}' % number


async def test_an_out_of_band_command_overtakes_what_is_stuck(
    oob: AsyncClient, stuck: Stuck
) -> None:
    """It is answered at once; the others later, in order."""
    await oob.send(name(1) + name(2) + LIST)
    assert await oob.reply() == {"return": [], "id": "oob"}
    await oob.send(name(3))
    assert (await oob.ask(LIST))["id"] == "oob"
    await stuck.release()
    assert [(await oob.reply())["id"] for _ in range(4)] == ["stuck", 1, 2, 3]
    assert [s["id"] for s in await oob.ok("query-secrets")] == ["stuck"]


async def test_others_do_not_overtake_and_errors_keep_their_place(
    oob: AsyncClient, stuck: Stuck
) -> None:
    """Neither what is malformed nor what may not be executed out of band.

    That one is refused at once.
    """
    await oob.send(b'{"execute": 3, "id": "a"}' + b"{]" + b"'stray\x01" + name(4))
    refused = await oob.ask(b'{"exec-oob": "query-name", "id": "no"}')
    assert refused["error"]["desc"] == "The command query-name does not support OOB"
    assert refused["id"] == "no"
    await stuck.release()
    replies = [await oob.reply() for _ in range(5)]
    assert [r.get("id") for r in replies] == ["stuck", "a", None, None, 4]
    assert replies[3]["error"]["desc"] == "JSON parse error, stray ''stray\1'"


async def test_behind_eight_requests_nothing_is_read(oob: AsyncClient, stuck: Stuck) -> None:
    """As in QEMU: what comes then waits, out of band or not, and is answered in its turn."""
    await oob.send(b"".join(map(name, range(7))))
    assert (await oob.ask(LIST))["id"] == "oob"
    await oob.send(name(7) + LIST + b"@\n" + name(8))
    await stuck.release()
    assert [(await oob.reply())["id"] for _ in range(10)] == ["stuck", *range(8), "oob"]
    assert (await oob.reply())["error"]["desc"] == "JSON parse error, stray '@'"
    assert (await oob.reply())["id"] == 8


@pytest.mark.parametrize("junk", [b"@abc ", b"@'abc ", b'@ "\xc3 ', b"01 x\t"])
async def test_skipped_bytes_are_not_part_of_the_queue(
    oob: AsyncClient, stuck: Stuck, junk: bytes
) -> None:
    """One error for the junk, and the request behind it in its turn."""
    await oob.send(junk + name(1) + name(2))
    assert (await oob.ask(LIST))["id"] == "oob"
    await stuck.release()
    assert (await oob.reply())["id"] == "stuck"
    assert "JSON parse error, stray" in (await oob.reply())["error"]["desc"]
    assert [(await oob.reply())["id"] for _ in range(2)] == [1, 2]


async def test_several_that_wait_stand_in_one_queue(
    oob: AsyncClient, stuck: Stuck, tmp_path: Path
) -> None:
    """The second goes on waiting when the first is done; what is out of band still overtakes."""
    second = await Stuck.begin(oob, str(tmp_path / "second"), b"second")
    await oob.send(name(1))
    await stuck.release()
    assert await oob.reply() == {"return": {}, "id": "stuck"}
    assert [s["id"] for s in (await oob.ask(LIST))["return"]] == ["stuck"]
    await second.release()
    assert [(await oob.reply())["id"] for _ in range(2)] == ["second", 1]


async def test_a_secret_in_the_queue_is_added_in_its_turn(oob: AsyncClient, stuck: Stuck) -> None:
    """It waits in locked memory, also where it is large or in escapes."""
    for object_id, data in ((b"a", b"letme\\u0069n"), (b"b", b"x" * 100_000)):
        await oob.send(
            b'{"execute": "object-add", "arguments": {"qom-type": "secret", "id": "%s", "data": '
            b'"%s"}}\n' % (object_id, data)
        )
    assert (await oob.ask(LIST))["return"] == []
    await stuck.release()
    assert [(await oob.reply()).get("id") for _ in range(3)] == ["stuck", None, None]
    assert await oob.read("a") == b"letmein"
    assert await oob.read("b") == b"x" * 100_000


async def test_a_client_that_leaves_takes_its_queue_along(
    oob: AsyncClient, stuck: Stuck, in_loop: Served
) -> None:
    """Nothing of it is carried out, and no locked memory stays (the daemon's end checks that)."""
    await oob.send(name(1) + b"{]'\x01" + b'{"execute": "object-add", "arguments": {"qom-type": '
                                          b'"secret",'
             b' "id": "late", "data": "x"}}')  # fmt: skip
    assert (await oob.ask(LIST))["id"] == "oob"
    oob.close()
    await stuck.release()
    other = await in_loop.connect()
    while len(in_loop.server.sessions) > 1:
        await asyncio.sleep(0)
    assert "late" not in [s["id"] for s in await other.ok("query-secrets")]


async def test_what_was_sent_before_the_end_is_answered(oob: AsyncClient, stuck: Stuck) -> None:
    """Also what is queued. QEMU drops it."""
    await oob.send(name(1) + name(2))
    assert (await oob.ask(LIST))["id"] == "oob"
    oob.sock.shutdown(socket.SHUT_WR)
    await stuck.release()
    assert [(await oob.reply())["id"] for _ in range(3)] == ["stuck", 1, 2]
    assert await oob.line() == b""


async def test_where_locked_memory_is_short_the_queue_is_too(
    oob: AsyncClient, stuck: Stuck, in_loop: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What finds no room is not read until there is some."""
    assert (await oob.ask(LIST))["id"] == "oob"
    with _no_room(in_loop, monkeypatch):
        await oob.send(name(1) + LIST)
        while not ([s for s in in_loop.server.sessions if s.transport._paused]):
            await asyncio.sleep(0)
    await stuck.release()
    assert [(await oob.reply())["id"] for _ in range(3)] == ["stuck", 1, "oob"]


@contextlib.contextmanager
def _no_room(in_loop: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = in_loop.scratch.allocate

    def allocate(size: int) -> object:
        if size == len(name(1)):
            raise LockedMemoryExhausted("none left")
        return real(size)

    with monkeypatch.context() as patch:
        patch.setattr(in_loop.scratch, "allocate", allocate)
        yield


@pytest.mark.slow
async def test_a_flood_of_out_of_band_commands_lets_others_go_on(
    oob: AsyncClient, stuck: Stuck, in_loop: Served
) -> None:
    """All are answered, and another connection in between."""
    await oob.send(LIST * 2000)
    other = await in_loop.connect()
    assert await other.ok("query-name") == {}
    for _ in range(2000):
        assert (await oob.reply())["id"] == "oob"
    await stuck.release()
    assert (await oob.reply())["id"] == "stuck"


PIECES = [
    *(name(1), name(2), b'{"execute": "nope", "id": "n"}', b'{"execute": 3}', b"[1]", b'{"id": 5}'),
    *(b"@", b"@'abc ", b"{]", b"}", b"01", b"\xff", b"\n", b" ", b'"a\nb"', b"nul ", b"[[", b"'x"),
    b"{'execute': 'query-name', 'id': 'single'}",
]


async def answer(client: AsyncClient) -> bytes:
    """The next line that is no event: those come when their time is."""
    while (line := await client.line()).startswith(b'{"timestamp"'):
        pass
    return line


@pytest.mark.parametrize("seed", range(40))
async def test_requests_behind_a_stuck_one_are_answered_alike(
    oob: AsyncClient, stuck: Stuck, aqmp: AsyncClient, seed: int
) -> None:
    """The same answers in the same order, of good and bad messages in any mixture."""
    rng = random.Random(seed)
    data = b"".join(rng.choice(PIECES) for _ in range(rng.randint(1, 25)))
    data += b'\xff{"execute": "query-name", "id": "end"}'
    while data:
        piece, data = data[: (size := rng.choice([1, 7, 50, 1000]))], data[size:]
        await oob.send(piece)
        await aqmp.send(piece)
    await stuck.release()
    assert (await oob.reply())["id"] == "stuck"
    wanted = b""
    while b'"id": "end"' not in wanted:
        wanted = await answer(aqmp)
        assert await answer(oob) == wanted


@pytest.mark.slow
@pytest.mark.tuning(look_seconds=1000.0)
async def test_a_client_that_reads_no_oob_replies_is_not_read(
    in_loop: Served,
    aqmp: AsyncClient,
    oob: AsyncClient,
    stuck: Stuck,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Replies do not pile up, however long its turn is; all come once it reads again."""
    for number in range(300):
        await aqmp.add(f"secret{number}", data="letmein")
    await oob.send(LIST * 100)
    (session,) = [s for s in in_loop.server.sessions if s.monitor.oob]
    while not session.transport.backlogged:
        await asyncio.sleep(0)
    assert session.transport.sender.backlog < 512 << 10
    assert all([len((await oob.reply())["return"]) == 300 for _ in range(100)])
    await stuck.release()
    while (await oob.reply()).get("id") != "stuck":
        pass
