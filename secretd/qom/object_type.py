# SPDX-License-Identifier: LGPL-2.1-or-later
"""Types of objects, and what qom-list-types says about them (QEMU's TypeInfo).

Each type is defined in a file beside this one; registry lists them. The tree holds the objects, and
calls this module.
"""

from collections.abc import Awaitable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NotRequired, TypeAlias, TypedDict

import msgspec
from msgspec import Struct

from secretd.errors import CommandError, DeviceNotFound
from secretd.journal.files import ObjectRecord
from secretd.memory.arena import LockedBuffer
from secretd.qapi.visitor import JSON_VISITOR, members
from secretd.qom.loading import Loading
from secretd.wire.parser import JSON, Text

if TYPE_CHECKING:
    from secretd.qom.tree import ObjectTree

ObjectPropertyInfo = TypedDict(
    "ObjectPropertyInfo",
    {
        "name": str,
        "type": str,
        "description": NotRequired[str],
        "default-value": NotRequired[object],
    },
)
"""An entry of qom-list and qom-list-properties (qapi/qom.json)."""


class ObjectTypeInfo(TypedDict):
    """An entry of qom-list-types (qapi/qom.json)."""

    name: str
    abstract: NotRequired[bool]
    parent: NotRequired[str]


class StoredInvalidValue(CommandError):
    """A refused value that the property keeps nevertheless, as some of QEMU's setters do.

    ``changes``: the properties to store.
    """

    def __init__(self, desc: str, changes: dict[str, object]) -> None:
        super().__init__(desc)
        self.changes = changes


class TypeInfo(NamedTuple):
    """A QOM type as qom-list-types shows it; ``ancestors``: all types that it implements, including
    itself.
    """

    name: str
    parent: str | None
    abstract: bool
    ancestors: tuple[str, ...]
    properties: tuple[tuple[str, str], ...] = (("type", "string"),)


class ObjectOptions(Struct, tag_field="qom-type", forbid_unknown_fields=True, kw_only=True):
    """The members that all types have in object-add (ObjectOptions of qapi/qom.json)."""

    id: str


Content: TypeAlias = LockedBuffer | dict[str, object] | None
"""The content that a type loads for an object: plaintext, or further properties to store, or
nothing.
"""


class ObjectType:
    """A type of objects that object-add creates; subclasses override what differs.

    ``number`` stands in the journal and never changes. ``defaults``: the values of properties that
    were not given. ``decides``: access depends on such objects. ``declares_store``: such an object
    is a store on disk; ``names_versions``: it is an alias. ``acquired``: the properties that change
    by use; an object of the command line keeps them at the next start. ``by_command``: the command
    that makes such objects, if object-add does not; ``registers``: the tree keeps a register of
    them (`joined`, `left`); ``trusted_only``: only uid 0 and the daemon's own uid may add, change
    or delete them.
    """

    info: TypeInfo
    number: int
    options: type[ObjectOptions]
    defaults: Mapping[str, object]
    decides: bool = False
    declares_store: bool = False
    names_versions: bool = False
    acquired: frozenset[str] = frozenset()
    by_command = ""
    registers: bool = False
    trusted_only: bool = False

    def create(self, _options: Any, _loading: Loading) -> Content | Awaitable[Content]:
        """Return the content that the options describe, at once or later. Raises CommandError."""
        return None

    def check(
        self, _tree: "ObjectTree", _object_id: str, _properties: Mapping[str, object]
    ) -> None:
        """Raise CommandError if the tree cannot have the new object beside its others."""

    def joined(
        self, _tree: "ObjectTree", _object_id: str, _properties: Mapping[str, object]
    ) -> None:
        """An object was added, or taken over from an earlier process."""

    def left(self, _tree: "ObjectTree", _object_id: str, _record: ObjectRecord) -> None:
        """An object is about to be removed."""

    def stored(self, options: ObjectOptions) -> dict[str, object]:
        """Return the properties to store: those that were given."""
        given = msgspec.to_builtins(options)
        return {name: given[name] for name, _ in self.info.properties if name in given}

    def get(self, record: ObjectRecord, name: str) -> object:
        """Return a property's value."""
        properties = record.properties
        return properties[name] if name in properties else self.defaults[name]

    def set(self, name: str, value: JSON) -> dict[str, object]:
        """Check a new value; return the properties to store."""
        (member,) = (m for m in members(self.options) if m.wire_name == name)
        return {name: msgspec.to_builtins(member.check(JSON_VISITOR, name, name, value))}


SECRET_COMMON_NAME: Final = "secret_common"  # noqa: S105 - a type's name
"""The ancestor of all types of secrets."""


class Types:
    """All types: those that objects can be created of, and others that qom-list-types shows.

    ``of``: the type by its options; ``numbered``: the type by its number in the journal;
    ``secrets``: the numbers of types of secrets.
    """

    def __init__(self, creatable: tuple[ObjectType, ...], infos: tuple[TypeInfo, ...]) -> None:
        self.of: Mapping[type[ObjectOptions], ObjectType] = {k.options: k for k in creatable}
        self.numbered: Mapping[int, ObjectType] = {kind.number: kind for kind in creatable}
        self.secrets: Collection[int] = frozenset(
            kind.number for kind in creatable if SECRET_COMMON_NAME in kind.info.ancestors
        )
        self._infos = {info.name: info for info in infos}

    def help(self, type_name: JSON) -> str:
        """Return the output of ``--object TYPE,help`` (user_creatable_print_help())."""
        name = type_name.to_str() if isinstance(type_name, Text) else ""
        # People type the names of object-add; one of them differs from the type's own.
        kinds = {
            kind.options.__struct_config__.tag: kind.info
            for kind in self.numbered.values()
            if not kind.by_command
        }
        info = kinds.get(name) or self._infos.get(name)
        if info is None:
            head = "List of user creatable objects:"
            lines = sorted(f"  {tag}" for tag in kinds)
        else:
            lines = [f"  {n}=<{kind}>" for n, kind in sorted(info.properties) if n != "type"]
            head = f"{name} options:" if lines else f"There are no options for {name}."
        return "\n".join((head, *lines, ""))

    def listed(self, implements: str | None, *, abstract: bool) -> list[ObjectTypeInfo]:
        """Return the ObjectTypeInfo list of qom-list-types."""
        listed = []
        for info in self._infos.values():
            if info.abstract and not abstract:
                continue
            if implements is None or implements in info.ancestors:
                entry: ObjectTypeInfo = {"name": info.name}
                if info.abstract:
                    entry["abstract"] = True
                if info.parent is not None:
                    entry["parent"] = info.parent
                listed.append(entry)
        return listed

    def properties(self, name: str) -> list[ObjectPropertyInfo]:
        """Return the ObjectPropertyInfo list of qom-list-properties."""
        info = self._infos.get(name)
        if info is None:
            raise DeviceNotFound(f"Class '{name}' not found")
        if "object" not in info.ancestors:
            raise CommandError("Parameter 'typename' expects a QOM type")
        return as_listed(info.properties)


def as_listed(
    properties: "list[tuple[str, str]] | tuple[tuple[str, str], ...]",
) -> list[ObjectPropertyInfo]:
    """Return properties, name and type, in the form of qom-list and qom-list-properties."""
    return [{"name": name, "type": kind} for name, kind in properties]


def properties_size(properties: Mapping[str, object]) -> int:
    """Return about how many bytes properties take in the journal."""
    return sum(len(str(value)) for value in properties.values())
