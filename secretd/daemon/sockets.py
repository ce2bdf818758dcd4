# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's sockets: from the command line, the service manager, or by default.

It opens them; server serves them. daemon.process calls it.
"""

import contextlib
import grp
import os
import socket
import stat
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

from secretd import paths
from secretd.access.peer import SocketRole
from secretd.errors import UsageError
from secretd.net.listener import Dialect, Listener, listen
from secretd.qapi import keyval
from secretd.systemd.activation import Passed


class SocketSpec(NamedTuple):
    """The value of ``--control``, ``--client`` or ``--credentials``.

    ``mode``: of the socket's file; ``gid``: its group, -1 for no change; ``authz``: the id of the
    object that admits further peers to a control socket; ``dialect``: its language.
    """

    role: SocketRole
    path: str
    mode: int
    gid: int
    authz: str | None = None
    dialect: Dialect = "qmp"


PASSED_NAMES: Final[dict[str, tuple[SocketRole, Dialect]]] = {
    "control": (SocketRole.CONTROL, "qmp"),
    "client": (SocketRole.CLIENT, "qmp"),
    "credentials": (SocketRole.CREDENTIALS, "qmp"),
    "control-jsonrpc": (SocketRole.CONTROL, "jsonrpc"),
    "client-jsonrpc": (SocketRole.CLIENT, "jsonrpc"),
}
"""Role and dialect by the FileDescriptorName= of a .socket unit."""

_MODES: Final = {SocketRole.CONTROL: 0o600, SocketRole.CLIENT: 0o666, SocketRole.CREDENTIALS: 0o600}


def socket_spec(role: SocketRole, text: str) -> SocketSpec:
    """Parse PATH[,mode=OCTAL][,group=NAME], [,protocol=qmp|jsonrpc] for control and client sockets,
    and [,authz=ID] for a control socket. Raises UsageError.
    """
    option = f"--{role.value} {text}"
    try:
        # Unlike the name of a type, a path may contain commas.
        members = keyval.parse(text if text.startswith("path=") else f"path={text}", "path")
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None
    path = members.pop("path", "")
    if not path:
        raise UsageError(f"{option}: the path of the socket is missing")
    mode, gid = _MODES[role], -1
    authz = members.pop("authz", None) if role is SocketRole.CONTROL else None
    dialect: Dialect = "qmp"
    if "protocol" in members and role is not SocketRole.CREDENTIALS:
        given = members.pop("protocol")
        if given not in ("qmp", "jsonrpc"):
            raise UsageError(f"{option}: protocol is qmp or jsonrpc, not '{given}'")
        dialect = "qmp" if given == "qmp" else "jsonrpc"
    if authz is not None:
        mode = 0o666  # peers are checked at accept
    if "mode" in members:
        try:
            mode = int(members.pop("mode"), 8)
        except ValueError:
            raise UsageError(f"{option}: mode expects an octal number such as 0660") from None
    if "group" in members:
        name = members.pop("group")
        try:
            gid = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
        except KeyError:
            raise UsageError(f"{option}: there is no group '{name}'") from None
    if members:
        raise UsageError(f"{option}: Parameter '{next(iter(members))}' is unexpected")
    return SocketSpec(role, path, mode, gid, authz, dialect)


def default_sockets() -> list[SocketSpec]:
    """Return the default sockets, and create their directory."""
    directory = paths.default_directory()
    own = not paths.has_runtime_directory()
    with contextlib.suppress(FileExistsError):
        try:
            os.mkdir(directory, 0o700 if own else 0o755)
        except FileNotFoundError as error:
            raise UsageError(f"{directory}: {os.strerror(error.errno or 0)}") from None
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UsageError(f"{directory}: is not a directory of uid {os.getuid()}; remove it")
    if own and status.st_mode & 0o077:
        raise UsageError(f"{directory}: other users may enter it; run 'chmod 700 {directory}'")
    return [
        SocketSpec(SocketRole.CONTROL, paths.control_path(), _MODES[SocketRole.CONTROL], -1),
        SocketSpec(SocketRole.CLIENT, paths.client_path(), _MODES[SocketRole.CLIENT], -1),
    ]


def wanted(
    options: "Iterable[tuple[SocketRole, list[str]]]", passed: "Collection[Passed]"
) -> list[SocketSpec]:
    """Return the sockets of the options; without options and passed sockets, the default ones."""
    specs = [socket_spec(role, text) for role, texts in options for text in texts]
    return specs if specs or passed else default_sockets()


def is_listening(fd: int) -> bool:
    """Return True if a borrowed descriptor is a listening AF_UNIX stream socket."""
    copy = os.dup(fd)
    try:
        borrowed = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return False
    with borrowed:
        return (
            borrowed.family == socket.AF_UNIX
            and borrowed.type == socket.SOCK_STREAM
            and bool(borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        )


def open_sockets(specs: Iterable[SocketSpec], passed: Iterable[Passed]) -> list[Listener]:
    """Open the named sockets, and take over those that the service manager ``passed``.

    The name of a passed socket gives its role. A spec with the path of a passed socket applies to
    it (``authz``), except for mode and group, which are the .socket unit's. Raises UsageError.
    """
    opened: list[Listener] = []
    left = list(specs)
    try:
        # 1. Passed sockets, each with the spec of its path if there is one.
        for name, fd in passed:
            sock = socket.socket(fileno=fd)
            sock.setblocking(False)
            path = _path(sock)
            spec = next((spec for spec in left if spec.path == path), None)
            role, dialect = PASSED_NAMES[name]
            if spec is None:
                opened.append(Listener(sock, role, path, owned=False, dialect=dialect))
                continue
            left.remove(spec)
            if spec.role is not role or spec.dialect not in ("qmp", dialect):
                sock.close()
                raise UsageError(
                    f"--{spec.role.value} {path}: the service manager passed this socket as "
                    f"'{name}'"
                )
            opened.append(Listener(sock, spec.role, path, spec.authz, owned=False, dialect=dialect))
        # 2. The other specs.
        for spec in left:
            opened.append(  # noqa: PERF401 - those before an error are closed
                listen(spec.path, spec.role, spec.mode, spec.gid, spec.authz, spec.dialect)
            )
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    return opened


def _path(sock: socket.socket) -> str:
    name = sock.getsockname()
    return name if isinstance(name, str) else f"@{os.fsdecode(name[1:])}"
