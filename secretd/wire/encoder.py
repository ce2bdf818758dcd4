# SPDX-License-Identifier: LGPL-2.1-or-later
"""JSON as QEMU writes it: qobject/json-writer.c and qjson.c, members in QDict's order.

The output is ASCII with separators ", " and ": "; a line ends in CRLF. Sensitive text may only go
through `write_quoted`, which stays in the given buffer. wire.messages, wire.connection,
monitor.core and daemon.argv call this module.
"""

import re
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Final, Generic, NamedTuple, TypeVar

from secretd.wire.hash_order import KNOWN_NAMES, qdict_items
from secretd.wire.parser import Fault, Number, Text

_PLAIN: Final = re.compile(r"[ !#-\[\]-~]*")
_SHORT: Final = {
    '"': '\\"',
    "\\": "\\\\",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
}
# One sequence of mod_utf8_codepoint(), valid or not (util/unicode.c).
_SEQUENCE: Final = re.compile(
    rb"[\xc0-\xdf][\x80-\xbf]?|[\xe0-\xef][\x80-\xbf]{0,2}|[\xf0-\xf7][\x80-\xbf]{0,3}"
    rb"|[\xf8-\xfb][\x80-\xbf]{0,4}|[\xfc\xfd][\x80-\xbf]{0,5}|.",
    re.DOTALL,
)


def _character(character: str) -> str:
    short = _SHORT.get(character)
    if short is not None:
        return short
    code = ord(character)
    if 0x20 <= code < 0x7F:
        return character
    if 0xD800 <= code < 0xE000:
        return "\\uFFFD"  # from a command line that was not UTF-8
    if code < 0x10000:
        return f"\\u{code:04X}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"


_ESCAPES_KEPT: Final = 4096


class _Escapes(dict[int, str]):
    """The written forms of characters by code, filled by str.translate()."""

    def __missing__(self, code: int) -> str:
        written = _character(chr(code))
        if len(self) < _ESCAPES_KEPT:
            self[code] = written
        return written


_ESCAPES: Final = _Escapes()


def string(text: str) -> str:
    """Return ``text`` as a JSON string."""
    if _PLAIN.fullmatch(text):
        return f'"{text}"'
    return f'"{text.translate(_ESCAPES)}"'


T = TypeVar("T")


class JSONText(str, Generic[T]):
    """The JSON text of a value of type T, which is sent unchanged."""

    __slots__ = ()


def value(data: object) -> str:
    """Return the JSON text of None, bool, int, float, str, lists and dicts of them, and of
    insensitive values of wire.parser.

    Members come in QDict's order. It is iterative, since 1024 levels exceed Python's stack.
    """
    parts: list[str] = []
    stack = [data]
    while stack:
        item = stack.pop()
        if isinstance(item, JSONText):
            parts.append(item)
        elif isinstance(item, dict):
            text = _known_members(item)
            if text is not None:
                parts.append(text)
                continue
            stack.append(JSONText("}"))
            for key, member in reversed(qdict_items(item)):
                stack += (member, JSONText(f", {string(key)}: "))
            if item:
                stack[-1] = JSONText(str(stack[-1])[2:])
            parts.append("{")
        elif isinstance(item, list):
            known = [_known_members(each) if type(each) is dict else None for each in item]
            if None not in known:
                parts.append(f"[{', '.join(known)}]")  # type: ignore[arg-type]
                continue
            stack.append(JSONText("]"))
            for element in reversed(item):
                stack += (element, JSONText(", "))
            stack.pop()  # it is not empty: an empty one has no unknown member
            parts.append("[")
        else:
            parts.append(_scalar(item))
    return "".join(parts)


class _Form(NamedTuple):
    """Dicts with the same names and types: their values in QDict's order, and how to write them.

    ``is_plain`` matches a text whose strings need no escapes: any other text has a further quote,
    or a character that the strings of the pattern exclude.
    """

    ordered: Callable[[Mapping[str, object]], object]
    text: str
    is_plain: Callable[[str], object]


def _known_members(members: dict[str, object]) -> str | None:
    """An optimisation for lists: return the text of known members that are str and int.

    Returns None for any others, and where a string needs escapes; `value` has the reference.
    """
    kinds = (*members, *map(type, members.values()))
    form = _FORMS.get(kinds) or _new_form(kinds, members)
    if form is None:
        return None
    text = form.text % form.ordered(members)
    return text if form.is_plain(text) else None


def _new_form(kinds: tuple[object, ...], members: dict[str, object]) -> _Form | None:
    if not members or not KNOWN_NAMES.issuperset(members) or len(_FORMS) == _FORMS_KEPT:
        return None
    if not _KINDS.keys() >= set(map(type, members.values())):
        return None
    order = qdict_items(members)
    form = ", ".join(f'"{name}": {_KINDS[type(value)][0]}' for name, value in order)
    shape = ", ".join(f'"{name}": {_KINDS[type(value)][1]}' for name, value in order)
    _FORMS[kinds] = _Form(
        itemgetter(*(name for name, _ in order)),
        f"{{{form}}}",
        re.compile(rf"\{{{shape}\}}").fullmatch,
    )
    return _FORMS[kinds]


_KINDS: Final[dict[type, tuple[str, str]]] = {
    str: ('"%s"', rf'"{_PLAIN.pattern}"'),
    int: ("%d", r"-?[0-9]+"),
}
"""How to write a value of each type, and what it looks like then."""

_FORMS_KEPT: Final = 64
_FORMS: Final[dict[tuple[object, ...], _Form]] = {}
"""By names and types."""


def _scalar(data: object) -> str:
    if isinstance(data, Text):
        return string(data.to_str())
    if isinstance(data, Number):
        data = data.value()
    if isinstance(data, str):
        return string(data)
    if data is None:
        return "null"
    if data is True:
        return "true"
    if data is False:
        return "false"
    if isinstance(data, int):
        return str(data)
    if isinstance(data, float):
        return f"{data:.17g}"
    raise TypeError(f"{type(data).__name__} has no JSON form")


def line(data: object) -> bytes:
    """Return one message as bytes: the JSON text and CRLF."""
    return value(data).encode("ascii") + b"\r\n"


def write_quoted(quote: memoryview, into: memoryview) -> int:
    """Write the sender's bytes as the inside of a JSON string; return the number of bytes written.

    As QEMU prints a C string, it stops at the first NUL and writes invalid UTF-8 as U+FFFD.
    ``into`` must hold six bytes for each byte of ``quote``. Only single characters become Python
    objects.
    """
    at = 0
    for match in _SEQUENCE.finditer(quote):
        start = match.start()
        first = quote[start]
        if first == 0:
            break
        if 0x20 <= first < 0x7F and first not in b'"\\':
            into[at] = first
            at += 1
            continue
        encoded = _character(_decoded(match[0])).encode("ascii")
        into[at : at + len(encoded)] = encoded
        at += len(encoded)
    return at


def write_quoted_message(fault: Fault, head: bytes, tail: bytes, into: memoryview) -> int:
    """Write a message around a fault that quotes the sender's bytes; return its length in bytes."""
    assert fault.quote is not None
    before = head + string(fault.before)[:-1].encode()
    into[: len(before)] = before
    at = len(before) + write_quoted(fault.quote, into[len(before) :])
    behind = string(fault.after)[1:].encode() + tail
    into[at : at + len(behind)] = behind
    return at + len(behind)


def _decoded(sequence: bytes) -> str:
    """Return the character of a sequence, U+FFFD for an invalid one and for noncharacters."""
    if sequence == b"\xc0\x80":
        return "\0"
    try:
        character = sequence.decode()
    except UnicodeDecodeError:
        return "\ufffd"
    code = ord(character)
    return "\ufffd" if code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF else character
