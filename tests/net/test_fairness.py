# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shares are per uid: what one uid sends, asks for and is granted costs the others nothing. Work is
counted.
"""

import asyncio
import itertools
import json
import os
from collections.abc import Callable

import pytest

from secretd.monitor import monitor, session
from secretd.net.loop import Loop, turn
from secretd.net.transport import Transport
from secretd.net.turns import Turns
from secretd.qom.authz import Rules
from secretd.qom.sorted_ids import IDS_PER_LOOK
from tests.support.daemon import Daemon
from tests.support.grants import (
    SECRET,
    allow,
    denied,
    grant,
)
from tests.support.needs import need_root
from tests.support.qmp import Client

COSTLY = ('{"execute": "query-version", "id": "' + "\\n\u00e9" * 1200 + '"}\n').encode()


def full_pipe() -> tuple[int, int]:
    """Return a pipe that takes no byte more."""
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    try:
        while True:
            os.write(sink, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(sink, True)
        return source, sink


def blocked_read(client: Client) -> tuple[int, int]:
    """Start a delivery that waits; return its pipe."""
    source, sink = full_pipe()
    client.send(b'{"execute":"secret-read","arguments":{"id":"s"},"id":0}\n', (sink,))
    return source, sink


def granted_client(daemon: Daemon, qmp: Client) -> Client:
    """Return a client of uid 1000, with oob, that may read the secret ``s``."""
    need_root()
    qmp.add("s", data="letmein")
    allow(qmp, "who", "uid:1000")
    grant(qmp, "g", "s", "who")
    client = daemon.connect(role="client", uid=1000, negotiate=False)
    client.reply()
    assert client.cmd("qmp_capabilities", {"enable": ["oob"]}) == {"return": {}}
    return client


def test_turns_go_round_by_uid() -> None:
    """Whatever a uid has to do waits behind one piece of each other; the same piece waits once."""
    done: list[str] = []
    failed: list[Exception] = []
    turns = Turns(failed.append)
    work = {name: (lambda name=name: done.append(name)) for name in ("a1", "a2", "a3", "b1")}
    for name in ("a1", "a2", "a3"):
        turns.add(1, work[name])
    turns.add(2, work["b1"])
    turns.add(1, work["a1"])

    def wrong() -> None:
        raise ValueError

    turns.add(3, wrong)
    while turns.waiting:
        turns.run()
    assert done == ["a1", "b1", "a2", "a3"]
    assert [type(error) for error in failed] == [ValueError]


def test_a_coroutine_waits_for_its_turn() -> None:
    """Its uid's, or the loop's; also where it is cancelled meanwhile."""

    async def main() -> None:
        await turn(None)
        await turn(7)
        waiting = asyncio.ensure_future(turn(7))
        await asyncio.sleep(0)
        waiting.cancel()
        await turn(7)
        await asyncio.gather(waiting, return_exceptions=True)

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main())


@pytest.mark.slow
def test_many_connections_of_one_uid_do_not_delay_root(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new control connection is answered after a few of their messages, not after all of them."""
    need_root()
    handled: list[int] = []
    real = monitor.Monitor.handle

    def counting(self: monitor.Monitor, request: object) -> object:
        handled.append(self.peer.uid)
        return real(self, request)  # type: ignore[arg-type]

    monkeypatch.setattr(monitor.Monitor, "handle", counting)
    # One piece of work between two looks
    daemon.call(lambda: setattr(asyncio.get_running_loop().turns, "seconds", 0.0))
    many = [daemon.connect(role="client", uid=1000) for _ in range(100)]
    for client in many:
        client.send(COSTLY * 10)
    while handled.count(1000) < 150:
        pass
    begun = len(handled)
    fresh = daemon.connect()
    assert fresh.ok("query-name") == {}
    between = handled[begun:]
    between = between[: len(between) - 1 - between[::-1].index(0)]
    assert between.count(1000) < 200  # of the 850 and more that wait
    for client in many:
        for _ in range(10):
            assert "return" in client.reply()


def test_a_message_on_the_client_socket_has_few_tokens(daemon: Daemon, qmp: Client) -> None:
    """What is made of them takes the time of all; a control socket takes as many as ever."""
    client = daemon.connect(role="client")
    many = b'{"execute": "query-version", "id": [' + b",".join([b"0"] * 100) + b"]}"
    words = "JSON token count limit exceeded"
    assert client.ask(many)["error"]["desc"] == words
    client.send(b"\xff")
    assert len(json.dumps(qmp.ask(many))) > 300


def test_queued_requests_are_carried_out_one_in_each_turn(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a command that waits, with oob: also when many end at once.

    All are answered, in order.
    """
    client = granted_client(daemon, qmp)
    turns: list[object] = []
    real = session.Session._continue
    monkeypatch.setattr(session.Session, "_continue", lambda self: (turns.append(self), real(self)))
    source, sink = blocked_read(client)
    for number in range(1, 6):
        client.send(b'{"execute":"query-version","id":%d}\n' % number)
    ours = [s for s in daemon.server.sessions if s.peer.uid == 1000]
    while daemon.call(lambda: len(ours[0]._queue)) < 5:
        pass
    qmp.ok("object-del", {"id": "g"})
    assert [client.reply()["id"] for _ in range(6)] == list(range(6))
    assert len(turns) >= 5
    for fd in (source, sink):
        os.close(fd)


def test_a_client_that_resets_ends_no_more_than_its_connection(daemon: Daemon, qmp: Client) -> None:
    """During a delivery, with a greeting unread on its side and a request on ours."""
    need_root()
    qmp.add("s", data="letmein")
    allow(qmp, "who", "uid:1000")
    grant(qmp, "g", "s", "who")
    for _ in range(3):
        client = daemon.connect(role="client", uid=1000, negotiate=False)
        client.send(b'{"execute":"qmp_capabilities"}\n')
        while not daemon.call(lambda: [s for s in daemon.server.sessions if s.peer.uid == 1000]):
            pass
        source, sink = blocked_read(client)
        while not daemon.call(lambda: len(daemon.server.core.deliveries._running)):
            pass
        client.send(b'{"execute":"query-version"}\n' * 3)
        client.close()
        os.read(source, 1 << 17)
        while daemon.call(lambda: [s for s in daemon.server.sessions if s.peer.uid == 1000]):
            pass
        os.close(source)
        os.close(sink)
    assert qmp.cmd("query-version")["return"]
    connections = daemon.server.core.limits.connections
    assert daemon.call(lambda: connections.held(1000)) == 0


def test_later_requests_come_after_queued_ones(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With oob, when the command before them has ended and they wait for the uid's turn."""
    client = granted_client(daemon, qmp)
    late: list[Callable[[], None]] = []
    later = Transport.later

    def only_others(self: Transport, step: Callable[[], None]) -> None:
        if getattr(step, "__name__", "") == "_continue_safely":
            late.append(step)
        else:
            later(self, step)

    monkeypatch.setattr(Transport, "later", only_others)
    source, sink = blocked_read(client)
    (ours,) = (s for s in daemon.server.sessions if s.peer.uid == 1000)
    for number in range(1, 3):
        client.send(b'{"execute":"query-version","id":%d}\n' % number)
    while daemon.call(lambda: len(ours._queue)) < 2:
        pass
    os.read(source, 1 << 17)
    assert client.reply()["id"] == 0
    client.send(b'{"execute":"query-version","id":3}\n')
    while daemon.call(lambda: len(ours._queue)) < 3:
        pass
    monkeypatch.undo()
    daemon.call(lambda: [step() for step in late])
    assert [client.reply()["id"] for _ in range(3)] == [1, 2, 3]
    os.close(source)
    os.close(sink)


def test_a_grant_taken_back_ends_a_list_that_goes_on(daemon: Daemon, qmp: Client) -> None:
    """What comes after the next turn of others is not listed."""
    need_root()
    for number in range(IDS_PER_LOOK + 10):
        qmp.add(f"o{number:04}", data="x")
    allow(qmp, "who", "uid:1000")
    grant(qmp, "g", "o*", "who")
    client = daemon.connect(role="client", uid=1000)
    peer = next(s.peer for s in daemon.server.sessions if s.peer.uid == 1000)
    found = daemon.server.core.access.readable_after(peer, "")
    first = daemon.call(lambda: list(itertools.takewhile(lambda each: each is not None, found)))
    assert first
    qmp.ok("object-del", {"id": "g"})
    assert [each for each in daemon.call(lambda: list(found)) if each is not None] == []
    client.close()


def test_a_list_that_looks_through_much_lets_others_go_first(daemon: Daemon, qmp: Client) -> None:
    """Also out of band, beside a command that waits; what is deleted meanwhile is not listed."""
    need_root()
    for number in range(2 * IDS_PER_LOOK + 10):
        qmp.add(f"o{number:04}", data="x")
    for name in ("o0011.x", "o1033.x", "z"):
        qmp.add(name, data="x")
    allow(qmp, "who", "uid:1000")
    grant(qmp, "g", "*.x", "who")
    grant(qmp, "h", "z", "who")
    client = daemon.connect(role="client", uid=1000, negotiate=False)
    client.reply()
    client.cmd("qmp_capabilities", {"enable": ["oob"]})
    assert [s["id"] for s in client.ok("query-secrets")] == ["o0011.x", "o1033.x", "z"]
    assert [s["id"] for s in client.ok("query-secrets", {"after": "o0011.x"})] == ["o1033.x", "z"]
    source, sink = full_pipe()
    client.send(b'{"execute":"secret-read","arguments":{"id":"z"},"id":"slow"}\n', (sink,))
    for number in range(3):
        client.send(b'{"exec-oob":"query-secrets","id":%d}\n' % number)
    for number in range(3):
        reply = client.reply()
        assert reply["id"] == number
        assert len(reply["return"]) == 3
    qmp.ok("object-del", {"id": "h"})
    assert client.reply()["id"] == "slow"
    client.send(b'{"execute":"query-secrets"}\n')
    client.close()
    for fd in (source, sink):
        os.close(fd)


def test_a_question_costs_the_peers_own_grants(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of others, whatever changes among them."""
    need_root()
    for number in range(60):
        qmp.ok(
            "object-add",
            {"qom-type": "authz-simple", "id": f"a{number}", "identity": f"uid:{2000 + number}"},
        )
        grant(qmp, f"g{number}", f"s{number}", f"a{number}")
        qmp.add(f"s{number}", data=SECRET.decode())
    judged: list[frozenset[str]] = []
    real = Rules.judge

    def counting(self: Rules, identities: frozenset[str]) -> object:
        judged.append(identities)
        return real(self, identities)

    monkeypatch.setattr(Rules, "judge", counting)
    clients = [daemon.connect(role="client", uid=2000 + number) for number in range(5)]
    assert [denied(c, f"s{n}") for n, c in enumerate(clients)] == [False] * 5
    assert (
        len(judged) <= 15
    )  # for each: once when it is first asked for, and twice while it is read
    judged.clear()
    for number in range(10, 60):
        qmp.ok("object-del", {"id": f"g{number}"})
        qmp.ok("object-del", {"id": f"a{number}"})
    assert denied(clients[0], "s1")
    assert judged == []
    qmp.ok("object-del", {"id": "a0"})
    assert denied(clients[0], "s0")
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": "a0", "identity": "uid:2000"})
    assert not denied(clients[0], "s0")
    allow(qmp, "wide", "uid:200*")
    grant(qmp, "w", "s7", "wide")
    assert [denied(c, "s7") for c in clients] == [False] * 5
    qmp.ok("object-del", {"id": "w"})
    assert [denied(c, "s7") for c in clients] == [True] * 5


def test_the_audits_key_is_for_the_trusted_alone(daemon: Daemon, qmp: Client) -> None:
    """Not for an administrator by authz=: neither read, sealed, nor used; nor by way of a grant."""
    need_root()
    qmp.ok("secret-generate", {"id": "key", "size": 32})
    qmp.add("s", data="letmein")
    allow(qmp, "admins", "uid:1000")
    daemon.call(lambda: daemon.tree.pin("key"))
    admin = daemon.connect(role="admins", uid=1000)
    words = "Reading secret 'key' is not permitted"
    source, sink = os.pipe()
    assert admin.fail("secret-read", {"id": "key"}, (sink,)) == words
    assert admin.fail("secret-seal", {"id": "key", "keyid": "key"}) == words
    assert admin.fail("secret-seal", {"id": "s", "keyid": "key"}) == words
    sealed = qmp.ok("secret-seal", {"id": "s", "keyid": "key"})
    assert admin.add("x", keyid="key", format="base64", **sealed)["error"]["desc"] == words
    grant(admin, "g", "key", "admins")
    assert (
        daemon.connect(role="client", uid=1000).fail("secret-read", {"id": "key"}, (sink,)) == words
    )
    os.close(source)
    os.close(sink)
    assert len(qmp.read("key")) == 32
    assert qmp.add("y", keyid="key", format="base64", **sealed) == {"return": {}}
