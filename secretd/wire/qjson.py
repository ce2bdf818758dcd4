# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's JSON dialect over views of locked memory: cutting messages, parsing, encoding.

This is the reference for what is well-formed: a `Streamer` cuts bytes into tokens and messages as
QEMU's json-lexer.c and json-streamer.c do, and parses them as json-parser.c does. It yields
offsets and `Text` views, never strings: only keys become str here. It does no I/O and knows
nothing of QMP; wire.qmp calls it.

Differences from QEMU's limits stand in docs/protocol.md.
"""

import re
from array import array
from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

MAX_MESSAGE_BYTES = 2 << 20
"""Bytes of one message, from its first token to its last. QEMU: 64 MiB of token text
(MAX_TOKEN_SIZE); ours lie in locked memory, and a secret that large comes by descriptor."""

MAX_TOKENS = 16 << 10
"""Tokens of one message. QEMU: 2 Mi (MAX_TOKEN_COUNT); each costs 8 bytes while the message waits for its
end, and up to 200 once it is parsed."""

MAX_NESTING = 1024
"""Open brackets and braces of one message; QEMU's MAX_NESTING."""

# Lexer states; QEMU's enum json_lexer_state. 0 is the error state, so that a byte no table lists
# is an error by default.
_ERROR = 0
_RECOVERY = 1
_DQ = 2
_DQ_ESCAPE = 3
_SQ = 4
_SQ_ESCAPE = 5
_ZERO = 6
_EXP_DIGITS = 7
_EXP_SIGN = 8
_EXP_E = 9
_MANTISSA = 10
_MANTISSA_DIGITS = 11
_DIGITS = 12
_SIGN = 13
_KEYWORD = 14
_START = 15

# Token kinds.
LCURLY: Final = 16
RCURLY: Final = 17
LSQUARE: Final = 18
RSQUARE: Final = 19
COLON: Final = 20
COMMA: Final = 21
INTEGER: Final = 22
FLOAT: Final = 23
KEYWORD: Final = 24
STRING: Final = 25
_SKIP = 26

# A token in one number: kind, start and end, each offset below 2^28.
_KIND_SHIFT: Final = 56
_START_SHIFT: Final = 28
_OFFSET_MASK: Final = (1 << 28) - 1

_LOOKAHEAD = 0x80
"""Flag: the byte is not part of the token and is looked at again."""


def _row(default: int, spans: dict[str | range, int]) -> bytes:
    row = bytearray([default] * 256)
    for span, state in spans.items():
        for byte in span.encode() if isinstance(span, str) else span:
            row[byte] = state
    return bytes(row)


_STRUCTURE: Final[dict[str | range, int]] = {
    "{": LCURLY,
    "}": RCURLY,
    "[": LSQUARE,
    "]": RSQUARE,
    ":": COLON,
    ",": COMMA,
}
_AGAIN = _START | _LOOKAHEAD
_IN_STRING = range(0x20, 0xFE)

_TABLE: Final = {
    _RECOVERY: _row(
        _RECOVERY,
        {range(0x20): _AGAIN, "\t": _RECOVERY, range(0xFE, 0x100): _AGAIN, "{}[]:,": _AGAIN},
    ),
    _DQ: _row(_ERROR, {_IN_STRING: _DQ, "\\": _DQ_ESCAPE, '"': STRING}),
    _DQ_ESCAPE: _row(_ERROR, {_IN_STRING: _DQ}),
    _SQ: _row(_ERROR, {_IN_STRING: _SQ, "\\": _SQ_ESCAPE, "'": STRING}),
    _SQ_ESCAPE: _row(_ERROR, {_IN_STRING: _SQ}),
    _ZERO: _row(INTEGER | _LOOKAHEAD, {"0123456789": _ERROR, ".": _MANTISSA}),
    _EXP_DIGITS: _row(FLOAT | _LOOKAHEAD, {"0123456789": _EXP_DIGITS}),
    _EXP_SIGN: _row(_ERROR, {"0123456789": _EXP_DIGITS}),
    _EXP_E: _row(_ERROR, {"0123456789": _EXP_DIGITS, "+-": _EXP_SIGN}),
    _MANTISSA: _row(_ERROR, {"0123456789": _MANTISSA_DIGITS}),
    _MANTISSA_DIGITS: _row(FLOAT | _LOOKAHEAD, {"0123456789": _MANTISSA_DIGITS, "eE": _EXP_E}),
    _DIGITS: _row(INTEGER | _LOOKAHEAD, {"0123456789": _DIGITS, "eE": _EXP_E, ".": _MANTISSA}),
    _SIGN: _row(_ERROR, {"0": _ZERO, "123456789": _DIGITS}),
    _KEYWORD: _row(KEYWORD | _LOOKAHEAD, {range(0x61, 0x7B): _KEYWORD}),
    _START: _row(
        _ERROR,
        _STRUCTURE
        | {
            '"': _DQ,
            "'": _SQ,
            "0": _ZERO,
            "123456789": _DIGITS,
            "-": _SIGN,
            range(0x61, 0x7B): _KEYWORD,
            " \t\r\n": _SKIP,
        },
    ),
}

# Where a state usually lasts for many bytes, one regular expression steps over them.
_RUNS: Final = {
    _DQ: re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*'),
    _SQ: re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*"),
    _RECOVERY: re.compile(rb"[^{}\[\]:,\x00-\x08\x0a-\x1f\xfe\xff]*"),
    _START: re.compile(rb"[ \t\r\n]*"),
    _KEYWORD: re.compile(rb"[a-z]*"),
    _DIGITS: re.compile(rb"[0-9]*"),
}

# What json-parser.c's parse_string() accepts between the quotes: modified UTF-8 (C0 80 is NUL) without
# surrogates, noncharacters and overlong forms, and escapes of valid characters. The repeat takes as
# much as it can, so where it ends is where the fault is; possessive, so that it keeps no history.
_UTF8 = (
    rb"[\x20-\x5b\x5d-\x7f]++|\xc0\x80|[\xc2-\xdf][\x80-\xbf]"
    rb"|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]"
    rb"|\xef(?:[\x80-\xb6\xb8-\xbe][\x80-\xbf]|\xb7[\x80-\x8f\xb0-\xbf]|\xbf[\x80-\xbd])"
    rb"|(?!\xf0[\x80-\x8f]|\xf4[\x90-\xbf]|.[\x8f\x9f\xaf\xbf]\xbf[\xbe\xbf])"
    rb"[\xf0-\xf4][\x80-\xbf]{3}"
)
_BMP = rb"\\u(?![dD][89a-fA-F]|[fF][dD][dDeE]|[fF]{3}[eEfF])[0-9a-fA-F]{4}"
_PAIR = (
    rb"(?!\\u[dD][89abAB][37bBfF][fF]\\u[dD][fF]{2}[eEfF])"
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
_VALID: Final = re.compile(
    rb"(?:" + _UTF8 + rb"|\\[\"'\\/bfnrt]|" + _BMP + rb"|" + _PAIR + rb")*+", re.DOTALL
)
_PLAIN: Final = re.compile(rb"[\x20-\x5b\x5d-\x7f]*+")
_ESCAPE: Final = re.compile(rb"\\(?:u([dD][89abAB]..)\\u(....)|u(....)|(.))", re.DOTALL)
_UNICODE_ESCAPE: Final = re.compile(
    rb"\\u(?:[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|.{0,4})", re.DOTALL
)
_SHORT: Final = {0x62: b"\b", 0x66: b"\f", 0x6E: b"\n", 0x72: b"\r", 0x74: b"\t"}


class Text:
    """A JSON string as it stands in the buffer, quotes included. It has no text form of its own."""

    __slots__ = ("end", "start", "view")

    def __init__(self, view: memoryview, start: int, end: int) -> None:
        self.view = view
        self.start = start
        self.end = end

    def to_str(self) -> str:
        """Return the content. Only for members the schema does not mark sensitive."""
        content = bytes(self.view[self.start + 1 : self.end - 1])
        if b"\\" in content:
            content = _ESCAPE.sub(_unescape, content)
        return content.replace(b"\xc0\x80", b"\0").decode()

    def decode_in_place(self) -> memoryview:
        """Undo the escapes where the text stands; return the content between two double quotes.

        The content never grows, and the buffer is wiped once the message has been carried out.
        """
        view, at, read = self.view, self.start + 1, self.start + 1
        for match in _ESCAPE.finditer(view, self.start + 1, self.end - 1):
            run = match.start() - read
            view[at : at + run] = view[read : read + run]
            decoded = _unescape(match)
            at += run
            view[at : at + len(decoded)] = decoded
            at += len(decoded)
            read = match.end()
        run = self.end - 1 - read
        view[at : at + run] = view[read : read + run]
        view[self.start] = view[at + run] = 0x22
        return view[self.start : at + run + 1]

    def __repr__(self) -> str:
        return f"<Text of {self.end - self.start - 2} bytes>"


class Number:
    """A JSON number as it stands in the buffer; `value` converts it."""

    __slots__ = ("end", "integer", "start", "view")

    def __init__(self, view: memoryview, start: int, end: int, *, integer: bool) -> None:
        self.view = view
        self.start = start
        self.end = end
        self.integer = integer

    def value(self) -> int | float:
        """Return int64, else uint64, else a double, as json-parser.c's parse_literal()."""
        text = bytes(self.view[self.start : self.end])
        # 20 characters hold every 64-bit integer; int() of megabytes would be quadratic.
        if self.integer and len(text) <= 20:
            number = int(text)
            if -(1 << 63) <= number < 1 << 64:
                return number
        return float(text)

    def __repr__(self) -> str:
        return "<Number>"


JSON: TypeAlias = "bool | Number | Text | list[JSON] | dict[str, JSON] | None"


class Fault(NamedTuple):
    """What is wrong with a message: ``JSON parse error, …``. ``quote`` is the sender's own text, still
    in locked memory; the reply is built around it there.
    """

    before: str
    quote: memoryview | None = None
    after: str = ""


class NeedData:
    """Type of `NEED_DATA`: the bytes so far hold no further whole message."""


NEED_DATA: Final = NeedData()


class Streamer:
    """Cuts a stream of bytes into messages, keeping its state between feeds.

    All positions are offsets into the view given to `next`. When the caller moves unfinished bytes,
    it tells by how much with `moved`.
    """

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._state = _START
        self._token = 0  # where the unfinished token starts; only in the states of one
        self._reset()

    def _reset(self) -> None:
        # Packed as `_pack` does, relative to _base: a message may have many, and waits for its end.
        self._tokens = array("Q")
        self._base = 0
        self._braces = 0
        self._brackets = 0

    @property
    def idle(self) -> bool:
        """True between messages, where nothing has been taken in that matters to what follows."""
        return self._state == _START and not self._tokens

    def kept_from(self, position: int) -> int:
        """Return the offset of the first byte still needed, where `next` has come to ``position``."""
        if self._tokens:
            return self._base + (self._tokens[0] >> _START_SHIFT & _OFFSET_MASK)
        return position if self._state in (_START, _RECOVERY) else self._token

    def moved(self, distance: int) -> None:
        """The bytes still needed now lie ``distance`` lower than before."""
        self._token -= distance
        self._base -= distance

    def next(
        self, view: memoryview, position: int, end: int
    ) -> tuple[int, "JSON | Fault | NeedData"]:
        """Read from ``position`` until a message ends, something is wrong, or ``end``.

        Returns where it stopped and the parsed message, the `Fault`, or `NEED_DATA`.
        """
        state = self._state
        # Where the limit is crossed must not depend on the pieces in which the bytes arrive.
        bound = end
        if self._tokens or state not in (_START, _RECOVERY):
            bound = min(end, self.kept_from(position) + self._max_bytes)
        while position < bound:
            run = _RUNS.get(state)
            if run is not None:
                position = run.match(view, position, bound).end()  # type: ignore[union-attr]
                if position == bound:
                    break
            following = _TABLE[state][view[position]]
            if following & _LOOKAHEAD:
                following &= ~_LOOKAHEAD
            else:
                if state == _START:
                    self._token = position
                    if not self._tokens:
                        bound = min(end, position + self._max_bytes)
                position += 1
            if following == _ERROR:
                self._state = _RECOVERY
                self._reset()
                return position, Fault(
                    "JSON parse error, stray '", view[self._token : position], "'"
                )
            if LCURLY <= following <= STRING:
                state = _START
                outcome = self._take(following, view, self._token, position)
                if outcome is not NEED_DATA:
                    self._state = _START
                    return position, outcome
            else:
                state = _START if following == _SKIP else following
        self._state = state
        if position < end:
            self._state = _START
            self._reset()
            return position, Fault("JSON token size limit exceeded")
        return position, NEED_DATA

    def _take(self, kind: int, view: memoryview, start: int, end: int) -> "JSON | Fault | NeedData":
        """json-streamer.c: count brackets, apply the limits, parse at the end of a message."""
        if kind == LCURLY:
            self._braces += 1
        elif kind == RCURLY:
            self._braces -= 1
        elif kind == LSQUARE:
            self._brackets += 1
        elif kind == RSQUARE:
            self._brackets -= 1
        tokens = self._tokens
        fault = None
        if len(tokens) >= MAX_TOKENS:
            fault = Fault("JSON token count limit exceeded")
        elif self._braces + self._brackets > MAX_NESTING:
            fault = Fault("JSON nesting depth limit exceeded")
        if fault is not None:
            self._reset()
            return fault
        if not tokens:
            self._base = start
        tokens.append(kind << _KIND_SHIFT | start - self._base << _START_SHIFT | end - self._base)
        if (self._braces > 0 or self._brackets > 0) and self._braces >= 0 and self._brackets >= 0:
            return NEED_DATA
        base = self._base
        self._reset()
        try:
            return _parse(view, _unpack(tokens, base))
        except _ParseError as error:
            return error.fault


def _unpack(tokens: "array[int]", base: int) -> Iterator[tuple[int, int, int]]:
    """Yield kind, start and end of each token."""
    for token in tokens:  # pragma: no branch - the parser stops at the last one
        start = base + (token >> _START_SHIFT & _OFFSET_MASK)
        yield token >> _KIND_SHIFT, start, base + (token & _OFFSET_MASK)


class _ParseError(Exception):
    def __init__(self, before: str, quote: memoryview | None = None, after: str = "") -> None:
        super().__init__()
        self.fault = Fault(f"JSON parse error, {before}", quote, after)


def _parse(view: memoryview, tokens: Iterator[tuple[int, int, int]]) -> JSON:
    """json-parser.c: the value that the tokens make, or the first thing wrong with them.

    Iterative, since 1024 levels are more than Python's stack takes.
    """
    # The containers that are open, and for each object the key that waits for its value.
    stack: list[tuple[dict[str, JSON] | list[JSON], str | None]] = []
    kind, start, end = next(tokens)
    while True:
        # A value is due.
        value: JSON
        if kind in (LCURLY, LSQUARE):
            container: dict[str, JSON] | list[JSON] = {} if kind == LCURLY else []
            closer = RCURLY if kind == LCURLY else RSQUARE
            kind, start, end = next(tokens)
            if kind != closer:
                stack.append((container, None))
                continue
            value = container
        else:
            value = _scalar(view, kind, start, end)
        # A value is complete: hand it to what holds it, close what it completes.
        while True:
            if not stack:
                return value
            container, key = stack[-1]
            if isinstance(container, list):
                container.append(value)
            elif key is None:
                if not isinstance(value, Text):
                    raise _ParseError("key is not a string in object")
                kind, start, end = next(tokens)
                if kind != COLON:
                    raise _ParseError("missing : in object pair")
                stack[-1] = (container, value.to_str())
                break
            else:
                if key in container:
                    raise _ParseError("duplicate key")
                container[key] = value
                stack[-1] = (container, None)
            kind, start, end = next(tokens)
            if kind == COMMA:
                break
            if isinstance(container, list):
                if kind != RSQUARE:
                    raise _ParseError("expected separator in list")
            elif kind != RCURLY:
                raise _ParseError("expected separator in dict")
            stack.pop()
            value = container
        kind, start, end = next(tokens)


def _scalar(view: memoryview, kind: int, start: int, end: int) -> JSON:
    if kind == STRING:
        if _PLAIN.match(view, start + 1, end - 1).end() != end - 1:  # type: ignore[union-attr]
            _check_string(view, start + 1, end - 1)
        return Text(view, start, end)
    if kind in (INTEGER, FLOAT):
        return Number(view, start, end, integer=kind == INTEGER)
    if kind == KEYWORD:
        word = view[start:end]
        for text, value in ((b"true", True), (b"false", False), (b"null", None)):
            if word == text:
                return value
        # vsnprintf() into message[1024] cuts what does not fit.
        raise _ParseError("invalid keyword '", word[:1006], "'" if len(word) < 1006 else "")
    raise _ParseError("expecting value")


def _check_string(view: memoryview, start: int, end: int) -> None:
    wrong = _VALID.match(view, start, end).end()  # type: ignore[union-attr]
    if wrong == end:
        return
    if view[wrong] != 0x5C:
        raise _ParseError("invalid UTF-8 sequence in string")
    escape = _UNICODE_ESCAPE.match(view, wrong, end + 1)  # QEMU's text runs on over the quote
    if escape is None:
        raise _ParseError("invalid escape sequence in string")
    raise _ParseError("", view[wrong : escape.end()], " is not a valid Unicode character")


def _unescape(match: re.Match[bytes]) -> bytes:
    high, low, code, short = match.groups()
    if short is not None:
        return _SHORT.get(short[0], short)
    if high is not None:
        return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF)).encode()
    return chr(int(code, 16)).encode().replace(b"\0", b"\xc0\x80")
