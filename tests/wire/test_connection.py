# SPDX-License-Identifier: LGPL-2.1-or-later
"""Command objects: what is one, and the messages' bytes."""

import json

import pytest

from secretd.wire import encoder, messages
from secretd.wire.connection import Connection
from secretd.wire.lexer import NEED_DATA
from secretd.wire.messages import Malformed, Request
from secretd.wire.parser import Fault, Text


def first(data: bytes) -> object:
    view = memoryview(bytearray(data))
    return Connection(lambda _line: None).next(view, 0, len(view))[1]


def test_a_command_object_has_command_arguments_and_id() -> None:
    """Arguments stay in the buffer; the id is ready to be echoed."""
    request = first(b'{"execute": "x", "arguments": {"a": "b"}, "id": {"k": [1, "\\u00e9"]}}')
    assert isinstance(request, Request)
    assert request.command == "x"
    assert isinstance(request.arguments["a"], Text)
    assert request.id == '{"k": [1, "\\u00E9"]}'
    assert first(b"{'execute': 'x'}") == Request("x", {}, None)


@pytest.mark.parametrize(
    ("data", "words", "id_text"),
    [
        (b"[1]", "QMP input must be a JSON object", None),
        (b"{}", "QMP input lacks member 'execute'", None),
        (b'{"id": 3}', "QMP input lacks member 'execute'", "3"),
        (b'{"execute": 5, "id": null}', "QMP input member 'execute' must be a string", "null"),
        (
            b'{"execute": "x", "arguments": []}',
            "QMP input member 'arguments' must be an object",
            None,
        ),
        (b'{"execute": "x", "foo": 1, "bar": 2}', "QMP input member 'bar' is unexpected", None),
        (b'{"eea": 1, "arguments": 5}', "QMP input member 'arguments' must be an object", None),
        (b'{"arguments": 5, "eea": 1}', "QMP input member 'eea' is unexpected", None),
        (b'{"exec-oob": "x", "id": 1}', "QMP input member 'exec-oob' is unexpected", "1"),
    ],
)
def test_what_is_no_command_object_is_named_in_qemus_words(
    data: bytes, words: str, id_text: str | None
) -> None:
    """The checks of qmp_dispatch_check_obj(), with the id where there is one."""
    assert first(data) == Malformed(Fault(words), id_text)


def test_the_fast_path_gets_one_line_at_a_time_and_may_decline() -> None:
    """What it declines is read by the reference; it is not asked again inside that line."""
    lines = []

    def fast(line: memoryview) -> str | None:
        lines.append(bytes(line))
        return "taken" if bytes(line[:2]) == b'{"' else None

    connection = Connection(fast)
    data = b"{'execute':'a'} {'execute':'b'}\n" + b'{"execute":"c"}\r\n{"exec'
    view = memoryview(bytearray(data))
    position, found = 0, []
    while True:
        position, request = connection.next(view, position, len(view))
        if request is NEED_DATA:
            break
        found.append(request if request == "taken" else request.command)
    assert found == ["a", "b", "taken", "taken"]
    assert lines == [b"{'execute':'a'} {'execute':'b'}\n", b'{"execute":"c"}\r\n', b'{"exec']
    assert connection.idle


def test_moving_the_bytes_lets_the_fast_path_try_again() -> None:
    """Positions are the caller's; what was declined is remembered only until they change."""
    lines = []

    def fast(line: memoryview) -> None:
        lines.append(bytes(line))

    connection: Connection[None] = Connection(fast)
    view = memoryview(bytearray(b"{1}{2}"))
    position, _ = connection.next(view, 0, 6)
    assert position == 2 or position == 3
    connection.shifted(0)
    connection.next(view, 3, 6)
    assert lines == [b"{1}{2}", b"{2}"]


def test_messages_have_qemus_bytes() -> None:
    """Separators, member order, CRLF and ASCII as QEMU writes them."""
    assert messages.success(None, None) == messages.EMPTY_RETURN == b'{"return": {}}\r\n'
    assert messages.success([1, True], '"x"') == b'{"return": [1, true], "id": "x"}\r\n'
    assert messages.failure("GenericError", "é\x7f", "7") == (
        b'{"id": 7, "error": {"class": "GenericError", "desc": "\\u00E9\\u007F"}}\r\n'
    )
    assert messages.failure("DeviceNotFound", "x", None).startswith(b'{"error": ')
    assert messages.event("STOP", "{}", 1, 2) == (
        b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP", "data": {}}\r\n'
    )
    assert json.loads(messages.greeting((10, 0, 0), "p", ["oob"])) == {
        "QMP": {
            "version": {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": "p"},
            "capabilities": ["oob"],
        }
    }


def test_a_quoting_error_is_built_in_the_given_buffer() -> None:
    """The sender's bytes, escaped: control bytes, quotes, UTF-8, NUL as the end of a C string."""
    quote = b'"a\\\n\x01\xc3\xa9\xf0\x9f\x98\x80\xff\xc0\x80z\0rest'
    fault = Fault("stray '", memoryview(quote), "'")
    into = memoryview(bytearray(messages.quoted_failure_size(fault)))
    reply = json.loads(bytes(into[: messages.write_quoted_failure(fault, into)]))
    assert reply["error"]["desc"] == "stray '\"a\\\n\x01é😀\ufffd\0z'"


def test_values_without_a_json_form_are_refused() -> None:
    """A programming error shows itself instead of reaching a client."""
    with pytest.raises(TypeError, match="bytes has no JSON form"):
        encoder.value({"a": [b"x"]})
    assert encoder.value({"a": [], "b": {}, "c": [1, [2.5, None, False]]}) == (
        '{"a": [], "b": {}, "c": [1, [2.5, null, false]]}'
    )


def test_few_escapes_are_kept() -> None:
    """However many characters are written."""
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 2 * encoder._ESCAPES_KEPT)))
    assert json.loads(encoder.string(text)) == text
    assert len(encoder._ESCAPES) <= encoder._ESCAPES_KEPT
