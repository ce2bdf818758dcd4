# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events about secrets: which connections get them, what is in them, what becomes of those that do
not read.
"""

import os
import time
from pathlib import Path

import pytest

from secretd.limits import Tuning
from tests.support.daemon import Daemon
from tests.support.grants import allow, grant
from tests.support.needs import need_root
from tests.support.qmp import Client


def test_the_other_connections_learn_what_one_does(daemon: Daemon, qmp: Client) -> None:
    """Added and deleted, with who did it; never a value. Who did it has the reply."""
    other = daemon.connect().watch()
    before = int(time.time())
    assert qmp.add("s", data="letmein") == {"return": {}}
    event = other.event()
    assert event["timestamp"]["seconds"] >= before
    assert 0 <= event["timestamp"]["microseconds"] < 1_000_000
    peer = {"uid": os.getuid(), "gid": os.getgid(), "pid": os.getpid()}
    assert event["event"] == "SECRET_ADDED"
    assert event["data"] == {"id": "s", "peer": peer}
    assert qmp.ok("object-del", {"id": "s"}) == {}
    event = other.event()
    assert (event["event"], event["data"]) == ("SECRET_DELETED", {"id": "s", "peer": peer})
    assert qmp.ok("query-name") == {}
    assert qmp.events == []


def test_every_way_to_add_or_delete_is_told(daemon: Daemon, qmp: Client, tmp_path: Path) -> None:
    """From a file, generated, by the human monitor; but not what fails and what is no secret."""
    other = daemon.connect().watch()
    (tmp_path / "f").write_bytes(b"letmein")
    qmp.add("s", data="x", file="y")
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": "a", "identity": "x"})
    qmp.ok("object-del", {"id": "a"})
    qmp.fail("object-del", {"id": "a"})
    qmp.add("f", file=str(tmp_path / "f"))
    qmp.ok("secret-generate", {"id": "g", "size": 32})
    for line in ("object_add secret,id=h,data=x", "object_del h"):
        assert qmp.ok("human-monitor-command", {"command-line": line}) == ""
    events = [other.event() for _ in range(4)]
    assert [(e["event"], e["data"]["id"]) for e in events] == [
        ("SECRET_ADDED", "f"),
        ("SECRET_ADDED", "g"),
        ("SECRET_ADDED", "h"),
        ("SECRET_DELETED", "h"),
    ]


def test_neither_the_client_socket_nor_who_has_not_negotiated_gets_them(
    daemon: Daemon, qmp: Client
) -> None:
    """Events come after negotiation, as in QEMU."""
    client = daemon.connect(role="client")
    silent = daemon.connect(negotiate=False)
    qmp.add("s", data="letmein")
    assert client.ok("query-version")
    assert client.events == []
    assert "QMP" in silent.message()
    assert silent.cmd("qmp_capabilities") == {"return": {}}
    assert silent.events == []


@pytest.mark.slow
def test_who_does_not_read_loses_events_and_is_told_how_many(daemon: Daemon, qmp: Client) -> None:
    """The daemon keeps few; others are not held up."""
    lazy = daemon.connect().watch()
    pairs = 4000
    line = b'{"execute":"object-%s","arguments":{"id":"' + b"s" * 300 + b'"%s}}\n'
    both = line % (b"add", b',"qom-type":"secret","data":"x"') + line % (b"del", b"")
    for _ in range(pairs // 400):
        qmp.send(both * 400)
        for _ in range(800):
            assert qmp.reply() == {"return": {}}
    got = lost = 0
    while got + lost < 2 * pairs:
        event = lazy.event()
        if event["event"] == "SECRET_EVENTS_LOST":
            lost += event["data"]["count"]
        else:
            got += 1
    assert lost > 0
    assert got > 100
    qmp.add("t", data="x")
    assert lazy.event()["data"]["id"] == "t"


def test_who_comes_later_is_not_told_what_was_before(daemon: Daemon, qmp: Client) -> None:
    """However short the time since; and an end by a signal does not lose what is on its way."""
    first = daemon.connect().watch()
    qmp.add("before", data="x")
    late = daemon.connect().watch()
    qmp.add("after", data="x")
    daemon.call(daemon.server.stop)
    assert late.event()["data"]["id"] == "after"
    assert [first.event()["data"]["id"] for _ in range(2)] == ["before", "after"]
    assert late.line() == b""


def test_the_end_is_told_to_all(daemon: Daemon, qmp: Client) -> None:
    """SHUTDOWN also to who asked for it, before the reply, as in QEMU."""
    other = daemon.connect().watch()
    assert qmp.cmd("quit")["event"] == "SHUTDOWN"
    assert qmp.reply() == {"return": {}}
    assert other.message()["data"] == {"guest": False, "reason": "host-qmp-quit"}


# --- reads and refusals, and the client socket


@pytest.fixture
def granted(daemon: Daemon, qmp: Client) -> Client:
    """Secrets web.a, web.b and db; uid 1000 and 1001 may read web.*."""
    need_root()
    for name in ("web.a", "web.b", "db"):
        qmp.add(name, data="letmein")
    allow(qmp, "web", "uid:1000", "uid:1001")
    grant(qmp, "g", "web.*", "web")
    return qmp


def told(client: Client, count: int) -> list[tuple[str, str]]:
    return [(e["event"], e["data"]["id"]) for e in (client.event() for _ in range(count))]


def refused(client: Client, name: str) -> None:
    source, sink = os.pipe()
    assert client.fail("secret-read", {"id": name}, (sink,)).endswith("is not permitted")
    os.close(source)
    os.close(sink)


def test_reads_and_refusals_are_told_on_the_control_socket(daemon: Daemon, granted: Client) -> None:
    """With who it was; not to who did it."""
    watching = daemon.connect().watch()
    client = daemon.connect(role="client", uid=1000)
    client.read("web.a")
    refused(client, "db")
    refused(client, "no such \u20ac")
    events = [watching.event() for _ in range(3)]
    peer = {"uid": 1000, "gid": 1000, "pid": os.getpid()}
    for event in events:
        event["data"]["peer"].pop("unit", None)
    assert [(e["event"], e["data"]) for e in events] == [
        ("SECRET_READ", {"id": "web.a", "peer": peer}),
        ("SECRET_DENIED", {"id": "db", "peer": peer}),
        ("SECRET_DENIED", {"id": "no such \u20ac", "peer": peer}),
    ]
    assert client.ok("query-version")
    assert client.events == []


@pytest.mark.slow
def test_the_client_socket_is_told_of_what_it_may_read_and_of_nothing_else(
    daemon: Daemon, granted: Client
) -> None:
    """Without who did it."""
    client = daemon.connect(role="client", uid=1000).watch()
    stranger = daemon.connect(role="client", uid=1002).watch()
    other = daemon.connect(role="client", uid=1001)
    granted.ok("object-del", {"id": "db"})
    granted.add("db", data="x")
    granted.add("web.c", data="x")
    assert told(client, 1) == [("SECRET_ADDED", "web.c")]
    refused(stranger, "db")
    refused(stranger, "web.b")
    other.read("web.a")
    granted.read("db")
    assert sorted(told(client, 2)) == [("SECRET_DENIED", "web.b"), ("SECRET_READ", "web.a")]
    granted.ok("secret-expire", {"id": "web.c", "after": 1})
    granted.ok("object-del", {"id": "web.b"})
    event = client.event()
    assert (event["event"], event["data"]) == ("SECRET_DELETED", {"id": "web.b"})
    event = client.event()
    assert (event["event"], event["data"]) == ("SECRET_EXPIRED", {"id": "web.c"})
    granted.ok("object-del", {"id": "g"})
    granted.ok("object-del", {"id": "web.a"})
    daemon.call(daemon.server.core.broadcaster.flush)
    for each in (client, stranger):
        assert each.ok("query-version")
        assert each.events == []


@pytest.mark.slow
@pytest.mark.tuning(throttled_seconds=0.3, events_seconds=1000.0)
def test_reads_of_one_secret_are_told_once_a_second(
    daemon: Daemon, granted: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first at once, the last at the end of the second; each secret for itself."""
    client = daemon.connect(role="client", uid=1000)
    watching = daemon.connect().watch()
    for _ in range(5):
        client.read("web.a")
        daemon.call(daemon.server.core.broadcaster.flush)
    client.read("web.b")
    granted.read("web.b")
    daemon.call(daemon.server.core.broadcaster.flush)
    assert told(watching, 2) == [("SECRET_READ", "web.a"), ("SECRET_READ", "web.b")]
    assert watching.ok("query-name") == {}
    assert watching.events == []
    assert told(watching, 1) == [("SECRET_READ", "web.a")]
    while daemon.call(lambda: any(s.throttle and s.throttle._next for s in daemon.server.sessions)):
        pass
    assert watching.ok("query-name") == {}
    assert watching.events == []
    client.read("web.a")
    daemon.call(daemon.server.core.broadcaster.flush)
    assert told(watching, 1) == [("SECRET_READ", "web.a")]


@pytest.mark.tuning(throttled_ids=5)
def test_what_cannot_be_throttled_is_lost_and_counted(
    daemon: Daemon, granted: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who asks for a thousand names fills no memory, and hides no event of others for
    long.
    """
    client = daemon.connect(role="client", uid=1002)
    watching = daemon.connect().watch()
    theirs = daemon.connect(role="client", uid=1001).watch()
    for number in range(20):
        refused(client, f"n{number}")
    daemon.call(daemon.server.core.broadcaster.flush)
    got = lost = 0
    while got + lost < 16:
        event = watching.event()
        if event["event"] == "SECRET_EVENTS_LOST":
            lost += event["data"]["count"]
        else:
            assert event["event"] == "SECRET_DENIED"
            got += 1
    assert (got, lost) == (5, 11)  # of the 16 that one uid may cause within a second
    # None of it concerned the client socket, which loses nothing and hears of nothing.
    granted.read("web.a")
    assert told(theirs, 1) == [("SECRET_READ", "web.a")]


@pytest.mark.tuning(queued_events=3)
def test_what_finds_no_room_is_counted_on_the_control_socket(
    daemon: Daemon, granted: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More events at once than are kept."""
    watching = daemon.connect().watch()
    client = daemon.connect(role="client", uid=1000).watch()
    daemon.call(daemon.server.core.broadcaster.flush)
    daemon.call(lambda: burst(daemon, 10))
    names = [watching.event()["event"] for _ in range(4)]
    assert names.count("SECRET_EVENTS_LOST") == 1
    assert told(client, 3) == [("SECRET_ADDED", f"web.{n}") for n in range(3)]
    assert client.ok("query-version")
    assert client.events == []


def burst(daemon: Daemon, count: int) -> None:
    """So many events at once that no connection has caused."""
    for number in range(count):
        daemon.server.core.announce("SECRET_ADDED", f"web.{number}", None, None)


def test_the_time_of_an_event_tells_nothing_of_others(daemon: Daemon, granted: Client) -> None:
    """Events are sent at the ticks of a clock, whatever else there is to send."""
    daemon.connect().watch()
    broadcaster = daemon.server.core.broadcaster

    def scheduled() -> list[float]:
        broadcaster.flush()
        handles = []
        for name in ("db", "web.a"):
            broadcaster._ticking = False
            daemon.server.core.announce("SECRET_ADDED", name, None, None)
            handles += [h for h in daemon.loop._scheduled if "_tick" in repr(h)]
        return [h.when() / Tuning.events_seconds for h in handles]

    for when in daemon.call(scheduled):
        assert abs(when - round(when)) < 1e-6


@pytest.mark.slow
@pytest.mark.tuning(throttled_seconds=0.2)
def test_what_was_held_back_is_not_told_after_a_revocation(
    daemon: Daemon, granted: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it happened before."""
    client = daemon.connect(role="client", uid=1000)
    client.watch()
    for _ in range(2):
        granted.read("web.a")
        daemon.call(daemon.server.core.broadcaster.flush)
    granted.ok("object-del", {"id": "g"})
    assert told(client, 1) == [("SECRET_READ", "web.a")]
    while daemon.call(lambda: any(s.throttle and s.throttle._next for s in daemon.server.sessions)):
        pass
    assert client.ok("query-version")
    assert client.events == []


@pytest.mark.tuning(throttled_seconds=0.1)
def test_a_connection_that_ends_takes_its_throttle_along(
    daemon: Daemon, granted: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No timer stays behind."""
    watching = daemon.connect().watch()
    client = daemon.connect(role="client", uid=1000)
    for _ in range(2):
        client.read("web.a")
        daemon.call(daemon.server.core.broadcaster.flush)
    assert told(watching, 2) == [("SECRET_READ", "web.a")] * 2
    watching.close()
    while daemon.call(lambda: len(daemon.server.sessions)) > 2:
        pass


@pytest.mark.slow
@pytest.mark.tuning(tick_events=2)
def test_many_events_are_spread_over_ticks_and_none_is_lost(
    daemon: Daemon, granted: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share at each tick; in order, and all of them."""
    watching = daemon.connect().watch()
    sent: list[int] = []
    sessions = [
        s for s in daemon.server.sessions if s in daemon.server.core.broadcaster.subscribers
    ]
    (session,) = sessions
    send = session.send_events

    def watched(events: bytes, count: int) -> None:
        sent.append(count)
        send(events, count)

    session.send_events = watched
    daemon.call(lambda: burst(daemon, 50))
    assert told(watching, 50) == [("SECRET_ADDED", f"web.{n}") for n in range(50)]
    assert max(sent) == 2
    assert sum(sent) == 50


@pytest.mark.tuning(queued_events=3, tick_events=1)
def test_what_is_lost_is_reported_while_it_goes_on(
    daemon: Daemon, granted: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once at first, and then not with each tick."""
    watching = daemon.connect().watch()
    daemon.call(lambda: burst(daemon, 10))
    first = [watching.event() for _ in range(3)]
    assert "SECRET_EVENTS_LOST" in [e["event"] for e in first]
    daemon.call(lambda: burst(daemon, 10))
    count = sum(e["data"].get("count", 1) for e in first)
    while count < 20:
        count += watching.event()["data"].get("count", 1)
    assert count == 20


# --- secret-events


def test_events_come_only_to_those_that_ask(daemon: Daemon, qmp: Client) -> None:
    """QEMU sends its clients nothing about secrets, and some take an event for a reply. SHUTDOWN
    comes to all.
    """
    silent, asking = daemon.connect(), daemon.connect().watch()
    qmp.add("s", data="x")
    assert asking.event()["event"] == "SECRET_ADDED"
    assert silent.ok("query-name") == {}
    assert silent.events == []
    asking.ok("secret-events", {"enable": False})
    qmp.add("t", data="x")
    daemon.call(daemon.server.core.broadcaster.flush)
    assert asking.ok("query-name") == {}
    assert asking.events == []
    assert qmp.cmd("quit")["event"] == "SHUTDOWN"
    assert silent.message()["event"] == "SHUTDOWN"


def test_events_can_be_chosen_by_name(daemon: Daemon, qmp: Client) -> None:
    """Others are not sent, and names that there are not are refused in QEMU's words."""
    some = daemon.connect().watch("SECRET_DELETED")
    words = "Parameter 'null' does not accept value 'SHUTDOWN'"
    arguments = {"enable": True, "events": ["SHUTDOWN"]}
    assert daemon.connect().fail("secret-events", arguments) == words
    qmp.add("s", data="x")
    qmp.ok("object-del", {"id": "s"})
    assert some.event()["event"] == "SECRET_DELETED"
    none = daemon.connect()
    none.ok("secret-events", {"enable": True, "events": []})
    assert list(daemon.server.core.broadcaster.subscribers) != []
    qmp.add("s", data="x")
    daemon.call(daemon.server.core.broadcaster.flush)
    assert none.ok("query-name") == {}
    assert none.events == []


@pytest.mark.slow
def test_a_flood_of_refusals_leaves_room_for_the_events_of_others(
    daemon: Daemon, granted: Client
) -> None:
    """One uid that is refused thousands of names takes 16 of them a second; nothing else is lost or
    late.
    """
    watching = daemon.connect().watch()
    flooding = daemon.connect(role="client", uid=1002)
    source, sink = os.pipe()
    for number in range(2000):
        line = b'{"execute":"secret-read","arguments":{"id":"n%d-%s"}}\n' % (number, b"x" * 3000)
        flooding.send(line, (sink,))
        flooding.reply()
        if number % 100 == 0:
            granted.ok("secret-generate", {"id": f"real{number}", "size": 32})
    os.close(source)
    os.close(sink)
    daemon.call(daemon.server.core.broadcaster.flush)
    watching.ok("query-name")
    names = [(e["event"], e["data"].get("id")) for e in watching.events]
    assert [n for e, n in names if e == "SECRET_ADDED"] == [f"real{n}" for n in range(0, 2000, 100)]
    assert "SECRET_EVENTS_LOST" not in [e for e, _ in names]
    broadcaster = daemon.server.core.broadcaster
    assert daemon.call(lambda: len(broadcaster._by_uid) + len(broadcaster._log)) == 0


@pytest.mark.tuning(queued_events_per_uid=2, events_seconds=1000.0)
def test_events_of_one_uid_have_room_of_their_own(
    daemon: Daemon, granted: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes beyond is counted; the events of others stay."""
    watching = daemon.connect().watch()
    client = daemon.connect(role="client", uid=1000)
    for name in ("web.a", "web.b", "web.a"):
        client.read(name)
    granted.read("db")
    daemon.call(daemon.server.core.broadcaster.flush)
    seen = [watching.event() for _ in range(4)]
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
def test_many_subscribers_are_served_in_slices(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests have their turn between them, and none of the subscribers is forgotten."""
    watching = [daemon.connect().watch() for _ in range(20)]
    broadcaster = daemon.server.core.broadcaster
    turns: list[int] = []
    deliver = broadcaster._deliver

    def counted() -> None:
        turns.append(len(broadcaster._waiting))
        deliver()

    broadcaster._deliver = counted  # type: ignore[method-assign]
    qmp.add("s", data="x")
    for each in watching:
        assert each.event()["data"]["id"] == "s"
    assert turns == list(range(20, 0, -1))
    watching[0].close()
    watching[1].ok("secret-events", {"enable": False})
    qmp.add("t", data="x")
    for each in watching[2:]:
        assert each.event()["data"]["id"] == "t"


@pytest.mark.tuning(slice_seconds=0.0)
def test_turning_events_on_anew_during_a_delivery_stops_it_for_nobody(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All get the next event, and nothing is kept any more."""
    watching = [daemon.connect().watch() for _ in range(5)]
    broadcaster = daemon.server.core.broadcaster

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
    qmp.add("s", data="x")
    while not daemon.call(lambda: anew and not broadcaster._waiting):
        pass
    qmp.add("t", data="x")
    for each in watching:
        while each.event()["data"]["id"] != "t":
            pass
    while daemon.call(lambda: len(broadcaster._waiting) + len(broadcaster._log)):
        pass


@pytest.mark.tuning(log_events=5, events_seconds=1e-06, tick_events=5, slice_seconds=0.0)
def test_events_that_are_being_sent_are_limited(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further ones wait in the queues, and come after them."""
    watching = [daemon.connect().watch() for _ in range(10)]
    broadcaster = daemon.server.core.broadcaster
    longest = 0
    take = broadcaster._take

    def measured(of_trusted: int, of_each: int) -> None:
        nonlocal longest
        take(of_trusted, of_each)
        longest = max(longest, len(broadcaster._log))

    broadcaster._take = measured  # type: ignore[method-assign]
    daemon.call(lambda: burst(daemon, 30))
    got = [[each.event()["data"]["id"] for _ in range(30)] for each in watching]
    assert all(each == got[0] for each in got)
    assert len(set(got[0])) == 30
    assert longest < 10
