# SPDX-License-Identifier: LGPL-2.1-or-later
"""The limits of each uid: at one all works, past it is refused by name, and others do not
notice.
"""

import os
import socket
from collections.abc import Callable

import pytest

from secretd import limits
from secretd.errors import LimitReached
from secretd.limits import Limits, SharedQuota
from tests.support.daemon import Daemon
from tests.support.grants import allow, grant
from tests.support.needs import need_root
from tests.support.qmp import Client

A, B = 1000, 1001


@pytest.fixture(autouse=True)
def _root() -> None:
    need_root()


def stats(qmp: Client) -> dict[str, int]:
    return {
        stat["name"]: stat["value"]
        for part in qmp.ok("query-secret-stats")
        for stat in part["stats"]
    }


@pytest.fixture
def others(daemon: Daemon, qmp: Client) -> Callable[[], None]:
    """Check that another uid and root are served as ever."""
    qmp.add("theirs", data="letmein")
    allow(qmp, "b", f"uid:{B}")
    grant(qmp, "gb", "theirs", "b")
    client = daemon.connect(role="client", uid=B)

    def check() -> None:
        assert client.read("theirs") == b"letmein"
        assert daemon.connect(role="client", uid=B).read("theirs") == b"letmein"
        assert qmp.read("theirs") == b"letmein"

    return check


def test_a_share_counts_for_each_uid() -> None:
    """At the limit, one past it, and given back."""
    share = SharedQuota("things", 3, "things")
    share.acquire(A, 2)
    share.acquire(A)
    with pytest.raises(LimitReached) as caught:
        share.acquire(A)
    assert caught.value.desc == "uid 1000 has 3 things, and the limit is 3 (things)"
    assert caught.value.limit == "things"
    share.acquire(B, 3)
    share.acquire(0, 100)
    assert (share.others, share.largest, share.held(A), share.held(5)) == (6, 100, 3, 0)
    share.release(A, 3)
    share.release(0, 100)
    assert (share.others, share.largest, share.held(A)) == (3, 3, 0)
    share.acquire(A, 3)


def test_connections(daemon: Daemon, qmp: Client, others: Callable[[], None]) -> None:
    """Of one uid; those that end make room."""
    daemon.server.core.limits.connections.limit = 3
    held = [daemon.connect(role="client", uid=A) for _ in range(3)]
    refused = daemon.connect(role="client", uid=A, negotiate=False)
    assert refused.reply()["error"]["desc"] == (
        "uid 1000 has 3 connections, and the limit is 3 (connections-per-uid)"
    )
    assert refused.line() == b""
    others()
    found = stats(qmp)
    assert found["connections-per-uid"] >= 3
    assert found["connections-per-uid-limit"] == 3
    assert found["connections-per-uid-hits"] == 1
    held[0].close()
    while daemon.call(lambda: daemon.server.core.limits.connections.held(A)) == 3:
        pass
    assert daemon.connect(role="client", uid=A).ok("query-version")


def test_the_limits_are_what_the_documentation_says() -> None:
    """Each by its constant."""
    made = Limits()
    assert made.connections.limit == limits.CONNECTIONS_PER_UID
    assert made.requests.limit == limits.REQUESTS_PER_UID
    assert made.descriptors.limit <= limits.DESCRIPTORS_PER_UID
    assert made.unfinished.limit == limits.UNFINISHED_BYTES_PER_UID
    assert made.objects.limit == limits.OBJECTS_PER_UID
    assert made.object_bytes.limit == limits.OBJECT_BYTES_PER_UID


def test_requests_in_flight(daemon: Daemon, qmp: Client, others: Callable[[], None]) -> None:
    """That wait for something; all else is still answered."""
    daemon.server.core.limits.requests.limit = 2
    qmp.ok("secret-generate", {"id": "big", "size": 1 << 20})
    allow(qmp, "a", f"uid:{A}")
    grant(qmp, "ga", "big", "a")
    waiting = []
    for _ in range(2):
        client = daemon.connect(role="client", uid=A)
        source, sink = os.pipe()
        client.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (sink,))
        os.close(sink)
        assert os.read(source, 1)
        waiting.append((client, source))
    client = daemon.connect(role="client", uid=A)
    source, sink = os.pipe()
    assert client.fail("secret-read", {"id": "big"}, (sink,)) == (
        "uid 1000 has 2 requests in flight, and the limit is 2 (requests-per-uid)"
    )
    assert client.ok("query-version")
    others()
    assert stats(qmp)["requests-per-uid-hits"] == 1
    for each, pipe in waiting:
        while os.read(pipe, 1 << 16):
            pass
        os.close(pipe)
        assert each.reply() == {"return": {"size": 1 << 20}}
    os.close(sink)
    os.close(source)
    assert len(client.read("big")) == 1 << 20


def test_descriptors_of_a_connection(
    daemon: Daemon, qmp: Client, others: Callable[[], None]
) -> None:
    """By name and in sets."""
    client = daemon.connect(role="client", uid=A)
    with open("/dev/null") as file:
        fds = (file.fileno(),)
        for number in range(64):
            client.ok("getfd", {"fdname": f"n{number}"}, fds)
        words = client.fail("getfd", {"fdname": "more"}, fds)
    assert words.startswith("This connection holds 64 descriptors, which is the limit")
    others()
    assert stats(qmp)["descriptors-per-connection-hits"] == 1


def test_descriptors_in_all(daemon: Daemon, qmp: Client, others: Callable[[], None]) -> None:
    """So many that the daemon, root and the daemon's own uid always have some left."""
    limits_ = daemon.server.core.limits
    held = daemon.connect(role="client", uid=A)
    limits_._room = limits_.connections.others + 2
    with open("/dev/null") as file:
        held.ok("getfd", {"fdname": "a"}, (file.fileno(),))
        held.ok("getfd", {"fdname": "b"}, (file.fileno(),))
        refused = daemon.connect(role="client", uid=B, negotiate=False)
        assert refused.reply()["error"]["desc"] == (
            f"The clients have {limits_._room} descriptors, which is the limit (descriptors: "
            "RLIMIT_NOFILE less 512); try again later"
        )
        assert refused.line() == b""
        qmp.ok("getfd", {"fdname": "a"}, (file.fileno(),))
        assert daemon.connect().ok("query-name") == {}
        held.send(b'{"execute":"query-version"}', (file.fileno(),))
        assert "(descriptors: RLIMIT_NOFILE" in held.reply()["error"]["desc"]
        assert held.line() == b""
    found = stats(qmp)
    assert (found["descriptors-hits"], found["descriptors-limit"]) == (2, limits_._room)
    while daemon.call(lambda: limits_.connections.others + limits_.descriptors.others) > 1:
        pass
    others()


def test_unfinished_bytes(daemon: Daemon, qmp: Client, others: Callable[[], None]) -> None:
    """Half messages of one uid leave room for those of others."""
    share = daemon.server.core.limits.unfinished
    share.limit = 3 * 2048
    held = [daemon.connect(role="client", uid=A) for _ in range(4)]
    for number, client in enumerate(held[:3]):
        client.send(b'{"execute"')
        while daemon.call(lambda: share.held(A)) != 2048 * (number + 1):
            pass
    held[3].send(b'{"execute"')
    assert held[3].reply()["error"]["desc"] == (
        "uid 1000 has 6144 bytes of unfinished messages, and the limit is 6144 (unfinished-bytes-per-uid)"
    )
    assert held[3].line() == b""
    other = daemon.connect(role="client", uid=B)
    other.send(b'{"execute"')
    other.send(b': "query-version"}')
    assert "return" in other.reply()
    others()
    assert stats(qmp)["unfinished-bytes-per-uid-hits"] == 1
    held[0].send(b': "query-version"}')
    assert "return" in held[0].reply()
    assert daemon.call(lambda: share.held(A)) == 2 * 2048
    # One that would have to grow beyond the limit waits, and others go on.
    held[1].send(b': "query-version", "id": "' + b"x" * 4000)
    others()


def test_messages_that_wait_behind_another_are_counted(daemon: Daemon, qmp: Client) -> None:
    """With oob enabled; until they are carried out, or the connection ends."""
    share = daemon.server.core.limits.unfinished
    qmp.ok("secret-generate", {"id": "big", "size": 1 << 20})
    allow(qmp, "a", f"uid:{A}")
    grant(qmp, "ga", "big", "a")
    for close in (False, True):
        client = daemon.connect(role="client", uid=A, negotiate=False)
        client.reply()
        client.cmd("qmp_capabilities", {"enable": ["oob"]})
        source, sink = os.pipe()
        client.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (sink,))
        os.close(sink)
        assert os.read(source, 1)
        for _ in range(3):
            client.send(b'{"execute":"query-version","id":"' + b"x" * 4000 + b'"}')
        while daemon.call(lambda: share.held(A)) < 12_000:
            pass
        if close:
            client.close()
        while os.read(source, 1 << 16):
            pass
        os.close(source)
        if not close:
            assert [list(client.reply()) for _ in range(4)] == [["return"], *[["return", "id"]] * 3]
        while daemon.call(lambda: share.held(A)):
            pass


@pytest.mark.slow
def test_half_messages_of_one_uid_leave_receive_space(daemon: Daemon, qmp: Client) -> None:
    """However many connections it has: hundreds of half messages, and another uid's are still
    taken.
    """
    held = []
    for _ in range(200):
        client = daemon.connect(role="client", uid=A)
        client.send(b'{"execute"')
        held.append(client)
    other = daemon.connect(role="client", uid=B)
    for piece in (b'{"exec', b'ute": "query-', b'version"}'):
        other.send(piece)
        assert qmp.ok("query-name") == {}
    assert "return" in other.reply()
    assert daemon.call(lambda: daemon.server.space.held) <= limits.UNFINISHED_BYTES_PER_UID


@pytest.fixture
def admin(daemon: Daemon, qmp: Client) -> Client:
    """An administrator of another uid."""
    allow(qmp, "admins", f"uid:{A}")
    return daemon.connect(role="admins", uid=A)


def test_objects_of_an_administrator(daemon: Daemon, qmp: Client, admin: Client) -> None:
    """Who is neither root nor the daemon's own uid; deleting makes room, whoever deletes."""
    daemon.tree.limits.objects.limit = 3
    for name in "abc":
        assert admin.add(name, data="x") == {"return": {}}
    words = "uid 1000 has 3 objects, and the limit is 3 (objects-per-uid)"
    assert admin.add("d", data="x")["error"]["desc"] == words
    assert admin.fail("secret-generate", {"id": "d", "size": 5}) == words
    assert qmp.add("d", data="x") == {"return": {}}
    assert stats(qmp)["objects-per-uid-hits"] == 2
    assert qmp.ok("object-del", {"id": "a"}) == {}
    assert admin.add("e", data="x") == {"return": {}}
    assert admin.ok("object-del", {"id": "d"}) == {}
    assert admin.add("f", data="x")["error"]["desc"] == words


def test_bytes_of_an_administrator(daemon: Daemon, qmp: Client, admin: Client) -> None:
    """At the limit, one past it."""
    share = daemon.tree.limits.object_bytes
    admin.ok("secret-generate", {"id": "a", "size": 900})
    used = share.held(A)
    assert 900 < used < 1000
    share.limit = 1100
    room = 1100 - used
    words = f"uid 1000 has {used} bytes of objects, and the limit is 1100 (object-bytes-per-uid)"
    assert admin.add("b", data="x" * (room + 1))["error"]["desc"] == words
    assert (
        admin.fail(
            "object-add", {"qom-type": "authz-simple", "id": "b", "identity": "x" * (room + 1)}
        )
        == words
    )
    assert (
        admin.fail("qom-set", {"path": "a", "property": "iv", "value": "x" * (room + 200)}) == words
    )
    assert admin.add("b", data="x" * room) == {"return": {}}
    assert "error" in admin.add("c", data="x")
    admin.ok("secret-expire", {"id": "a", "after": 1000})
    for name in "ab":
        qmp.ok("object-del", {"id": name})
    assert share.held(A) == 0
    qmp.ok("secret-generate", {"id": "e", "size": 1000})
    assert stats(qmp)["object-bytes-per-uid-hits"] == 4
    held = daemon.call(lambda: daemon.journal.arena.held)
    assert isinstance(held, int)
    assert held < 2000


def test_objects_in_all(daemon: Daemon, qmp: Client) -> None:
    """For everybody."""
    daemon.server.core.limits.objects_in_all = 2
    qmp.add("a", data="x")
    qmp.add("b", data="x")
    assert qmp.add("c", data="x")["error"]["desc"] == (
        "There are 2 objects, and that is the limit (objects)"
    )
    assert stats(qmp)["objects-hits"] == 1


@pytest.mark.tuning(delivery_seconds=0.05)
def test_the_size_of_a_secret_and_the_time_of_a_delivery_are_counted(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """As all limits are."""
    qmp.ok("secret-generate", {"id": "big", "size": 1 << 20})
    allow(qmp, "a", f"uid:{A}")
    grant(qmp, "ga", "big", "a")
    words = "The descriptor did not take the secret within 0.05 seconds"
    for client in (qmp, daemon.connect(role="client", uid=A)):
        source, sink = os.pipe()
        assert client.fail("secret-read", {"id": "big"}, (sink,)) == words
        os.close(source)
        os.close(sink)
    fd = os.memfd_create("x")
    os.ftruncate(fd, (1 << 20) + 1)
    added = qmp.ok("add-fd", None, (fd,))
    os.ftruncate(fd, (1 << 20))
    name = f"/dev/fdset/{added['fdset-id']}"
    assert qmp.add("most", file=name) == {"return": {}}
    os.ftruncate(fd, (1 << 20) + 1)
    assert "1048577 bytes, more than the limit" in qmp.add("more", file=name)["error"]["desc"]
    os.ftruncate(fd, (2 << 20) + 1)
    assert "larger than the limit" in qmp.add("more", file=name)["error"]["desc"]
    os.close(fd)
    source, sink = os.pipe()
    found = stats(qmp)
    assert found["delivery-seconds-hits"] == 2
    assert found["secret-bytes-hits"] == 1
    assert found["source-bytes-hits"] == 1
    os.close(source)
    os.close(sink)


def test_a_client_without_a_share_cannot_begin_but_may_go_on_elsewhere(daemon: Daemon) -> None:
    """What it holds is given back when its connection ends."""
    share = daemon.server.core.limits.unfinished
    client = daemon.connect(role="client", uid=A)
    client.send(b'{"execute"')
    while not daemon.call(lambda: share.held(A)):
        pass
    client.sock.shutdown(socket.SHUT_WR)
    assert client.line() == b""
    while daemon.call(lambda: share.held(A)):
        pass
