# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands about the session and the daemon (qapi/control.json, qapi/misc.json and others)."""

from typing import Final, Literal, NotRequired, TypedDict

from msgspec import UNSET, UnsetType

from secretd.errors import CommandNotFound
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands
from secretd.qapi.introspect import SchemaInfo
from secretd.qapi.openrpc import OpenRPCDocument
from secretd.wire.encoder import JSONText
from secretd.wire.messages import VersionInfo

command: Final = Commands()


class CommandInfo(TypedDict):
    """An entry of query-commands (qapi/control.json)."""

    name: str


RunState = Literal[
    "debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch",
    "finish-migrate", "restore-vm", "running", "save-vm", "shutdown", "suspended", "watchdog",
    "guest-panicked", "colo",
]  # fmt: skip
"""QEMU's states of a guest (qapi/run-state.json); secretd is always running."""


class NameInfo(TypedDict):
    """The result of query-name (qapi/machine.json)."""

    name: NotRequired[str]


@command(only="qmp", name="qmp_capabilities", client=True)
def qmp_capabilities(monitor: Monitor, enable: list[Literal["oob"]] | UnsetType = UNSET) -> None:
    """Leave negotiation mode. ``enable``: capabilities that the greeting offered."""
    if monitor.negotiated:
        raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
    monitor.negotiate(oob=bool(enable))


@command(client=True)
def query_version(monitor: Monitor) -> JSONText[VersionInfo]:
    """Return the version of QEMU that secretd follows, and its own as package."""
    return monitor.core.version


@command(client=True)
def query_commands(monitor: Monitor) -> list[CommandInfo]:
    """Return the commands of this socket."""
    return [{"name": name} for name in monitor.table.by_name]


@command(client=True)
def query_qmp_schema(monitor: Monitor) -> JSONText[list[SchemaInfo]]:
    """Return the schema of this socket's commands and of the events."""
    return monitor.table.schema


@command(name="rpc.discover", client=True, only="jsonrpc")
def rpc_discover(monitor: Monitor) -> JSONText[OpenRPCDocument]:
    """Return the OpenRPC document of this socket: methods, params, results and errors."""
    return monitor.table.openrpc


@command()
def query_name(_monitor: Monitor) -> NameInfo:
    """Return an empty object: secretd has no guest with a name."""
    return {}


class StatusInfo(TypedDict):
    """The result of query-status (qapi/run-state.json)."""

    running: bool
    status: RunState


@command(client=True)
def query_status(_monitor: Monitor) -> StatusInfo:
    """Return that secretd runs: many clients use this to check that a server answers."""
    return {"status": "running", "running": True}


@command()
def quit(monitor: Monitor) -> None:  # noqa: A001 - QEMU's name
    """Stop the daemon in order.

    Its secrets end, even where a service manager would keep them.
    """
    monitor.core.quit('{"guest": false, "reason": "host-qmp-quit"}')
