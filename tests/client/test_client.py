# SPDX-License-Identifier: LGPL-2.1-or-later
"""The asyncio client against a running server."""

import asyncio
import base64
import os
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from secretd import paths
from secretd.client import (
    Client,
    ConnectError,
    Encoding,
    ExecInterruptedError,
    ExecuteError,
    SecretInfo,
    StateError,
    SyncClient,
    default_socket,
    readiness,
)
from tests.support.daemon import Daemon
from tests.support.in_loop import Served
from tests.support.needs import ARENA_LEVEL, need_locked_memory
from tests.support.qmp import Client as Qmp
from tests.support.restarts import cut, restarted


def with_client(daemon: Daemon, use: Callable[[Client], Awaitable[None]]) -> None:
    async def main() -> None:
        async with Client(daemon.control) as client:
            await use(client)

    asyncio.run(main())


async def test_secrets_go_in_and_come_out(in_loop: Served) -> None:
    """Every method once, with small and large secrets."""
    need_locked_memory(16 << 20)  # it shares the limit with the worker's other tests
    async with Client(in_loop.control) as client:
        assert await client.version() == "secretd test"
        fd = os.memfd_create("x")
        os.write(fd, base64.b64encode(b"letmein"))
        await client.add("a", fd, Encoding("base64"))
        os.close(fd)
        big = os.urandom(1 << 20)
        await client.add_bytes("big", memoryview(big))
        await client.add_bytes("empty", memoryview(b""))
        await client.generate("key", 32)
        assert (await client.list())[0] == SecretInfo("a", "secret", 7, ARENA_LEVEL)
        with await client.read("a") as secret:
            assert bytes(secret.view) == b"letmein"
        with await client.read("a", format="base64") as secret:
            assert bytes(secret.view) == base64.b64encode(b"letmein")
        with await client.read("empty") as secret:
            assert len(secret) == 0
        large = await client.read("big")
        assert bytes(large.view) == big
        fd = os.memfd_create("x")
        assert await client.read_into("a", fd, format="base64") == 12
        assert os.pread(fd, 100, 0) == base64.b64encode(b"letmein")
        os.close(fd)
        assert (await client.explain("a", ["uid:1"])).allowed is False
        assert await client.stat("objects-per-uid") == 4
        sealed = await client.seal("a", "key")
        await client.add_bytes(
            "again", memoryview(sealed.data.encode()), Encoding("base64", "key", sealed.iv)
        )
        with await client.read("again") as secret:
            assert bytes(secret.view) == b"letmein"
        many = await asyncio.gather(*(client.read("a") for _ in range(30)))
        assert all(bytes(secret.view) == b"letmein" for secret in many)
        await client.delete("a")
        with pytest.raises(ExecuteError, match="No secret with id 'a'"):
            await client.read("a")
        with pytest.raises(ExecuteError, match="object 'a' not found"):
            await client.delete("a")


async def test_grants_and_figures_are_typed_results(in_loop: Served) -> None:
    """And a plan's refusals are the caller's."""
    need_locked_memory(16 << 20)
    async with Client(in_loop.control) as client:
        await client.generate("key", 32)
        await client.add_bytes("a", memoryview(b"letmein"))
        limits = {"expires_after": 60, "max_reads": 5, "credential": "pw"}
        name = await client.grant("a", ["unit:x.service", "uid:5"], **limits)  # type: ignore[arg-type]
        assert name == "grant-a-unit_x.service-uid_5"
        (granted,) = await client.grants(secret="a")
        assert (granted.id, granted.reads_left) == (name, 5)
        assert await client.grants(to=["uid:6"]) == []
        assert (await client.explain("a", ["uid:5"])).allowed
        with pytest.raises(ExecuteError, match="duplicate property"):
            await client.grant("a", ["uid:5"], grant_id=name)
        with pytest.raises(ExecuteError, match="expects an identifier"):
            await client.grant("a", ["uid:5"], grant_id="no id")
        with pytest.raises(ValueError, match="'key' is not a grant"):
            await client.revoke("key")
        assert await client.revoke(name)
        assert not await client.revoke(name)
        assert (await client.stats())["objects"] == await client.stat("objects") == 2
        assert (await client.usage("a")).releases == 0
        await client.push("a", "key", in_loop.control, qemu_id="b")
        with await client.read("b") as pushed:
            assert bytes(pushed.view) == b"letmein"
        with pytest.raises(ConnectError):
            await client.push("a", "key", "/nowhere")
    with pytest.raises(StateError):
        await client.grant("a", ["uid:5"])


async def test_a_client_waits_for_a_socket_that_comes_later(
    in_loop: Served, tmp_path: Path
) -> None:
    """As long as it may."""
    path = tmp_path / "later.sock"
    client = Client(str(path))
    connecting = asyncio.create_task(client.connect(retry_seconds=20))
    for _ in range(50):  # it has found nothing by then
        await asyncio.sleep(0)
    assert not connecting.done()
    path.symlink_to(in_loop.control)
    await connecting
    assert await client.version() == "secretd test"
    await client.close()


async def test_a_failed_add_leaves_no_descriptor_in_the_daemon(in_loop: Served) -> None:
    """Nor a task or a pipe here."""
    async with Client(in_loop.control) as client:
        with pytest.raises(ExecuteError, match="expects an identifier"):
            await client.add_bytes("1", memoryview(bytes(1 << 20)))
        assert await client.execute("query-fdsets") == []


async def test_connecting_to_nothing_is_a_connect_error(tmp_path: Path) -> None:
    """qemu.qmp's exception, with the cause in it."""
    with pytest.raises(ConnectError):
        await Client(str(tmp_path / "none")).connect()


async def test_a_wait_that_is_settled_twice_is_settled_once() -> None:
    """The loop may call back again before the waiter runs."""
    future = asyncio.get_running_loop().create_future()
    readiness._settle(future)
    readiness._settle(future)
    assert future.done()


def test_the_default_socket_is_the_best_one_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment, else control, else client, else where control would be."""
    monkeypatch.setenv("SECRETD_SOCKET", "/x")
    assert default_socket() == "/x"
    monkeypatch.delenv("SECRETD_SOCKET")
    monkeypatch.setattr(paths, "default_directory", lambda: str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path).exists() and "run" not in path)
    control, client = str(tmp_path / "control.sock"), str(tmp_path / "client.sock")
    assert default_socket() == control
    Path(client).touch()
    assert default_socket() == client
    Path(control).touch()
    assert default_socket() == control


def test_the_default_directory_depends_on_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """/run for root, the runtime directory of a user, else a private one in the temporary
    directory.
    """
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert paths.default_directory() == "/run/secretd"
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert paths.default_directory() == "/run/user/1000/secretd"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert paths.default_directory().endswith("/secretd-1000")


def test_a_directory_is_trusted_if_root_or_this_user_owns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere another user could have placed a socket."""
    assert paths.is_trusted(str(tmp_path))
    assert not paths.is_trusted(str(tmp_path / "none"))
    (tmp_path / "link").symlink_to(tmp_path)
    assert not paths.is_trusted(str(tmp_path / "link"))
    os.chown(tmp_path, 12345, -1) if os.getuid() == 0 else monkeypatch.setattr(
        os, "getuid", lambda: 7
    )
    assert not paths.is_trusted(str(tmp_path))


async def test_what_was_read_is_wiped_with_the_client(in_loop: Served) -> None:
    """A buffer that outlives its client reads as zeros, and can still be freed."""
    async with Client(in_loop.control) as client:
        await client.add_bytes("s", memoryview(b"letmein"))
        secret = await client.read("s")
    assert bytes(secret.view) == bytes(7)
    secret.free()


@pytest.mark.slow
def test_the_client_connects_again(tmp_path: Path) -> None:
    """Several at once too; whatever it was about to do, if nothing was sent."""
    daemon = Daemon(tmp_path)

    async def use() -> None:
        nonlocal daemon
        async with Client(daemon.control) as client:
            await client.add_bytes("a", memoryview(b"letmein"))
            daemon = await asyncio.to_thread(restarted, daemon, tmp_path)
            assert await client.list() == []
            daemon = await asyncio.to_thread(restarted, daemon, tmp_path)
            await client.add_bytes("a", memoryview(b"letmein"))
            daemon = await asyncio.to_thread(restarted, daemon, tmp_path)
            await asyncio.gather(*(client.generate(f"s{n}", 32) for n in range(20)))
            reads = [client.read(f"s{n}") for n in range(20)]
            assert {len(secret) for secret in await asyncio.gather(*reads)} == {32}
            daemon = await asyncio.to_thread(restarted, daemon, tmp_path)
            with pytest.raises(ExecuteError, match="No secret with id 's1'"):
                await client.read("s1")

    try:
        asyncio.run(use())
    finally:
        daemon.stop()


async def test_only_safe_commands_are_repeated(
    daemon: Daemon,
) -> None:
    """An add is not; nor is a delete, since another client may have added another of that id
    meanwhile.
    """
    async with Client(daemon.control) as client:
        cut(daemon)
        with pytest.raises(ExecInterruptedError):
            await client.add_bytes("a", memoryview(b"letmein"))
        with await client.read("a") as secret:
            assert bytes(secret.view) == b"letmein"
        cut(daemon)
        with pytest.raises(ExecInterruptedError):
            await client.generate("b", 32)
        assert [s.id for s in await client.list()] == ["a", "b"]
        cut(daemon)
        with pytest.raises(ExecInterruptedError):
            await client.delete("a")
        with pytest.raises(ExecuteError, match="object 'a' not found"):
            await client.delete("a")
        await client.expire("b", 100)


@pytest.mark.slow
async def test_it_is_tried_as_often_as_it_takes(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it is cut off."""
    times = iter(range(3))
    listed = daemon.tree.types.listed

    def cutting(*given: object, **named: object) -> object:
        if next(times, None) is not None:
            for session in list(daemon.server.sessions):
                session.transport.close()
        return listed(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(daemon.tree.types, "listed", cutting)
    async with Client(daemon.control) as client:
        assert await client.execute("qom-list-types")
        assert next(times, None) is None


async def test_a_socket_that_is_broken_already_is_made_anew(in_loop: Served) -> None:
    """Before the client has noticed it."""
    async with Client(in_loop.control) as client:
        await client.generate("a", 32)
        client._connection.qmp._writer.transport.get_extra_info("socket")._sock.shutdown(2)
        with await client.read("a") as secret:
            assert len(secret) == 32


@pytest.mark.slow
async def test_a_silent_socket_is_given_up(
    tmp_path: Path,
) -> None:
    """As systemd's, while secretd cannot start: neither until the time is over, nor once it is
    closed.
    """
    daemon = Daemon(tmp_path)
    short = Client(daemon.control, retry_seconds=0.2)
    closed = Client(daemon.control)
    for client in (short, closed):
        await client.connect()
    await asyncio.to_thread(daemon.stop)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(daemon.control)
        silent.listen()
        with pytest.raises(ConnectError):
            await short.list()
        waiting = asyncio.ensure_future(closed.list())
        while not closed._connection._connecting.locked():
            await asyncio.sleep(0)
        await closed.close()
        with pytest.raises(ConnectError):
            await waiting
        await short.close()
    os.unlink(daemon.control)
    daemon.stop()


@pytest.mark.slow
async def test_it_is_not_tried_for_ever(tmp_path: Path) -> None:
    """Nor at all, if that is said; nor once the client is closed."""
    daemon = Daemon(tmp_path)
    never = Client(daemon.control, retry_seconds=0)
    short = Client(daemon.control, retry_seconds=0.12)
    closed = Client(daemon.control)
    for client in (never, short, closed):
        await client.connect()
    await asyncio.to_thread(daemon.stop)
    with pytest.raises((StateError, ExecInterruptedError)):
        await never.list()
    with pytest.raises(ConnectError):
        await short.list()
    waiting = asyncio.ensure_future(closed.list())
    while not closed._connection._connecting.locked():
        await asyncio.sleep(0)
    await closed.close()
    with pytest.raises(ConnectError):
        await waiting
    with pytest.raises(StateError):
        await closed.list()
    for client in (never, short):
        await client.close()
    daemon.stop()


def test_events_come_as_an_iterator_also_after_a_lost_connection(daemon: Daemon, qmp: Qmp) -> None:
    """Until the client is closed."""

    async def main() -> list[tuple[str, str]]:
        seen: list[tuple[str, str]] = []
        async with Client(daemon.control, retry_seconds=10) as client:
            changes: list[bool] = []
            events = client.events(on_change=changes.append)
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.to_thread(subscribed, daemon)
            await asyncio.to_thread(lambda: qmp.add("a", data="letmein"))
            event = await waiting
            seen.append((event.name, event.id))
            assert event.peer is not None
            assert event.peer["uid"] == os.getuid()
            assert abs(event.time - time.time()) < 60
            assert event.data["id"] == "a"
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            mine = [s for s in daemon.server.sessions if s.peer.pid == os.getpid()]
            assert len(mine) == 2
            await asyncio.to_thread(daemon.call, lambda: drop_other(daemon))
            await asyncio.to_thread(subscribed, daemon)
            await asyncio.to_thread(qmp.ok, "object-del", {"id": "a"})
            event = await waiting
            seen.append((event.name, event.id))
            assert changes == [False, True]
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
        with pytest.raises(StopAsyncIteration):
            await waiting
        return seen

    assert asyncio.run(main()) == [("SECRET_ADDED", "a"), ("SECRET_DELETED", "a")]


def drop_other(daemon: Daemon) -> None:
    """Close the connection that was made last."""
    newest = max(daemon.server.sessions, key=lambda s: s.transport._sock.fileno())
    newest.transport.close()


def subscribed(daemon: Daemon) -> None:
    """Wait until a connection gets events."""
    while not daemon.call(lambda: list(daemon.server.core.broadcaster.subscribers)):
        pass


@pytest.mark.slow
def test_the_client_without_asyncio_does_the_same(daemon: Daemon, tmp_path: Path) -> None:
    """Each method, one after the other."""
    (tmp_path / "f").write_text("letmein")
    with SyncClient(daemon.control) as client:
        assert client.path == daemon.control
        assert client.version() == "secretd test"
        with open(tmp_path / "f", "rb") as file:
            client.add("a", file.fileno())
        with client.buffer(3) as plaintext:
            plaintext.view[:] = b"abc"
            client.add_bytes("b", plaintext.view)
        client.generate("k", 32)
        client.expire("b", 1000)
        assert [s.id for s in client.list()] == ["a", "b", "k"]
        with client.read("a") as secret:
            assert bytes(secret.view) == b"letmein"
        fd = os.memfd_create("x")
        assert client.read_into("a", fd, format="base64") == 12
        os.close(fd)
        assert set(client.seal("a", "k")._asdict()) == {"data", "iv"}
        assert client.explain("a", ["uid:1"]).allowed is False
        assert client.execute("query-name") == {}
        events = client.events()
        daemon.call(lambda: daemon.loop.call_later(0.2, announce, daemon))
        assert next(events).id == "told"
        client.delete("b")
        with pytest.raises(ExecuteError):
            client.delete("b")
        client.close()
        assert list(events) == []
    client = SyncClient(str(tmp_path / "no"))
    with pytest.raises(ConnectError), client:
        pass


def announce(daemon: Daemon) -> None:
    """Tell of something."""
    daemon.server.core.announce("SECRET_ADDED", "told", None, None)


async def test_a_copy_of_the_store_goes_to_a_descriptor(in_loop: Served, tmp_path: Path) -> None:
    """And its size is returned."""
    async with Client(in_loop.control) as client:
        with client.buffer(32) as key:
            key.view[:] = bytes(range(32))
            await client.add_bytes("key", key.view)
        path = str(tmp_path / "store")
        options = {"qom-type": "secret-store", "id": "store", "path": path, "keyid": "key"}
        await client.execute("object-add", {**options, "create": True})
        await client.execute("secret-store-unlock", {"id": "store"})
        with open(tmp_path / "copy", "wb") as file:
            size = await client.backup_store("store", file.fileno())
        assert (tmp_path / "copy").stat().st_size == size > 4096


async def test_aliases_are_set_and_asked_for(in_loop: Served) -> None:
    """The same values as without asyncio."""
    async with Client(in_loop.control) as client:
        await client.generate("a", 8)
        await client.convert("a")
        await client.generate("a.v2", 8)
        await client.set_alias(await client.alias("a"), current="a.v2", previous="a.v1")
        found = await client.alias("a")
        assert (found.current, found.previous, found.next) == ("a.v2", "a.v1", "a.v3")
        with pytest.raises(ExecuteError, match="is not as expected"):
            await client.set_alias(found._replace(current="a.v1", previous=""), current="a.v2")
