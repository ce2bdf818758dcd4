# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client without asyncio: what it does when the daemon refuses, restarts, stays silent or is
another program.
"""

import asyncio
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from secretd import client as api
from secretd.client import (
    Client,
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    StateError,
    SyncClient,
    sync,
)
from secretd.client.channel import Channel, Lost, Refused
from tests.support.daemon import Daemon
from tests.support.needs import need_locked_memory, need_root
from tests.support.qmp import Client as Qmp
from tests.support.restarts import cut, restarted
from tests.support.scripted import server

GREETING = b'{"QMP": {"version": {"qemu": {}, "package": "secretd x"}, "capabilities": []}}\n'


def test_it_needs_neither_asyncio_nor_qemu_qmp(daemon: Daemon) -> None:
    """Until one of qemu.qmp's errors is raised."""
    code = (
        "import sys\nfrom secretd.client import SyncClient\n"
        "with SyncClient(sys.argv[1]) as c:\n"
        "  c.generate('a', 8); assert c.read('a').size == 8; assert c.list(); c.delete('a')\n"
        "print(sorted({'asyncio', 'qemu.qmp'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, daemon.control], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_a_secret_is_pushed_into_another_monitor(daemon: Daemon, qmp: Qmp) -> None:
    """Sealed: the other has the key. This one is secretd itself, as it speaks QEMU's language."""
    qmp.ok("secret-generate", {"id": "key", "size": 32})
    qmp.add("a", data="letmein")
    with SyncClient(daemon.control) as client:
        client.push("a", "key", daemon.control, qemu_id="b")
        with client.read("b") as pushed:
            assert bytes(pushed.view) == b"letmein"


def test_a_client_tries_until_the_socket_is_there(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the client sleeps."""
    path = tmp_path / "later.sock"
    monkeypatch.setattr(time, "sleep", lambda _seconds: path.symlink_to(daemon.control))
    client = SyncClient(str(path))
    client.connect(retry_seconds=20)
    assert client.version() == "secretd test"
    client.close()


def test_a_refusal_is_said_in_the_daemons_words(reachable: Path) -> None:
    """By both clients: the one line that comes instead of a greeting."""
    need_root()
    words = "uid 1234 may not use the control socket; connect to the client socket"
    code = (
        "import asyncio, os, sys\nfrom secretd.client import Client, ConnectError, SyncClient\n"
        "import concurrent.futures.thread, qemu.qmp.models, secretd.client.aio\n"
        "os.setresuid(1234, 1234, 1234)\n"
        "try: SyncClient(sys.argv[1]).connect()\nexcept ConnectError as error: print(error)\n"
        "try: asyncio.run(Client(sys.argv[1]).connect())\nexcept ConnectError as error: "
        "print(error)\n"
    )
    # Measuring coverage writes into a directory of root's, and complains on stderr.
    measured = ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START")
    environment = {name: value for name, value in os.environ.items() if name not in measured}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    daemon = Daemon(reachable)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, daemon.admins],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
    finally:
        daemon.stop()
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"Refused by the server at {daemon.admins}: {words}"] * 2


def test_a_lost_connection_is_noticed_before_sending(tmp_path: Path) -> None:
    """So the first write after a restart is carried out, and once."""
    daemon = Daemon(tmp_path)
    try:
        with SyncClient(daemon.control) as client:
            for number in range(3):
                client.generate(f"a{number}", 8)
                daemon = restarted(daemon, tmp_path)
            client.add_bytes("b", memoryview(b"letmein"))
            assert [s.id for s in client.list()] == ["b"]
            assert client.package == "secretd test"
        assert client.package == ""
        with pytest.raises(StateError):
            client.list()
    finally:
        daemon.stop()


def test_what_was_sent_is_repeated_only_where_that_is_safe(daemon: Daemon) -> None:
    """And a few times at most, where it ends each fresh connection."""
    with SyncClient(daemon.control) as client:
        cut(daemon)
        with pytest.raises(ExecInterruptedError):
            client.generate("a", 8)
        assert [s.id for s in client.list()] == ["a"]
        cut(daemon)
        with pytest.raises(ExecInterruptedError):
            client.delete("a")


@pytest.mark.slow
def test_a_command_that_ends_each_connection_is_given_up(tmp_path: Path) -> None:
    """After four."""
    path = str(tmp_path / "s")
    with server(path, GREETING, b'{"return": {}}\n', b"") as received:
        with SyncClient(path) as client, pytest.raises(ExecInterruptedError):
            client.execute("query-name")
        assert sum(b"query-name" in data for data in received) == 4


@pytest.mark.slow
def test_silence_is_said_and_can_be_limited(tmp_path: Path) -> None:
    """While it connects, and while it waits for a reply; what comes later is not taken for
    another's.
    """
    path = str(tmp_path / "s")
    said: list[str] = []
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen(0)
        client = SyncClient(path, timeout=2.2, on_wait=said.append)
        with pytest.raises(ConnectError, match=r"No answer within 2\.2 seconds"):
            client.connect()
        assert said == [f"an answer on {path}"]
        # The one place of the queue is taken by the connection that was given up.
        with pytest.raises(ConnectError, match="a place in the queue"):
            client.connect()
        client.close()
    os.unlink(path)
    with server(path, GREETING, b'{"return": {}}\n', b"\n\n") as received:
        with SyncClient(path, timeout=0.1) as client:
            with pytest.raises(ConnectError, match="the reply to query-name"):
                client.execute("query-name")
        assert any(b"query-name" in data for data in received)


def test_text_that_is_not_utf8_is_refused_before_it_is_sent(daemon: Daemon) -> None:
    """In names, anywhere in arguments; by both clients."""
    bad = "disk-\udce4"
    with SyncClient(daemon.control) as client:
        attempts: tuple[Callable[[], object], ...] = (
            lambda: client.read(bad),
            lambda: client.add_bytes(bad, memoryview(b"x")),
            lambda: client.seal(bad, "k"),
            lambda: client.execute("x", {"a": [{"b": bad}]}),
            lambda: client.execute("x", {bad: 1}),
        )
        for attempt in attempts:
            with pytest.raises(ValueError, match=r"'disk-\\udce4' is not UTF-8 text"):
                attempt()
        with pytest.raises(TypeError):
            client.add_bytes("a", "a str")  # type: ignore[arg-type]
        assert client.list() == []

    async def other() -> None:
        async with Client(daemon.control) as client:
            for coroutine in (client.read(bad), client.generate(bad), client.seal("a", bad)):
                with pytest.raises(ValueError, match="is not UTF-8 text"):
                    await coroutine
            with pytest.raises(TypeError):
                await client.add_bytes("a", "a str")  # type: ignore[arg-type]

    asyncio.run(other())


def test_every_method_of_the_asyncio_client_is_there() -> None:
    """With the same parameters."""
    import inspect

    for name, method in vars(Client).items():
        if not name.startswith("_"):
            ours = inspect.signature(getattr(SyncClient, name))
            assert ours.parameters == inspect.signature(method).parameters, name


@pytest.mark.slow
def test_secrets_of_the_largest_size_are_sealed(daemon: Daemon, qmp: Qmp) -> None:
    """Through a descriptor, by both clients; the reply has no room for them."""
    need_locked_memory(16 << 20)
    largest = os.urandom(1 << 20)
    with SyncClient(daemon.control) as client:
        client.add_bytes("s", memoryview(largest))
        client.generate("k", 32)
        sealed = client.seal("s", "k")
        assert qmp.add("again", keyid="k", format="base64", **sealed._asdict()) == {"return": {}}
        with client.read("again") as secret:
            assert secret.view == largest
        with pytest.raises(ExecuteError, match="No secret with id 'none'"):
            client.seal("none", "k")
        with pytest.raises(ExecuteError, match="No secret with id 'none'"):
            client.seal("s", "none")
        assert client.info("s") == client.list()[2]
        assert client.info("t") is None
        assert client.stat("connections-per-uid") == 2
        client.expire("s", 100)
        client.expire("s", None)
        assert client.list()[2].expires_in is None

    async def other() -> None:
        async with Client(daemon.control) as client:
            again = await client.seal("s", "k")
            assert len(again.data) == len(sealed.data)
            found = await client.info("s")
            assert found is not None
            assert found.size == 1 << 20
            await client.expire("s", None)

    asyncio.run(other())
    assert "more than the limit of 65536 bytes" in qmp.fail(
        "secret-seal", {"id": "s", "keyid": "k"}
    )


def test_what_is_no_qmp_is_said(tmp_path: Path) -> None:
    """A greeting of another kind, none, or an end."""
    for number, (answer, words) in enumerate(
        (
            (b"SSH-2.0\n", "This is not QMP"),
            (b'{"hello": 1}\n', "This is not a QMP server"),
            (b"[]\n", "This is not QMP"),
            (b"", "The connection was closed without a greeting"),
        )
    ):
        path = str(tmp_path / str(number))
        with server(path, answer), pytest.raises(ConnectError, match=words):
            SyncClient(path).connect()
    path = str(tmp_path / "refusing")
    refusal = {"error": {"class": "GenericError", "desc": "no"}}
    with server(path, GREETING, json.dumps(refusal).encode() + b"\n"):
        with pytest.raises(ConnectError, match="Refused by the server at .*: no"):
            SyncClient(path).connect()


def test_events_go_on_over_a_lost_connection(daemon: Daemon, qmp: Qmp) -> None:
    """Only those of the names that were asked for; they end with the client."""
    seen: list[tuple[str, str]] = []
    client = SyncClient(daemon.control)
    client.connect()

    def follow() -> None:
        seen.extend((e.name, e.id) for e in client.events(names=["SECRET_DELETED"]))

    def subscribed() -> None:
        while not daemon.call(lambda: list(daemon.server.core.broadcaster.subscribers)):
            pass

    thread = threading.Thread(target=follow)
    thread.start()
    for name in ("a", "b"):
        subscribed()
        qmp.add(name, data="x")
        qmp.ok("object-del", {"id": name})
        while ("SECRET_DELETED", name) not in seen:
            pass
        drop_subscribers(daemon)
    subscribed()
    client._connection.is_open = False
    drop_subscribers(daemon)
    thread.join(10)
    assert not thread.is_alive()
    client.close()
    assert seen == [("SECRET_DELETED", "a"), ("SECRET_DELETED", "b")]


def drop_subscribers(daemon: Daemon) -> None:
    """End the connections that get events."""
    sessions = daemon.server.sessions
    daemon.call(lambda: [s.transport.close() for s in list(sessions) if s.wanted])


# --- a server that follows a script

READY = b'{"return": {}}\n'
EVENT = (
    b'{"event": "SECRET_ADDED", "data": {"id": "%s"}, "timestamp": {"seconds": 1, '
    b'"microseconds": 0}}\n'
)
REFUSAL = b'{"error": {"class": "GenericError", "desc": "no"}}\n'


def test_events_between_replies_are_kept_in_order(tmp_path: Path) -> None:
    """Also where a stray reply lies between them."""
    path = str(tmp_path / "s")
    with server(path, GREETING, READY, EVENT % b"a" + READY + READY + EVENT % b"b"):
        with SyncClient(path) as client:
            events = client.events()
            assert [next(events).id for _ in range(2)] == ["a", "b"]


def test_events_that_came_before_a_command_are_taken(daemon: Daemon, qmp: Qmp) -> None:
    """They do not look like the end of the connection."""
    channel = Channel(daemon.control, None)
    channel.exchange("secret-events", {"enable": True})
    qmp.add("a", data="x")
    daemon.call(daemon.server.core.broadcaster.flush)
    select.select([channel._sock], [], [])
    assert channel.exchange("query-name", None) == {"return": {}}
    assert [event["event"] for event in channel.events] == ["SECRET_ADDED"]
    channel.close()


@pytest.mark.parametrize("more", [b"", b"x" * 300_000])
def test_a_reset_is_the_end_of_a_connection(tmp_path: Path, more: bytes) -> None:
    """While a reply is waited for, and while a command is sent."""
    path = str(tmp_path / "s")
    with server(path, GREETING, READY, None):
        channel = Channel(path, None)
        with pytest.raises(Lost) as caught:
            channel.exchange("query-name", {"x": more.decode()})
        assert caught.value.sent == (not more)
        channel.close()


def test_a_reset_between_commands_is_noticed(tmp_path: Path) -> None:
    """Before the next one is sent, and while events are waited for."""
    for number in range(2):
        path = str(tmp_path / str(number))
        with server(path, GREETING, READY, READY, None):
            channel = Channel(path, None)
            assert channel.exchange("query-name", {"x": "x" * 100_000}) == {"return": {}}
            poll = select.poll()
            poll.register(channel._sock, 0)
            poll.poll()
            if number:
                assert channel.event() is None
            else:
                with pytest.raises(Lost) as caught:
                    channel.exchange("query-name", None)
                assert not caught.value.sent
            channel.close()


@pytest.mark.slow
def test_a_person_learns_what_a_delivery_waits_for(tmp_path: Path) -> None:
    """After two seconds; then it is waited for further."""
    path = str(tmp_path / "s")
    said: list[str] = []
    with server(path, GREETING, READY, READY, b"\n"):
        with SyncClient(path, timeout=2.2, on_wait=said.append) as client:
            with pytest.raises(ConnectError, match="waited for the reply to secret-read"):
                client.read("s")
    assert said == ["the reply to secret-read"]


def test_a_delivery_without_an_end_is_given_up(tmp_path: Path) -> None:
    """The server says how long the secret is, and writes nothing."""
    path = str(tmp_path / "s")
    with server(path, GREETING, READY, READY, b'{"return": {"size": 7}}\n'):
        with SyncClient(path, timeout=0.1) as client:
            with pytest.raises(ConnectError, match=r"The secret did not end within 0\.1 seconds"):
                client.read("s")


def test_a_large_secret_that_is_refused_is_not_sent_whole(daemon: Daemon) -> None:
    """The reply says why; a connection that is lost meanwhile is no reason to send it again."""
    large = memoryview(bytes(1 << 20))
    with SyncClient(daemon.control) as client:
        with pytest.raises(ExecuteError, match="expects an identifier"):
            client.add_bytes("1", large)
        cut(daemon)
        with pytest.raises(ExecInterruptedError):
            client.add_bytes("a", large)
        assert [s.id for s in client.list()] == ["a"]


def test_a_refusal_after_a_restart_ends_the_retries(tmp_path: Path) -> None:
    """Its words are the error; by both clients."""
    for number, method in enumerate(("sync", "asyncio")):
        path = str(tmp_path / str(number))
        with server(path, GREETING, READY, b"", later=[REFUSAL]):
            if method == "sync":
                with (
                    SyncClient(path) as client,
                    pytest.raises(ConnectError, match="server at .*: no"),
                ):
                    client.execute("query-name")
                continue

            async def use(path: str) -> None:
                async with Client(path) as client:
                    with pytest.raises(ConnectError, match="server at .*: no"):
                        await client.execute("query-name")

            asyncio.run(use(path))


def test_a_server_that_is_gone_is_tried_for_a_while(tmp_path: Path) -> None:
    """Then the reason is that there is no connection."""
    daemon = Daemon(tmp_path)
    with SyncClient(daemon.control, retry_seconds=0.1) as client:
        daemon.stop()
        with pytest.raises(ConnectError, match="Failed to establish connection"):
            client.execute("query-name")


@pytest.mark.slow
async def test_the_asyncio_client_gives_up_on_a_command_too(tmp_path: Path) -> None:
    """After four connections that it has ended."""
    path = str(tmp_path / "s")
    with server(path, GREETING, READY, b"") as received:
        async with Client(path) as client:
            with pytest.raises(ExecInterruptedError):
                await client.execute("query-name")
        assert sum(b"query-name" in data for data in received) == 4


async def test_the_asyncio_client_says_why_it_was_refused(tmp_path: Path) -> None:
    """If the server says so when it is asked once more; otherwise the first error stays."""
    later: tuple[list[bytes | None] | None, ...] = (None, [GREETING, READY], [b""])
    for number, again in enumerate(later):
        path = str(tmp_path / str(number))
        with server(path, b'{"error": {"desc": "no"}}\n', later=again):
            with pytest.raises(ConnectError) as caught:
                await Client(path).connect()
            assert isinstance(caught.value.exc, Refused) == (again is None)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Though its names are imported late."""
    with pytest.raises(AttributeError, match=r"module 'secretd\.client' has no attribute 'nope'"):
        _ = api.nope


def test_a_secret_that_comes_behind_the_reply_is_read_whole(tmp_path: Path) -> None:
    """A pipe and a socket have no order between them."""
    path = str(tmp_path / "s")

    def write_late(descriptors: list[int]) -> None:
        while not seen:
            pass
        for piece in (b"let", b"mein"):
            os.write(descriptors[0], piece)

    seen: list[float | None] = []
    real = sync.wait

    def waited(fd: int, events: int, timeout: float | None) -> bool:
        seen.append(timeout)
        return real(fd, events, timeout)

    with server(path, GREETING, READY, READY, b'{"return": {"size": 7}}\n', write_late):
        with SyncClient(path) as client, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sync, "wait", waited)
            with client.read("s") as secret:
                assert bytes(secret.view) == b"letmein"


def test_a_daemon_that_ends_while_it_is_given_a_secret_is_lost(tmp_path: Path) -> None:
    """The pipe has no reader then."""
    path = str(tmp_path / "s")

    def drop(descriptors: list[int]) -> None:
        for fd in descriptors:
            os.close(fd)
        descriptors.clear()

    added = b'{"return": {"fd": 3, "fdset-id": 0}}\n'
    with server(path, GREETING, READY, added, b"\n", drop, b""):
        with SyncClient(path) as client, pytest.raises(ExecInterruptedError):
            client.add_bytes("a", memoryview(bytes(1 << 20)))


def test_a_command_larger_than_the_buffer_is_sent_in_pieces(daemon: Daemon) -> None:
    """As room comes."""
    need_locked_memory(16 << 20)  # it shares the limit with the worker's other tests
    with SyncClient(daemon.control) as client:
        options = {"qom-type": "secret", "id": "a", "data": "x" * (1 << 20)}
        client.execute("object-add", options)
        with client.read("a") as secret:
            assert len(secret) == 1 << 20


def test_a_batch_needs_a_connection(daemon: Daemon, tmp_path: Path) -> None:
    """It makes one if the last one was lost."""
    with api.SyncClient(daemon.control) as client, client.buffer(1 << 12) as buffer:
        client._connection.disconnect()
        batch = client.batch(buffer)
        assert list(batch.put([b'{"execute": "query-name"}', b"\n"])) == []
        assert list(batch.finish()) == [{"return": {}}]
    lost = api.SyncClient(str(tmp_path / "no"))
    with client.buffer(1 << 12) as buffer, pytest.raises(api.ConnectError):
        lost.batch(buffer)
    client.close()
