# SPDX-License-Identifier: LGPL-2.1-or-later
"""Typed arguments: from a command's annotated function to checks in QEMU's words.

The function is the single source. From its signature come a msgspec Struct of its arguments and one
of the whole request; `check` fills the first from the reference parser's values, as QEMU's QAPI
visitors do, and `FastDecoder` the second straight from the bytes. Both build the same Struct, so
handlers see one type. Which commands exist is said in commands; this module knows none.

What an annotation means:

    str              a string
    Literal["a","b"] an enumeration
    int              an int64
    bool             true or false
    list[...]        an array of one of these
    msgspec.Raw      a string that carries a secret: the JSON text of its content in locked memory,
                     between double quotes, good only until the handler returns or awaits
    object           any JSON, undecoded (wire.qjson.JSON)
    … | UnsetType    optional; UNSET when not given
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, NamedTuple, Union

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from secretd.errors import CommandError
from secretd.wire.parser import JSON, Number, Text

_INT64 = range(-(1 << 63), 1 << 63)


class Member(NamedTuple):
    """One argument: its name on the wire, its Python name, how to check it, and whether it must be."""

    wire_name: str
    name: str
    check: Callable[[str, JSON], object]
    required: bool


class Command(NamedTuple):
    """A QMP command. ``function(monitor, *arguments)`` carries it out and returns JSON or a coroutine.

    ``boxed``: the function takes the Struct itself. ``client``: allowed on the client door.
    ``arguments`` are the alternatives by tag; an untagged Struct stands under "".
    """

    name: str
    function: Callable[..., Any]
    arguments: dict[str, type[Struct]]
    request: type[Struct]
    boxed: bool
    client: bool
    fast: bool


class Commands:
    """The commands that decorated functions define, by name in order of definition."""

    def __init__(self) -> None:
        self.by_name: dict[str, Command] = {}

    def __call__(
        self, *, name: str | None = None, client: bool = False
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate a function: its first parameter is the monitor, the others are the arguments."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            command = _command(function, name or function.__name__.replace("_", "-"), client=client)
            self.by_name[command.name] = command
            return function

        return register


def _command(function: Callable[..., Any], name: str, *, client: bool) -> Command:
    hints = typing.get_type_hints(function)
    parameters: list[inspect.Parameter] = list(inspect.signature(function).parameters.values())[1:]
    boxed = len(parameters) == 1 and parameters[0].name == "arguments"
    argument_type: Any
    if boxed:
        argument_type = hints["arguments"]
        structs = list(typing.get_args(argument_type)) or [argument_type]
        # msgspec wants the tag only of a union: with one type, add one that cannot be asked for.
        config = structs[0].__struct_config__
        nothing = msgspec.defstruct("Nothing", [], tag_field=config.tag_field, tag="\0")
        argument_type = Union[(*structs, nothing)]
    else:
        fields: list[Any] = [
            (p.name, hints[p.name]) if p.default is p.empty else (p.name, hints[p.name], p.default)
            for p in parameters
        ]
        title = "".join(map(str.capitalize, name.split("-"))) + "Arguments"
        argument_type = msgspec.defstruct(
            title, fields, forbid_unknown_fields=True, rename="kebab", omit_defaults=True
        )
        structs = [argument_type]
    optional = all(not member.required for struct in structs for member in members(struct))
    request_fields: list[Any] = [
        ("arguments", argument_type | UnsetType, UNSET)
        if optional
        else ("arguments", argument_type),
        ("id", Raw | UnsetType, UNSET),
    ]
    request = msgspec.defstruct(
        "".join(map(str.capitalize, name.split("-"))) + "Request",
        request_fields,
        tag_field="execute",
        tag=name,
        forbid_unknown_fields=True,
        omit_defaults=True,
    )
    return Command(
        name=name,
        function=function,
        arguments={struct.__struct_config__.tag or "": struct for struct in structs},
        request=request,
        boxed=boxed,
        client=client,
        fast=all(_is_fast(struct) for struct in structs),
    )


def members(struct: type[Struct]) -> list[Member]:
    """Return the members of an arguments Struct in schema order."""
    hints = typing.get_type_hints(struct)
    found = []
    for field in msgspec.structs.fields(struct):
        check = _checker(hints[field.name])
        found.append(Member(field.encode_name, field.name, check, field.required))
    return found


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [a for a in typing.get_args(hint) if a is not UnsetType]
    return [hint]


def _is_fast(struct: type[Struct]) -> bool:
    """Numbers and arrays have spellings that msgspec and QEMU judge differently: reference only."""
    for hint in typing.get_type_hints(struct).values():
        (kind,) = _alternatives(hint)
        if kind is not str and kind is not Raw and typing.get_origin(kind) is not Literal:
            return False
    return True


def _wrong_type(name: str, expected: str) -> CommandError:
    return CommandError(f"Invalid parameter type for '{name}', expected: {expected}")


def check_string(name: str, value: JSON) -> str:
    """Return the string, or raise what qobject-input-visitor.c says of anything else."""
    if not isinstance(value, Text):
        raise _wrong_type(name, "string")
    return value.to_str()


def _check_sensitive(name: str, value: JSON) -> Raw:
    if not isinstance(value, Text):
        raise _wrong_type(name, "string")
    return Raw(value.decode_in_place())


def _check_integer(name: str, value: JSON) -> int:
    number = value.value() if isinstance(value, Number) else None
    if not isinstance(number, int) or number not in _INT64:
        raise _wrong_type(name, "integer")
    return number


def _check_boolean(name: str, value: JSON) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, "boolean")
    return value


def _check_any(_name: str, value: JSON) -> object:
    return value


def check_enum(name: str, text: str, choices: tuple[str, ...]) -> str:
    """Return ``text`` if it is one of ``choices``, or raise what qapi-visit-core.c says."""
    if text not in choices:
        raise CommandError(f"Parameter '{name}' does not accept value '{text}'")
    return text


def _checker(hint: Any) -> Callable[[str, JSON], object]:
    (kind,) = _alternatives(hint)
    if kind is str:
        return check_string
    if kind is Raw:
        return _check_sensitive
    if kind is int:
        return _check_integer
    if kind is bool:
        return _check_boolean
    if kind is object:
        return _check_any
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return lambda name, value: check_enum(name, check_string(name, value), choices)
    if typing.get_origin(kind) is list:
        element = typing.get_args(kind)[0]
        return lambda name, value: _check_list(name, value, element)
    raise TypeError(f"{kind} has no QAPI type")


def _check_list(name: str, value: JSON, element: Any) -> list[object]:
    if not isinstance(value, list):
        raise _wrong_type(name, "array")
    checked: list[object] = []
    for index, member in enumerate(value):
        if typing.get_origin(element) is Literal:
            # An array element has no name when its enum is refused, and QEMU prints NULL.
            word = check_string(f"{name}[{index}]", member)
            checked.append(check_enum("null", word, typing.get_args(element)))
        else:
            checked.append(_checker(element)(f"{name}[{index}]", member))
    return checked


_MEMBERS: dict[type[Struct], list[Member]] = {}
_SENSITIVE: dict[type[Struct] | type[UnsetType], tuple[str, ...]] = {}


def check(command: Command, arguments: dict[str, JSON]) -> Struct:
    """Return the command's arguments Struct, or raise CommandError in QEMU's words.

    Known members in schema order first, then what is unexpected (qobject-input-visitor.c).
    """
    tag_field = None
    struct = command.arguments.get("")
    if struct is None:
        tag_field = next(iter(command.arguments.values())).__struct_config__.tag_field
        assert tag_field is not None
        if tag_field not in arguments:
            raise CommandError(f"Parameter '{tag_field}' is missing")
        tag = check_string(tag_field, arguments[tag_field])
        struct = command.arguments[check_enum(tag_field, tag, tuple(command.arguments))]
    plan = _MEMBERS.get(struct)
    if plan is None:
        plan = _MEMBERS[struct] = members(struct)
    values: dict[str, object] = {}
    known = {tag_field}
    for member in plan:
        known.add(member.wire_name)
        if member.wire_name in arguments:
            values[member.name] = member.check(member.wire_name, arguments[member.wire_name])
        elif member.required:
            raise CommandError(f"Parameter '{member.wire_name}' is missing")
    extra = [name for name in arguments if name not in known]
    if extra:
        raise CommandError(f"Parameter '{extra[-1]}' is unexpected")
    return struct(**values)


def text_of(raw: Raw) -> memoryview:
    """Return the content of a sensitive string, still in locked memory."""
    return memoryview(raw)[1:-1]


_FAST_ID: Final = re.compile(rb'(?:0|-?[1-9][0-9]{0,17}|"[ !#-\[\]-~]*")')
_FAST_SENSITIVE: Final = re.compile(rb'"[ !#-\[\]-~]*"')
_ORDINARY = rb'[^"\\\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xff]*'
_EMPTY: Final = Raw(b"")


class FastDecoder:
    """Decodes the line of one request where that is provably what the reference would do.

    Everything in doubt is declined: escapes, bytes outside ASCII, duplicate members (they have more
    quotes than what was understood has when it is written again), ids that QEMU prints otherwise.
    """

    def __init__(self, commands: Iterable[Command]) -> None:
        requests = tuple(c.request for c in commands if c.fast)
        self._decode = msgspec.json.Decoder(Union[requests]).decode  # noqa: UP007 - built at run time
        self._encode = msgspec.json.Encoder().encode
        self._shapes: dict[int, re.Pattern[bytes]] = {}

    def __call__(self, line: memoryview) -> Struct | None:
        """Return the request, or None to decline. Raises nothing: msgspec's errors quote the text."""
        try:
            request = self._decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        arguments, request_id = request.arguments, request.id
        quotes = 0
        if request_id is not UNSET:
            id_text = memoryview(request_id)
            if not _FAST_ID.fullmatch(id_text):
                return None
            quotes += 2 * (id_text[0] == 0x22)
            request.id = _EMPTY
        kept = []
        for name in _sensitive(type(arguments)):
            raw = getattr(arguments, name)
            if raw is not UNSET:
                if not _FAST_SENSITIVE.fullmatch(memoryview(raw)):
                    return None
                quotes += 2
                kept.append((name, raw))
                setattr(arguments, name, _EMPTY)
        quotes += self._encode(request).count(b'"')
        shape = self._shapes.get(quotes)
        if shape is None:
            shape = re.compile(_ORDINARY + rb'(?:"' + _ORDINARY + b"){%d}" % quotes)
            self._shapes[quotes] = shape
        if not shape.fullmatch(line):
            return None
        request.id = request_id
        for name, raw in kept:
            setattr(arguments, name, raw)
        return typing.cast(Struct, request)


def _sensitive(struct: type[Struct] | type[UnsetType]) -> tuple[str, ...]:
    """The names of the members that carry a secret."""
    names = _SENSITIVE.get(struct)
    if names is None:
        hints = typing.get_type_hints(struct) if struct is not UnsetType else {}
        names = tuple(name for name, hint in hints.items() if Raw in _alternatives(hint))
        _SENSITIVE[struct] = names
    return names
