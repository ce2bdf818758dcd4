# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events about secrets: who gets them, what is in them, and what happens to who does not read."""

import os
import time
from pathlib import Path

from tests.conftest import Client, Daemon


def test_the_other_connections_learn_what_one_does(daemon: Daemon, qmp: Client) -> None:
    """Added and deleted, with who did it; never a value. Who did it has the reply."""
    other = daemon.connect()
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
    other = daemon.connect()
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


def test_neither_the_client_door_nor_who_has_not_negotiated_gets_them(
    daemon: Daemon, qmp: Client
) -> None:
    """Events come after negotiation, as in QEMU."""
    client = daemon.connect(door="client")
    silent = daemon.connect(negotiate=False)
    qmp.add("s", data="letmein")
    assert client.ok("query-version")
    assert client.events == []
    assert "QMP" in silent.message()
    assert silent.cmd("qmp_capabilities") == {"return": {}}
    assert silent.events == []


def test_who_does_not_read_loses_events_and_is_told_how_many(daemon: Daemon, qmp: Client) -> None:
    """The daemon keeps few; others are not held up."""
    lazy = daemon.connect()
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
    first = daemon.connect()
    qmp.add("before", data="x")
    late = daemon.connect()
    qmp.add("after", data="x")
    daemon.call(daemon.server.stop)
    assert late.event()["data"]["id"] == "after"
    assert [first.event()["data"]["id"] for _ in range(2)] == ["before", "after"]
    assert late.line() == b""


def test_the_end_is_told_to_all(daemon: Daemon, qmp: Client) -> None:
    """SHUTDOWN also to who asked for it, before the reply, as in QEMU."""
    other = daemon.connect()
    assert qmp.cmd("quit")["event"] == "SHUTDOWN"
    assert qmp.reply() == {"return": {}}
    assert other.message()["data"] == {"guest": False, "reason": "host-qmp-quit"}
