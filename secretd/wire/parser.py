# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a message's tokens to values over views of locked memory: QEMU's json-parser.c.

Values are dicts, lists, keywords, and `Text` and `Number`, which are offsets: only keys become str
here. wire.lexer splits the stream into messages, and calls this module.
"""

import re
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed lacks it
from typing import Final, NamedTuple, TypeAlias

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

# What json-parser.c's parse_string() accepts between the quotes: modified UTF-8 (C0 80 is NUL)
# without surrogates, noncharacters and overlong forms, and escapes of valid characters. The repeat
# is bounded, since it keeps a history; possessive repeats would not, but Python 3.11.2 (Debian 12)
# gets them wrong.
_UTF8 = (
    rb"[\x20-\x5b\x5d-\x7f]+|\xc0\x80|[\xc2-\xdf][\x80-\xbf]"
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
    rb"(?:" + _UTF8 + rb"|\\[\"'\\/bfnrt]|" + _BMP + rb"|" + _PAIR + rb"){1,64}", re.DOTALL
)
_PLAIN: Final = re.compile(rb"[\x20-\x5b\x5d-\x7f]*")
_ESCAPE: Final = re.compile(rb"\\(?:u([dD][89abAB]..)\\u(....)|u(....)|(.))", re.DOTALL)
_UNICODE_ESCAPE: Final = re.compile(
    rb"\\u(?:[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|.{0,4})", re.DOTALL
)
_BACKSLASH: Final = b"\\\\"
_SHORT: Final = {0x62: b"\b", 0x66: b"\f", 0x6E: b"\n", 0x72: b"\r", 0x74: b"\t"}


class Text:
    """A JSON string in the buffer, including its quotes. It has no text form of its own."""

    __slots__ = ("end", "start", "view")

    def __init__(self, view: memoryview, start: int, end: int) -> None:
        self.view = view
        self.start = start
        self.end = end

    def to_str(self) -> str:
        """Return the content. Only for members the schema does not mark sensitive."""
        content = bytes(self.view[self.start + 1 : self.end - 1]).replace(b"\xc0\x80", b"\0")
        if b"\\" not in content:
            return content.decode()
        # Python's scanner knows JSON's escapes only: rewrite QEMU's \' and the bare double quotes
        # of single-quoted strings, piece by piece between escaped backslashes.
        pieces = (
            piece.replace(b"\\'", b"'").replace(b'\\"', b'"').replace(b'"', b'\\"')
            for piece in content.split(_BACKSLASH)
        )
        return str(scanstring(_BACKSLASH.join(pieces).decode() + '"', 0, False)[0])

    def decode_in_place(self) -> memoryview:
        """Undo the escapes in place; return the content between two double quotes, a borrowed view.

        The content never grows, and the buffer is wiped once the message has been handled.
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
    """A JSON number in the buffer; `value` converts it."""

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
    """The fault of a message or text: the words ``before`` and ``after`` a quotation of it.

    ``quote`` is the sender's own text, still in locked memory; the reply is built around it there.
    """

    before: str
    quote: memoryview | None = None
    after: str = ""


class ParseError(Exception):
    """Ends the parsing of a message; ``fault`` is the answer."""

    def __init__(self, before: str, quote: memoryview | None = None, after: str = "") -> None:
        super().__init__()
        self.fault = Fault(f"JSON parse error, {before}", quote, after)


def parse(view: memoryview, tokens: Iterator[tuple[int, int, int]]) -> JSON:
    """json-parser.c: return the value of the tokens. Raises ParseError with the first fault.

    It is iterative, since 1024 levels exceed Python's stack.
    """
    # The open containers, and for each object the key that waits for its value.
    stack: list[tuple[dict[str, JSON] | list[JSON], str | None]] = []
    kind, start, end = next(tokens)
    while True:
        # 1. A value is expected.
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
        # 2. A value is complete: add it to its container, and close what it completes.
        while True:
            if not stack:
                return value
            container, key = stack[-1]
            if isinstance(container, list):
                container.append(value)
            elif key is None:
                if not isinstance(value, Text):
                    raise ParseError("key is not a string in object")
                kind, start, end = next(tokens)
                if kind != COLON:
                    raise ParseError("missing : in object pair")
                stack[-1] = (container, value.to_str())
                break
            else:
                if key in container:
                    raise ParseError("duplicate key")
                container[key] = value
                stack[-1] = (container, None)
            kind, start, end = next(tokens)
            if kind == COMMA:
                break
            if isinstance(container, list):
                if kind != RSQUARE:
                    raise ParseError("expected separator in list")
            elif kind != RCURLY:
                raise ParseError("expected separator in dict")
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
        # vsnprintf() into message[1024] cuts the rest.
        raise ParseError("invalid keyword '", word[:1006], "'" if len(word) < 1006 else "")
    raise ParseError("expecting value")


def _check_string(view: memoryview, start: int, end: int) -> None:
    wrong = start
    while (valid := _VALID.match(view, wrong, end)) is not None:
        wrong = valid.end()
    if wrong == end:
        return
    if view[wrong] != 0x5C:
        raise ParseError("invalid UTF-8 sequence in string")
    escape = _UNICODE_ESCAPE.match(view, wrong, end + 1)  # QEMU's text includes the quote
    if escape is None:
        raise ParseError("invalid escape sequence in string")
    raise ParseError("", view[wrong : escape.end()], " is not a valid Unicode character")


def _unescape(match: re.Match[bytes]) -> bytes:
    high, low, code, short = match.groups()
    if short is not None:
        return _SHORT.get(short[0], short)
    if high is not None:
        return chr(0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF)).encode()
    return chr(int(code, 16)).encode().replace(b"\0", b"\xc0\x80")
