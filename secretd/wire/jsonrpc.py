# SPDX-License-Identifier: LGPL-2.1-or-later
"""JSON-RPC 2.0 over the same commands, sans-IO: a second codec beside wire.connection, and its
messages.

It reuses the lexer and parser, so plaintext never becomes a str. A method is a QMP command, and
params are by name. It has the functions of wire.messages; monitor calls either module by its table.
Numbers and sections are those of https://www.jsonrpc.org/specification.
"""

import re
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple, TypeVar

from secretd.wire import connection, encoder
from secretd.wire.lexer import NeedData, Streamer, unpack
from secretd.wire.messages import DESC_BYTES, LONGEST_ESCAPE, Malformed, Request
from secretd.wire.parser import (
    COMMA,
    JSON,
    LCURLY,
    LSQUARE,
    RCURLY,
    RSQUARE,
    Fault,
    Number,
    Text,
)

T = TypeVar("T")

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
SERVER_ERROR: Final = -32000

BATCH_MEMBERS: Final = 64
"""Members of one batch."""

GREETS: Final = False
"""The server sends nothing before the first request."""

EMPTY_RETURN: Final = b""
"""The reply to a notification: none."""

_EVENT: Final = re.compile(
    rb'\{"timestamp": (\{[^}]*\}), "event": "([A-Z_]+)", "data": (\{.*)\}\}\r\n'
)


class Batch(NamedTuple):
    """A batch (section 6): the places of its members in the view."""

    view: memoryview
    members: list[tuple[int, int]]


class StrictStreamer(Streamer):
    """A Streamer that refuses at once what QEMU's waits to see the end of: a bracket that closes a
    brace, or the reverse.

    ``members``: after a message that is an array, start and end of each member.
    """

    def _reset(self) -> None:
        super()._reset()
        self._open = bytearray()  # the kinds of open braces and brackets

    def _take(self, kind: int, view: memoryview, start: int, end: int) -> "JSON | Fault | NeedData":
        if kind in (LCURLY, LSQUARE):
            self._open.append(kind)
        elif kind in (RCURLY, RSQUARE):
            opened = LCURLY if kind == RCURLY else LSQUARE
            if not self._open or self._open.pop() != opened:
                self._reset()
                return Fault("JSON parse error, a brace or bracket closes what is not open")
        return super()._take(kind, view, start, end)

    def _complete(self, tokens: "array[int]", base: int) -> None:
        self.members = list(_members(unpack(tokens, base)))


def _members(tokens: Iterator[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """Yield start and end of each member of an array."""
    depth, first, last = 0, -1, 0
    for kind, start, end in tokens:
        depth -= kind in (RCURLY, RSQUARE)
        if first >= 0 and ((depth == 1 and kind == COMMA) or depth == 0):
            yield first, last
            first = -1
        elif depth >= 1 and first < 0 and kind != COMMA:
            first = start
        depth += kind in (LCURLY, LSQUARE)
        last = end


class Connection(connection.Connection[T]):
    """Requests out of a stream of bytes; see wire.connection.

    ``in_batch``: the bytes are a member of a batch, which may not be one itself.
    """

    streamer = StrictStreamer
    in_batch = False

    def _checked(self, message: JSON, view: memoryview) -> "Request | Malformed | Batch":
        if not isinstance(message, list) or self.in_batch:
            return _check_object(message)
        assert isinstance(self._streamer, StrictStreamer)
        members = self._streamer.members
        if not members:
            return Malformed(Fault("Invalid Request: the batch is empty"), "null", INVALID_REQUEST)
        if len(members) > BATCH_MEMBERS:
            words = f"Invalid Request: the batch has {len(members)} members, and the limit is "
            return Malformed(Fault(f"{words}{BATCH_MEMBERS}"), "null", INVALID_REQUEST)
        return Batch(view, members)

    def _fault(self, fault: Fault) -> Malformed:
        return Malformed(fault, "null", PARSE_ERROR)


def _check_object(message: JSON) -> Request | Malformed:
    """Return the request of a message (section 4), or its fault."""
    # 1. The id, which an error echoes if it is one.
    if not isinstance(message, dict):
        return _invalid("a request must be an object", "null")
    id_text: str | None = None
    if "id" in message:
        value = message["id"]
        if not (value is None or isinstance(value, Text | Number)):
            return _invalid("'id' must be a string, a number or null", "null")
        id_text = encoder.value(value)
        if len(id_text) > connection.MAX_ID_BYTES:
            return _invalid(f"'id' is longer than the limit of {connection.MAX_ID_BYTES} bytes",
                            "null")  # fmt: skip
    # 2. The other members; further ones are ignored.
    shown = "null" if id_text is None else id_text
    version = message.get("jsonrpc")
    if not isinstance(version, Text) or version.to_str() != "2.0":
        return _invalid("'jsonrpc' must be \"2.0\"", shown)
    method = message.get("method")
    if not isinstance(method, Text):
        return _invalid("'method' must be a string", shown)
    params = message.get("params", {})
    if isinstance(params, list):
        if id_text is None:
            return Malformed(Fault(""), None, INVALID_PARAMS)  # a notification has no reply
        words = "Invalid params: parameters are taken by name, so 'params' must be an object"
        return Malformed(Fault(words), id_text, INVALID_PARAMS)
    if not isinstance(params, dict):
        return _invalid("'params' must be an object", shown)
    return Request(method.to_str(), params, id_text)


def _invalid(words: str, id_text: str) -> Malformed:
    return Malformed(Fault(f"Invalid Request: {words}"), id_text, INVALID_REQUEST)


# --- messages; see wire.messages


def success(data: object, id_text: str | None) -> bytes:
    """Return a response (section 5) with a result; None for an empty object. A notification has
    none.
    """
    if id_text is None:
        return b""
    if isinstance(data, encoder.JSONText):
        body: str = data
    else:
        body = "{}" if data is None else encoder.value(data)
    return f'{{"jsonrpc": "2.0", "result": {body}, "id": {id_text}}}\n'.encode("ascii")


def failure(error_class: str, desc: str, id_text: str | None, code: int = SERVER_ERROR) -> bytes:
    """Return a response with an error (section 5.1); ``data`` has QMP's error class."""
    if id_text is None:
        return b""
    text = encoder.string(desc)
    if len(text) > DESC_BYTES:
        text = encoder.string(desc[: DESC_BYTES // LONGEST_ESCAPE])
    if error_class == "CommandNotFound" and code == SERVER_ERROR:
        code = METHOD_NOT_FOUND
    return (
        f'{{"jsonrpc": "2.0", "error": {{"code": {code}, "message": {text}, '
        f'"data": {{"class": "{error_class}"}}}}, "id": {id_text}}}\n'
    ).encode("ascii")


def refusal(desc: str) -> bytes:
    """Return an error that answers no request, such as that of a limit."""
    return failure("GenericError", desc, "null")


def quoted_failure_size(fault: Fault) -> int:
    """Return the bytes that `write_quoted_failure` may need."""
    assert fault.quote is not None
    return 6 * (len(fault.quote) + len(fault.before) + len(fault.after)) + 128


def write_quoted_failure(fault: Fault, into: memoryview) -> int:
    """Write the parse error that quotes the sender's bytes into a buffer; return its length in
    bytes.
    """
    assert fault.quote is not None
    head = f'{{"jsonrpc": "2.0", "error": {{"code": {PARSE_ERROR}, "message": '.encode()
    tail = b', "data": {"class": "GenericError"}}, "id": null}\n'
    return encoder.write_quoted_message(fault, head, tail, into)


def events(lines: bytes) -> bytes:
    """Return QMP events as notifications: the event's name is the method, and its data with the
    timestamp are the params.
    """
    return _EVENT.sub(
        rb'{"jsonrpc": "2.0", "method": "\2", "params": \3, "timestamp": \1}}' + b"\n", lines
    )
