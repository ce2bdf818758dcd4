# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ends by itself: secrets and grants with a lifetime."""

import asyncio
import os

import pytest

from secretd.qom import deadlines as module
from secretd.qom.deadlines import LIFETIME_SECONDS, Deadlines, now
from tests.support.daemon import Daemon
from tests.support.grants import allow, begin_delivery, denied, drained, grant
from tests.support.needs import need_root
from tests.support.qmp import Client

SECOND = 1_000_000_000


def end_soon(daemon: Daemon, object_id: str, nanoseconds: int = 1_000_000) -> None:
    """Let an object's time be over in a moment, as if its seconds had passed."""
    daemon.call(lambda: daemon.tree.deadlines.set(object_id, now() + nanoseconds))


@pytest.mark.slow
def test_a_secret_with_a_lifetime_is_wiped_at_its_end(daemon: Daemon, qmp: Client) -> None:
    """An event says so; the time that is left is listed until then."""
    other = daemon.connect().watch()
    qmp.watch()
    qmp.add("s", data="letmein")
    assert "expires-in" not in qmp.secrets()[0]
    assert qmp.ok("secret-expire", {"id": "s", "after": 1}) == {}
    assert qmp.secrets()[0]["expires-in"] == 1
    assert other.event()["event"] == "SECRET_ADDED"
    event = other.event()
    assert (event["event"], event["data"]) == ("SECRET_EXPIRED", {"id": "s"})
    assert qmp.event() == event
    assert qmp.secrets() == []
    assert qmp.fail("object-del", {"id": "s"}) == "object 's' not found"
    assert daemon.call(lambda: daemon.journal.arena.held) == 0
    qmp.add("s", data="again")
    assert qmp.read("s") == b"again"


def test_a_lifetime_can_be_changed_and_ends_with_the_secret(daemon: Daemon, qmp: Client) -> None:
    """The last word counts; another secret of that id has its own."""
    qmp.add("s", data="letmein")
    qmp.ok("secret-expire", {"id": "s", "after": 1})
    qmp.ok("secret-expire", {"id": "s", "after": 5000})
    assert qmp.secrets()[0]["expires-in"] == 5000
    qmp.ok("object-del", {"id": "s"})
    qmp.add("s", data="letmein")
    assert "expires-in" not in qmp.secrets()[0]
    for after in (0, -1, LIFETIME_SECONDS + 1):
        assert qmp.fail("secret-expire", {"id": "s", "after": after}) == (
            f"Parameter 'after' expects a number of seconds between 1 and {LIFETIME_SECONDS}"
        )
    assert qmp.fail("secret-expire", {"id": "t", "after": 1}) == "No secret with id 't'"
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": "a", "identity": "x"})
    assert (
        qmp.fail("secret-expire", {"id": "a", "after": 1}) == "Object with id 'a' is not a secret"
    )
    qmp.ok("secret-expire", {"id": "s", "after": LIFETIME_SECONDS})
    assert qmp.secrets()[0]["expires-in"] == LIFETIME_SECONDS


def test_time_is_checked_at_each_access(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not the timer has come yet, as after the machine slept."""
    qmp.add("s", data="letmein")
    qmp.ok("secret-generate", {"id": "k", "size": 32})
    qmp.ok("secret-expire", {"id": "s", "after": 1000})
    qmp.ok("secret-expire", {"id": "k", "after": 1000})
    late = now() + 1000 * SECOND
    monkeypatch.setattr(module, "now", lambda: late)
    source, sink = os.pipe()
    assert qmp.fail("secret-read", {"id": "s"}, (sink,)) == "No secret with id 's'"
    os.close(sink)
    assert os.read(source, 1) == b""
    os.close(source)
    assert qmp.secrets() == []
    assert qmp.ok("secret-explain", {"id": "s", "peer": []})["exists"] is False
    assert qmp.add("t", data="MTIz", keyid="k", format="base64")["error"]["desc"] == (
        "No secret with id 'k'"
    )


def test_a_delivery_ends_with_the_secrets_time(daemon: Daemon, qmp: Client) -> None:
    """And with the grant's."""
    need_root()
    qmp.ok("secret-generate", {"id": "big", "size": 1 << 20})
    reader = daemon.connect()
    source = begin_delivery(reader, "big")
    allow(qmp, "web", "uid:1000")
    grant(qmp, "g", "big", "web", **{"expires-after": 1000})
    client = daemon.connect(role="client", uid=1000)
    theirs = begin_delivery(client, "big")
    end_soon(daemon, "g")
    assert client.reply()["error"]["desc"] == "Secret 'big' was withdrawn"
    assert drained(theirs) < 1 << 20
    end_soon(daemon, "big")
    assert reader.reply()["error"]["desc"] == "Secret 'big' was withdrawn"
    assert drained(source) < 1 << 20


@pytest.mark.slow
def test_a_grant_with_a_lifetime_ends(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gone then, without a word to the clients; and before the timer comes it does not
    count.
    """
    need_root()
    qmp.add("s", data="letmein-" * 4)
    allow(qmp, "web", "uid:1000")
    grant(qmp, "g", "s", "web", **{"expires-after": 1})
    client = daemon.connect(role="client", uid=1000)
    assert not denied(client, "s")
    while daemon.call(lambda: "g" in daemon.journal):
        pass
    assert denied(client, "s")
    grant(qmp, "g", "s", "web", **{"expires-after": 1000})
    assert not denied(client, "s")
    with monkeypatch.context() as patch:
        late = now() + 1000 * SECOND
        patch.setattr(module, "now", lambda: late)
        assert denied(client, "s")
        (considered,) = qmp.ok("secret-explain", {"id": "s", "peer": ["uid:1000"]})["grants"]
        assert considered == {"grant": "g", "allowed": False, "reason": "the grant has expired"}
    assert not denied(client, "s")
    qmp.ok("qom-set", {"path": "g", "property": "expires-after", "value": 2000})
    assert daemon.call(lambda: daemon.tree.deadlines.remaining("g")) == 2000
    assert [e["event"] for e in client.events] == []


async def test_deadlines_are_kept_in_order_and_many_at_once_leave_others_their_turn() -> None:
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
    while len(ended) < 37:  # noqa: ASYNC110 - the timer tells no event
        await asyncio.sleep(0)
    assert deadlines.remaining("late") == 1000
    assert deadlines.remaining("gone") is None
    assert not deadlines.expired("late")
    deadlines.set("last", now() + SECOND // 1000)
    while len(ended) < 38:  # noqa: ASYNC110 - the timer tells no event
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
