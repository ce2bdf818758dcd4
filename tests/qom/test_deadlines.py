# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ends by itself: secrets and grants with a lifetime."""

import asyncio
import os

import pytest

from secretd.qom import deadlines as module
from secretd.qom.deadlines import LIFETIME_SECONDS, Deadlines, now
from tests.support.async_qmp import AsyncClient
from tests.support.grants import drained
from tests.support.in_loop import Served
from tests.support.needs import need_root

SECOND = 1_000_000_000


def end_soon(in_loop: Served, object_id: str, nanoseconds: int = 1_000_000) -> None:
    """Let an object's time be over in a moment, as if its seconds had passed."""
    (in_loop.tree.deadlines.set(object_id, now() + nanoseconds))


@pytest.mark.slow
async def test_a_secret_with_a_lifetime_is_wiped_at_its_end(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """An event says so; the time that is left is listed until then."""
    other = await (await in_loop.connect()).watch()
    await aqmp.watch()
    await aqmp.add("s", data="letmein")
    assert "expires-in" not in (await aqmp.secrets())[0]
    assert await aqmp.ok("secret-expire", {"id": "s", "after": 1}) == {}
    assert (await aqmp.secrets())[0]["expires-in"] == 1
    assert (await other.event())["event"] == "SECRET_ADDED"
    event = await other.event()
    assert (event["event"], event["data"]) == ("SECRET_EXPIRED", {"id": "s"})
    assert await aqmp.event() == event
    assert await aqmp.secrets() == []
    assert await aqmp.fail("object-del", {"id": "s"}) == "object 's' not found"
    assert in_loop.journal.arena.held == 0
    await aqmp.add("s", data="again")
    assert await aqmp.read("s") == b"again"


async def test_a_lifetime_can_be_changed_and_ends_with_the_secret(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """The last word counts; another secret of that id has its own."""
    await aqmp.add("s", data="letmein")
    await aqmp.ok("secret-expire", {"id": "s", "after": 1})
    await aqmp.ok("secret-expire", {"id": "s", "after": 5000})
    assert (await aqmp.secrets())[0]["expires-in"] == 5000
    await aqmp.ok("object-del", {"id": "s"})
    await aqmp.add("s", data="letmein")
    assert "expires-in" not in (await aqmp.secrets())[0]
    for after in (0, -1, LIFETIME_SECONDS + 1):
        assert await aqmp.fail("secret-expire", {"id": "s", "after": after}) == (
            f"Parameter 'after' expects a number of seconds between 1 and {LIFETIME_SECONDS}"
        )
    assert await aqmp.fail("secret-expire", {"id": "t", "after": 1}) == "No secret with id 't'"
    await aqmp.ok("object-add", {"qom-type": "authz-simple", "id": "a", "identity": "x"})
    assert (
        await aqmp.fail("secret-expire", {"id": "a", "after": 1})
        == "Object with id 'a' is not a secret"
    )
    await aqmp.ok("secret-expire", {"id": "s", "after": LIFETIME_SECONDS})
    assert (await aqmp.secrets())[0]["expires-in"] == LIFETIME_SECONDS


async def test_time_is_checked_at_each_access(
    in_loop: Served, aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the timer has come yet, as after the machine slept."""
    await aqmp.add("s", data="letmein")
    await aqmp.ok("secret-generate", {"id": "k", "size": 32})
    await aqmp.ok("secret-expire", {"id": "s", "after": 1000})
    await aqmp.ok("secret-expire", {"id": "k", "after": 1000})
    late = now() + 1000 * SECOND
    monkeypatch.setattr(module, "now", lambda: late)
    source, sink = os.pipe()
    assert await aqmp.fail("secret-read", {"id": "s"}, (sink,)) == "No secret with id 's'"
    os.close(sink)
    assert await asyncio.to_thread(os.read, source, 1) == b""
    os.close(source)
    assert await aqmp.secrets() == []
    assert (await aqmp.ok("secret-explain", {"id": "s", "peer": []}))["exists"] is False
    assert (await aqmp.add("t", data="MTIz", keyid="k", format="base64"))["error"]["desc"] == (
        "No secret with id 'k'"
    )


async def test_a_delivery_ends_with_the_secrets_time(in_loop: Served, aqmp: AsyncClient) -> None:
    """And with the grant's."""
    need_root()
    await aqmp.ok("secret-generate", {"id": "big", "size": 1 << 20})
    reader = await in_loop.connect()
    source = await reader.begin_delivery("big")
    await aqmp.allow("web", "uid:1000")
    await aqmp.grant("g", "big", "web", **{"expires-after": 1000})
    client = await in_loop.connect(role="client", uid=1000)
    theirs = await client.begin_delivery("big")
    end_soon(in_loop, "g")
    assert (await client.reply())["error"]["desc"] == "Secret 'big' was withdrawn"
    assert await asyncio.to_thread(drained, theirs) < 1 << 20
    end_soon(in_loop, "big")
    assert (await reader.reply())["error"]["desc"] == "Secret 'big' was withdrawn"
    assert await asyncio.to_thread(drained, source) < 1 << 20


@pytest.mark.slow
async def test_a_grant_with_a_lifetime_ends(
    in_loop: Served, aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gone then, without a word to the clients; and before the timer comes it does not
    count.
    """
    need_root()
    await aqmp.add("s", data="letmein-" * 4)
    await aqmp.allow("web", "uid:1000")
    await aqmp.grant("g", "s", "web", **{"expires-after": 1})
    client = await in_loop.connect(role="client", uid=1000)
    assert not await client.denied("s")
    while "g" in in_loop.journal:
        await asyncio.sleep(0)
    assert await client.denied("s")
    await aqmp.grant("g", "s", "web", **{"expires-after": 1000})
    assert not await client.denied("s")
    with monkeypatch.context() as patch:
        late = now() + 1000 * SECOND
        patch.setattr(module, "now", lambda: late)
        assert await client.denied("s")
        (considered,) = (await aqmp.ok("secret-explain", {"id": "s", "peer": ["uid:1000"]}))[
            "grants"
        ]
        assert considered == {"grant": "g", "allowed": False, "reason": "the grant has expired"}
    assert not await client.denied("s")
    await aqmp.ok("qom-set", {"path": "g", "property": "expires-after", "value": 2000})
    assert in_loop.tree.deadlines.remaining("g") == 2000
    assert [e["event"] for e in client.events] == []


async def test_many_deadlines_at_once_leave_others_their_turn() -> None:
    """An earlier one moves the timer; what was forgotten or changed does not end."""
    ended: list[str] = []
    deadlines = Deadlines(ended_per_turn=10)
    deadlines.set("before", now() + SECOND // 1000)

    def end(object_id: str) -> None:
        ended.append(object_id)
        deadlines.forget(object_id)

    deadlines.start(end)
    deadlines.set("late", now() + 1000 * SECOND)
    deadlines.set("gone", now() + SECOND // 1000)
    deadlines.forget("gone")
    deadlines.set("moved", now() + SECOND // 1000)
    deadlines.set("moved", now() + 1000 * SECOND)
    deadlines.set("past", now() - 5)
    for number in range(35):
        deadlines.set(f"n{number}", now() + SECOND // 1000)
    while len(ended) < 37:
        await asyncio.sleep(0)
    assert deadlines.remaining("late") == 1000
    assert deadlines.remaining("gone") is None
    assert not deadlines.expired("late")
    deadlines.set("last", now() + SECOND // 1000)
    while len(ended) < 38:
        await asyncio.sleep(0)
    deadlines.set("x", now())
    deadlines._due()
    deadlines.stop()
    deadlines._due()
    deadlines.stop()
    assert ended[:2] in (["past", "before"], ["before", "past"])
    assert ended[2:37] == sorted((f"n{n}" for n in range(35)), key=lambda n: int(n[1:]))
    assert ended[37:] == ["last", "x"]


def test_deadlines_that_are_void_are_not_kept() -> None:
    """However often one is set anew."""
    deadlines = Deadlines()
    for number in range(1000):
        deadlines.set("s", now() + number * SECOND)
    assert len(deadlines._queue) < 200
    assert deadlines.remaining("s") == 999


async def test_without_a_timer_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets that never end would be worse."""
    monkeypatch.setattr(module.time, "CLOCK_BOOTTIME", 9999)
    with pytest.raises(OSError, match="timerfd_create"):
        Deadlines().start(lambda _id: None)
