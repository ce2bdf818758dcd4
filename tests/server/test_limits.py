# SPDX-License-Identifier: LGPL-2.1-or-later
"""The limits of each uid: at one all works, past it is refused by name, and others do not
notice.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

import pytest

from secretd import limits
from secretd.errors import LimitReached
from secretd.limits import Limits, SharedQuota
from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served
from tests.support.needs import need_root

A, B = 1000, 1001


@pytest.fixture(autouse=True)
def _root() -> None:
    need_root()


async def stats(aqmp: AsyncClient) -> dict[str, int]:
    return {
        stat["name"]: stat["value"]
        for part in await aqmp.ok("query-secret-stats")
        for stat in part["stats"]
    }


@pytest.fixture
async def others(in_loop: Served, aqmp: AsyncClient) -> Callable[[], Awaitable[None]]:
    """Check that another uid and root are served as ever."""
    await aqmp.add("theirs", data="letmein")
    await aqmp.allow("b", f"uid:{B}")
    await aqmp.grant("gb", "theirs", "b")
    client = await in_loop.connect(role="client", uid=B)

    async def check() -> None:
        assert await client.read("theirs") == b"letmein"
        assert await (await in_loop.connect(role="client", uid=B)).read("theirs") == b"letmein"
        assert await aqmp.read("theirs") == b"letmein"

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


async def test_connections(
    in_loop: Served, aqmp: AsyncClient, others: Callable[[], Awaitable[None]]
) -> None:
    """Of one uid; those that end make room."""
    in_loop.server.core.limits.connections.limit = 3
    held = [await in_loop.connect(role="client", uid=A) for _ in range(3)]
    refused = await in_loop.connect(role="client", uid=A, negotiate=False)
    assert (await refused.reply())["error"]["desc"] == (
        "uid 1000 has 3 connections, and the limit is 3 (connections-per-uid)"
    )
    assert await refused.line() == b""
    await others()
    found = await stats(aqmp)
    assert found["connections-per-uid"] >= 3
    assert found["connections-per-uid-limit"] == 3
    assert found["connections-per-uid-hits"] == 1
    held[0].close()
    while in_loop.server.core.limits.connections.held(A) == 3:
        await asyncio.sleep(0)
    assert await (await in_loop.connect(role="client", uid=A)).ok("query-version")


def test_the_limits_are_what_the_documentation_says() -> None:
    """Each by its constant."""
    made = Limits()
    assert made.connections.limit == limits.CONNECTIONS_PER_UID
    assert made.requests.limit == limits.REQUESTS_PER_UID
    assert made.descriptors.limit <= limits.DESCRIPTORS_PER_UID
    assert made.unfinished.limit == limits.UNFINISHED_BYTES_PER_UID
    assert made.objects.limit == limits.OBJECTS_PER_UID
    assert made.object_bytes.limit == limits.OBJECT_BYTES_PER_UID


async def test_requests_in_flight(
    in_loop: Served, aqmp: AsyncClient, others: Callable[[], Awaitable[None]]
) -> None:
    """That wait for something; all else is still answered."""
    in_loop.server.core.limits.requests.limit = 2
    await aqmp.ok("secret-generate", {"id": "big", "size": 1 << 20})
    await aqmp.allow("a", f"uid:{A}")
    await aqmp.grant("ga", "big", "a")
    waiting = []
    for _ in range(2):
        client = await in_loop.connect(role="client", uid=A)
        source, sink = os.pipe()
        await client.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (sink,))
        os.close(sink)
        assert await asyncio.to_thread(os.read, source, 1)
        waiting.append((client, source))
    client = await in_loop.connect(role="client", uid=A)
    source, sink = os.pipe()
    assert await client.fail("secret-read", {"id": "big"}, (sink,)) == (
        "uid 1000 has 2 requests in flight, and the limit is 2 (requests-per-uid)"
    )
    assert await client.ok("query-version")
    await others()
    assert (await stats(aqmp))["requests-per-uid-hits"] == 1
    for each, pipe in waiting:
        while await asyncio.to_thread(os.read, pipe, 1 << 16):
            pass
        os.close(pipe)
        assert await each.reply() == {"return": {"size": 1 << 20}}
    os.close(sink)
    os.close(source)
    assert len(await client.read("big")) == 1 << 20


async def test_descriptors_of_a_connection(
    in_loop: Served, aqmp: AsyncClient, others: Callable[[], Awaitable[None]]
) -> None:
    """By name and in sets."""
    client = await in_loop.connect(role="client", uid=A)
    with open("/dev/null") as file:
        fds = (file.fileno(),)
        for number in range(64):
            await client.ok("getfd", {"fdname": f"n{number}"}, fds)
        words = await client.fail("getfd", {"fdname": "more"}, fds)
    assert words.startswith("This connection holds 64 descriptors, which is the limit")
    await others()
    assert (await stats(aqmp))["descriptors-per-connection-hits"] == 1


async def test_descriptors_in_all(
    in_loop: Served, aqmp: AsyncClient, others: Callable[[], Awaitable[None]]
) -> None:
    """So many that the in_loop, root and the daemon's own uid always have some left."""
    limits_ = in_loop.server.core.limits
    held = await in_loop.connect(role="client", uid=A)
    limits_._room = limits_.connections.others + 2
    with open("/dev/null") as file:
        await held.ok("getfd", {"fdname": "a"}, (file.fileno(),))
        await held.ok("getfd", {"fdname": "b"}, (file.fileno(),))
        refused = await in_loop.connect(role="client", uid=B, negotiate=False)
        assert (await refused.reply())["error"]["desc"] == (
            f"The clients have {limits_._room} descriptors, which is the limit (descriptors: "
            "RLIMIT_NOFILE less 512); try again later"
        )
        assert await refused.line() == b""
        await aqmp.ok("getfd", {"fdname": "a"}, (file.fileno(),))
        assert await (await in_loop.connect()).ok("query-name") == {}
        await held.send(b'{"execute":"query-version"}', (file.fileno(),))
        assert "(descriptors: RLIMIT_NOFILE" in (await held.reply())["error"]["desc"]
        assert await held.line() == b""
    found = await stats(aqmp)
    assert (found["descriptors-hits"], found["descriptors-limit"]) == (2, limits_._room)
    while (limits_.connections.others + limits_.descriptors.others) > 1:
        await asyncio.sleep(0)
    await others()


async def test_unfinished_bytes(
    in_loop: Served, aqmp: AsyncClient, others: Callable[[], Awaitable[None]]
) -> None:
    """Half messages of one uid leave room for those of others."""
    share = in_loop.server.core.limits.unfinished
    share.limit = 3 * 2048
    held = [await in_loop.connect(role="client", uid=A) for _ in range(4)]
    for number, client in enumerate(held[:3]):
        await client.send(b'{"execute"')
        while share.held(A) != 2048 * (number + 1):
            await asyncio.sleep(0)
    await held[3].send(b'{"execute"')
    assert (await held[3].reply())["error"]["desc"] == (
        "uid 1000 has 6144 bytes of unfinished messages, and the limit is 6144 "
        "(unfinished-bytes-per-uid)"
    )
    assert await held[3].line() == b""
    other = await in_loop.connect(role="client", uid=B)
    await other.send(b'{"execute"')
    await other.send(b': "query-version"}')
    assert "return" in await other.reply()
    await others()
    assert (await stats(aqmp))["unfinished-bytes-per-uid-hits"] == 1
    await held[0].send(b': "query-version"}')
    assert "return" in await held[0].reply()
    assert share.held(A) == 2 * 2048
    # One that would have to grow beyond the limit waits, and others go on.
    await held[1].send(b': "query-version", "id": "' + b"x" * 4000)
    await others()


async def test_messages_that_wait_behind_another_are_counted(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """With oob enabled; until they are carried out, or the connection ends."""
    share = in_loop.server.core.limits.unfinished
    await aqmp.ok("secret-generate", {"id": "big", "size": 1 << 20})
    await aqmp.allow("a", f"uid:{A}")
    await aqmp.grant("ga", "big", "a")
    for close in (False, True):
        client = await in_loop.connect(role="client", uid=A, negotiate=False)
        await client.reply()
        await client.cmd("qmp_capabilities", {"enable": ["oob"]})
        source, sink = os.pipe()
        await client.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (sink,))
        os.close(sink)
        assert await asyncio.to_thread(os.read, source, 1)
        for _ in range(3):
            await client.send(b'{"execute":"query-version","id":"' + b"x" * 4000 + b'"}')
        while share.held(A) < 12_000:
            await asyncio.sleep(0)
        if close:
            client.close()
        while await asyncio.to_thread(os.read, source, 1 << 16):
            pass
        os.close(source)
        if not close:
            assert [list(await client.reply()) for _ in range(4)] == [
                ["return"],
                *[["return", "id"]] * 3,
            ]
        while share.held(A):
            await asyncio.sleep(0)


@pytest.mark.slow
async def test_half_messages_of_one_uid_leave_receive_space(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """However many connections it has: hundreds of half messages, and another uid's are still
    taken.
    """
    held = []
    for _ in range(200):
        client = await in_loop.connect(role="client", uid=A)
        await client.send(b'{"execute"')
        held.append(client)
    other = await in_loop.connect(role="client", uid=B)
    for piece in (b'{"exec', b'ute": "query-', b'version"}'):
        await other.send(piece)
        assert await aqmp.ok("query-name") == {}
    assert "return" in await other.reply()
    assert in_loop.server.space.held <= limits.UNFINISHED_BYTES_PER_UID


@pytest.fixture
async def admin(in_loop: Served, aqmp: AsyncClient) -> AsyncClient:
    """An administrator of another uid."""
    await aqmp.allow("admins", f"uid:{A}")
    return await in_loop.connect(role="admins", uid=A)


async def test_objects_of_an_administrator(
    in_loop: Served, aqmp: AsyncClient, admin: AsyncClient
) -> None:
    """Not of root or the daemon's own uid; every deletion makes room."""
    in_loop.tree.limits.objects.limit = 3
    for name in "abc":
        assert await admin.add(name, data="x") == {"return": {}}
    words = "uid 1000 has 3 objects, and the limit is 3 (objects-per-uid)"
    assert (await admin.add("d", data="x"))["error"]["desc"] == words
    assert await admin.fail("secret-generate", {"id": "d", "size": 5}) == words
    assert await aqmp.add("d", data="x") == {"return": {}}
    assert (await stats(aqmp))["objects-per-uid-hits"] == 2
    assert await aqmp.ok("object-del", {"id": "a"}) == {}
    assert await admin.add("e", data="x") == {"return": {}}
    assert await admin.ok("object-del", {"id": "d"}) == {}
    assert (await admin.add("f", data="x"))["error"]["desc"] == words


async def test_bytes_of_an_administrator(
    in_loop: Served, aqmp: AsyncClient, admin: AsyncClient
) -> None:
    """At the limit, one past it."""
    share = in_loop.tree.limits.object_bytes
    await admin.ok("secret-generate", {"id": "a", "size": 900})
    used = share.held(A)
    assert 900 < used < 1000
    share.limit = 1100
    room = 1100 - used
    words = f"uid 1000 has {used} bytes of objects, and the limit is 1100 (object-bytes-per-uid)"
    assert (await admin.add("b", data="x" * (room + 1)))["error"]["desc"] == words
    assert (
        await admin.fail(
            "object-add", {"qom-type": "authz-simple", "id": "b", "identity": "x" * (room + 1)}
        )
        == words
    )
    assert (
        await admin.fail("qom-set", {"path": "a", "property": "iv", "value": "x" * (room + 200)})
        == words
    )
    assert await admin.add("b", data="x" * room) == {"return": {}}
    assert "error" in await admin.add("c", data="x")
    await admin.ok("secret-expire", {"id": "a", "after": 1000})
    for name in "ab":
        await aqmp.ok("object-del", {"id": name})
    assert share.held(A) == 0
    await aqmp.ok("secret-generate", {"id": "e", "size": 1000})
    assert (await stats(aqmp))["object-bytes-per-uid-hits"] == 4
    held = in_loop.journal.arena.held
    assert isinstance(held, int)
    assert held < 2000


async def test_objects_in_all(in_loop: Served, aqmp: AsyncClient) -> None:
    """For everybody."""
    in_loop.server.core.limits.objects_in_all = 2
    await aqmp.add("a", data="x")
    await aqmp.add("b", data="x")
    assert (await aqmp.add("c", data="x"))["error"]["desc"] == (
        "There are 2 objects, and that is the limit (objects)"
    )
    assert (await stats(aqmp))["objects-hits"] == 1


@pytest.mark.tuning(delivery_seconds=0.05)
async def test_limits_of_size_and_delivery_time_are_counted(
    in_loop: Served, aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """As all limits are."""
    await aqmp.ok("secret-generate", {"id": "big", "size": 1 << 20})
    await aqmp.allow("a", f"uid:{A}")
    await aqmp.grant("ga", "big", "a")
    words = "The descriptor did not take the secret within 0.05 seconds"
    for client in (aqmp, await in_loop.connect(role="client", uid=A)):
        source, sink = os.pipe()
        assert await client.fail("secret-read", {"id": "big"}, (sink,)) == words
        os.close(source)
        os.close(sink)
    fd = os.memfd_create("x")
    os.ftruncate(fd, (1 << 20) + 1)
    added = await aqmp.ok("add-fd", None, (fd,))
    os.ftruncate(fd, (1 << 20))
    name = f"/dev/fdset/{added['fdset-id']}"
    assert await aqmp.add("most", file=name) == {"return": {}}
    os.ftruncate(fd, (1 << 20) + 1)
    assert (
        "1048577 bytes, more than the limit" in (await aqmp.add("more", file=name))["error"]["desc"]
    )
    os.ftruncate(fd, (2 << 20) + 1)
    assert "larger than the limit" in (await aqmp.add("more", file=name))["error"]["desc"]
    os.close(fd)
    source, sink = os.pipe()
    found = await stats(aqmp)
    assert found["delivery-seconds-hits"] == 2
    assert found["secret-bytes-hits"] == 1
    assert found["source-bytes-hits"] == 1
    os.close(source)
    os.close(sink)


async def test_a_quota_is_returned_when_a_connection_ends(
    in_loop: Served,
) -> None:
    """What it holds is given back when its connection ends."""
    share = in_loop.server.core.limits.unfinished
    client = await in_loop.connect(role="client", uid=A)
    await client.send(b'{"execute"')
    while not share.held(A):
        await asyncio.sleep(0)
    client.sock.shutdown(socket.SHUT_WR)
    assert await client.line() == b""
    while share.held(A):
        await asyncio.sleep(0)
