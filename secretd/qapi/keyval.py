# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line's ``secret,id=x,file=y``, or JSON, to arguments and back (QEMU's util/keyval.c).

It does not know what the arguments mean. A text may hold a secret: it is read in place, and values
stay views of it. daemon and monitor.hmp call this module.
"""

import re
from typing import Final, NamedTuple, TypeAlias

from secretd.errors import UsageError
from secretd.qapi.visitor import JSON_VISITOR, KEYVAL_VISITOR, Visitor
from secretd.wire.hash_order import qdict_items
from secretd.wire.lexer import document
from secretd.wire.parser import JSON, Fault, Text

FRAGMENT_BYTES: Final = 127
"""Bytes of one fragment of a key, as in QEMU."""

KEY_FRAGMENTS: Final = 16
"""Fragments of a key; no object type needs more than three. QEMU has no limit."""

_NAME = rb"(?:__[A-Za-z0-9.-]*_)?[A-Za-z][A-Za-z0-9_-]*"  # parse_qapi_name()
_FIRST: Final = re.compile(_NAME)
_FRAGMENT: Final = re.compile(rb"[0-9]+|" + _NAME)
_KEY_END: Final = re.compile(rb"[=,]")
_HELP: Final = re.compile(rb"help|\?")
_COMMAS: Final = re.compile(rb",,?")
_LARGEST_INDEX: Final = (1 << 31) - 1

_Tree: TypeAlias = "dict[str, JSON]"


class Value(Text):
    """A value within the text. As with Text, start and end include one extra byte on each side."""

    __slots__ = ()

    def to_str(self) -> str:
        """Return the value. Only for members the schema does not mark sensitive."""
        content = bytes(self.view[self.start + 1 : self.end - 1])
        return content.replace(b"\xc0\x80", b"\0").decode(errors="surrogateescape")

    def decode_in_place(self) -> memoryview:
        """Return the value between two double quotes; keyval has no escapes."""
        self.view[self.start] = self.view[self.end - 1] = 0x22
        return self.view[self.start : self.end]


class KeyvalError(UsageError):
    """The fault of a text, in QEMU's words around a part of the text.

    That part may belong to a secret (after a comma that should have been doubled), so it stays in
    the text until a caller asks for the words.
    """

    def __init__(self, before: str, quote: memoryview | None = None, after: str = "") -> None:
        super().__init__()
        self._fault = Fault(before, quote, after)

    def words(self, most: int | None = None) -> str:
        """Return the words, with a quotation of at most ``most`` bytes, None for all."""
        before, quote, after = self._fault
        if quote is None:
            return before
        if bytes(quote[-1:]) == b"\0":  # the end of the text
            quote = quote[:-1]
        part = bytes(quote[:most]).decode(errors="replace")
        return f"{before}{part}{'' if most is None or len(quote) <= most else '…'}{after}"

    def __str__(self) -> str:
        return self.words()


class Given(NamedTuple):
    """The arguments of an option, the visitor that checks them, and whether help was requested."""

    members: dict[str, JSON]
    visitor: Visitor
    help: bool


def arguments(view: memoryview) -> Given:
    """Return the arguments of ``--object TEXT``: JSON if it starts with a brace, else keyval.

    ``view``: the text between two spare bytes; it is changed in place. Raises UsageError in QEMU's
    words (util/keyval.c, and qobject/json-parser.c for JSON).
    """
    if bytes(view[1:2]) != b"{":
        return _parse(view, "qom-type")
    message = document(view[1:])
    if isinstance(message, Fault):
        raise KeyvalError(*message)
    assert isinstance(message, dict)
    return Given(message, JSON_VISITOR, help=False)


def buffer(text: str) -> memoryview:
    """Return a command line's text in the form that `arguments` takes."""
    return memoryview(bytearray(b"\0" + text.encode(errors="surrogateescape") + b"\0"))


def parse(text: str, implied_key: str) -> dict[str, str]:
    """Return the members of ``[VALUE,]KEY=VALUE,…``; ``,,`` is a comma, and the last value of a key
    counts.

    ``implied_key``: the key of a leading value without one. Raises UsageError in QEMU's words, also
    for nested keys.
    """
    plain = {}
    for key, value in _parse(buffer(text), implied_key).members.items():
        if not isinstance(value, Text):
            raise UsageError(f"Parameters '{key}.*' are unexpected")
        plain[key] = value.to_str()
    return plain


def compose(members: dict[str, str]) -> str:
    """Return the text that `parse` reads as ``members``."""
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in members.items())


def _parse(view: memoryview, implied_key: str) -> Given:
    tree: _Tree = {}
    position, end = 1, len(view) - 1
    wants_help = False
    while position < end:
        match = _KEY_END.search(view, position, end)
        key_end = match.start() if match else end
        if key_end > position and (match is None or match[0] == b","):
            # Compared in place: after a comma that should be doubled, this is part of a secret.
            if _HELP.fullmatch(view, position, key_end):
                wants_help = True
                position = key_end + 1
                continue
            if position == 1:
                tree[implied_key] = Value(view, position - 1, key_end + 1)
                position = key_end + 1
                continue
        fragments = _fragments(
            view[position:key_end], complete=match is not None and match[0] == b"="
        )
        node = tree
        for index in range(len(fragments) - 1):
            node = _put(node, fragments[: index + 1], None)
        value, position = _value(view, key_end + 1, end)
        _put(node, fragments, value)
    return Given(_listified(tree, ""), KEYVAL_VISITOR, help=wants_help)


def _fragments(key: memoryview, *, complete: bool) -> list[str]:
    """Return the fragments between the dots of a key. Raises KeyvalError.

    ``complete``: an equals sign follows. Names with a reverse domain have dots of their own.
    """
    spans = []
    at = 0
    while at <= len(key):
        match = (_FRAGMENT if at else _FIRST).match(key, at)
        if match is None or bytes(key[match.end() : match.end() + 1]) not in (b"", b"."):
            raise KeyvalError("Invalid parameter '", key, "'")
        if match.end() - at > FRAGMENT_BYTES:
            part = "" if match.end() - at == len(key) else " fragment"
            raise KeyvalError(f"Parameter{part} '", key[at : match.end()], "' is too long")
        spans.append(key[at : match.end()])
        if len(spans) > KEY_FRAGMENTS:
            after = f"' has more than the limit of {KEY_FRAGMENTS} fragments"
            raise KeyvalError("Parameter '", key, after)
        at = match.end() + 1
    if not complete:
        raise KeyvalError("Expected '=' after parameter '", key, "'")
    return [bytes(span).decode() for span in spans]


def _put(node: _Tree, path: list[str], value: Value | None) -> _Tree:
    """Put a value at a path, or without one ensure that an object is there; return that object."""
    fragment = path[-1]
    old = node.get(fragment)
    if old is not None and isinstance(old, dict) is not (value is None):
        raise UsageError(f"Parameters '{'.'.join(path)}.*' used inconsistently")
    if value is not None:
        node[fragment] = value
        return node
    inner = node.setdefault(fragment, {})
    assert isinstance(inner, dict)
    return inner


def _value(view: memoryview, start: int, end: int) -> tuple[Value, int]:
    """Return the value up to a single comma, with its doubled commas undone, and the position after
    it.
    """
    into = at = start
    for match in _COMMAS.finditer(view, start, end):
        # Up to and including the first comma of two; a single one ends the value.
        stop = match.end() - 1
        view[into : into + stop - at] = view[at:stop]
        into += stop - at
        at = match.end()
        if match[0] == b",":
            return Value(view, start - 1, into + 1), at
    view[into : into + end - at] = view[at:end]
    return Value(view, start - 1, into + end - at + 1), end


def _index(key: str) -> int | None:
    return min(int(key[:20]), _LARGEST_INDEX) if key[:1].isdigit() else None


def _listified(node: _Tree, path: str) -> "_Tree":
    """keyval_listify(): turn objects whose keys are all numbers into lists, except the root."""
    done: _Tree = {}
    for key, value in qdict_items(node):
        done[key] = _listify(value, f"{path}{key}.") if isinstance(value, dict) else value
    # In the order given, which is the order in which QDict was filled.
    return {key: done[key] for key in node}


def _listify(node: _Tree, path: str) -> JSON:
    inner = _listified(node, path)
    indices = {key: _index(key) for key in inner}
    if None not in indices.values():
        return _list(inner, indices, path)  # type: ignore[arg-type]  # it has no None, see above
    if any(index is not None for index in indices.values()):
        raise UsageError(f"Parameters '{path}*' used inconsistently")
    return inner


def _list(node: _Tree, indices: dict[str, int], path: str) -> JSON:
    elements = {indices[key]: value for key, value in qdict_items(node)}
    for index in range(min(len(node) + 1, max(elements) + 1)):
        if index not in elements:
            raise UsageError(f"Parameter '{path}{index}' missing")
    return [elements[i] for i in sorted(elements)]
