# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client without asyncio: what it does when the daemon refuses, restarts, stays silent or is
another program.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from secretd.client import (
    Client,
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    StateError,
    SyncClient,
)
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
def test_a_refusal_is_said_in_the_daemons_words(reachable: Path) -> None:
    """By both clients: the one line that comes instead of a greeting."""
    need_root()
    words = "uid 1234 may not use the control socket; connect to the client socket"
    code = (
        "import asyncio, os, sys\nfrom secretd.client import Client, ConnectError, SyncClient\n"
        "import concurrent.futures.thread, qemu.qmp.models, secretd.client.aio\n"
        "os.setresuid(1234, 1234, 1234)\n"
        "try: SyncClient(sys.argv[1]).connect()\nexcept ConnectError as error: print(error)\n"
        "try: asyncio.run(Client(sys.argv[1]).connect())\nexcept ConnectError as error: print(error)\n"
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
    assert done.stdout.splitlines() == [f"Refused by the server: {words}"] * 2


def test_the_end_of_a_connection_is_noticed_before_a_command_is_sent(tmp_path: Path) -> None:
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
            (b"SSH-2.0\n", "This is no QMP"),
            (b'{"hello": 1}\n', "This is not a QMP server"),
            (b"[]\n", "This is no QMP"),
            (b"", "The connection was closed without a word"),
        )
    ):
        path = str(tmp_path / str(number))
        with server(path, answer), pytest.raises(ConnectError, match=words):
            SyncClient(path).connect()
    path = str(tmp_path / "refusing")
    refusal = {"error": {"class": "GenericError", "desc": "no"}}
    with server(path, GREETING, json.dumps(refusal).encode() + b"\n"):
        with pytest.raises(ConnectError, match="Refused by the server: no"):
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
