# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's JSON dialect over views of locked memory: splitting a stream into messages.

With wire.parser this is the reference for well-formed messages: a `Streamer` splits bytes into
tokens and messages as QEMU's json-lexer.c and json-streamer.c do, and calls the parser. It does no
I/O and knows nothing about QMP; wire.connection calls it. docs/protocol.md lists the differences
from QEMU's limits.
"""

import re
from array import array
from collections.abc import Iterator
from typing import Final

from secretd.wire.parser import (
    COLON,
    COMMA,
    FLOAT,
    INTEGER,
    JSON,
    KEYWORD,
    LCURLY,
    LSQUARE,
    RCURLY,
    RSQUARE,
    STRING,
    Fault,
    ParseError,
    parse,
)

MAX_MESSAGE_BYTES = 2 << 20
"""Bytes of one message, from its first token to its last. QEMU allows 64 MiB of token text
(MAX_TOKEN_SIZE); here they lie in locked memory, and larger secrets come by descriptor.
"""

MAX_TOKENS = 16 << 10
"""Tokens of one message. QEMU allows 2 Mi (MAX_TOKEN_COUNT); each takes 8 bytes while the message
is unfinished, and up to 200 once it is parsed.
"""

MAX_NESTING = 1024
"""Open brackets and braces of one message; QEMU's MAX_NESTING."""

# Lexer states; QEMU's enum json_lexer_state. 0 is the error state, so that a byte no table lists is
# an error by default. The parser's token kinds go on from 16.
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
START = 15

_SKIP = 26

# A token in one number: kind, start and end, each offset below 2^28.
_KIND_SHIFT: Final = 56
_START_SHIFT: Final = 28
_OFFSET_MASK: Final = (1 << 28) - 1

_LOOKAHEAD = 0x80
"""Flag: the byte is not part of the token, and is read again."""


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
_AGAIN = START | _LOOKAHEAD
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
    START: _row(
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

# Where a state usually lasts for many bytes, one regular expression skips them.
_RUNS: Final = {
    _DQ: re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*(?:\\[\x20-\xfd][^"\\\x00-\x1f\xfe\xff]*){0,64}'),
    _SQ: re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*(?:\\[\x20-\xfd][^'\\\x00-\x1f\xfe\xff]*){0,64}"),
    _RECOVERY: re.compile(rb"[^{}\[\]:,\x00-\x08\x0a-\x1f\xfe\xff]*"),
    START: re.compile(rb"[ \t\r\n]*"),
    _KEYWORD: re.compile(rb"[a-z]*"),
    _DIGITS: re.compile(rb"[0-9]*"),
    _MANTISSA_DIGITS: re.compile(rb"[0-9]*"),
    _EXP_DIGITS: re.compile(rb"[0-9]*"),
}


class NeedData:
    """Type of `NEED_DATA`: the bytes so far hold no further whole message."""


NEED_DATA: Final = NeedData()


class Streamer:
    """Splits a stream of bytes into messages, and keeps its state between calls.

    All positions are offsets into the view given to `next`. When the caller moves unfinished bytes,
    it calls `shifted`. ``max_bytes``, ``max_tokens``: the limits of one message.
    """

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES, max_tokens: int | None = None) -> None:
        self._max_bytes = max_bytes
        self._max_tokens = MAX_TOKENS if max_tokens is None else max_tokens
        self._state = START
        self._token = 0  # start of the unfinished token, in the states that have one
        self._reset()

    def _reset(self) -> None:
        # Packed by `_take`, relative to _base: an unfinished message may have many tokens.
        self._tokens = array("Q")
        self._base = 0
        self._braces = 0
        self._brackets = 0

    @property
    def idle(self) -> bool:
        """True between messages, if no earlier byte influences the following ones."""
        return self._state == START and not self._tokens

    @property
    def ending(self) -> int | None:
        """A byte that acts like the end of input: it completes a token, or shows that it is
        incomplete. None without an unfinished token.
        """
        if self._state in (START, _RECOVERY):
            return None
        return 0x20 if _TABLE[self._state][0] & _LOOKAHEAD else 0

    def unfinished(self, view: memoryview) -> Fault:
        """Return the fault if the input ends here: JSON_END_OF_INPUT of json-parser.c."""
        if not self._tokens:
            return Fault("Expecting a JSON value")
        try:
            parse(view, _until_the_end(self._tokens, self._base))
        except ParseError as error:
            fault = error.fault
        return fault

    def first_needed(self, position: int) -> int:
        """Return the offset of the first byte that is still needed, once `next` has reached
        ``position``.
        """
        if self._tokens:
            return self._base + (self._tokens[0] >> _START_SHIFT & _OFFSET_MASK)
        return position if self._state in (START, _RECOVERY) else self._token

    def shifted(self, distance: int) -> None:
        """Note that the bytes still needed now lie ``distance`` bytes lower."""
        self._token -= distance
        self._base -= distance

    def next(
        self, view: memoryview, position: int, end: int
    ) -> tuple[int, "JSON | Fault | NeedData"]:
        """Read from ``position`` until a message ends, a fault occurs, or ``end`` is reached.

        Returns the position reached and the parsed message, the `Fault`, or `NEED_DATA`.
        """
        state = self._state
        # The byte that crosses the limit must not depend on the pieces in which bytes arrive.
        bound = end
        if self._tokens or state not in (START, _RECOVERY):
            bound = min(end, self.first_needed(position) + self._max_bytes)
        while position < bound:
            # 1. Skip bytes that keep the state, then take one step of the table.
            run = _RUNS.get(state)
            if run is not None:
                position = run.match(view, position, bound).end()  # type: ignore[union-attr]
                if position == bound:
                    break
            following = _TABLE[state][view[position]]
            if following & _LOOKAHEAD:
                following &= ~_LOOKAHEAD
            else:
                if state == START:
                    self._token = position
                    if not self._tokens:
                        bound = min(end, position + self._max_bytes)
                position += 1
            # 2. A fault, a token, or just another state.
            if following == _ERROR:
                self._state = _RECOVERY
                self._reset()
                return position, Fault(
                    "JSON parse error, stray '", view[self._token : position], "'"
                )
            if LCURLY <= following <= STRING:
                state = START
                outcome = self._take(following, view, self._token, position)
                if outcome is not NEED_DATA:
                    self._state = START
                    return position, outcome
            else:
                state = START if following == _SKIP else following
        self._state = state
        if position < end:
            self._state = START
            self._reset()
            return position, Fault("JSON token size limit exceeded")
        return position, NEED_DATA

    def _take(self, kind: int, view: memoryview, start: int, end: int) -> "JSON | Fault | NeedData":
        """json-streamer.c: count brackets, apply the limits, parse at the end of a message."""
        # 1. Brackets and limits.
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
        if len(tokens) >= self._max_tokens:
            fault = Fault("JSON token count limit exceeded")
        elif self._braces + self._brackets > MAX_NESTING:
            fault = Fault("JSON nesting depth limit exceeded")
        if fault is not None:
            self._reset()
            return fault
        # 2. Keep the token; parse at the end of the message.
        if not tokens:
            self._base = start
        tokens.append(kind << _KIND_SHIFT | start - self._base << _START_SHIFT | end - self._base)
        if (self._braces > 0 or self._brackets > 0) and self._braces >= 0 and self._brackets >= 0:
            return NEED_DATA
        base = self._base
        self._reset()
        self._complete(tokens, base)
        try:
            return parse(view, unpack(tokens, base))
        except ParseError as error:
            return error.fault

    def _complete(self, tokens: "array[int]", base: int) -> None:
        """Note the tokens of a whole message; `unpack` reads them. A subclass may want them."""


def _until_the_end(tokens: "array[int]", base: int) -> Iterator[tuple[int, int, int]]:
    """Yield the tokens, then raise the fault of a missing one."""
    yield from unpack(tokens, base)
    raise ParseError("premature EOI")


def document(view: memoryview) -> "JSON | Fault":
    """Return the one value of a text, or its fault: qobject_from_json().

    The last byte of ``view`` is not part of the text, and may be changed.
    """
    end = len(view) - 1
    streamer = Streamer(len(view))
    position, value = streamer.next(view, 0, end)
    if value is NEED_DATA and streamer.ending is not None:
        view[end] = streamer.ending  # json_lexer_flush()
        position, value = streamer.next(view, position, end + 1)
    if isinstance(value, NeedData):
        return streamer.unfinished(view)
    if isinstance(value, Fault):
        return value
    rest = streamer.next(view, position, end)[1]
    if rest is NEED_DATA and streamer.idle:
        return value
    return Fault("Expecting at most one JSON value")


def unpack(tokens: "array[int]", base: int) -> Iterator[tuple[int, int, int]]:
    """Yield kind, start and end of each token."""
    for token in tokens:
        start = base + (token >> _START_SHIFT & _OFFSET_MASK)
        yield token >> _KIND_SHIFT, start, base + (token & _OFFSET_MASK)
