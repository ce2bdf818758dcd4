# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events about secrets: which connections get them, what is in them, what becomes of those that do
not read.
"""

import asyncio
import itertools
import os
import time
from pathlib import Path

import pytest

from secretd.limits import Tuning
from secretd.monitor.broadcast import BATCH_EVENTS
from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served
from tests.support.needs import need_root


async def test_the_other_connections_learn_what_one_does(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """Added and deleted, with the peer; never a value. The causing connection has the reply."""
    other = await (await in_loop.connect()).watch()
    before = int(time.time())
    assert await aqmp.add("s", data="letmein") == {"return": {}}
    event = await other.event()
    assert event["timestamp"]["seconds"] >= before
    assert 0 <= event["timestamp"]["microseconds"] < 1_000_000
    peer = {"uid": os.getuid(), "gid": os.getgid(), "pid": os.getpid()}
    assert event["event"] == "SECRET_ADDED"
    assert event["data"] == {"id": "s", "peer": peer}
    assert await aqmp.ok("object-del", {"id": "s"}) == {}
    event = await other.event()
    assert (event["event"], event["data"]) == ("SECRET_DELETED", {"id": "s", "peer": peer})
    assert await aqmp.ok("query-name") == {}
    assert aqmp.events == []


async def test_every_way_to_add_or_delete_is_an_event(
    in_loop: Served, aqmp: AsyncClient, tmp_path: Path
) -> None:
    """From a file, generated, by the human monitor; but not what fails and what is no secret."""
    other = await (await in_loop.connect()).watch()
    (tmp_path / "f").write_bytes(b"letmein")
    await aqmp.add("s", data="x", file="y")
    await aqmp.ok("object-add", {"qom-type": "authz-simple", "id": "a", "identity": "x"})
    await aqmp.ok("object-del", {"id": "a"})
    await aqmp.fail("object-del", {"id": "a"})
    await aqmp.add("f", file=str(tmp_path / "f"))
    await aqmp.ok("secret-generate", {"id": "g", "size": 32})
    for line in ("object_add secret,id=h,data=x", "object_del h"):
        assert await aqmp.ok("human-monitor-command", {"command-line": line}) == ""
    events = [await other.event() for _ in range(4)]
    assert [(e["event"], e["data"]["id"]) for e in events] == [
        ("SECRET_ADDED", "f"),
        ("SECRET_ADDED", "g"),
        ("SECRET_ADDED", "h"),
        ("SECRET_DELETED", "h"),
    ]


async def test_events_need_negotiation_and_the_control_socket(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """Events come after negotiation, as in QEMU."""
    client = await in_loop.connect(role="client")
    silent = await in_loop.connect(negotiate=False)
    await aqmp.add("s", data="letmein")
    assert await client.ok("query-version")
    assert client.events == []
    assert "QMP" in await silent.message()
    assert await silent.cmd("qmp_capabilities") == {"return": {}}
    assert silent.events == []


@pytest.mark.slow
async def test_an_unread_connection_loses_events_and_learns_the_count(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """The daemon keeps few; others are not held up."""
    lazy = await (await in_loop.connect()).watch()
    pairs = 4000
    line = b'{"execute":"object-%s","arguments":{"id":"' + b"s" * 300 + b'"%s}}\n'
    both = line % (b"add", b',"qom-type":"secret","data":"x"') + line % (b"del", b"")
    for _ in range(pairs // 400):
        await aqmp.send(both * 400)
        for _ in range(800):
            assert await aqmp.reply() == {"return": {}}
    got = lost = 0
    while got + lost < 2 * pairs:
        event = await lazy.event()
        if event["event"] == "SECRET_EVENTS_LOST":
            lost += event["data"]["count"]
        else:
            got += 1
    assert lost > 0
    assert got > 100
    await aqmp.add("t", data="x")
    assert (await lazy.event())["data"]["id"] == "t"


async def test_a_new_connection_gets_no_earlier_events(in_loop: Served, aqmp: AsyncClient) -> None:
    """However short the time since; and an end by a signal does not lose what is on its way."""
    first = await (await in_loop.connect()).watch()
    await aqmp.add("before", data="x")
    late = await (await in_loop.connect()).watch()
    await aqmp.add("after", data="x")
    in_loop.server.stop()
    assert (await late.event())["data"]["id"] == "after"
    assert [(await first.event())["data"]["id"] for _ in range(2)] == ["before", "after"]
    assert await late.line() == b""


async def test_shutdown_reaches_all_connections(in_loop: Served, aqmp: AsyncClient) -> None:
    """SHUTDOWN also reaches its own connection, before the reply, as in QEMU."""
    other = await (await in_loop.connect()).watch()
    assert (await aqmp.cmd("quit"))["event"] == "SHUTDOWN"
    assert await aqmp.reply() == {"return": {}}
    assert (await other.message())["data"] == {"guest": False, "reason": "host-qmp-quit"}


# --- reads and refusals, and the client socket


@pytest.fixture
async def granted(in_loop: Served, aqmp: AsyncClient) -> AsyncClient:
    """Secrets web.a, web.b and db; uid 1000 and 1001 may read web.*."""
    need_root()
    for name in ("web.a", "web.b", "db"):
        await aqmp.add(name, data="letmein")
    await aqmp.allow("web", "uid:1000", "uid:1001")
    await aqmp.grant("g", "web.*", "web")
    return aqmp


async def received(client: AsyncClient, count: int) -> list[tuple[str, str]]:
    events = [await client.event() for _ in range(count)]
    return [(e["event"], e["data"]["id"]) for e in events]


async def refused(client: AsyncClient, name: str) -> None:
    source, sink = os.pipe()
    assert (await client.fail("secret-read", {"id": name}, (sink,))).endswith("is not permitted")
    os.close(source)
    os.close(sink)


async def test_reads_and_refusals_are_events_on_the_control_socket(
    in_loop: Served, granted: AsyncClient
) -> None:
    """With the peer; the causing connection gets none."""
    watching = await (await in_loop.connect()).watch()
    client = await in_loop.connect(role="client", uid=1000)
    await client.read("web.a")
    await refused(client, "db")
    await refused(client, "no such \u20ac")
    events = [await watching.event() for _ in range(3)]
    peer = {"uid": 1000, "gid": 1000, "pid": os.getpid()}
    for event in events:
        event["data"]["peer"].pop("unit", None)
    assert [(e["event"], e["data"]) for e in events] == [
        ("SECRET_READ", {"id": "web.a", "peer": peer}),
        ("SECRET_DENIED", {"id": "db", "peer": peer}),
        ("SECRET_DENIED", {"id": "no such \u20ac", "peer": peer}),
    ]
    assert await client.ok("query-version")
    assert client.events == []


@pytest.mark.slow
async def test_client_connections_get_events_of_readable_secrets(
    in_loop: Served, granted: AsyncClient
) -> None:
    """Without the peer."""
    client = await (await in_loop.connect(role="client", uid=1000)).watch()
    stranger = await (await in_loop.connect(role="client", uid=1002)).watch()
    other = await in_loop.connect(role="client", uid=1001)
    await granted.ok("object-del", {"id": "db"})
    await granted.add("db", data="x")
    await granted.add("web.c", data="x")
    assert await received(client, 1) == [("SECRET_ADDED", "web.c")]
    await refused(stranger, "db")
    await refused(stranger, "web.b")
    await other.read("web.a")
    await granted.read("db")
    assert sorted(await received(client, 2)) == [
        ("SECRET_DENIED", "web.b"),
        ("SECRET_READ", "web.a"),
    ]
    await granted.ok("secret-expire", {"id": "web.c", "after": 1})
    await granted.ok("object-del", {"id": "web.b"})
    event = await client.event()
    assert (event["event"], event["data"]) == ("SECRET_DELETED", {"id": "web.b"})
    event = await client.event()
    assert (event["event"], event["data"]) == ("SECRET_EXPIRED", {"id": "web.c"})
    await granted.ok("object-del", {"id": "g"})
    await granted.ok("object-del", {"id": "web.a"})
    in_loop.server.core.broadcaster.flush()
    for each in (client, stranger):
        assert await each.ok("query-version")
        assert each.events == []


@pytest.mark.slow
@pytest.mark.tuning(throttled_seconds=0.3, events_seconds=1000.0)
async def test_reads_of_one_secret_are_events_once_a_second(
    in_loop: Served, granted: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first at once, the last at the end of the second; each secret for itself."""
    client = await in_loop.connect(role="client", uid=1000)
    watching = await (await in_loop.connect()).watch()
    for _ in range(5):
        await client.read("web.a")
        in_loop.server.core.broadcaster.flush()
    await client.read("web.b")
    await granted.read("web.b")
    in_loop.server.core.broadcaster.flush()
    assert await received(watching, 2) == [("SECRET_READ", "web.a"), ("SECRET_READ", "web.b")]
    assert await watching.ok("query-name") == {}
    assert watching.events == []
    assert await received(watching, 1) == [("SECRET_READ", "web.a")]
    while any(s.throttle and s.throttle._next for s in in_loop.server.sessions):
        await asyncio.sleep(0)
    assert await watching.ok("query-name") == {}
    assert watching.events == []
    await client.read("web.a")
    in_loop.server.core.broadcaster.flush()
    assert await received(watching, 1) == [("SECRET_READ", "web.a")]


@pytest.mark.tuning(throttled_ids=5)
async def test_what_cannot_be_throttled_is_lost_and_counted(
    in_loop: Served, granted: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that asks for a thousand names fills no memory, and hides no event of others for
    long.
    """
    client = await in_loop.connect(role="client", uid=1002)
    watching = await (await in_loop.connect()).watch()
    theirs = await (await in_loop.connect(role="client", uid=1001)).watch()
    for number in range(20):
        await refused(client, f"n{number}")
    in_loop.server.core.broadcaster.flush()
    got = lost = 0
    while got + lost < 16:
        event = await watching.event()
        if event["event"] == "SECRET_EVENTS_LOST":
            lost += event["data"]["count"]
        else:
            assert event["event"] == "SECRET_DENIED"
            got += 1
    assert (got, lost) == (5, 11)  # of the 16 that one uid may cause within a second
    # None of it concerned the client socket, which loses nothing and hears of nothing.
    await granted.read("web.a")
    assert await received(theirs, 1) == [("SECRET_READ", "web.a")]


@pytest.mark.tuning(queued_events=3)
async def test_what_finds_no_room_is_counted_on_the_control_socket(
    in_loop: Served, granted: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More events at once than are kept."""
    watching = await (await in_loop.connect()).watch()
    client = await (await in_loop.connect(role="client", uid=1000)).watch()
    in_loop.server.core.broadcaster.flush()
    burst(in_loop, 10)
    names = [(await watching.event())["event"] for _ in range(4)]
    assert names.count("SECRET_EVENTS_LOST") == 1
    assert await received(client, 3) == [("SECRET_ADDED", f"web.{n}") for n in range(3)]
    assert await client.ok("query-version")
    assert client.events == []


def burst(in_loop: Served, count: int) -> None:
    """So many events at once that no connection has caused."""
    for number in range(count):
        in_loop.server.core.announce("SECRET_ADDED", f"web.{number}", None, None)


async def test_the_time_of_an_event_tells_nothing_of_others(
    in_loop: Served, granted: AsyncClient
) -> None:
    """Events are sent at the ticks of a clock, whatever else there is to send."""
    await (await in_loop.connect()).watch()
    broadcaster = in_loop.server.core.broadcaster

    def scheduled() -> list[float]:
        broadcaster.flush()
        handles = []
        for name in ("db", "web.a"):
            broadcaster._ticking = False
            in_loop.server.core.announce("SECRET_ADDED", name, None, None)
            handles += [h for h in asyncio.get_running_loop()._scheduled if "_tick" in repr(h)]
        return [h.when() / Tuning.events_seconds for h in handles]

    for when in scheduled():
        assert abs(when - round(when)) < 1e-6


@pytest.mark.slow
@pytest.mark.tuning(throttled_seconds=0.2)
async def test_a_held_event_is_not_sent_after_a_revocation(
    in_loop: Served, granted: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it happened before."""
    client = await in_loop.connect(role="client", uid=1000)
    await client.watch()
    for _ in range(2):
        await granted.read("web.a")
        in_loop.server.core.broadcaster.flush()
    await granted.ok("object-del", {"id": "g"})
    assert await received(client, 1) == [("SECRET_READ", "web.a")]
    while any(s.throttle and s.throttle._next for s in in_loop.server.sessions):
        await asyncio.sleep(0)
    assert await client.ok("query-version")
    assert client.events == []


@pytest.mark.tuning(throttled_seconds=0.1)
async def test_a_connection_that_ends_takes_its_throttle_along(
    in_loop: Served, granted: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No timer stays behind."""
    watching = await (await in_loop.connect()).watch()
    client = await in_loop.connect(role="client", uid=1000)
    for _ in range(2):
        await client.read("web.a")
        in_loop.server.core.broadcaster.flush()
    assert await received(watching, 2) == [("SECRET_READ", "web.a")] * 2
    watching.close()
    while len(in_loop.server.sessions) > 2:
        await asyncio.sleep(0)


@pytest.mark.slow
@pytest.mark.tuning(tick_events=2)
async def test_many_events_are_spread_over_ticks_and_none_is_lost(
    in_loop: Served, granted: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share at each tick; in order, and all of them."""
    watching = await (await in_loop.connect()).watch()
    sent: list[int] = []
    sessions = [
        s for s in in_loop.server.sessions if s in in_loop.server.core.broadcaster.subscribers
    ]
    (session,) = sessions
    send = session.send_events

    def watched(events: bytes, count: int) -> None:
        sent.append(count)
        send(events, count)

    session.send_events = watched  # type: ignore[method-assign]
    burst(in_loop, 50)
    assert await received(watching, 50) == [("SECRET_ADDED", f"web.{n}") for n in range(50)]
    assert max(sent) == 2
    assert sum(sent) == 50


@pytest.mark.tuning(queued_events=3, tick_events=1)
async def test_what_is_lost_is_reported_while_it_goes_on(
    in_loop: Served, granted: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once at first, and then not with each tick."""
    watching = await (await in_loop.connect()).watch()
    burst(in_loop, 10)
    first = [await watching.event() for _ in range(3)]
    assert "SECRET_EVENTS_LOST" in [e["event"] for e in first]
    burst(in_loop, 10)
    count = sum(e["data"].get("count", 1) for e in first)
    while count < 20:
        count += (await watching.event())["data"].get("count", 1)
    assert count == 20


# --- secret-events


async def test_events_come_only_to_those_that_ask(in_loop: Served, aqmp: AsyncClient) -> None:
    """QEMU sends its clients nothing about secrets, and some take an event for a reply. SHUTDOWN
    comes to all.
    """
    silent, asking = await in_loop.connect(), await (await in_loop.connect()).watch()
    await aqmp.add("s", data="x")
    assert (await asking.event())["event"] == "SECRET_ADDED"
    assert await silent.ok("query-name") == {}
    assert silent.events == []
    await asking.ok("secret-events", {"enable": False})
    await aqmp.add("t", data="x")
    in_loop.server.core.broadcaster.flush()
    assert await asking.ok("query-name") == {}
    assert asking.events == []
    assert (await aqmp.cmd("quit"))["event"] == "SHUTDOWN"
    assert (await silent.message())["event"] == "SHUTDOWN"


async def test_events_can_be_chosen_by_name(in_loop: Served, aqmp: AsyncClient) -> None:
    """Others are not sent, and names that there are not are refused in QEMU's words."""
    some = await (await in_loop.connect()).watch("SECRET_DELETED")
    words = "Parameter 'null' does not accept value 'SHUTDOWN'"
    arguments = {"enable": True, "events": ["SHUTDOWN"]}
    assert await (await in_loop.connect()).fail("secret-events", arguments) == words
    await aqmp.add("s", data="x")
    await aqmp.ok("object-del", {"id": "s"})
    assert (await some.event())["event"] == "SECRET_DELETED"
    none = await in_loop.connect()
    await none.ok("secret-events", {"enable": True, "events": []})
    assert list(in_loop.server.core.broadcaster.subscribers) != []
    await aqmp.add("s", data="x")
    in_loop.server.core.broadcaster.flush()
    assert await none.ok("query-name") == {}
    assert none.events == []


@pytest.mark.slow
async def test_a_flood_of_refusals_leaves_room_for_other_events(
    in_loop: Served, granted: AsyncClient
) -> None:
    """One uid that is refused thousands of names takes 16 of them a second; nothing else is lost or
    late.
    """
    watching = await (await in_loop.connect()).watch()
    flooding = await in_loop.connect(role="client", uid=1002)
    source, sink = os.pipe()
    for number in range(2000):
        line = b'{"execute":"secret-read","arguments":{"id":"n%d-%s"}}\n' % (number, b"x" * 3000)
        await flooding.send(line, (sink,))
        await flooding.reply()
        if number % 100 == 0:
            await granted.ok("secret-generate", {"id": f"real{number}", "size": 32})
    os.close(source)
    os.close(sink)
    in_loop.server.core.broadcaster.flush()
    await watching.ok("query-name")
    names = [(e["event"], e["data"].get("id")) for e in watching.events]
    assert [n for e, n in names if e == "SECRET_ADDED"] == [f"real{n}" for n in range(0, 2000, 100)]
    assert "SECRET_EVENTS_LOST" not in [e for e, _ in names]
    broadcaster = in_loop.server.core.broadcaster
    assert (len(broadcaster._by_uid) + len(broadcaster._log)) == 0


@pytest.mark.tuning(queued_events_per_uid=2, events_seconds=1000.0)
async def test_events_of_one_uid_have_room_of_their_own(
    in_loop: Served, granted: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes beyond is counted; the events of others stay."""
    watching = await (await in_loop.connect()).watch()
    client = await in_loop.connect(role="client", uid=1000)
    for name in ("web.a", "web.b", "web.a"):
        await client.read(name)
    await granted.read("db")
    in_loop.server.core.broadcaster.flush()
    seen = [await watching.event() for _ in range(4)]
    events = [(e["event"], e["data"].get("id") or e["data"]) for e in seen]
    assert sorted(map(str, events)) == sorted(
        map(
            str,
            [
                ("SECRET_READ", "db"),
                ("SECRET_READ", "web.a"),
                ("SECRET_READ", "web.b"),
                ("SECRET_EVENTS_LOST", {"count": 1}),
            ],
        )
    )


@pytest.mark.tuning(slice_seconds=0.0)
async def test_many_subscribers_are_served_in_slices(
    in_loop: Served, aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests have their turn between them, and none of the subscribers is forgotten."""
    watching = [await (await in_loop.connect()).watch() for _ in range(20)]
    broadcaster = in_loop.server.core.broadcaster
    turns: list[int] = []
    deliver = broadcaster._deliver

    def counted() -> None:
        turns.append(len(broadcaster._waiting))
        deliver()

    broadcaster._deliver = counted  # type: ignore[method-assign]
    await aqmp.add("s", data="x")
    for each in watching:
        assert (await each.event())["data"]["id"] == "s"
    assert turns == list(range(20, 0, -1))
    watching[0].close()
    await watching[1].ok("secret-events", {"enable": False})
    await aqmp.add("t", data="x")
    for each in watching[2:]:
        assert (await each.event())["data"]["id"] == "t"


@pytest.mark.tuning(slice_seconds=0.0, slice_pause=2.0)
async def test_events_take_at_most_a_third_of_the_time(
    in_loop: Served, aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each slice, requests have twice as long, by a clock that the test moves."""
    watching = [await (await in_loop.connect()).watch() for _ in range(4)]
    broadcaster = in_loop.server.core.broadcaster
    clock = itertools.count()  # each look at it takes a second
    pauses: list[float] = []

    def deliver_at(when: float) -> None:
        pauses.append(when - next(clock) + 1)
        broadcaster._delivering = True
        asyncio.get_running_loop().call_soon(broadcaster._deliver)

    monkeypatch.setattr("secretd.monitor.broadcast.monotonic", lambda: next(clock))
    broadcaster._deliver_at = deliver_at  # type: ignore[method-assign]
    await aqmp.add("s", data="x")
    for each in watching:
        assert (await each.event())["data"]["id"] == "s"
    # A slice: its start, its only look at the clock, and its end.
    assert pauses == [2 * 2.0] * 3


@pytest.mark.tuning(log_events=1_000, tick_events=1_000, events_seconds=1e-06)
async def test_many_events_are_sent_in_batches_and_in_order(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """A subscriber that is behind gets one batch after the other; nothing stays in the log."""
    watching = [await (await in_loop.connect()).watch() for _ in range(3)]
    broadcaster = in_loop.server.core.broadcaster
    count = 2 * BATCH_EVENTS + 7
    for number in range(count):
        full = b'{"event": "X", "data": {"id": "%d"}}\r\n' % number
        broadcaster.publish("SECRET_ADDED", f"s{number}", full, full, None, None)
    for each in watching:
        assert [(await each.event())["data"]["id"] for _ in range(count)] == [
            str(number) for number in range(count)
        ]
    while len(broadcaster._waiting) + len(broadcaster._log):
        await asyncio.sleep(0)


@pytest.mark.tuning(slice_seconds=0.0)
async def test_subscribing_again_during_a_delivery_stops_no_other(
    in_loop: Served, aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All get the next event, and nothing is kept any more."""
    watching = [await (await in_loop.connect()).watch() for _ in range(5)]
    broadcaster = in_loop.server.core.broadcaster

    def again() -> None:
        if len(broadcaster._waiting) == 3 and not anew:
            first = broadcaster._waiting[0]
            anew.append(first)
            broadcaster.unsubscribe(first)
            broadcaster.subscribe(first)
        deliver()

    anew: list[object] = []
    deliver = broadcaster._deliver
    broadcaster._deliver = again  # type: ignore[method-assign]
    await aqmp.add("s", data="x")
    while not (anew and not broadcaster._waiting):
        await asyncio.sleep(0)
    await aqmp.add("t", data="x")
    for each in watching:
        while (await each.event())["data"]["id"] != "t":
            pass
    while len(broadcaster._waiting) + len(broadcaster._log):
        await asyncio.sleep(0)


@pytest.mark.tuning(log_events=5, events_seconds=1e-06, tick_events=5, slice_seconds=0.0)
async def test_events_that_are_being_sent_are_limited(
    in_loop: Served, aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further ones wait in the queues, and come after them."""
    watching = [await (await in_loop.connect()).watch() for _ in range(10)]
    broadcaster = in_loop.server.core.broadcaster
    longest = 0
    take = broadcaster._take

    def measured(of_trusted: int, of_each: int) -> None:
        nonlocal longest
        take(of_trusted, of_each)
        longest = max(longest, len(broadcaster._log))

    broadcaster._take = measured  # type: ignore[method-assign]
    burst(in_loop, 30)
    got = [[(await each.event())["data"]["id"] for _ in range(30)] for each in watching]
    assert all(each == got[0] for each in got)
    assert len(set(got[0])) == 30
    assert longest < 10


@pytest.mark.tuning(log_events=3, events_seconds=1000.0, slice_seconds=0.0)
async def test_everything_is_sent_at_the_end(in_loop: Served, granted: AsyncClient) -> None:
    """Also what found no room in the log, and what waited for its slice."""
    watching = [await (await in_loop.connect()).watch() for _ in range(3)]
    client = await in_loop.connect(role="client", uid=1000)
    for _ in range(30):
        await client.read("web.a")
        await client.read("web.b")
    burst(in_loop, 10)
    broadcaster = in_loop.server.core.broadcaster
    broadcaster._tick()
    broadcaster.flush()
    assert not broadcaster._log
    for each in watching:
        names = [await received(each, 1) for _ in range(12)]
        assert [("SECRET_READ", "web.a")] in names


@pytest.mark.tuning(throttled_seconds=0.05)
async def test_a_connection_that_ends_during_an_event_gets_no_more(
    in_loop: Served, granted: AsyncClient
) -> None:
    """What was held back for it is dropped."""
    await (await in_loop.connect()).watch()
    client = await in_loop.connect(role="client", uid=1000)
    (session,) = in_loop.server.core.broadcaster.subscribers
    for name in ("web.a", "web.a", "web.b", "web.b"):
        await client.read(name)
        in_loop.server.core.broadcaster.flush()
    sent: list[bytes] = []

    def end(events: bytes, _count: int) -> None:
        sent.append(events)
        session.transport.close()

    session.send_events = end  # type: ignore[method-assign, assignment]
    while not sent:
        await asyncio.sleep(0)
    assert len(sent) == 1


async def test_grants_are_events_on_control_sockets_only(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """Added, deleted and expired; a client with a grant for everything sees none of them."""
    need_root()
    watcher = await (await in_loop.connect()).watch()
    await aqmp.allow("a", f"uid:{1000}")
    await aqmp.grant("all", "*", "a")
    client = await (await in_loop.connect(role="client", uid=1000)).watch()
    await aqmp.grant("g", "web.*", "a")
    await aqmp.ok("object-del", {"id": "g"})
    await aqmp.grant("short", "s", "a", **{"expires-after": 1})
    seen = [await watcher.event() for _ in range(5)]
    assert [(e["event"], e["data"]["id"], e["data"].get("secret")) for e in seen] == [
        ("SECRET_GRANTED", "all", "*"),
        ("SECRET_GRANTED", "g", "web.*"),
        ("SECRET_REVOKED", "g", None),
        ("SECRET_GRANTED", "short", "s"),
        ("SECRET_REVOKED", "short", None),
    ]
    assert ["peer" in event["data"] for event in seen] == [True] * 4 + [False]
    await aqmp.add("s", data="x")
    assert (await client.event())["event"] == "SECRET_ADDED"
