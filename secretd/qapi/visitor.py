# SPDX-License-Identifier: LGPL-2.1-or-later
"""From parsed values to typed ones, in QEMU's words: its QAPI input visitors
(qobject-input-visitor.c).

`JSON_VISITOR` takes the values of wire.parser. `KEYVAL_VISITOR` takes those of a command line,
where every scalar is text and paths have dots. `checker` turns an annotation (see qapi.command)
into a check. This module knows no command and no object type.
"""

import re
import types
import typing
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, NewType, TypeAlias, Union

import msgspec
from msgspec import Raw, Struct, UnsetType

from secretd.errors import ArgumentError, CommandError
from secretd.wire.hash_order import GHashTable, qdict_items
from secretd.wire.parser import JSON, Number, Text

Int32 = NewType("Int32", int)
"""An int32 of QAPI; a plain ``int`` is an int64."""

SensitiveAny = NewType("SensitiveAny", object)
"""Any JSON, which may carry a secret."""

ORDERED_NAMES: Final = 512
"""Names among which the unexpected one is chosen as QEMU does; of more, the first is named. The
client chooses the names, and so the time of the search.
"""

_INT32: Final = range(-(1 << 31), 1 << 31)
_INT64: Final = range(-(1 << 63), 1 << 63)
# strtoll(3) with base 0 of the whole text.
_STRTOLL: Final = re.compile(
    r"[ \t-\r]*([+-]?)(?:0[xX]0*([0-9a-fA-F]{1,16})|0+([0-7]{0,22})|([1-9][0-9]{0,19}))"
)
_BOOLEANS: Final = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}


class Visitor:
    """Checks JSON values. ``path`` is the value's name in errors, from the top."""

    def member(self, path: str, name: str) -> str:
        """Return the path of an object's member."""
        return f"{path}.{name}" if path else name

    def element(self, path: str, index: int) -> str:
        """Return the path of an array's element."""
        return f"{path}[{index}]"

    def text(self, path: str, value: JSON) -> Text:
        """Return the string, or raise CommandError, as the methods below do."""
        if not isinstance(value, Text):
            raise _wrong_type(path, "string")
        return value

    def integer(self, path: str, value: JSON) -> int:
        """Return the int64."""
        number = value.value() if isinstance(value, Number) else None
        if not isinstance(number, int) or number not in _INT64:
            raise _wrong_type(path, "integer")
        return number

    def boolean(self, path: str, value: JSON) -> bool:
        """Return true or false."""
        if not isinstance(value, bool):
            raise _wrong_type(path, "boolean")
        return value


class _KeyvalVisitor(Visitor):
    """Checks the values of `keyval`: dicts, lists and Text."""

    def element(self, path: str, index: int) -> str:
        return f"{path}.{index}"

    def text(self, path: str, value: JSON) -> Text:
        if not isinstance(value, Text):
            raise ArgumentError(f"Parameters '{path}.*' are unexpected")
        return value

    def integer(self, path: str, value: JSON) -> int:
        match = _STRTOLL.fullmatch(self.text(path, value).to_str())
        if match is not None:
            sign, hexadecimal, octal, decimal = match.groups()
            base = 16 if hexadecimal else 8 if octal else 10
            number = int(sign + (hexadecimal or octal or decimal or "0"), base)
            if number in _INT64:
                return number
        raise ArgumentError(f"Parameter '{path}' expects integer")

    def boolean(self, path: str, value: JSON) -> bool:
        found = _BOOLEANS.get(self.text(path, value).to_str())
        if found is None:
            raise ArgumentError(f"Parameter '{path}' expects 'on' or 'off'")
        return found


JSON_VISITOR: Final = Visitor()
KEYVAL_VISITOR: Final = _KeyvalVisitor()

Check: TypeAlias = Callable[[Visitor, str, str, JSON], object]
"""``check(visitor, path, name, value)`` returns the typed value or raises CommandError."""


def _wrong_type(path: str, expected: str) -> CommandError:
    return ArgumentError(f"Invalid parameter type for '{path}', expected: {expected}")


class Member(NamedTuple):
    """A member of an object: its name on the wire, its Python name, annotation and check, and
    whether it is required.
    """

    wire_name: str
    name: str
    hint: Any
    check: Check
    required: bool


_MEMBERS: dict[type[Struct], list[Member]] = {}


def members(struct: type[Struct]) -> list[Member]:
    """Return the members of a Struct in schema order."""
    found = _MEMBERS.get(struct)
    if found is None:
        found = _MEMBERS[struct] = [
            Member(field.encode_name, field.name, field.type, checker(field.type), field.required)
            for field in msgspec.structs.fields(struct)
        ]
    return found


def alternatives(hint: Any) -> list[Any]:
    """Return the types of an annotation, without the mark of an optional member."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [a for a in typing.get_args(hint) if a is not UnsetType]
    return [hint]


def checker(hint: Any) -> Check:
    """Return the check of an annotation. Raises TypeError for one that QAPI does not have."""
    (kind,) = alternatives(hint)
    simple = _CHECKS.get(kind)
    if simple is not None:
        return simple
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return lambda visitor, path, name, value: check_enum(
            name, visitor.text(path, value).to_str(), arguments
        )
    if typing.get_origin(kind) is list:
        of_element = checker(arguments[0])
        return lambda visitor, path, _name, value: _check_list(visitor, path, value, of_element)
    if isinstance(kind, type) and issubclass(kind, Struct):
        return lambda visitor, path, _name, value: _check_object(visitor, path, value, kind)
    raise TypeError(f"{kind} has no QAPI type")


def _check_int32(visitor: Visitor, path: str, name: str, value: JSON) -> int:
    number = visitor.integer(path, value)
    if number not in _INT32:
        raise ArgumentError(f"Parameter '{name}' expects int32_t")
    return number


_CHECKS: Final[dict[Any, Check]] = {
    str: lambda visitor, path, _name, value: visitor.text(path, value).to_str(),
    Raw: lambda visitor, path, _name, value: Raw(visitor.text(path, value).decode_in_place()),
    int: lambda visitor, path, _name, value: visitor.integer(path, value),
    Int32: _check_int32,
    bool: lambda visitor, path, _name, value: visitor.boolean(path, value),
    object: lambda _visitor, _path, _name, value: value,
    SensitiveAny: lambda _visitor, _path, _name, value: value,
}


def check_enum(name: str, text: str, choices: tuple[str, ...]) -> str:
    """Return ``text`` if it is one of ``choices``, or raise CommandError in the words of
    qapi-visit-core.c.
    """
    if text not in choices:
        raise ArgumentError(f"Parameter '{name}' does not accept value '{text}'")
    return text


def _check_list(visitor: Visitor, path: str, value: JSON, of_element: Check) -> list[object]:
    if not isinstance(value, list):
        raise _wrong_type(path, "array")
    # An array's element has no name of its own, so QEMU prints NULL.
    return [of_element(visitor, visitor.element(path, i), "null", e) for i, e in enumerate(value)]


def _check_object(visitor: Visitor, path: str, value: JSON, struct: type[Struct]) -> Struct:
    if not isinstance(value, dict):
        raise _wrong_type(path, "object")
    return check_members(visitor, path, value, struct, ())


def check_members(
    visitor: Visitor,
    path: str,
    given: dict[str, JSON],
    struct: type[Struct],
    visited: tuple[str, ...],
) -> Struct:
    """Return the Struct of an object's members, or raise CommandError in QEMU's words.

    Known members are checked first, in schema order, then unexpected ones. ``visited``: members
    that were looked up before. ``path``: the object's name in errors, "" at the top.
    """
    values: dict[str, object] = {}
    seen = list(visited)
    for member in members(struct):
        name = member.wire_name
        if name in given:
            seen.append(name)
            where = visitor.member(path, name)
            values[member.name] = member.check(visitor, where, name, given[name])
        elif member.required:
            raise ArgumentError(f"Parameter '{visitor.member(path, name)}' is missing")
    if len(seen) != len(given):
        unexpected = visitor.member(path, _unexpected(given, seen))
        raise ArgumentError(f"Parameter '{unexpected}' is unexpected")
    return struct(**values)


def _unexpected(given: dict[str, JSON], seen: list[str]) -> str:
    """Return the unexpected member that QEMU names: the first one left in its hash table."""
    if len(given) > ORDERED_NAMES:
        return next(name for name in given if name not in seen)
    table = GHashTable(name for name, _ in qdict_items(given))
    for name in seen:
        table.remove(name)
    return next(iter(table))
