# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object tree: types, ids, paths, properties (QEMU's qom/object.c, object_interfaces.c).

Objects are records of the journal, not Python objects; what a type can do is said once for all of its
objects by an `ObjectType`. It decides nothing about who may do what. commands calls it.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, Protocol

from msgspec import Struct

from secretd.errors import CommandError, DeviceNotFound
from secretd.memory import Arena, LockedBuffer
from secretd.state import Journal, Record
from secretd.wire.parser import JSON

ID_BYTES: Final = 4096
"""Bytes of an object's id. QEMU has no limit."""

_IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")

ReadSource = Callable[[str], LockedBuffer | Awaitable[LockedBuffer]]
"""Returns what ``file=NAME`` names, between two spare bytes in scratch memory."""


class TypeInfo(NamedTuple):
    """A QOM type as qom-list-types shows it; ``ancestors`` are all it implements, itself too."""

    name: str
    parent: str | None
    abstract: bool
    ancestors: tuple[str, ...]
    properties: tuple[tuple[str, str], ...] = (("type", "string"),)


class ObjectType(Protocol):
    """What can be made with object-add. ``number`` stands in the journal and never changes."""

    info: TypeInfo
    number: int
    options: type[Struct]

    def create(
        self, tree: "ObjectTree", options: Struct, read: ReadSource
    ) -> LockedBuffer | Awaitable[LockedBuffer]:
        """Return the plaintext that the options stand for, or raise CommandError."""

    def stored(self, options: Struct) -> dict[str, object]:
        """Return the properties to store."""

    def get(self, record: Record, name: str) -> object:
        """Return a property's value."""

    def set(self, name: str, value: JSON) -> dict[str, object]:
        """Check a new value; return what to store of it."""


BASE_TYPES: Final = (
    TypeInfo("object", None, True, ("object",)),
    TypeInfo("interface", None, True, ("interface",), ()),
    TypeInfo("user-creatable", "interface", True, ("user-creatable", "interface"), ()),
    TypeInfo("container", "object", False, ("container", "object")),
)

ROOT: Final = "/"
OBJECTS: Final = "/objects"


class ObjectTree:
    """All objects: `/objects` and what is in it.

    ``secrets`` in the journal's arena; ``scratch`` is locked memory for intermediate results.
    """

    def __init__(
        self,
        journal: Journal,
        scratch: Arena,
        types: tuple[ObjectType, ...],
        more: tuple[TypeInfo, ...],
    ) -> None:
        self.journal = journal
        self.scratch = scratch
        self._by_options = {kind.options: kind for kind in types}
        self._by_number = {kind.number: kind for kind in types}
        self.types = {info.name: info for info in (*BASE_TYPES, *more, *(t.info for t in types))}
        self._loading: set[str] = set()

    # --- object-add, object-del

    def add(self, options: Struct, read: ReadSource) -> Awaitable[None] | None:
        """Make an object; user_creatable_add_type()'s order of checks. A failed add leaves nothing.

        Returns an awaitable if its source must be waited for.
        """
        self.check_new(options.id)  # type: ignore[attr-defined]
        kind = self._by_options[type(options)]
        plaintext = kind.create(self, options, read)
        if isinstance(plaintext, LockedBuffer):
            self.store(options, plaintext)
            return None
        # Taken from now on, not only when the coroutine first runs.
        self._loading.add(options.id)  # type: ignore[attr-defined]
        return self._add_later(options, plaintext)

    async def _add_later(self, options: Struct, plaintext: Awaitable[LockedBuffer]) -> None:
        try:
            self.store(options, await plaintext)
        finally:
            self._loading.discard(options.id)  # type: ignore[attr-defined]

    def check_new(self, object_id: str) -> None:
        """Raise CommandError unless an object of that id can be added."""
        if not _IDENTIFIER.fullmatch(object_id):
            raise CommandError("Parameter 'id' expects an identifier")
        if len(object_id) > ID_BYTES:
            raise CommandError(f"Parameter 'id' is longer than the limit of {ID_BYTES} bytes")
        if object_id in self.journal or object_id in self._loading or object_id == "type":
            raise CommandError(
                f"attempt to add duplicate property '{object_id}' to object (type 'container')"
            )

    def store(self, options: Struct, plaintext: LockedBuffer) -> None:
        """Take over the plaintext (in the journal's arena) of an object that passed `check_new`."""
        kind = self._by_options[type(options)]
        object_id: str = options.id  # type: ignore[attr-defined]
        try:
            self.journal.add(object_id, kind.number, kind.stored(options), plaintext)
        except BaseException:
            plaintext.free()
            raise

    def delete(self, object_id: str) -> None:
        """Remove an object and wipe its plaintext, or raise CommandError."""
        if object_id not in self.journal:
            raise CommandError(f"object '{object_id}' not found")
        self.journal.remove(object_id)

    def type_of(self, object_id: str) -> ObjectType | None:
        """Return the type of an object, None if there is none of that id."""
        summary = self.journal.summary(object_id)
        return None if summary is None else self._by_number[summary[0]]

    # --- paths

    def resolve(self, path: str) -> tuple[str | None, bool]:
        """Return ROOT, OBJECTS or an id for a QOM path, and whether it is ambiguous.

        object_resolve_path(): absolute, or a part of a path that fits in one place only.
        """
        parts = [part for part in path.split("/") if part]
        if path.startswith("/"):
            return self._walk(ROOT, parts), False
        if not parts:
            return None, True
        found = [n for n in (self._walk(ROOT, parts), self._walk(OBJECTS, parts)) if n is not None]
        return (found[0], False) if len(found) == 1 else (None, bool(found))

    def _walk(self, node: str, parts: list[str]) -> str | None:
        for part in parts:
            if node == ROOT and part == "objects":
                node = OBJECTS
            elif node == OBJECTS and part in self.journal:
                node = part
            else:
                return None
        return node

    def _node(self, path: str) -> str:
        node, _ = self.resolve(path)
        if node is None:
            raise DeviceNotFound(f"Device '{path}' not found")
        return node

    def properties(self, path: str) -> list[dict[str, object]]:
        """Return the ObjectPropertyInfo list of qom-list."""
        node, ambiguous = self.resolve(path)
        if ambiguous:
            raise CommandError(f"Path '{path}' is ambiguous")
        if node is None:
            raise DeviceNotFound(f"Device '{path}' not found")
        if node == ROOT:
            children = [("objects", "child<container>")]
        elif node == OBJECTS:
            children = [(i, f"child<{self._info(i).name}>") for i in self.journal]
        else:
            return _listed(self._info(node).properties)
        return _listed([("type", "string"), *children])

    def _info(self, object_id: str) -> TypeInfo:
        kind = self.type_of(object_id)
        assert kind is not None
        return kind.info

    # --- properties

    def get(self, path: str, name: str) -> object:
        """Return a property's value for qom-get."""
        node = self._node(path)
        if node in (ROOT, OBJECTS):
            if name == "type":
                return "container"
            if self._is_child(node, name):
                return f"{node.rstrip('/')}/{name}"
            raise CommandError(f"Property 'container.{name}' not found")
        record = self.journal.get(node)
        assert record is not None
        kind = self._by_number[record.type]
        self._check_property(kind.info, name)
        return kind.info.name if name == "type" else kind.get(record, name)

    def set(self, path: str, name: str, value: JSON) -> None:
        """Carry out qom-set: the property changes, what was loaded stays."""
        node = self._node(path)
        if node in (ROOT, OBJECTS):
            if name == "type" or self._is_child(node, name):
                raise CommandError(f"Property 'container.{name}' is not writable")
            raise CommandError(f"Property 'container.{name}' not found")
        record = self.journal.get(node)
        assert record is not None
        kind = self._by_number[record.type]
        self._check_property(kind.info, name)
        if name == "type":
            raise CommandError(f"Property '{kind.info.name}.type' is not writable")
        changes = kind.set(name, value)
        if changes:
            self.journal.set_properties(node, record.properties | changes)

    def _is_child(self, node: str, name: str) -> bool:
        return name == "objects" if node == ROOT else name in self.journal

    def _check_property(self, info: TypeInfo, name: str) -> None:
        if all(name != known for known, _ in info.properties):
            raise CommandError(f"Property '{info.name}.{name}' not found")

    # --- types

    def list_types(self, implements: str | None, *, abstract: bool) -> list[dict[str, object]]:
        """Return the ObjectTypeInfo list of qom-list-types."""
        listed: list[dict[str, object]] = []
        for info in self.types.values():
            if info.abstract and not abstract:
                continue
            if implements is None or implements in info.ancestors:
                entry: dict[str, object] = {"abstract": True} if info.abstract else {}
                entry["name"] = info.name
                if info.parent is not None:
                    entry["parent"] = info.parent
                listed.append(entry)
        return listed

    def list_type_properties(self, name: str) -> list[dict[str, object]]:
        """Return the ObjectPropertyInfo list of qom-list-properties."""
        info = self.types.get(name)
        if info is None:
            raise DeviceNotFound(f"Class '{name}' not found")
        if "object" not in info.ancestors:
            raise CommandError("Parameter 'typename' expects a QOM type")
        return _listed(info.properties)


def _listed(
    properties: "list[tuple[str, str]] | tuple[tuple[str, str], ...]",
) -> list[dict[str, object]]:
    return [{"name": name, "type": kind} for name, kind in properties]
