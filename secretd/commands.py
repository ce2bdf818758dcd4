# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands: one short typed function each.

The signature is the schema (see secretd.schema), the docstring the documentation. A function takes the
session's Monitor and returns JSON, None for an empty object, or a coroutine if it must wait; it
raises CommandError. What a command does is said in qom, access and deliver; here is only which.
Commands of QEMU 10's qapi/ unless the docstring says that they are ours.
"""

from collections.abc import Awaitable, Coroutine
from typing import Any, Final, Literal

from msgspec import UNSET, UnsetType

from secretd import crypto
from secretd.access import check, readable
from secretd.errors import CommandError, CommandNotFound
from secretd.memory import LockedBuffer
from secretd.monitor import QEMU_VERSION, Monitor
from secretd.qom.secret import (
    SecretOptions,
    generate,
    secret_plaintext,
)
from secretd.schema import Commands
from secretd.wire.message import version

COMMANDS: Final = Commands()
JSONObject = dict[str, object]


@COMMANDS(name="qmp_capabilities", client=True)
def qmp_capabilities(monitor: Monitor, enable: list[Literal["oob"]] | UnsetType = UNSET) -> None:
    """Leave negotiation mode. ``enable``: capabilities that the greeting offered."""
    if monitor.negotiated:
        raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
    if enable:
        raise CommandError(f"Capability {enable[0]} not available")
    monitor.negotiated = True


@COMMANDS(client=True)
def query_version(monitor: Monitor) -> JSONObject:
    """Return the version of QEMU whose answers these are, and secretd's own as package."""
    return version(QEMU_VERSION, monitor.daemon.package)


@COMMANDS(client=True)
def query_commands(monitor: Monitor) -> list[JSONObject]:
    """Return the commands of this door."""
    return [{"name": name} for name in monitor.table.by_name]


@COMMANDS()
def query_name(_monitor: Monitor) -> JSONObject:
    """Return an empty object: secretd has no guest with a name."""
    return {}


@COMMANDS()
def quit(monitor: Monitor) -> None:  # noqa: A001 - QEMU's name
    """Stop the daemon in order."""
    monitor.daemon.emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
    monitor.daemon.stop()


# --- objects


@COMMANDS()
def object_add(monitor: Monitor, arguments: SecretOptions) -> Awaitable[None] | None:
    """Make an object."""
    return monitor.tree.add(arguments, monitor.source.read)


@COMMANDS()
def object_del(monitor: Monitor, id: str) -> None:  # noqa: A002 - the wire's name
    """Remove an object; a secret's plaintext is wiped before the reply."""
    monitor.daemon.deliveries.withdraw(id)
    monitor.tree.delete(id)


@COMMANDS()
def qom_list(monitor: Monitor, path: str) -> list[JSONObject]:
    """List an object's properties, and the objects in a container."""
    return monitor.tree.properties(path)


@COMMANDS()
def qom_get(monitor: Monitor, path: str, property: str) -> object:  # noqa: A002
    """Return a property's value."""
    return monitor.tree.get(path, property)


@COMMANDS()
def qom_set(monitor: Monitor, path: str, property: str, value: object) -> None:  # noqa: A002
    """Change a property; what an object has loaded stays."""
    monitor.tree.set(path, property, value)  # type: ignore[arg-type]  # JSON by the schema


@COMMANDS()
def qom_list_types(
    monitor: Monitor, implements: str | UnsetType = UNSET, abstract: bool | UnsetType = UNSET
) -> list[JSONObject]:
    """List the types of objects."""
    wanted = None if implements is UNSET else implements
    return monitor.tree.list_types(wanted, abstract=abstract is True)


@COMMANDS()
def qom_list_properties(monitor: Monitor, typename: str) -> list[JSONObject]:
    """List the properties of a type."""
    return monitor.tree.list_type_properties(typename)


# --- descriptors


@COMMANDS(client=True)
def add_fd(
    monitor: Monitor, fdset_id: int | UnsetType = UNSET, opaque: str | UnsetType = UNSET
) -> JSONObject:
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
def query_fdsets(monitor: Monitor) -> list[JSONObject]:
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
) -> JSONObject | Coroutine[Any, Any, JSONObject]:
    """Write a secret to a descriptor: the one that getfd called ``fdname``, or the one passed with
    this command. The descriptor is closed; the reply comes after the last byte was accepted.
    """
    fd = monitor.pending.take() if fdname is UNSET else monitor.named.take(fdname)
    try:
        grant = check(monitor.peer, id)
        plaintext = secret_plaintext(monitor.tree, id)
        if format == "base64":
            encoded = crypto.encode_base64(plaintext, monitor.scratch)
            plaintext = encoded.view
        else:
            encoded = None
    except BaseException:
        fd.close()
        raise
    size: JSONObject = {"size": len(plaintext)}
    try:
        rest = monitor.daemon.deliveries.deliver(grant, plaintext, fd)
    except BaseException:
        if encoded is not None:
            encoded.free()
        raise
    if rest is not None:
        return _deliver_rest(rest, encoded, size)
    if encoded is not None:
        encoded.free()
    return size


async def _deliver_rest(
    rest: Coroutine[Any, Any, None], encoded: LockedBuffer | None, size: JSONObject
) -> JSONObject:
    try:
        await rest
    finally:
        if encoded is not None:
            encoded.free()
    return size


@COMMANDS()
def secret_seal(monitor: Monitor, id: str, keyid: str) -> JSONObject:  # noqa: A002
    """Return a secret encrypted under another, as QEMU's object-add takes it with keyid, iv and
    format=base64. Both in base64; the IV is fresh each time.
    """
    check(monitor.peer, id)
    plaintext = secret_plaintext(monitor.tree, id)
    key = secret_plaintext(monitor.tree, keyid)
    crypto.check_key(key)
    data, iv = crypto.seal(plaintext, key, monitor.scratch)
    return {"data": data, "iv": iv}


@COMMANDS()
def secret_generate(monitor: Monitor, id: str, size: int) -> None:  # noqa: A002
    """Make a secret of ``size`` random bytes, which nobody has seen."""
    generate(monitor.tree, id, size)


@COMMANDS(client=True)
def query_secrets(monitor: Monitor) -> list[JSONObject]:
    """List the secrets: id, type, size in bytes, how well their memory is protected. On the client
    door only those that the caller may read.
    """
    journal = monitor.tree.journal
    listed: list[JSONObject] = []
    for object_id in readable(monitor.peer, journal):
        kind = monitor.tree.type_of(object_id)
        summary = journal.summary(object_id)
        assert kind is not None
        assert summary is not None
        listed.append(
            {
                "id": object_id,
                "qom-type": kind.info.name,
                "size": summary[1],
                "memory": monitor.daemon.memory,
            }
        )
    return listed
