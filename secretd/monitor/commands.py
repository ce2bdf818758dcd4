# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands: one short typed function each.

The signature is the schema (see secretd.qapi.command), the docstring the documentation. A function takes the
session's Monitor and returns JSON, None for an empty object, or a coroutine if it must wait; it
raises CommandError. What a command does is said in qom, access and deliver; here is only which.
Commands of QEMU 10's qapi/ unless the docstring says that they are ours.
"""

from collections.abc import Awaitable, Coroutine, Iterator
from typing import Any, Final, Literal, NotRequired, TypedDict

from msgspec import UNSET, Raw, UnsetType

from secretd.access.decision import Grant
from secretd.crypto import cipher
from secretd.descriptors.passed import AddfdInfo, FdsetInfo
from secretd.errors import CommandError, CommandNotFound
from secretd.limits import Stat
from secretd.monitor import hmp
from secretd.monitor.events import EventName
from secretd.monitor.monitor import Monitor
from secretd.net.loop import turn
from secretd.qapi.command import Commands
from secretd.qapi.introspect import SchemaInfo
from secretd.qapi.visitor import SensitiveAny
from secretd.qom.grant import check_seconds
from secretd.qom.object_type import (
    ObjectOptions,
    ObjectPropertyInfo,
    ObjectTypeInfo,
    StoredInvalidValue,
)
from secretd.qom.registry import AnyOptions
from secretd.qom.secret import SecretOptions, check_size, random_plaintext
from secretd.wire.encoder import Verbatim
from secretd.wire.messages import VersionInfo

COMMANDS: Final = Commands()

SECRETS_PER_REPLY: Final = 400
"""Secrets that query-secrets lists in one reply, with SECRETS_BYTES for their ids. Some 100 bytes each
beside the id, so that the line stays under MAX_REPLY_BYTES."""

GRANTS_PER_REPLY: Final = 100
"""Grants that secret-explain tells of."""

SECRETS_BYTES: Final = 16 << 10
"""Bytes of the ids in one reply of query-secrets."""


class CommandInfo(TypedDict):
    """An entry of query-commands (qapi/control.json)."""

    name: str


RunState = Literal[
    "debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch",
    "finish-migrate", "restore-vm", "running", "save-vm", "shutdown", "suspended", "watchdog",
    "guest-panicked", "colo",
]  # fmt: skip
"""QEMU's states of a guest (qapi/run-state.json), of which secretd has one."""


class NameInfo(TypedDict):
    """What query-name returns (qapi/machine.json)."""

    name: NotRequired[str]


class Delivered(TypedDict):
    """What secret-read returns: how many bytes were written."""

    size: int


class Sealed(TypedDict):
    """What secret-seal returns, both in base64; ``size``: bytes that were written to a descriptor instead."""

    data: NotRequired[str]
    iv: str
    size: NotRequired[int]


SecretInfo = TypedDict(
    "SecretInfo",
    {
        "id": str,
        "qom-type": str,
        "size": int,
        "memory": Literal["secretmem", "mlock", "none"],
        "expires-in": NotRequired[int],
    },
)
"""An entry of query-secrets: the size in bytes, the time left in seconds if it is limited."""


class ConsideredGrant(TypedDict):
    """What a secret-grant says of a client, and why."""

    grant: str
    allowed: bool
    reason: str


class Explanation(TypedDict):
    """What secret-explain returns. ``grant``: the one by which the client may read the secret."""

    allowed: bool
    exists: bool
    grant: NotRequired[str]
    grants: list[ConsideredGrant]


class StatInfo(TypedDict):
    """A figure, as query-stats and query-stats-schemas of QEMU have them (qapi/stats.json)."""

    name: str
    type: Literal["instant", "cumulative"]
    unit: NotRequired[Literal["bytes", "seconds"]]
    value: int


class StatsResult(TypedDict):
    """The figures of one part of the daemon."""

    provider: Literal["limits", "audit"]
    stats: list[StatInfo]


@COMMANDS(name="qmp_capabilities", client=True)
def qmp_capabilities(monitor: Monitor, enable: list[Literal["oob"]] | UnsetType = UNSET) -> None:
    """Leave negotiation mode. ``enable``: capabilities that the greeting offered."""
    if monitor.negotiated:
        raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
    monitor.negotiate(oob=bool(enable))


@COMMANDS(client=True)
def query_version(monitor: Monitor) -> VersionInfo:
    """Return the version of QEMU whose answers these are, and secretd's own as package."""
    return monitor.core.version  # type: ignore[return-value]  # JSON text of it


@COMMANDS(client=True)
def query_commands(monitor: Monitor) -> list[CommandInfo]:
    """Return the commands of this door."""
    return [{"name": name} for name in monitor.table.by_name]


@COMMANDS(client=True)
def query_qmp_schema(monitor: Monitor) -> list[SchemaInfo]:
    """Return what this door's commands take and return, and the events."""
    return Verbatim(monitor.table.schema)  # type: ignore[return-value]  # JSON text of such a list


@COMMANDS()
def query_name(_monitor: Monitor) -> NameInfo:
    """Return an empty object: secretd has no guest with a name."""
    return {}


class StatusInfo(TypedDict):
    """What query-status returns (qapi/run-state.json)."""

    running: bool
    status: RunState


@COMMANDS(client=True)
def query_status(_monitor: Monitor) -> StatusInfo:
    """Return that secretd runs, which is what clients ask to see whether somebody answers."""
    return {"status": "running", "running": True}


@COMMANDS()
def quit(monitor: Monitor) -> None:  # noqa: A001 - QEMU's name
    """Stop the daemon in order. Its secrets end, even where a service manager keeps them otherwise."""
    monitor.core.quit('{"guest": false, "reason": "host-qmp-quit"}')


# --- objects


@COMMANDS()
def object_add(monitor: Monitor, arguments: AnyOptions) -> Awaitable[None] | None:
    """Make an object."""
    size = monitor.tree.add(arguments, monitor.loading)
    if isinstance(size, int):
        _added(monitor, arguments, size)
        return None
    return _added_later(monitor, arguments, size)


def _added(monitor: Monitor, options: ObjectOptions, size: int) -> None:
    kind = monitor.tree.types.of[type(options)]
    name = kind.info.name
    if kind.decides:
        monitor.note("grant" if name == "secret-grant" else "add", options.id, name)
    else:
        monitor.note("add", options.id, name, size)
        monitor.announce("SECRET_ADDED", options.id)


async def _added_later(monitor: Monitor, options: ObjectOptions, waiting: Awaitable[int]) -> None:
    _added(monitor, options, await waiting)


@COMMANDS()
def object_del(monitor: Monitor, id: str) -> None:  # noqa: A002 - the wire's name
    """Remove an object; a secret's plaintext is wiped before the reply."""
    kind = monitor.tree.delete(id)
    name = kind.info.name
    monitor.note("revoke" if name == "secret-grant" else "delete", id, name)
    if not kind.decides:
        monitor.announce("SECRET_DELETED", id)


@COMMANDS()
def qom_list(monitor: Monitor, path: str) -> list[ObjectPropertyInfo]:
    """List an object's properties, and the objects in a container."""
    return monitor.core.paths.properties(path)


@COMMANDS()
def qom_get(monitor: Monitor, path: str, property: str) -> object:  # noqa: A002
    """Return a property's value."""
    return monitor.core.paths.get(path, property)


@COMMANDS()
def qom_set(
    monitor: Monitor,
    path: str,
    property: str,  # noqa: A002
    value: SensitiveAny,
) -> None:
    """Change a property; what an object has loaded stays."""
    paths = monitor.core.paths
    try:
        paths.set(path, property, value)  # type: ignore[arg-type]  # JSON by the schema
    except StoredInvalidValue:
        _note_set(monitor, path)
        raise
    _note_set(monitor, path)


def _note_set(monitor: Monitor, path: str) -> None:
    node, _ = monitor.core.paths.resolve(path)
    assert node is not None
    kind = monitor.tree.type_of(node)
    assert kind is not None
    monitor.note("set", node, kind.info.name)


@COMMANDS()
def qom_list_types(
    monitor: Monitor, implements: str | UnsetType = UNSET, abstract: bool | UnsetType = UNSET
) -> list[ObjectTypeInfo]:
    """List the types of objects."""
    wanted = None if implements is UNSET else implements
    return monitor.tree.types.listed(wanted, abstract=abstract is True)


@COMMANDS()
def qom_list_properties(monitor: Monitor, typename: str) -> list[ObjectPropertyInfo]:
    """List the properties of a type."""
    return monitor.tree.types.properties(typename)


# --- descriptors


@COMMANDS(client=True)
def add_fd(
    monitor: Monitor, fdset_id: int | UnsetType = UNSET, opaque: str | UnsetType = UNSET
) -> AddfdInfo:
    """Add the passed descriptor to a set."""
    fd = monitor.take_descriptor()
    return monitor.fdsets.add(
        fd, None if fdset_id is UNSET else fdset_id, None if opaque is UNSET else opaque
    )


@COMMANDS(client=True)
def remove_fd(monitor: Monitor, fdset_id: int, fd: int | UnsetType = UNSET) -> None:
    """Close one descriptor of a set, or all of them."""
    monitor.fdsets.remove(fdset_id, None if fd is UNSET else fd)


@COMMANDS(client=True)
def query_fdsets(monitor: Monitor) -> list[FdsetInfo]:
    """List this connection's sets."""
    return monitor.fdsets.query()


@COMMANDS(client=True)
def getfd(monitor: Monitor, fdname: str) -> None:
    """Name the passed descriptor."""
    monitor.named.add(fdname, monitor.take_descriptor())


@COMMANDS(client=True)
def closefd(monitor: Monitor, fdname: str) -> None:
    """Close a named descriptor."""
    monitor.named.take(fdname).close()


# --- ours


@COMMANDS(client=True)
def secret_read(
    monitor: Monitor,
    id: str,  # noqa: A002
    fdname: str | UnsetType = UNSET,
    format: Literal["raw", "base64"] | UnsetType = UNSET,  # noqa: A002
) -> Delivered | Coroutine[Any, Any, Delivered]:
    """Write a secret to a descriptor: the one that getfd called ``fdname``, or the one passed with
    this command. The descriptor is closed; the reply comes after the last byte was accepted.
    """
    fd = monitor.pending_descriptor() if fdname is UNSET else monitor.named.take(fdname)
    released = monitor.core.deliveries.release(
        fd, lambda: monitor.check(id, "read"), base64=format == "base64"
    )
    size: Delivered = Verbatim(f'{{"size": {released.size}}}')  # type: ignore[assignment]  # JSON text of it
    if released.rest is not None:
        return _announce_later(monitor, id, released.rest, size)
    monitor.announce("SECRET_READ", id)
    return size


async def _announce_later(
    monitor: Monitor, object_id: str, rest: Coroutine[Any, Any, None], size: Delivered
) -> Delivered:
    await rest
    monitor.announce("SECRET_READ", object_id)
    return size


@COMMANDS(client=True)
def secret_events(
    monitor: Monitor,
    enable: bool,
    events: list[EventName] | UnsetType = UNSET,
) -> None:
    """Turn events about secrets on for this connection, or off. ``events``: only those of these names."""
    assert monitor.on_events is not None
    if not enable:
        monitor.on_events(())
    else:
        monitor.on_events(None if events is UNSET else frozenset(events))


@COMMANDS()
def secret_seal(
    monitor: Monitor,
    id: str,  # noqa: A002
    keyid: str,
    fdname: str | UnsetType = UNSET,
) -> Sealed | Coroutine[Any, Any, Sealed]:
    """Return a secret encrypted under another, as QEMU's object-add takes it with keyid, iv and
    format=base64. Both in base64; the IV is fresh each time. With ``fdname`` the data goes to the descriptor
    that getfd called so, and its size in bytes is returned: a reply has no room for more than some 48,000.
    """
    fd = None if fdname is UNSET else monitor.named.take(fdname)
    try:
        key = monitor.tree.key(keyid, monitor.peer.uid)
        cipher.check_key(key)
    except BaseException:
        if fd is not None:
            fd.close()
        raise
    if fd is None:
        data, iv = cipher.seal(monitor.check(id, "seal").plaintext, key, monitor.scratch)
        return {"data": data, "iv": iv}
    reply: Sealed = {"iv": ""}

    def seal(grant: Grant) -> bytes:
        data, reply["iv"] = cipher.seal(grant.plaintext, key, monitor.scratch)
        return data.encode()

    released = monitor.core.deliveries.release(fd, lambda: monitor.check(id, "seal"), seal=seal)
    reply["size"] = released.size
    return reply if released.rest is None else _after(released.rest, reply)


async def _after(rest: Coroutine[Any, Any, None], reply: Sealed) -> Sealed:
    await rest
    return reply


@COMMANDS()
def secret_generate(monitor: Monitor, id: str, size: int) -> None:  # noqa: A002
    """Make a secret of ``size`` random bytes, which nobody has seen."""
    check_size(size)
    tree = monitor.tree
    tree.check_new(id)
    options = SecretOptions(id=id)
    plaintext = random_plaintext(tree.journal.arena, size)
    _added(monitor, options, tree.store(options, plaintext, monitor.peer.uid))


@COMMANDS(client=True, oob=True)
def query_secrets(
    monitor: Monitor, after: str | UnsetType = UNSET
) -> list[SecretInfo] | Coroutine[Any, Any, list[SecretInfo]]:
    """List the secrets by id: type, size in bytes, how well their memory is protected. On the client
    door only those that the caller may read. A reply holds SECRETS_PER_REPLY at most; ``after`` goes on
    behind that id, until the list is empty.
    """
    found = monitor.core.access.readable_after(monitor.peer, "" if after is UNSET else after)
    page = _Page(monitor)
    return page.listed if page.fill(found) else _fill_later(page, found)


async def _fill_later(page: "_Page", found: Iterator[str | None]) -> list[SecretInfo]:
    """Look through many secrets of which few may be listed, a little at a time."""
    monitor = page.monitor
    done = False
    while not done:
        await turn(None if monitor.trusted else monitor.peer.uid)
        done = page.fill(found)
    return page.listed


class _Page:
    """One reply of query-secrets."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.listed: list[SecretInfo] = []
        self._room = SECRETS_BYTES

    def fill(self, found: Iterator[str | None]) -> bool:
        """List what was found until the page is full or nothing is left; False where others should have their
        turn.
        """
        tree, memory = self.monitor.tree, self.monitor.core.memory
        listed = self.listed
        for object_id in found:
            if object_id is None:
                return False
            self._room -= len(object_id)
            if listed and (self._room < 0 or len(listed) == SECRETS_PER_REPLY):
                break
            qom_type, size = tree.secret(object_id)
            info: SecretInfo = {
                "id": object_id, "qom-type": qom_type, "size": size, "memory": memory,
            }  # fmt: skip
            remaining = tree.deadlines.remaining(object_id)
            if remaining is not None:
                info["expires-in"] = remaining
            listed.append(info)
        return True


@COMMANDS()
def secret_expire(monitor: Monitor, id: str, after: int | UnsetType = UNSET) -> None:  # noqa: A002
    """Wipe a secret ``after`` so many seconds from now, whatever was said before; without it never."""
    monitor.tree.plaintext(id)
    if after is UNSET:
        monitor.tree.keep(id)
        monitor.core.audit.note("lifetime", monitor.subject, id=id)
        return
    check_seconds("after", after)
    if id in monitor.tree.pinned:
        raise CommandError(f"object '{id}' is in use, can not be deleted")
    monitor.tree.expire_after(id, after)
    monitor.core.audit.note("lifetime", monitor.subject, id=id, count=after)


@COMMANDS()
def secret_explain(monitor: Monitor, id: str, peer: list[str]) -> Explanation:  # noqa: A002
    """Say whether a client with the identities ``peer`` may read a secret on the client door, and
    what each secret-grant that names the secret says.
    """
    considered = monitor.core.access.explain(frozenset(peer), id)
    allowed = next((c for c in considered if c.allowed), None)
    found: Explanation = {
        "allowed": allowed is not None,
        "exists": monitor.tree.is_secret(id),
        "grants": [c._asdict() for c in considered[:GRANTS_PER_REPLY]],  # type: ignore[misc]
    }
    if allowed is not None:
        found["grant"] = allowed.grant
    return found


@COMMANDS()
def query_secret_stats(monitor: Monitor) -> list[StatsResult]:
    """Return how much is held of what is limited, what the limits are, how often each was hit, and
    what the audit has written.
    """
    audit = monitor.core.audit
    written = (
        Stat("audit-records", "cumulative", None, audit.records),
        Stat("audit-dropped", "cumulative", None, audit.dropped),
        Stat("log-dropped", "cumulative", None, monitor.core.log_dropped()),
    )
    return [
        {"provider": "limits", "stats": [_stat(s) for s in monitor.core.limits.stats()]},
        {"provider": "audit", "stats": [_stat(s) for s in written]},
    ]


def _stat(stat: Stat) -> StatInfo:
    info: StatInfo = {"name": stat.name, "type": stat.type, "value": stat.value}
    if stat.unit is not None:
        info["unit"] = stat.unit
    return info


@COMMANDS()
def human_monitor_command(
    monitor: Monitor,
    command_line: Raw,
    cpu_index: int | UnsetType = UNSET,  # noqa: ARG001 - there is no CPU, whichever is meant
) -> str | Awaitable[str]:
    """Carry out a line of the human monitor and return what it prints."""
    text = memoryview(command_line)
    with monitor.scratch.allocate(len(text)) as line:
        line.view[:] = text
        return hmp.execute(monitor, line.view)
