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
from secretd.wire.lexer import (
    MAX_MESSAGE_BYTES,
    NEED_DATA,
    START,
    NeedData,
    Streamer,
    unpack,
)
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
INTERNAL_ERROR: Final = -32603

BATCH_MEMBERS: Final = 64
"""Members of one batch."""

GREETS: Final = False
"""The server sends nothing before the first request."""

EMPTY_RETURN: Final = b""
"""The reply to a notification: none."""

_EVENT: Final = re.compile(
    rb'\{"timestamp": (\{[^}]*\}), "event": "([A-Z_]+)", "data": (\{.*)\}\}\r\n'
)


_MARK: Final = re.compile(rb'["\\\[\]{}\n\xff]')
_QUOTE, _BACKSLASH, _NEWLINE, _RESET = 0x22, 0x5C, 0x0A, 0xFF
_OPENERS: Final = {0x7B: LCURLY, 0x5B: LSQUARE}
_CLOSERS: Final = {0x7D: LCURLY, 0x5D: LSQUARE}


class Batch(NamedTuple):
    """A batch (section 6): the places of its members in the view."""

    view: memoryview
    members: list[tuple[int, int]]


class StrictStreamer(Streamer):
    """A Streamer that refuses at once what QEMU's waits to see the end of: a bracket that closes a
    brace, or the reverse.

    After a fault inside an array or object the rest of that text, and of its last line, is skipped:
    QEMU reads it as further messages, and members of a broken batch would be executed. The byte
    0xFF ends that, as it ends a message. ``members``: after a message that is an array, start and
    end of each member.
    """

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES, max_tokens: int | None = None) -> None:
        self._open = bytearray()  # the kinds of open braces and brackets
        self._left_open = bytearray()  # those of the previous message
        self._skipping = False
        self._in_string = False  # while skipping
        self._escaped = False
        super().__init__(max_bytes, max_tokens)

    @property
    def idle(self) -> bool:
        """See Streamer."""
        return not self._skipping and super().idle

    def next(
        self, view: memoryview, position: int, end: int
    ) -> tuple[int, "JSON | Fault | NeedData"]:
        """See Streamer."""
        if self._skipping:
            position = self._skip(view, position, end)
            if self._skipping:
                return position, NEED_DATA
        position, found = super().next(view, position, end)
        # A line that ends in the middle of a string is the end of the text.
        if isinstance(found, Fault) and self._left_open and view[position - 1] != _NEWLINE:
            self._skipping, self._in_string, self._escaped = True, False, False
        return position, found

    def _skip(self, view: memoryview, position: int, end: int) -> int:
        """Skip to the end of a faulty text and of its last line; return the position reached."""
        opened = self._left_open
        for match in _MARK.finditer(view, position, end):
            byte = view[match.start()]
            if self._escaped and match.start() == position:
                self._escaped = False
                continue
            position = match.end()
            if byte == _BACKSLASH:
                self._escaped = self._in_string
            elif byte == _RESET or (byte == _NEWLINE and (self._in_string or not opened)):
                self._skipping, self._state = False, START
                return position
            elif byte == _QUOTE:
                self._in_string = not self._in_string
            elif byte in _OPENERS and not self._in_string:
                opened.append(_OPENERS[byte])
            elif byte in _CLOSERS and not self._in_string:
                _close(opened, _CLOSERS[byte])
        self._escaped = self._escaped and position == end
        return end

    def _reset(self) -> None:
        super()._reset()
        self._left_open, self._open = self._open, bytearray()

    def _take(self, kind: int, view: memoryview, start: int, end: int) -> "JSON | Fault | NeedData":
        if kind in (LCURLY, LSQUARE):
            self._open.append(kind)
        elif kind in (RCURLY, RSQUARE):
            opened = LCURLY if kind == RCURLY else LSQUARE
            if not self._open or self._open[-1] != opened:
                _close(self._open, opened)
                # At least the rest of the line belongs to it.
                self._reset()
                self._skipping, self._in_string, self._escaped = True, False, False
                return Fault("JSON parse error, a brace or bracket closes what is not open")
            self._open.pop()
        return super()._take(kind, view, start, end)

    def _complete(self, tokens: "array[int]", base: int) -> None:
        self.members = list(_members(unpack(tokens, base)))


def _close(opened: bytearray, kind: int) -> None:
    """Close the last brace or bracket of a kind, and those inside it; without one, all, as nothing
    tells where the text ends.
    """
    del opened[max(opened.rfind(kind), 0) :]


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
        id_text = _as_sent(value)
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
    if params == []:
        params = {}  # as some clients say that there are none
    if isinstance(params, list):
        if id_text is None:
            return Malformed(Fault(""), None, INVALID_PARAMS)  # a notification has no reply
        words = "Invalid params: parameters are taken by name, so 'params' must be an object"
        return Malformed(Fault(words), id_text, INVALID_PARAMS)
    if not isinstance(params, dict):
        return _invalid("'params' must be an object", shown)
    return Request(method.to_str(), params, id_text)


def _as_sent(value: Text | Number | None) -> str:
    """Return the JSON text of an id; a number is the same digits as in the request."""
    if isinstance(value, Number):
        return str(value.view[value.start : value.end], "ascii")
    return encoder.value(value)


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
