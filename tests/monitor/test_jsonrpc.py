# SPDX-License-Identifier: LGPL-2.1-or-later
"""JSON-RPC 2.0 sockets: the specification's examples, errors, batches, descriptors and events."""

import asyncio
import base64
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from secretd.access.peer import SocketRole
from secretd.client import Client, ConnectError, SyncClient
from secretd.daemon.sockets import open_sockets, socket_spec
from secretd.errors import UsageError
from secretd.monitor.batch import DEFERRED_EVENTS
from secretd.monitor.commands import COMMANDS
from secretd.monitor.session import Session
from secretd.monitor.tables import tables
from secretd.net.listener import listen
from secretd.qapi.command import check
from secretd.systemd.activation import Passed
from secretd.wire import jsonrpc
from secretd.wire.jsonrpc import BATCH_MEMBERS
from secretd.wire.lexer import NeedData
from secretd.wire.messages import Malformed, Request
from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served
from tests.support.needs import need_root
from tests.support.secretctl import SECRETCTL
from tests.support.users import connect_as


class RpcClient(AsyncClient):
    """A raw client: a line is a JSON text."""

    async def text(self) -> Any:
        """The next text, as JSON."""
        line = await self.line()
        assert line.endswith(b"\n"), line
        assert not line.endswith(b"\r\n")
        return json.loads(line)

    async def call(
        self, method: str, params: object = None, request_id: object = 1, fds: tuple[int, ...] = ()
    ) -> dict:
        """Send a request; return the whole response."""
        message = {"jsonrpc": "2.0", "method": method, "id": request_id}
        if params is not None:
            message["params"] = params
        await self.send(json.dumps(message).encode() + b"\n", fds)
        reply = await self.text()
        assert reply["id"] == request_id
        assert reply["jsonrpc"] == "2.0"
        return reply


@pytest.fixture
async def rpc(in_loop: Served, tmp_path: Path) -> RpcClient:
    """A client of a JSON-RPC control socket."""
    return await connected(in_loop, tmp_path)


async def connected(
    in_loop: Served, tmp_path: Path, role: SocketRole = SocketRole.CONTROL, uid: int | None = None
) -> RpcClient:
    path = str(tmp_path / f"{role.value}-rpc.sock")
    if all(listener.path != path for listener in in_loop.server._listeners):
        mode = 0o600 if role is SocketRole.CONTROL else 0o666
        in_loop.server.add(listen(path, role, mode, dialect="jsonrpc"))
    if uid is None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
    else:
        sock = connect_as(path, uid, uid, ())
    client = RpcClient(sock)
    in_loop.clients.append(client)
    return client


INVALID = {"code": -32600}
NOT_FOUND = {"code": -32601}
PARSE = {"code": -32700}

# The examples of the specification, section 7, in its order: what is sent, and the codes and ids of
# the answers. Its methods are not secretd's, so they are not found.
EXAMPLES: list[tuple[str, object]] = [
    ('{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}', (-32602, 1)),
    ('{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23}, "id": 3}',
     (-32601, 3)),
    ('{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', None),
    ('{"jsonrpc": "2.0", "method": "foobar"}', None),
    ('{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', (-32601, "1")),
    ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', (-32700, None)),
    ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', (-32600, None)),
    ('[{"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},'
     '{"jsonrpc": "2.0", "method"]', (-32700, None)),
    ("[]", (-32600, None)),
    ("[1]", [(-32600, None)]),
    ("[1,2,3]", [(-32600, None)] * 3),
    ('[{"jsonrpc": "2.0", "method": "sum", "params": {}, "id": "1"},'
     ' {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},'
     ' {"jsonrpc": "2.0", "method": "query-name", "id": "2"},'
     ' {"foo": "boo"},'
     ' {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},'
     ' {"jsonrpc": "2.0", "method": "query-name", "id": "9"}]',
     [(-32601, "1"), (None, "2"), (-32600, None), (-32601, "5"), (None, "9")]),
    ('[{"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},'
     ' {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}]', None),
]  # fmt: skip


def outcome(reply: dict) -> tuple[int | None, object]:
    """Code and id of a response."""
    assert reply["jsonrpc"] == "2.0"
    assert ("result" in reply) != ("error" in reply)
    return reply.get("error", {}).get("code"), reply["id"]


@pytest.mark.parametrize(("sent", "wanted"), EXAMPLES)
async def test_the_specifications_examples_hold(rpc: RpcClient, sent: str, wanted: object) -> None:
    """And the connection goes on after each."""
    await rpc.send(sent.encode() + b"\n")
    if wanted is not None:
        reply = await rpc.text()
        found = [outcome(each) for each in reply] if isinstance(reply, list) else outcome(reply)
        assert found == wanted
    assert (await rpc.call("query-name", request_id="next"))["result"] == {}


@pytest.mark.parametrize("request_id", ["a", "ä\n", 7, -1, 1.5, None])
async def test_ids_of_every_permitted_type_are_echoed(rpc: RpcClient, request_id: object) -> None:
    """Fast and slow path."""
    assert (await rpc.call("query-name", request_id=request_id))["result"] == {}
    await rpc.send(json.dumps({"id": request_id, "method": "quit ", "jsonrpc": "2.0"}).encode())
    reply = await rpc.text()
    assert (reply["id"], reply["error"]["code"]) == (request_id, -32601)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"jsonrpc": "1.0", "method": "query-name", "id": 1}, "'jsonrpc' must be \"2.0\""),
        ({"method": "query-name", "id": 1}, "'jsonrpc' must be \"2.0\""),
        ({"jsonrpc": "2.0", "id": 1}, "'method' must be a string"),
        ({"jsonrpc": "2.0", "method": "query-name", "params": 1, "id": 1}, "must be an object"),
        ({"jsonrpc": "2.0", "method": "query-name", "id": True}, "a string, a number or null"),
        ({"jsonrpc": "2.0", "method": "query-name", "id": "x" * 17000}, "the limit of 16384 bytes"),
        (7, "a request must be an object"),
    ],
)
async def test_an_invalid_request_is_told_in_words(
    rpc: RpcClient, message: object, words: str
) -> None:
    """With the id, where it is one."""
    await rpc.send(json.dumps(message).encode() + b"\n")
    reply = await rpc.text()
    assert reply["error"]["code"] == -32600
    assert reply["error"]["message"].startswith("Invalid Request: ")
    assert words in reply["error"]["message"]
    given = message.get("id") if isinstance(message, dict) else None
    assert reply["id"] == (1 if given == 1 and given is not True else None)


async def test_errors_have_qemus_words_and_class(rpc: RpcClient) -> None:
    """Codes by kind: arguments, commands, everything else."""
    cases: tuple[tuple[str, dict[str, object], int, str], ...] = (
        ("object-add", {"qom-type": "secret", "id": "s"}, -32000, "Either 'file' or 'data' must"),
        ("object-add", {"qom-type": "secret", "data": "x"}, -32602, "Parameter 'id' is missing"),
        ("object-add", {"qom-type": "nope", "id": "s"}, -32602, "does not accept value 'nope'"),
        ("object-del", {"id": 7}, -32602, "Invalid parameter type for 'id', expected: string"),
        ("object-del", {"id": "s"}, -32000, "object 's' not found"),
        ("nope", {}, -32601, "The command nope has not been found"),
        ("x" * 60_000, {}, -32601, "The command xxx"),
        ("qmp_capabilities", {}, -32601, "The command qmp_capabilities has not been found"),
        ("qom-get", {"path": "/nowhere", "property": "x"}, -32000, "Device '/nowhere' not found"),
    )
    for method, params, code, words in cases:
        error = (await rpc.call(method, params))["error"]
        assert error["code"] == code, method
        assert words in error["message"]
        assert error["data"]["class"] in ("GenericError", "CommandNotFound", "DeviceNotFound")
    reply = await rpc.call("object-del", ["s"])
    assert reply["error"]["code"] == -32602
    assert "parameters are taken by name" in reply["error"]["message"]


async def test_a_parse_error_quotes_and_recovers(rpc: RpcClient) -> None:
    """As QMP sockets do."""
    await rpc.send(b'{"jsonrpc": "2.0", nonsense}\n')
    reply = await rpc.text()
    assert (reply["id"], reply["error"]["code"]) == (None, -32700)
    assert reply["error"]["message"].startswith("JSON parse error")
    await rpc.send(b'{"x": \x01}\n\xff')
    assert (await rpc.text())["error"]["message"] == "JSON parse error, stray '\x01'"
    while (reply := await rpc.text())["error"]["code"] == -32700:
        await rpc.send(b'{"jsonrpc": "2.0", "method": "nope", "id": 2}\n')
        if (await rpc.text())["id"] == 2:
            break


async def test_secrets_go_in_and_out_by_descriptor(
    in_loop: Served, rpc: RpcClient, tmp_path: Path
) -> None:
    """Inline, escaped, in base64; a read through a pipe; a client only what it is granted."""
    need_root()
    values = {"a": "letmein", "b": 'quote " umlaut ä', "c": "base64"}
    for name, value in values.items():
        params = {"qom-type": "secret", "id": name, "data": value}
        if name == "c":
            data = base64.b64encode(value.encode()).decode()
            params |= {"data": data, "format": "base64"}
        assert (await rpc.call("object-add", params))["result"] == {}

    async def read(client: RpcClient, name: str) -> dict:
        source, sink = os.pipe()
        reply = await client.call("secret-read", {"id": name}, fds=(sink,))
        os.close(sink)
        data = await asyncio.to_thread(os.read, source, 100)
        os.close(source)
        if "result" in reply:
            assert data.decode() == values[name]
        return reply

    for name, value in values.items():
        assert (await read(rpc, name))["result"] == {"size": len(value.encode())}
    client = await connected(in_loop, tmp_path, SocketRole.CLIENT, uid=1000)
    assert "result" in await client.call("query-version")  # before it may pass descriptors
    error = (await read(client, "a"))["error"]
    assert error["message"] == "Reading secret 'a' is not permitted"
    rules = [{"match": "uid:1000", "policy": "allow"}]
    grants: tuple[dict[str, object], ...] = (
        {"qom-type": "authz-list", "id": "me", "rules": rules},
        {"qom-type": "secret-grant", "id": "g", "secret": "a", "authz": "me"},
    )
    for grant in grants:
        assert (await rpc.call("object-add", grant))["result"] == {}
    assert (await read(client, "a"))["result"] == {"size": 7}
    assert [s["id"] for s in (await client.call("query-secrets"))["result"]] == ["a"]
    assert (await client.call("object-del", {"id": "a"}))["error"]["code"] == -32601


# --- batches


def request(request_id: object, method: str = "query-name", **params: object) -> dict:
    """A request."""
    made: dict[str, object] = {"jsonrpc": "2.0", "method": method, "params": params}
    return made if request_id is None else made | {"id": request_id}


async def test_a_batch_is_answered_in_order(rpc: RpcClient) -> None:
    """Requests, notifications and invalid members; those that wait do not overtake."""
    members: list[object] = [
        request(1, "object-add", **{"qom-type": "secret", "id": "s", "data": 'with " escape'}),
        request(None, "secret-expire", id="s", after=100),
        request(2, "secret-generate", id="g", size=32),
        request(3, "secret-seal", id="s", keyid="g"),
        [request(4)],
        request(5, "object-del", id="nope"),
        request(None, "object-del", id="g"),
        request(6, "query-secrets"),
    ]
    await rpc.send(json.dumps(members).encode())
    replies = await rpc.text()
    assert [outcome(each) for each in replies] == [
        (None, 1), (None, 2), (None, 3), (-32600, None), (-32000, 5), (None, 6),
    ]  # fmt: skip
    (secret,) = replies[-1]["result"]
    assert (secret["id"], secret["expires-in"], secret["size"]) == ("s", 100, 13)
    assert (await rpc.call("query-name"))["result"] == {}


async def test_one_member_takes_the_descriptor(rpc: RpcClient) -> None:
    """The first that wants one; a waiting member holds the others back."""
    await rpc.call("object-add", {"qom-type": "secret", "id": "s", "data": "letmein"})
    source, sink = os.pipe()
    members = [request(1, "secret-read", id="s"), request(2, "secret-read", id="s")]
    await rpc.send(json.dumps(members).encode(), (sink,))
    os.close(sink)
    first, second = await rpc.text()
    assert first["result"] == {"size": 7}
    assert "error" in second
    assert await asyncio.to_thread(os.read, source, 100) == b"letmein"
    os.close(source)


async def test_a_batch_has_a_limit(rpc: RpcClient) -> None:
    """At it everything is answered, beyond it nothing is executed."""
    await rpc.send(json.dumps([request(n) for n in range(BATCH_MEMBERS)]).encode())
    assert [each["id"] for each in await rpc.text()] == list(range(BATCH_MEMBERS))
    await rpc.send(json.dumps([request(n) for n in range(BATCH_MEMBERS + 1)]).encode())
    reply = await rpc.text()
    assert reply["id"] is None
    assert reply["error"]["message"] == (
        "Invalid Request: the batch has 65 members, and the limit is 64"
    )


async def test_a_batch_of_an_untrusted_peer_is_charged(
    in_loop: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its members take turns; without room none is executed, and the connection goes on."""
    need_root()
    client = await connected(in_loop, tmp_path, SocketRole.CLIENT, uid=1000)
    await client.send(json.dumps([request(n, "query-secrets") for n in range(20)]).encode())
    assert [each["id"] for each in await client.text()] == list(range(20))
    quota = in_loop.server.core.limits.unfinished
    assert quota.held(1000) == 0
    monkeypatch.setattr(quota, "limit", 1500)
    await client.send(json.dumps([request(n, "query-secrets") for n in range(40)]).encode())
    reply = await client.text()
    assert "unfinished-bytes-per-uid" in reply["error"]["message"]
    assert quota.held(1000) == 0
    assert (await client.call("query-secrets"))["result"] == []


async def test_a_batch_waits_for_a_client_that_does_not_read(rpc: RpcClient) -> None:
    """Replies are streamed: what is not read holds the members back."""
    for number in range(400):
        await rpc.call("secret-generate", {"id": f"{'s' * 30}{number}", "size": 1})
    members = [request(n, "query-secrets") for n in range(BATCH_MEMBERS)]
    await rpc.send(json.dumps(members).encode())
    for _ in range(300):
        await asyncio.sleep(0)
    replies = await rpc.text()
    assert [each["id"] for each in replies] == list(range(BATCH_MEMBERS))
    assert all(len(each["result"]) == 400 for each in replies)
    assert (await rpc.call("query-name"))["result"] == {}


async def test_a_connection_may_end_in_the_middle_of_a_batch(
    in_loop: Served, rpc: RpcClient
) -> None:
    """Everything is freed (the fixture checks it), and others go on."""
    other = await in_loop.connect()
    for number in range(400):
        await rpc.call("secret-generate", {"id": f"{'s' * 30}{number}", "size": 1})
    await rpc.send(json.dumps([request(n, "query-secrets") for n in range(64)]).encode())
    await asyncio.sleep(0)
    rpc.close()
    assert await other.ok("query-name") == {}


BROKEN = [
    "[@, MEMBER]",
    '[{"a": 1], MEMBER]',
    '["x\\q", MEMBER]',
    "[1, [2}, MEMBER]",
    "[1, \x01 MEMBER]",
    "[" * 1100 + " MEMBER]",
    '[@ "\\"]", {"x": [1, "}"]}, MEMBER]',
    "[@,\nMEMBER,\nMEMBER]",
    '[@, "a\\\\", MEMBER',
    "@ MEMBER ]",
]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_members_of_a_broken_batch_are_not_executed(broken: str, piece: int) -> None:
    """QEMU's recovery would read them as messages; the next line is a request again, if the batch
    has an end.
    """
    member = json.dumps(request(1, "object-del", id="s"))
    stream = broken.replace("MEMBER", member) + "\n" + json.dumps(request(2)) + "\n"
    found = requests_of(stream.encode(), piece)
    assert isinstance(found[0], Malformed)
    executed = [each.id for each in found if isinstance(each, Request)]
    ended = broken.endswith("]") and "[[" not in broken
    assert executed == ([] if not ended else ["1", "2"] if broken.startswith("@") else ["2"])


@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_a_byte_0xff_ends_a_broken_batch(piece: int) -> None:
    """As it ends a message."""
    stream = b"[@, {\n" + b"\xff" + json.dumps(request(2)).encode() + b"\n"
    found = requests_of(stream, piece)
    assert [each.id for each in found if isinstance(each, Request)] == ["2"]


def requests_of(stream: bytes, piece: int) -> list[object]:
    """What a connection finds in a stream that arrives in pieces."""
    codec: jsonrpc.Connection[None] = jsonrpc.Connection(lambda _line: None)
    found: list[object] = []
    view, position = memoryview(bytearray(stream)), 0
    for end in [*range(piece, len(stream), piece), len(stream)]:
        while True:
            position, request = codec.next(view, position, end)
            if isinstance(request, NeedData):
                break
            found.append(request)
    return found


NUMBERS = [
    "1e400", "-1e400", "1.0", "-0", "1E+2", "12345678901234567890", "9007199254740993.0", "1" * 400,
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
async def test_a_numeric_id_is_echoed_as_it_was_sent(rpc: RpcClient, number: str) -> None:
    """Digit by digit: a client in another language may have it as a text."""
    await rpc.send(b'{"jsonrpc": "2.0", "method": "query-name", "id": %s}\n' % number.encode())
    assert (await rpc.line()).endswith(f', "id": {number}}}\n'.encode())


async def test_a_notification_has_no_response(rpc: RpcClient) -> None:
    """Neither with a result nor with an error, on the fast path and on the other."""
    for text in ('"method": "query-version"', '"method": "query-secrets", "more": 1',
                 '"method": "object-del", "params": {"id": "no"}'):  # fmt: skip
        await rpc.send(b'{"jsonrpc": "2.0", %s}\n' % text.encode())
    assert (await rpc.call("query-name", request_id="next"))["result"] == {}


async def test_an_empty_array_of_params_is_none(rpc: RpcClient) -> None:
    """As some client libraries write it."""
    assert (await rpc.call("query-name", []))["result"] == {}


async def waiting_batch(rpc: RpcClient) -> int:
    """Start a batch whose second member waits for the reader of the returned descriptor."""
    await rpc.call("secret-generate", {"id": "big", "size": 200_000})
    source, sink = os.pipe()
    members = [request(1), request(2, "secret-read", id="big"), request(3)]
    await rpc.send(json.dumps(members).encode(), (sink,))
    os.close(sink)
    assert len(await asyncio.to_thread(os.read, source, 1)) == 1
    return source


def drain(source: int) -> None:
    """Read a descriptor to its end, and close it."""
    with open(source, "rb") as stream:
        stream.read()


async def test_lost_events_are_reported_after_the_batch(
    in_loop: Served, aqmp: AsyncClient, rpc: RpcClient
) -> None:
    """More events than can wait do not break the array."""
    await rpc.call("secret-events", {"enable": True, "events": ["SECRET_ADDED"]})
    source = await waiting_batch(rpc)
    for _ in range(DEFERRED_EVENTS + 5):
        await aqmp.ok("secret-generate", {"id": "e", "size": 1})
        await aqmp.ok("object-del", {"id": "e"})
    (session,) = in_loop.server.core.broadcaster.subscribers
    assert isinstance(session, Session)
    batch = session._batch
    assert batch is not None
    sent = DEFERRED_EVENTS + 5
    while (deferred := sum(n for _, n in batch.events)) + session.outbox._lost < sent:
        await asyncio.sleep(0.01)
    await asyncio.to_thread(drain, source)
    assert [outcome(each)[1] for each in await rpc.text()] == [1, 2, 3]
    *events, last = [await rpc.text() for _ in range(deferred + 1)]
    assert {event["method"] for event in events} == {"SECRET_ADDED"}
    assert last["method"] == "SECRET_EVENTS_LOST"
    assert last["params"]["count"] == sent - deferred > 0


async def test_quit_lets_a_waiting_batch_end_its_array(
    in_loop: Served, aqmp: AsyncClient, rpc: RpcClient
) -> None:
    """Running members are answered, further ones are not executed."""
    source = await waiting_batch(rpc)
    await aqmp.send(b'{"execute": "quit"}\n')
    while await aqmp.line():
        pass
    await asyncio.to_thread(drain, source)
    replies = await rpc.text()
    assert [outcome(each)[1] for each in replies] == [1, 2]
    assert await rpc.line() == b""


# --- events


async def test_events_are_notifications_after_secret_events(
    in_loop: Served, aqmp: AsyncClient, rpc: RpcClient, tmp_path: Path
) -> None:
    """Not before, with the same filter; and not inside the reply to a batch."""
    other = await connected(in_loop, tmp_path)
    await aqmp.add("a", data="x")
    assert await rpc.call("secret-events", {"enable": True, "events": ["SECRET_ADDED"]})
    await aqmp.ok("object-del", {"id": "a"})
    await aqmp.add("b", data="x")
    event = await rpc.text()
    assert (event["jsonrpc"], event["method"]) == ("2.0", "SECRET_ADDED")
    assert "id" not in event
    assert event["params"]["id"] == "b"
    assert event["params"]["peer"]["uid"] == os.getuid()
    assert event["params"]["timestamp"]["seconds"] > 1_700_000_000
    assert (await other.call("query-name"))["result"] == {}
    members = [request(n, "query-secrets") for n in range(64)]
    await rpc.send(json.dumps(members).encode())
    await aqmp.add("c", data="x")
    texts = [await rpc.text(), await rpc.text()]
    assert sorted(isinstance(text, list) for text in texts) == [False, True]


async def test_shutdown_reaches_those_that_asked_for_events(
    in_loop: Served, aqmp: AsyncClient, rpc: RpcClient, tmp_path: Path
) -> None:
    """The others see the end."""
    other = await connected(in_loop, tmp_path)
    assert (await other.call("query-name"))["result"] == {}
    await rpc.call("secret-events", {"enable": True})
    await aqmp.send(b'{"execute": "quit"}\n')
    event = await rpc.text()
    assert event["method"] == "SHUTDOWN"
    assert event["params"]["reason"] == "host-qmp-quit"
    assert await other.line() == b""


async def test_a_refused_peer_gets_an_error_in_its_dialect(in_loop: Served, tmp_path: Path) -> None:
    """With id null, before any request."""
    need_root()
    path = str(tmp_path / "admins-rpc.sock")
    role = SocketRole.CONTROL
    in_loop.server.add(listen(path, role, 0o666, authz="nobody", dialect="jsonrpc"))
    client = RpcClient(connect_as(path, 1000, 1000, ()))
    reply = await client.text()
    assert reply["id"] is None
    assert "may not use the control socket" in reply["error"]["message"]
    client.close()


async def test_discovery_lists_the_methods_of_the_socket(
    in_loop: Served, rpc: RpcClient, tmp_path: Path
) -> None:
    """With params by name, the required ones first; a client socket has fewer."""
    document = (await rpc.call("rpc.discover"))["result"]
    methods = {method["name"]: method for method in document["methods"]}
    assert "qmp_capabilities" not in methods
    params = methods["secret-expire"]["params"]
    assert [(p["name"], p["required"]) for p in params] == [("id", True), ("after", False)]
    assert params[1]["schema"] == {"type": "integer"}
    assert document["openrpc"] == "1.2.6"
    assert methods["query-secrets"]["result"]["schema"]["type"] == "array"
    names = {each["name"] for each in (await rpc.call("query-commands"))["result"]}
    assert names == set(methods)
    client = await connected(in_loop, tmp_path, SocketRole.CLIENT)
    few = (await client.call("rpc.discover"))["result"]["methods"]
    assert "object-add" not in {method["name"] for method in few}


async def test_plaintext_leaves_no_trace_of_a_failed_batch(rpc: RpcClient) -> None:
    """What cannot be executed is wiped like the rest."""
    members = [request(1, "object-add", **{"qom-type": "secret", "id": "1", "data": "hunter2"})]
    await rpc.send(json.dumps(members).encode())
    (reply,) = await rpc.text()
    assert "hunter2" not in json.dumps(reply)


# --- clients that speak QMP


async def test_clients_of_qmp_are_refused_in_words(
    in_loop: Served, rpc: RpcClient, tmp_path: Path
) -> None:
    """They would wait for a greeting otherwise."""
    path = next(x.path for x in in_loop.server._listeners if x.path.endswith("control-rpc.sock"))
    words = "This is a JSON-RPC socket; QMP has a socket of its own"
    with pytest.raises(ConnectError, match=words):
        await asyncio.to_thread(SyncClient(path).connect)
    with pytest.raises(ConnectError, match=words):
        await Client(path).connect()
    done = await asyncio.create_subprocess_exec(
        SECRETCTL, "--socket", path, "list", stderr=asyncio.subprocess.PIPE
    )
    _, errors = await done.communicate()
    assert errors.decode() == f"secretctl: {path}: {words}\n"
    need_root()
    admins = str(tmp_path / "admins-rpc.sock")
    in_loop.server.add(listen(admins, SocketRole.CONTROL, 0o666, authz="nobody", dialect="jsonrpc"))
    assert (await rpc.call("query-name"))["result"] == {}


def test_a_socket_has_one_dialect() -> None:
    """As its option or its unit says."""
    spec = socket_spec(SocketRole.CONTROL, "/run/x,protocol=jsonrpc")
    assert (spec.path, spec.dialect) == ("/run/x", "jsonrpc")
    assert socket_spec(SocketRole.CLIENT, "/run/x,protocol=qmp").dialect == "qmp"
    with pytest.raises(UsageError, match="protocol is qmp or jsonrpc, not 'soap'"):
        socket_spec(SocketRole.CONTROL, "/run/x,protocol=soap")
    with pytest.raises(UsageError, match="Parameter 'protocol' is unexpected"):
        socket_spec(SocketRole.CREDENTIALS, "/run/x,protocol=jsonrpc")


def test_a_passed_socket_has_the_dialect_of_its_name(tmp_path: Path) -> None:
    """FileDescriptorName= of the unit; an option may not contradict it."""
    made = []
    for name, role, dialect in (
        ("control-jsonrpc", SocketRole.CONTROL, "jsonrpc"),
        ("client-jsonrpc", SocketRole.CLIENT, "jsonrpc"),
        ("control", SocketRole.CONTROL, "qmp"),
    ):
        path = str(tmp_path / name)
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        sock.listen()
        (listener,) = open_sockets([], [Passed(name, sock.detach())])
        assert (listener.role, listener.dialect) == (role, dialect)
        made.append(listener)
    for listener in made:
        listener.close()
    sock = socket.socket(socket.AF_UNIX)
    path = str(tmp_path / "x")
    sock.bind(path)
    sock.listen()
    spec = socket_spec(SocketRole.CONTROL, f"{path},protocol=jsonrpc")
    with pytest.raises(UsageError, match="passed this socket as 'control'"):
        open_sockets([spec], [Passed("control", sock.detach())])


# --- one behaviour


TEXTS = st.text(alphabet=st.sampled_from('ab1."\\/\né 🔑{}[]:,'), max_size=8)
VALUES = TEXTS | st.integers(-9, 99) | st.booleans() | st.none() | st.just([1]) | st.just({"a": 1})
CALLS = st.builds(
    lambda method, params, extra: {"jsonrpc": "2.0", "method": method, "params": params, **extra},
    st.sampled_from([*COMMANDS.by_name, "nope"]),
    st.dictionaries(
        st.sampled_from(["id", "qom-type", "data", "format", "fdname", "keyid", "after", "x"]),
        VALUES | st.just("secret") | st.just("base64"),
        max_size=4,
    ),
    st.fixed_dictionaries({}, optional={"id": VALUES, "jsonrpc": VALUES, "more": VALUES}),
)


@given(CALLS, st.sampled_from([(",", ":"), (", ", ": ")]), st.booleans())
@settings(max_examples=400)
@example({"jsonrpc": "2.0", "method": "object-del", "params": {"id": "a"}}, (",", ":"), True)
@example(
    {"jsonrpc": "2x0", "method": "object-del", "params": {"id": "a"}, "id": 7}, (", ", ": "), True
)
@example(
    {"jsonrpc": "2.0", "method": "object-del", "params": {"id": "a"}, "id": 7}, (", ", ": "), True
)
@example(
    {
        "jsonrpc": "2.0",
        "method": "object-add",
        "params": {"qom-type": "secret", "id": "a", "data": "x"},
        "id": "7",
    },
    (", ", ": "),
    True,
)
@example(
    {
        "jsonrpc": "2.0",
        "method": "object-add",
        "params": {"qom-type": "secret", "id": "a", "data": "x"},
        "id": 1.5,
    },
    (",", ":"),
    True,
)
def test_fast_path_and_reference_are_one_behaviour(
    message: dict, separators: tuple[str, str], ascii_only: bool
) -> None:
    """The fast path may only decode what the reference does, or decline."""
    line = json.dumps(message, separators=separators, ensure_ascii=ascii_only).encode() + b"\n"
    every = list(COMMANDS.by_name.values())
    fast: Any = tables(every)[SocketRole.CONTROL, "jsonrpc"]
    request = fast.decode(memoryview(bytearray(line)))
    if request is None:
        return
    command = fast.by_request[type(request)]
    view = memoryview(bytearray(line))
    _, reference = jsonrpc.Connection(lambda _line: None).next(view, 0, len(view))
    assert isinstance(reference, Request)
    assert reference.command == command.name
    given_id = None if request.id is UNSET else bytes(memoryview(request.id)).decode()
    assert given_id == reference.id
    arguments = check(command, reference.arguments)
    if request.arguments is UNSET:
        assert not any(getattr(arguments, n) is not UNSET for n in arguments.__struct_fields__)
        return
    for name in arguments.__struct_fields__:
        ours, theirs = getattr(request.arguments, name), getattr(arguments, name)
        if isinstance(ours, Raw):
            ours, theirs = bytes(memoryview(ours)), bytes(memoryview(theirs))
        assert ours == theirs
