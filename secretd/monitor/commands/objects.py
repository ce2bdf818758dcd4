# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands about objects and their properties (qapi/qom.json)."""

from collections.abc import Awaitable, Callable
from typing import Final

from msgspec import UNSET, UnsetType

from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands
from secretd.qapi.visitor import SensitiveAny
from secretd.qom.alias import SecretAliasOptions
from secretd.qom.grant import SecretGrantOptions
from secretd.qom.object_type import (
    ObjectOptions,
    ObjectPropertyInfo,
    ObjectTypeInfo,
    StoredInvalidValue,
)
from secretd.qom.registry import AnyOptions
from secretd.store.commit import Commit

command: Final = Commands()


@command(waits=True)
def object_add(monitor: Monitor, arguments: AnyOptions) -> Awaitable[None] | None:
    """Create an object."""
    monitor.check_own(arguments.id)
    if isinstance(arguments, SecretAliasOptions):
        for version in (arguments.current, arguments.staged, arguments.previous):
            monitor.check_own("" if version is UNSET else version)
    size = monitor.tree.add(arguments, monitor.loading)
    if isinstance(size, int):
        added(monitor, arguments, size)
        return None
    if isinstance(size, Commit):
        return once_written(size, lambda: added(monitor, arguments, size.size))
    return once_loaded(size, lambda loaded: added(monitor, arguments, loaded))


async def once_loaded(loading: Awaitable[int | Commit], use: Callable[[int], object]) -> None:
    """Call ``use`` with an object's size in bytes once it is loaded and, if a store has it,
    written.
    """
    size = await loading
    if isinstance(size, Commit):
        await once_written(size, lambda: use(size.size))
    else:
        use(size)


def once_written(commit: Commit, use: Callable[[], object]) -> Commit:
    """Call ``use`` when a store has the change, even if the client is gone by then; return the
    commit.
    """
    commit.then(lambda error: use() if error is None else None)
    return commit


def added(monitor: Monitor, options: ObjectOptions, size: int) -> None:
    """Record and announce a new object of ``size`` bytes."""
    kind = monitor.tree.types.of[type(options)]
    name = kind.info.name
    if isinstance(options, SecretGrantOptions):
        monitor.note("grant", options.id, name)
        monitor.announce_grant("SECRET_GRANTED", {"id": options.id, "secret": options.secret})
    elif kind.decides or kind.declares_store or kind.registers:
        monitor.note("add", options.id, name)
    else:
        monitor.note("add", options.id, name, size)
        monitor.announce("SECRET_ADDED", options.id)


@command(waits=True)
def object_del(monitor: Monitor, id: str) -> Awaitable[None] | None:  # noqa: A002 - the wire's name
    """Delete an object; a secret's plaintext is wiped before the reply."""
    monitor.check_own(id)
    monitor.tree.check_deletable(id)
    kind, commit = monitor.tree.delete(id)
    name = kind.info.name
    if name == "secret-grant":
        monitor.note("revoke", id, name)
        monitor.announce_grant("SECRET_REVOKED", {"id": id})
        return commit
    monitor.note("delete", id, name)
    if not (kind.decides or kind.declares_store or kind.registers):
        monitor.announce("SECRET_DELETED", id)
    return commit


@command()
def qom_list(monitor: Monitor, path: str) -> list[ObjectPropertyInfo]:
    """List an object's properties, and the objects in a container."""
    return monitor.core.paths.properties(path)


@command()
def qom_get(monitor: Monitor, path: str, property: str) -> object:  # noqa: A002
    """Return a property's value."""
    return monitor.core.paths.get(path, property)


@command(waits=True)
def qom_set(
    monitor: Monitor,
    path: str,
    property: str,  # noqa: A002
    value: SensitiveAny,
) -> Awaitable[None] | None:
    """Change a property; the object's loaded content stays."""
    paths = monitor.core.paths
    monitor.check_own(paths.resolve(path)[0] or "")
    try:
        commit = paths.set(path, property, value)  # type: ignore[arg-type]  # JSON by the schema
    except StoredInvalidValue:
        _note_set(monitor, path)
        raise
    _note_set(monitor, path)
    return commit


def _note_set(monitor: Monitor, path: str) -> None:
    node, _ = monitor.core.paths.resolve(path)
    assert node is not None
    kind = monitor.tree.type_of(node)
    assert kind is not None
    monitor.note("set", node, kind.info.name)


@command()
def qom_list_types(
    monitor: Monitor, implements: str | UnsetType = UNSET, abstract: bool | UnsetType = UNSET
) -> list[ObjectTypeInfo]:
    """List the types of objects."""
    wanted = None if implements is UNSET else implements
    return monitor.tree.types.listed(wanted, abstract=abstract is True)


@command()
def qom_list_properties(monitor: Monitor, typename: str) -> list[ObjectPropertyInfo]:
    """List the properties of a type."""
    return monitor.tree.types.properties(typename)
