# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store over QMP: order of replies, what waits and what does not, events, and its commands."""

import asyncio
import json
import os
from pathlib import Path

import pytest

from secretd.limits import REQUESTS_PER_UID
from secretd.qom.keeper import Keeper
from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served
from tests.support.needs import need_root
from tests.support.slow_disk import SlowDisk

KEY = "0123456789abcdef" * 2


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    """A disk that the test stops."""
    made = SlowDisk(monkeypatch)
    made.go()
    return made


@pytest.fixture
async def store(aqmp: AsyncClient, slow: SlowDisk, tmp_path: Path) -> str:
    """An open store; its path."""
    path = str(tmp_path / "store")
    assert await aqmp.add("key", data=KEY) == {"return": {}}
    options = {"qom-type": "secret-store", "id": "store", "path": path, "keyid": "key"}
    assert await aqmp.ok("object-add", {**options, "create": True}) == {}
    assert await aqmp.ok("secret-store-unlock", {"id": "store"}) == {}
    assert slow.batches == []
    return path


def line(command: str, number: int, **arguments: object) -> bytes:
    """A request."""
    request = {"execute": command, "arguments": arguments, "id": number}
    return json.dumps(request).encode() + b"\n"


def addition(object_id: str, number: int, **more: str) -> bytes:
    """A request that adds a secret."""
    return line(
        "object-add", number, **{"qom-type": "secret", "id": object_id, "data": "x"}, **more
    )


@pytest.mark.usefixtures("store")
async def test_additions_go_on_while_earlier_ones_are_written(
    aqmp: AsyncClient, slow: SlowDisk
) -> None:
    """In a few transactions; a command of another kind waits for all, and replies keep their
    order.
    """
    slow.stop()
    requests = [addition(f"s{number}", number) for number in range(100)]
    requests[50] = addition("s1", 50)  # it is taken, though it is not there yet
    await aqmp.send(b"".join(requests) + line("query-secrets", 100))
    while len(slow.batches) < 1:
        await asyncio.sleep(0)
    slow.go()
    for number in range(100):
        reply = await aqmp.reply()
        assert reply["id"] == number
        assert ("error" in reply) is (number == 50)
    assert len((await aqmp.reply())["return"]) == 100
    assert len(slow.batches) <= 5


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "second",
    [
        addition("t", 2, keyid="s"),
        line("object-add", 2, **{"qom-type": "secret", "id": "t", "file": "/dev/null"}),
        line("object-del", 2, id="s"),
        line("object-add", 2, **{"qom-type": "authz-listfile", "id": "l", "filename": "/dev/null"}),
        b'{"execute": "object-add", "arguments": 1, "id": 2}\n',
        b'{"execute": x}\n',
        b"{'execute': 'query-secrets', 'id': 2}\n",
    ],
)
async def test_what_depends_on_an_addition_waits_for_it(
    aqmp: AsyncClient, slow: SlowDisk, second: bytes
) -> None:
    """Keys, sources, other commands and errors."""
    slow.stop()
    await aqmp.send(addition("s", 1) + second + addition("u", 3))
    while not slow.batches:
        await asyncio.sleep(0)
    other = slow.batches[:]
    for _ in range(50):
        await asyncio.sleep(0)
    assert slow.batches == other == [["s"]]
    slow.go()
    replies = [await aqmp.reply() for _ in range(3)]
    assert [r.get("id") for r in replies][::2] == [1, 3]
    assert replies[0] == {"return": {}, "id": 1}


@pytest.mark.usefixtures("store")
async def test_single_quotes_are_executed_alike(aqmp: AsyncClient, slow: SlowDisk) -> None:
    """The reference parser's requests, too, go on while others are written."""
    slow.stop()
    text = "{'execute': 'object-add', 'arguments': {'qom-type': 'secret', 'id': '%s', 'data': 'x'}}"
    await aqmp.send(b"".join((text % f"s{number}").encode() for number in range(9)))
    while not slow.batches:
        await asyncio.sleep(0)
    slow.go()
    for _ in range(9):
        assert await aqmp.reply() == {"return": {}}
    assert len(slow.batches) <= 3


@pytest.mark.usefixtures("store")
async def test_at_a_number_of_waiting_replies_nothing_is_read(
    aqmp: AsyncClient, slow: SlowDisk
) -> None:
    """All are answered in the end."""
    slow.stop()
    for number in range(300):
        await aqmp.send(addition(f"s{number}", number))
    slow.go()
    for number in range(300):
        assert await aqmp.reply() == {"return": {}, "id": number}


async def test_others_do_not_wait_for_the_disk(
    in_loop: Served, aqmp: AsyncClient, slow: SlowDisk, store: str
) -> None:
    """Not other connections, and not out-of-band commands of the same one."""
    slow.stop()
    async with asyncio.timeout(20):
        oob = await in_loop.connect(negotiate=False)
        await oob.reply()
        await oob.ok("qmp_capabilities", {"enable": ["oob"]})
        await oob.send(addition("s", 1) + addition("t", 2) + line("object-del", 3, id="s"))
        await oob.send(b'{"exec-oob": "query-secrets", "id": 4}\n')
        reply = await oob.reply()
        assert reply["id"] == 4
        assert [secret["id"] for secret in reply["return"]] == ["key"]
        info = (await aqmp.ok("query-secret-store"))[0]
        assert info == {
            "id": "store", "path": store, "keyid": "key", "secrets": "*", "state": "open",
            "rows": 0, "sequence": 0,
        }  # fmt: skip
        slow.go()
        assert [(await oob.reply())["id"] for _ in range(3)] == [1, 2, 3]


@pytest.mark.usefixtures("store")
async def test_a_client_that_leaves_has_its_additions_made(
    in_loop: Served, aqmp: AsyncClient, slow: SlowDisk
) -> None:
    """The disk may have them by then; the requests are counted to their end."""
    slow.stop()
    other = await in_loop.connect()
    await other.send(addition("s", 1) + addition("t", 2))
    while not in_loop.tree.reserved >= {"s", "t"}:
        await asyncio.sleep(0)
    (session,) = (each for each in in_loop.server.sessions if each.busy)
    session.transport.close()
    assert session not in in_loop.server.sessions
    slow.go()
    while "t" not in in_loop.journal:
        await asyncio.sleep(0)
    assert in_loop.server.core.limits.requests.by_uid == {}
    assert await aqmp.ok("object-del", {"id": "s"}) == {}


@pytest.mark.usefixtures("store")
async def test_a_failed_write_is_the_reply(aqmp: AsyncClient, slow: SlowDisk) -> None:
    """Of each command that changes something, with the same words, and nothing has changed."""
    assert await aqmp.add("s", data="old") == {"return": {}}
    slow.go("Unable to write /x: No space left on device")
    words = "Unable to write /x: No space left on device"
    grant = {"qom-type": "secret-grant", "id": "g", "secret": "*", "authz": "a"}
    for command, arguments in (
        ("object-add", {"qom-type": "secret", "id": "t", "data": "x"}),
        ("object-add", grant),
        ("secret-generate", {"id": "t", "size": 32}),
        ("secret-replace", {"qom-type": "secret", "id": "s", "data": "new"}),
        ("secret-expire", {"id": "s", "after": 99}),
        ("qom-set", {"path": "s", "property": "format", "value": "base64"}),
        ("object-del", {"id": "s"}),
    ):
        if command == "object-del":
            assert await aqmp.ok("qom-get", {"path": "s", "property": "format"}) == "raw"
        assert await aqmp.fail(command, arguments) == words, command
    line = {"command-line": "object_add secret,id=h,data=x"}
    assert await aqmp.ok("human-monitor-command", line) == f"Error: {words}\r\n"
    assert await aqmp.fail("object-del", {"id": "t"}) == "object 't' not found"
    slow.go()
    assert await aqmp.ok("human-monitor-command", line) == ""
    assert await aqmp.ok("human-monitor-command", {"command-line": "object_del h"}) == ""


@pytest.mark.usefixtures("store")
async def test_all_changes_wait_for_the_disk(aqmp: AsyncClient, slow: SlowDisk) -> None:
    """Each is in a transaction before its reply."""
    (await aqmp.ok("secret-generate", {"id": "s", "size": 32}))
    await aqmp.ok("secret-replace", {"qom-type": "secret", "id": "s", "data": "new"})
    read, write = os.pipe()
    os.write(write, b"newer")
    os.close(write)
    added = await aqmp.ok("add-fd", None, (read,))
    os.close(read)
    file = f"/dev/fdset/{added['fdset-id']}"
    await aqmp.ok("secret-replace", {"qom-type": "secret", "id": "s", "file": file})
    await aqmp.ok("object-add", {"qom-type": "secret", "id": "t", "file": "/dev/null"})
    await aqmp.ok("secret-expire", {"id": "s", "after": 99})
    await aqmp.ok("secret-expire", {"id": "s"})
    await aqmp.ok("qom-set", {"path": "s", "property": "format", "value": "base64"})
    await aqmp.ok("object-del", {"id": "s"})
    assert slow.batches == [["s"]] * 3 + [["t"]] + [["s"]] * 4


@pytest.mark.usefixtures("store")
async def test_a_counted_read_waits_until_its_count_is_written(
    in_loop: Served, aqmp: AsyncClient, slow: SlowDisk
) -> None:
    """Not a byte leaves before; a failure, a revocation and a client that leaves give it back."""
    await aqmp.add("s", data="letmein")
    await aqmp.allow("a", "uid:*")
    grant = {"qom-type": "secret-grant", "id": "g", "secret": "s", "authz": "a", "max-reads": 3}
    await aqmp.ok("object-add", grant)

    async def reads() -> int:
        return await aqmp.ok("qom-get", {"path": "g", "property": "reads"})

    for uid in (None, 1001) if os.getuid() == 0 else (None,):
        client = await in_loop.connect(role="client", uid=uid)
        source, sink = os.pipe2(os.O_NONBLOCK)
        request = line("secret-read", 1, id="s")
        slow.stop()
        await client.send(request, (sink,))
        while await reads() == 0:
            await asyncio.sleep(0)
        with pytest.raises(BlockingIOError):
            os.read(source, 99)
        slow.go("No space left on device")
        words = "Reading secret 's' cannot be counted now; try again later"
        assert (await client.reply())["error"]["desc"] == words
        while await reads() != 0:
            await asyncio.sleep(0)
        slow.stop()
        await client.send(request, (sink,))
        while await reads() == 0:
            await asyncio.sleep(0)
        others = set(in_loop.server.sessions)
        leaver = await in_loop.connect(role="client", uid=uid)
        await leaver.send(request, (sink,))
        while await reads() == 1:
            await asyncio.sleep(0)
        (session,) = set(in_loop.server.sessions) - others
        session.transport.close()
        while await reads() == 2:
            await asyncio.sleep(0)
        slow.go()
        assert (await client.reply())["return"] == {"size": 7}
        assert os.read(source, 99) == b"letmein"
        await aqmp.ok("qom-set", {"path": "g", "property": "max-reads", "value": 3})
        os.close(source)
        os.close(sink)
        await aqmp.ok("object-del", {"id": "g"})
        await aqmp.ok("object-add", grant)
        client.close()
    client = await in_loop.connect(role="client")
    source, sink = os.pipe2(os.O_NONBLOCK)
    slow.stop()
    await client.send(line("secret-read", 1, id="s"), (sink,))
    while await reads() == 0:
        await asyncio.sleep(0)
    await aqmp.send(line("object-del", 1, id="g"))
    for _ in range(20):
        await asyncio.sleep(0)
    slow.go()
    assert (await client.reply())["error"]["desc"] == "Secret 's' was withdrawn"
    await aqmp.reply()
    with pytest.raises(BlockingIOError):
        os.read(source, 99)
    # A reader of a full pipe gets the rest later.
    await aqmp.ok("object-add", grant)
    await aqmp.add("big", data="x" * 200_000)
    await aqmp.ok("qom-set", {"path": "g", "property": "secret", "value": "*"})
    os.set_blocking(sink, False)
    await client.send(line("secret-read", 1, id="big"), (sink,))
    got = 0
    while got < 200_000:
        try:
            got += len(os.read(source, 1 << 16))
        except BlockingIOError:
            await asyncio.sleep(0)
    assert (await client.reply())["return"] == {"size": 200_000}
    os.close(source)
    os.close(sink)


async def test_states_are_events_for_control_connections(
    in_loop: Served, aqmp: AsyncClient, store: str
) -> None:
    """With the reason of a failure; locked, open and failed."""
    watcher = await in_loop.connect()
    await watcher.ok("secret-events", {"enable": True, "events": ["SECRET_STORE"]})
    await aqmp.ok("object-del", {"id": "key"})
    assert (await watcher.event())["data"] == {"id": "store", "state": "locked"}
    assert (await aqmp.add("s", data="x"))["error"]["desc"] == (
        "Store 'store' is locked; add its key 'key' first"
    )
    await aqmp.add("key", data="short")
    failed = (await watcher.event())["data"]
    assert failed["reason"] == "key 'key' has 5 bytes, and 32 are needed"
    assert (await aqmp.ok("query-secret-store"))[0]["reason"] == failed["reason"]
    words = await aqmp.fail("secret-store-unlock", {"id": "store"})
    assert words == f"Store 'store' has failed: {failed['reason']}"
    await watcher.event()
    await aqmp.ok("object-del", {"id": "key"})
    await aqmp.add("key", data=KEY)
    assert (await watcher.event())["data"] == {"id": "store", "state": "open"}
    assert await aqmp.ok("qom-get", {"path": "store", "property": "state"}) == "open"
    assert "store.db" in os.listdir(store)


async def test_the_store_is_verified_copied_rekeyed_and_destroyed(
    aqmp: AsyncClient, store: str, tmp_path: Path
) -> None:
    """And each says what is wrong."""
    for command in ("unlock", "verify", "destroy"):
        words = await aqmp.fail(f"secret-store-{command}", {"id": "nope"})
        assert words == "Store 'nope' not found"
    await aqmp.add("s", data="x")
    assert await aqmp.ok("secret-store-verify", {"id": "store"}) == {"rows": 1}
    with open(tmp_path / "copy", "wb") as file:
        assert await aqmp.ok("getfd", {"fdname": "f"}, (file.fileno(),)) == {}
        copied = await aqmp.ok("secret-store-backup", {"id": "store", "fdname": "f"})
        assert copied == {"size": os.stat(tmp_path / "copy").st_size}
    with open("/dev/full", "wb") as file:
        await aqmp.ok("getfd", {"fdname": "f"}, (file.fileno(),))
        words = await aqmp.fail("secret-store-backup", {"id": "store", "fdname": "f"})
        assert words == "Unable to write the copy: No space left on device"
        await aqmp.ok("getfd", {"fdname": "f"}, (file.fileno(),))
        await aqmp.fail("secret-store-backup", {"id": "nope", "fdname": "f"})
    await aqmp.ok("secret-generate", {"id": "key.new", "size": 32})
    await aqmp.ok("secret-generate", {"id": "long", "size": 33})
    words = await aqmp.fail("secret-store-rekey", {"id": "store", "keyid": "long"})
    assert words == "Store 'store': key 'long' has 33 bytes, and 32 are needed"
    await aqmp.ok("secret-store-rekey", {"id": "store", "keyid": "key.new"})
    rekey = {"id": "store", "keyid": "key.new"}
    await aqmp.ok("secret-store-rekey", {**rekey, "only": True})
    await aqmp.ok("secret-store-rekey", {**rekey, "data": True})
    assert await aqmp.ok("secret-store-verify", {"id": "store"}) == {"rows": 2}
    await aqmp.ok("secret-store-destroy", {"id": "store"})
    assert os.listdir(store) == []
    left = [secret["id"] for secret in await aqmp.ok("query-secrets")]
    assert left == ["key", "key.new"]


@pytest.mark.usefixtures("store")
async def test_an_untrusted_administrator_has_a_share_of_the_disk(
    in_loop: Served, aqmp: AsyncClient, slow: SlowDisk
) -> None:
    """Its waiting requests and objects are counted."""
    need_root()
    await aqmp.allow("admins", "uid:1001")
    admin = await in_loop.connect(role="admins", uid=1001)
    own = "Only uid 0 and the daemon's own uid may "
    store = {"qom-type": "secret-store", "id": "x", "path": "/x", "keyid": "key"}
    assert await admin.fail("object-add", store) == f"{own}name a directory"
    for command in ("unlock", "verify", "rekey", "backup", "destroy"):
        arguments = {"id": "store", "rekey": {"keyid": "k"}, "backup": {"fdname": "f"}}
        more = arguments.get(command, {})
        assert isinstance(more, dict)
        if command == "backup":
            with open(os.devnull, "wb") as file:
                await admin.ok("getfd", {"fdname": "f"}, (file.fileno(),))
        words = await admin.fail(f"secret-store-{command}", {"id": "store", **more})
        assert words == f"{own}do this"
    changes: list[tuple[str, dict[str, object]]] = [
        ("object-add", {"qom-type": "secret", "id": "key.new", "data": "x" * 32}),
        ("secret-replace", {"qom-type": "secret", "id": "key", "data": "x" * 32}),
        ("secret-generate", {"id": "key.new", "size": 32}),
        ("secret-expire", {"id": "key", "after": 9}),
        ("object-del", {"id": "key"}),
        ("object-del", {"id": "store"}),
        ("qom-set", {"path": "store", "property": "secrets", "value": "x"}),
    ]
    for command, change in changes:
        assert (await admin.fail(command, change)).startswith(f"{own}add, change or delete '")
    words = "Reading secret 'key' is not permitted"
    assert await admin.fail("secret-seal", {"id": "key", "keyid": "key"}) == words
    slow.stop()
    many = REQUESTS_PER_UID + 1
    for number in range(many):
        await admin.send(addition(f"s{number}", number))
    while len(in_loop.tree.reserved) < REQUESTS_PER_UID:
        await asyncio.sleep(0)
    assert in_loop.tree.limits.objects.held(1001) == REQUESTS_PER_UID
    slow.go()
    replies = [await admin.reply() for _ in range(many)]
    assert sum("return" in reply for reply in replies) >= REQUESTS_PER_UID
    assert in_loop.tree.limits.objects.held(1001) >= REQUESTS_PER_UID


async def test_there_is_no_store_by_default(aqmp: AsyncClient) -> None:
    """And a missing one says so."""
    assert await aqmp.ok("query-secret-store") == []
    assert await aqmp.fail("secret-store-unlock", {"id": "x"}) == "Store 'x' not found"


@pytest.mark.tuning(stop_seconds=0.05)
async def test_a_disk_that_never_answers_does_not_hold_up_the_stop(
    in_loop: Served, aqmp: AsyncClient, slow: SlowDisk, store: str
) -> None:
    """Neither with changes under way, nor while the store is being locked."""
    assert store
    slow.stop()
    await aqmp.send(addition("s", 1))
    while not slow.batches:
        await asyncio.sleep(0)
    other = await in_loop.connect()
    await other.send(line("object-del", 1, id="key"))
    in_loop.server.stop()
    while in_loop.server.sessions:
        await asyncio.sleep(0)
    slow.go()


@pytest.mark.usefixtures("store")
async def test_a_stop_takes_no_further_additions(
    in_loop: Served, aqmp: AsyncClient, slow: SlowDisk
) -> None:
    """What is being written is answered."""
    slow.stop()
    await aqmp.send(addition("a", 1))
    while not slow.batches:
        await asyncio.sleep(0)
    in_loop.server.core.stopping = True
    await aqmp.send(addition("b", 2))
    for _ in range(20):
        await asyncio.sleep(0)
    slow.go()
    assert await aqmp.reply() == {"return": {}, "id": 1}
    in_loop.server.core.stopping = False
    assert "b" not in in_loop.tree.journal


@pytest.mark.usefixtures("store")
@pytest.mark.tuning(stop_seconds=0.2)
async def test_a_step_ends_though_its_session_has_ended(
    in_loop: Served, aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a stop that waits no longer for the reply."""
    go, begun, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def unlock(_keeper: Keeper) -> None:
        begun.set()
        await go.wait()
        ended.set()

    monkeypatch.setattr(Keeper, "unlock", unlock)
    await aqmp.send(line("secret-store-unlock", 1, id="store"))
    await begun.wait()
    in_loop.server.stop()
    while in_loop.server.core.limits.requests.held(os.getuid()):
        await asyncio.sleep(0)
    go.set()
    await ended.wait()


async def test_a_failing_step_is_logged(in_loop: Served, caplog: pytest.LogCaptureFixture) -> None:
    """By its type only: the text might quote a secret."""

    async def step() -> None:
        raise ValueError(words)

    words = "letmein"
    task = in_loop.server.core.background(step())
    await asyncio.wait({task})
    await asyncio.sleep(0)
    assert "ValueError" in caplog.text
    assert "letmein" not in caplog.text


@pytest.mark.usefixtures("store")
async def test_a_read_that_cannot_be_counted_is_refused(in_loop: Served, aqmp: AsyncClient) -> None:
    """While the store of its grant is locked; the words say nothing about the store."""
    need_root()
    await aqmp.add("s", data="letmein")
    await aqmp.allow("one", "uid:1001")
    await aqmp.grant("g", "s", "one", **{"max-reads": 3})
    client = await in_loop.connect(role="client", uid=1001)
    assert await client.read("s") == b"letmein"
    await aqmp.ok("object-del", {"id": "key"})
    fd = os.memfd_create("x")
    os.posix_fallocate(fd, 0, 4096)
    words = await client.fail("secret-read", {"id": "s"}, (fd,))
    os.close(fd)
    assert words == "Reading secret 's' cannot be counted now; try again later"


@pytest.mark.usefixtures("store")
async def test_aliases_wait_for_the_store(
    in_loop: Served, aqmp: AsyncClient, slow: SlowDisk
) -> None:
    """Their changes are announced once they are written, and a failed one is none."""
    watcher = await (await in_loop.connect()).watch("SECRET_ROTATED")
    await aqmp.add("a", data="first")
    assert await aqmp.ok("secret-alias-convert", {"id": "a"}) == {}
    assert (await watcher.event())["data"]["version"] == "a.v1"
    await aqmp.add("a.v2", data="second")
    change = {"id": "a", "expect": {"current": "a.v1"}, "current": "a.v2"}
    slow.go("No space left on device")
    assert "No space left" in await aqmp.fail("secret-alias-set", change)
    slow.go()
    assert await aqmp.ok("secret-alias-set", {**change, "current": "a.v1", "note": "x"}) == {}
    expect = {"current": "a.v1", "note": "x"}
    assert await aqmp.ok("secret-alias-set", {**change, "expect": expect}) == {}
    assert (await watcher.event())["data"]["version"] == "a.v2"
    # One that only an interrupted conversion is left of is taken up.
    await aqmp.add("b", data="same")
    await aqmp.add("b.v1", data="same")
    assert await aqmp.ok("secret-alias-convert", {"id": "b"}) == {}
    assert (await watcher.event())["data"]["version"] == "b.v1"
    options = {"qom-type": "secret-alias", "id": "c", "current": "c.v1", "note": "n" * 1025}
    assert "at most 1024 characters" in await aqmp.fail("object-add", options)
    assert await aqmp.ok("object-add", {**options, "note": "n"}) == {}
