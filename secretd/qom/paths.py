# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objects by path, and their properties: qom-list, qom-get, qom-set (QEMU's qom/object.c,
qom-qmp-cmds.c).

The paths are `/`, `/objects`, and the tree's objects below it. monitor.commands calls this module.
"""

from typing import Final

from secretd.errors import CommandError, DeviceNotFound
from secretd.qom.object_type import (
    ObjectPropertyInfo,
    StoredInvalidValue,
    TypeInfo,
    as_listed,
)
from secretd.qom.tree import ObjectTree
from secretd.store.commit import Commit
from secretd.wire.hash_order import GHashTable
from secretd.wire.parser import JSON

CHILDREN_PER_REPLY: Final = 1600
"""Children that qom-list lists: more cannot fit into a reply. QEMU has no limit."""

ROOT: Final = "/"
OBJECTS: Final = "/objects"


class Paths:
    """The paths of the objects of a tree."""

    def __init__(self, tree: ObjectTree) -> None:
        self._tree = tree

    def resolve(self, path: str) -> tuple[str | None, bool]:
        """Return ROOT, OBJECTS, an id, or None for a QOM path, and whether it is ambiguous.

        object_resolve_path(): the path is absolute, or a part of a path that matches in one place
        only.
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
            elif node == OBJECTS and part in self._tree.journal:
                node = part
            else:
                return None
        return node

    def _node(self, path: str) -> str:
        node, _ = self.resolve(path)
        if node is None:
            raise DeviceNotFound(f"Device '{path}' not found")
        return node

    def properties(self, path: str) -> list[ObjectPropertyInfo]:
        """Return the ObjectPropertyInfo list of qom-list."""
        node, ambiguous = self.resolve(path)
        if ambiguous:
            raise CommandError(f"Path '{path}' is ambiguous")
        if node is None:
            raise DeviceNotFound(f"Device '{path}' not found")
        if node == ROOT:
            children = [("objects", "child<container>")]
        elif node == OBJECTS:
            if len(self._tree.journal) > CHILDREN_PER_REPLY:
                raise CommandError(
                    f"Path '{path}' has {len(self._tree.journal)} children, more than the limit of "
                    f"{CHILDREN_PER_REPLY}; query-secrets lists any number of secrets in pieces"
                )
            # QEMU prepends each entry while it walks a hash table.
            names = reversed(list(GHashTable(self._tree.journal)))
            children = [(i, f"child<{self._info(i).name}>") for i in names]
        else:
            return as_listed(self._info(node).properties)
        return as_listed([("type", "string"), *children])

    def _info(self, object_id: str) -> TypeInfo:
        kind = self._tree.type_of(object_id)
        assert kind is not None
        return kind.info

    def get(self, path: str, name: str) -> object:
        """Return a property's value for qom-get."""
        node = self._node(path)
        if node in (ROOT, OBJECTS):
            if name == "type":
                return "container"
            if self._is_child(node, name):
                return f"{node.rstrip('/')}/{name}"
            raise CommandError(f"Property 'container.{name}' not found")
        record = self._tree.journal.get(node)
        assert record is not None
        kind = self._tree.types.numbered[record.type]
        self._check_property(kind.info, name)
        return kind.info.name if name == "type" else kind.get(record, name)

    def set(self, path: str, name: str, value: JSON) -> Commit | None:
        """Execute qom-set: the property changes, the loaded content stays.

        Returns what waits for the disk if a store has the object.
        """
        node = self._node(path)
        if node in (ROOT, OBJECTS):
            if name == "type" or self._is_child(node, name):
                raise CommandError(f"Property 'container.{name}' is not writable")
            raise CommandError(f"Property 'container.{name}' not found")
        record = self._tree.journal.get(node)
        assert record is not None
        kind = self._tree.types.numbered[record.type]
        self._check_property(kind.info, name)
        if name == "type":
            raise CommandError(f"Property '{kind.info.name}.type' is not writable")
        try:
            changes = kind.set(name, value)
        except StoredInvalidValue as error:
            self._tree.change(node, error.changes)
            raise
        return self._tree.change(node, changes) if changes else None

    def _is_child(self, node: str, name: str) -> bool:
        return name == "objects" if node == ROOT else name in self._tree.journal

    def _check_property(self, info: TypeInfo, name: str) -> None:
        if all(name != known for known, _ in info.properties):
            raise CommandError(f"Property '{info.name}.{name}' not found")
