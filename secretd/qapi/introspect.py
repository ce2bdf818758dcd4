# SPDX-License-Identifier: LGPL-2.1-or-later
"""The schema that query-qmp-schema returns (QEMU's qapi/introspect.json), from commands' functions.

It is derived from the annotations of commands (see qapi.command) and the TypedDicts that they
return; nothing is written twice. As in QEMU, enumerations and objects have meaningless numbers for
names, and arrays "[ELEMENT]". monitor asks once for each socket.
"""

import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, NotRequired, TypeAlias, Union

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from secretd.qapi.command import Command
from secretd.qapi.visitor import Int32, SensitiveAny, alternatives

Names = list[str] | UnsetType


class SchemaInfoEnumMember(Struct, omit_defaults=True):
    """A value of an enumeration."""

    name: str
    features: Names = UNSET


class SchemaInfoObjectMember(Struct, omit_defaults=True):
    """A member of an object. An optional member has ``default``, which is null."""

    name: str
    type: str
    default: object | UnsetType = UNSET
    features: Names = UNSET


class SchemaInfoObjectVariant(Struct):
    """Further members of an object, by the value of its tag."""

    case: str
    type: str


class SchemaInfoAlternateMember(Struct):
    """A type of an alternate; secretd has no alternates."""

    type: str


class _SchemaInfo(Struct, tag_field="meta-type", rename="kebab", omit_defaults=True, kw_only=True):
    tag_at: ClassVar = 1

    name: str
    features: Names = UNSET


class SchemaInfoBuiltin(_SchemaInfo, tag="builtin", kw_only=True):
    """A built-in type."""

    json_type: Literal["string", "number", "int", "boolean", "null", "object", "array", "value"]


class SchemaInfoEnum(_SchemaInfo, tag="enum", kw_only=True):
    """An enumeration."""

    members: list[SchemaInfoEnumMember]
    values: Annotated[list[str], "deprecated"]


class SchemaInfoArray(_SchemaInfo, tag="array", kw_only=True):
    """An array."""

    element_type: str


class SchemaInfoObject(_SchemaInfo, tag="object", kw_only=True):
    """An object, optionally with a tag that selects further members."""

    members: list[SchemaInfoObjectMember]
    tag: str | UnsetType = UNSET
    variants: list[SchemaInfoObjectVariant] | UnsetType = UNSET


class SchemaInfoAlternate(_SchemaInfo, tag="alternate", kw_only=True):
    """A value of one of several types."""

    members: list[SchemaInfoAlternateMember]


class SchemaInfoCommand(_SchemaInfo, tag="command", kw_only=True):
    """A command."""

    arg_type: str
    ret_type: str
    allow_oob: bool | UnsetType = UNSET


class SchemaInfoEvent(_SchemaInfo, tag="event", kw_only=True):
    """An event."""

    arg_type: str


SchemaInfo: TypeAlias = (
    SchemaInfoBuiltin
    | SchemaInfoEnum
    | SchemaInfoArray
    | SchemaInfoObject
    | SchemaInfoAlternate
    | SchemaInfoCommand
    | SchemaInfoEvent
)

_BUILTIN: Final[dict[Any, tuple[str, str]]] = {
    str: ("str", "string"),
    Raw: ("str", "string"),
    int: ("int", "int"),
    Int32: ("int", "int"),
    bool: ("bool", "boolean"),
    object: ("any", "value"),
    SensitiveAny: ("any", "value"),
}
_FEATURES: Final = {Raw: ["sensitive"], SensitiveAny: ["sensitive"]}


def schema(commands: Iterable[Command], events: Mapping[str, type]) -> list[dict[str, object]]:
    """Return the SchemaInfo list of these commands and events, as JSON values.

    ``events``: by name, the TypedDict of each event's data. The source of the form is
    qapi/introspect.json.
    """
    found = _Types()
    entries: list[SchemaInfo] = []
    for command in commands:
        structs = tuple(command.arguments.values())
        arguments: Any = Union[structs] if command.tag_field else structs[0]  # noqa: UP007
        entries.append(
            SchemaInfoCommand(
                name=command.name,
                arg_type=found.name(arguments),
                ret_type=found.name(_Nothing if command.returns is None else command.returns),
                allow_oob=command.oob or UNSET,
            )
        )
    entries += [SchemaInfoEvent(name=n, arg_type=found.name(data)) for n, data in events.items()]
    listed: list[dict[str, object]] = msgspec.to_builtins(entries + found.entries)
    return listed


class _Nothing(Struct):
    """The object without members."""


class _Types:
    """The types that were needed so far, each once."""

    def __init__(self) -> None:
        self.entries: list[SchemaInfo] = []
        self._names: dict[bytes, str] = {}
        self._count = 0

    def name(self, hint: Any) -> str:
        """Return the name of an annotation's type; enter the type if it is new."""
        builtin = _BUILTIN.get(hint)
        if builtin is not None:
            name, json_type = builtin
            return self._add(SchemaInfoBuiltin(name=name, json_type=json_type), name)  # type: ignore[arg-type]
        origin = typing.get_origin(hint)
        if origin is list:
            element = self.name(typing.get_args(hint)[0])
            return self._add(SchemaInfoArray(name="", element_type=element), f"[{element}]")
        if origin is Literal:
            return self._enum(typing.get_args(hint))
        if origin in (Union, types.UnionType):
            return self._union(typing.get_args(hint))
        return self._add(SchemaInfoObject(name="", members=self._members(_fields(hint))))

    def _enum(self, values: tuple[str, ...]) -> str:
        members = [SchemaInfoEnumMember(value) for value in values]
        return self._add(SchemaInfoEnum(name="", members=members, values=list(values)))

    def _union(self, structs: tuple[type[Struct], ...]) -> str:
        """Enter an object with variants: the members that all alternatives share, and the others by
        tag.
        """
        tag = structs[0].__struct_config__.tag_field
        assert tag is not None
        fields = {str(s.__struct_config__.tag): _fields(s) for s in structs}
        first, *others = fields.values()
        base = {n: m for n, m in first.items() if all(n in other for other in others)}
        members = self._members(base)
        at = getattr(structs[0], "tag_at", 0)
        members.insert(at, SchemaInfoObjectMember(tag, self._enum(tuple(fields))))
        variants = []
        for case, own in fields.items():
            rest = self._members({n: m for n, m in own.items() if n not in base})
            variants.append(
                SchemaInfoObjectVariant(case, self._add(SchemaInfoObject(name="", members=rest)))
            )
        return self._add(SchemaInfoObject(name="", members=members, tag=tag, variants=variants))

    def _members(self, fields: "_Fields") -> list[SchemaInfoObjectMember]:
        return [
            SchemaInfoObjectMember(
                name, self.name(hint), UNSET if required else None, features or UNSET
            )
            for name, (hint, required, features) in fields.items()
        ]

    def _add(self, info: SchemaInfo, name: str | None = None) -> str:
        key = msgspec.json.encode(info)
        known = self._names.get(key)
        if known is None:
            if name is None:
                name = str(self._count)
                self._count += 1
            known = self._names[key] = info.name = name
            self.entries.append(info)
        return known


_Fields: TypeAlias = dict[str, tuple[Any, bool, list[str]]]


def _fields(kind: type) -> _Fields:
    """Return the members of a Struct or TypedDict: annotation, whether it is required, and its
    features.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    found: _Fields = {}
    if issubclass(kind, Struct):
        for field in msgspec.structs.fields(kind):
            found[field.encode_name] = _entry(hints[field.name], required=field.required)
        return found
    for name, hint in hints.items():
        optional = typing.get_origin(hint) is NotRequired
        found[name] = _entry(typing.get_args(hint)[0] if optional else hint, required=not optional)
    return found


def _entry(hint: Any, *, required: bool) -> tuple[Any, bool, list[str]]:
    features: list[str] = []
    if typing.get_origin(hint) is Annotated:
        hint, *features = typing.get_args(hint)
    (hint,) = alternatives(hint)
    return hint, required, features or _FEATURES.get(hint, [])
