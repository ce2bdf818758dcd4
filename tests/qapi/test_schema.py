# SPDX-License-Identifier: LGPL-2.1-or-later
"""Arguments: checks in QEMU's words, and one behaviour of the fast path and the reference."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw, Struct

from secretd.errors import CommandError
from secretd.monitor.commands import COMMANDS
from secretd.monitor.tables import USUAL
from secretd.qapi.command import (
    Command,
    Commands,
    check,
    text_of,
)
from secretd.qapi.fast_decoder import FastDecoder
from secretd.qapi.usual_lines import UsualLines
from secretd.qapi.visitor import members
from secretd.qom.secret import SecretOptions
from secretd.wire.connection import Connection
from secretd.wire.messages import Malformed, Request

ALL = list(COMMANDS.by_name.values())
SLOWER = FastDecoder({c.request: [*c.arguments.values()] for c in ALL if c.request}).decode
FAST = UsualLines(ALL, USUAL, SLOWER).decode
USUAL_ONLY = UsualLines(ALL, USUAL, lambda _line: None).decode
NONE_USUAL = UsualLines([], USUAL, lambda _line: None).decode
BY_REQUEST = {command.request: command for command in ALL if command.request}


def reference(line: bytes) -> object:
    """What the reference makes of a line: (command, arguments, id) or the error's words."""
    view = memoryview(bytearray(line))
    _, request = Connection(lambda _line: None).next(view, 0, len(view))
    if isinstance(request, Malformed):
        return request.fault.before
    if not isinstance(request, Request):
        return "unfinished"
    command = COMMANDS.by_name.get(request.command)
    if command is None:
        return "no such command"
    try:
        return command.name, plain(check(command, request.arguments)), request.id
    except CommandError as error:
        return error.desc


def fast(line: bytes, decoder: Callable[[memoryview], object] = FAST) -> object:
    """The same from the fast path; None if it declines."""
    request: Any = decoder(memoryview(bytearray(line)))
    if request is None:
        return None
    arguments = {} if request.arguments is UNSET else plain(request.arguments)
    id_text = None if request.id is UNSET else bytes(memoryview(request.id)).decode()
    return BY_REQUEST[type(request)].name, arguments, id_text


def plain(struct: Struct) -> dict[str, object]:
    found = {}
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if value is not UNSET:
            found[name] = bytes(text_of(value)) if isinstance(value, Raw) else value
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"execute":"query-version"}\r\n', ("query-version", {}, None)),
        (b'{"execute":"quit","arguments":{}}\n', ("quit", {}, None)),
        (
            b'{"id": "x y", "execute": "object-del", "arguments": {"id": "s"}}',
            ("object-del", {"id": "s"}, '"x y"'),
        ),
        (
            b'{"execute":"getfd","arguments":{"fdname":"a"},"id":-17}',
            ("getfd", {"fdname": "a"}, "-17"),
        ),
        (
            b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","data":"x","format":"raw"}}',
            ("object-add", {"id": "s", "data": b"x", "format": "raw"}, None),
        ),
        (
            b'{"execute":"object-add","arguments":{"id":"s","file":"/x","qom-type":"secret"},"id":0}',
            ("object-add", {"id": "s", "file": "/x"}, "0"),
        ),
    ],
)
def test_the_fast_path_takes_the_common_cases(line: bytes, expected: object) -> None:
    """What clients usually send is decoded in one step, and as the reference would."""
    assert fast(line) == expected == reference(line)


@pytest.mark.parametrize(
    "line",
    [
        b"{'execute':'query-version'}",
        b'{"execute":"query-version","id":1.0}',
        b'{"execute":"query-version","id":-0}',
        b'{"execute":"query-version","id":[1]}',
        b'{"execute":"query-version","id":"\\n"}',
        b'{"execute":"query-version","execute":"query-version"}',
        b'{"execute":"query-version"} {"execute":"quit"}',
        b'{"execute":"qmp_capabilities"}',
        b'{"execute":"secret-generate","arguments":{"id":"a","size":1}}',
        b'{"execute":"object-del","arguments":{"id":"\xc3\xa9"}}',
        b'{"execute":"object-del","arguments":{"id":"\xff"}}',
        b'{"execute":"object-del","arguments":{"id":"a\x7f"}}',
        b'{"execute":"object-del","arguments":{"id":"a","x":1}}',
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","data":"a\\u0062"}}',
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","data":5}}',
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","data":"1","data":"2"}}',
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","format":"hex"}}',
        b'{"execute":"object-add","arguments":{"id":"a","data":"x","format":"raw","format":"raw"}}',
        b'{"execute":"object-add","arguments":{"id":"a","data":"x"}}',
        b'{"execute":"nope"}',
        b'{"execute":"query-version",',
        b'{"execute":"query-version","id":' + b"[" * 2000 + b"]" * 2000 + b"}",
    ],
)
def test_the_fast_path_declines_what_is_in_doubt(line: bytes) -> None:
    """Declining is always right; the reference decides."""
    assert fast(line) is None


WORDS = [
    "execute", "arguments", "id", "object-add", "object-del", "getfd", "fdname", "qom-type",
    "secret",
    "data", "file", "format", "raw", "base64", "keyid", "iv", "x", "query-version", "secret-read",
    "qom-get", "path", "property", "typename", "",
]  # fmt: skip
SCALARS = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=5),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
)
ARGUMENTS = st.dictionaries(st.sampled_from(WORDS), SCALARS, max_size=5)
MESSAGES = st.fixed_dictionaries(
    {
        "execute": st.sampled_from(
            ["object-add", "object-del", "getfd", "secret-read", "quit", "qom-get"]
        )
    },
    optional={
        "arguments": st.one_of(
            ARGUMENTS,
            st.fixed_dictionaries({"id": st.sampled_from(["a", "s"])}),
            st.fixed_dictionaries(
                {"qom-type": st.just("secret"), "id": st.just("s"), "data": st.text(max_size=9)},
                optional={"format": st.sampled_from(["raw", "base64", "hex"]), "iv": SCALARS},
            ),
        ),
        "id": st.one_of(SCALARS, st.lists(SCALARS, max_size=2)),
    },
)
EDITS = st.lists(
    st.tuples(
        st.integers(0, 200),
        st.integers(0, 3),
        st.one_of(
            st.binary(max_size=2),
            st.sampled_from(
                [
                    b'"',
                    b"\\",
                    b" ",
                    b",",
                    b":",
                    b"}",
                    b'"id":1,',
                    b"'",
                    b"\t",
                    b"1e400",
                    b"\xc3\xa9",
                    b"-0",
                ]
            ),
        ),
    ),
    max_size=3,
)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("object-add", {"qom-type": "secret", "id": "vm-1.disk_0", "data": " !#~[]x"}),
        ("object-add", {"qom-type": "secret", "id": "s", "data": ""}),
        ("object-del", {"id": "s"}),
        ("secret-read", {"id": "s" * 128}),
    ],
)
@pytest.mark.parametrize("request_id", [None, "libvirt-17", "", 12345])
def test_usual_lines_are_decoded_by_one_expression(
    command: str, arguments: dict, separators: tuple[str, str], request_id: str | int | None
) -> None:
    """As programs send them; the decoder behind it reads the same."""
    message: dict[str, object] = {"execute": command, "arguments": arguments}
    if request_id is not None:
        message["id"] = request_id
    line = json.dumps(message, separators=separators).encode() + b"\n"
    assert USUAL_ONLY(memoryview(bytearray(line))) is not None
    assert fast(line) == fast(line, SLOWER) == reference(line)
    assert USUAL_ONLY(memoryview(bytearray(line[:-1]))) is None
    line = line[:-1] + b"\r\n"
    assert fast(line) == fast(line, SLOWER) == reference(line)


def test_without_usual_commands_every_line_is_declined() -> None:
    """On a socket that has none of them."""
    for line in (b'{"execute": "}\n', b'{"execute": "object-del", "arguments": {"id": "s"}}\n'):
        assert NONE_USUAL(memoryview(bytearray(line))) is None


@pytest.mark.slow
@given(MESSAGES, st.sampled_from([(",", ":"), (", ", ": ")]), EDITS)
@example({"execute": "quit"}, (",", ":"), [(1, 0, b'"execute":"quit",')])
@settings(max_examples=400)
def test_fast_path_and_reference_are_one_behaviour(
    message: dict, separators: tuple[str, str], edits: list[tuple[int, int, bytes]]
) -> None:
    """Whatever the fast path takes, the reference reads the same way."""
    line = json.dumps(message, separators=separators).encode()
    for position, length, insert in edits:
        line = line[:position] + insert + line[position + length :]
    taken = fast(line + b"\n")
    assert taken == fast(line + b"\n", SLOWER)
    if taken is not None:
        assert taken == reference(line + b"\n")


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("object-add", "{}", "Parameter 'qom-type' is missing"),
        ("object-add", '{"qom-type": 5}',
        "Invalid parameter type for 'qom-type', expected: string"),
        ("object-add", '{"qom-type": "nope"}', "Parameter 'qom-type' does not accept value 'nope'"),
        ("object-add", '{"qom-type": "secret"}', "Parameter 'id' is missing"),
        ("object-add", '{"qom-type": "secret", "id": null}',
         "Invalid parameter type for 'id', expected: string"),
        ("object-add", '{"qom-type": "secret", "id": "a", "data": 5}',
         "Invalid parameter type for 'data', expected: string"),
        ("object-add", '{"qom-type": "secret", "id": "a", "format": "hex", "x": 1}',
         "Parameter 'format' does not accept value 'hex'"),
        ("object-add", '{"qom-type": "secret", "id": "a", "loaded": true}',
         "Parameter 'loaded' is unexpected"),
        ("query-name", '{"x": 1}', "Parameter 'x' is unexpected"),
        ("remove-fd", '{"fdset-id": 1.0}', "Invalid parameter type for 'fdset-id', expected: "
                                           "integer"),
        ("remove-fd", '{"fdset-id": 9223372036854775808}',
         "Invalid parameter type for 'fdset-id', expected: integer"),
        ("remove-fd", '{"fdset-id": "1"}', "Invalid parameter type for 'fdset-id', expected: "
                                           "integer"),
        ("qom-list-types", '{"abstract": 1}', "Invalid parameter type for 'abstract', expected: "
                                              "boolean"),
        ("qmp_capabilities", '{"enable": "oob"}', "Invalid parameter type for 'enable', "
                                                  "expected: array"),
        ("qmp_capabilities", '{"enable": [5]}',
         "Invalid parameter type for 'enable[0]', expected: string"),
        ("qmp_capabilities", '{"enable": ["nope"]}',
        "Parameter 'null' does not accept value 'nope'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_in_qemus_words(command: str, arguments: str, words: str) -> None:
    """Known members in schema order first, then what is unexpected."""
    assert reference(f'{{"execute": "{command}", "arguments": {arguments}}}'.encode()) == words


def test_a_signature_gives_struct_members_and_names() -> None:
    """The annotated function is the single source."""
    commands = Commands()

    @commands(client=True)
    def do_it(
        _session: object, some_name: str, numbers: list[int] | msgspec.UnsetType = UNSET
    ) -> None:
        """Do it."""

    command: Command = commands.by_name["do-it"]
    assert command.client
    assert command.request is None
    (struct,) = command.arguments.values()
    assert [(m.wire_name, m.required) for m in members(struct)] == [
        ("some-name", True),
        ("numbers", False),
    ]
    view = memoryview(bytearray(b'{"some-name": "a", "numbers": [1, 2]}'))
    _, arguments = Connection(lambda _line: None)._streamer.next(view, 0, len(view))
    assert isinstance(arguments, dict)
    assert plain(check(command, arguments)) == {"some_name": "a", "numbers": [1, 2]}


def test_an_annotation_without_a_qapi_type_is_an_error_at_start() -> None:
    """A mistake in a command's signature does not wait for a client."""
    with pytest.raises(TypeError, match="has no QAPI type"):

        @Commands()()
        def do_it(_session: object, odd: bytes) -> None:
            """Do it."""


def test_a_handler_says_what_it_returns_at_once() -> None:
    """Or the schema would not know."""
    with pytest.raises(TypeError, match="does not say what is returned"):

        @Commands()()
        def do_it(_session: object) -> Awaitable[None]:
            raise NotImplementedError


def test_a_secret_in_a_request_does_not_show_in_its_repr() -> None:
    """Raw prints no content."""
    line = b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","data":"letmein"}}'
    request: Any = FAST(memoryview(bytearray(line)))
    assert isinstance(request.arguments, SecretOptions)
    assert "letmein" not in repr(request)
