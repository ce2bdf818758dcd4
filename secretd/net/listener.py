# SPDX-License-Identifier: LGPL-2.1-or-later
"""Listening sockets: binding, the checks of the directory, and the life of the socket file.

It accepts nothing; server.server does. daemon.sockets and server.server call `listen`.
"""

import contextlib
import os
import socket
import stat
from typing import Final, Literal

from secretd.access.peer import SocketRole
from secretd.descriptors.threads import BlockingCalls
from secretd.errors import UsageError
from secretd.linux.sockopt import permit_descriptors
from secretd.linux.user_namespace import UIDS

Dialect = Literal["qmp", "jsonrpc"]
"""The language of a socket; each has one."""

LISTEN_BACKLOG: Final = 128
"""Connections that may wait to be accepted."""

PATH_BYTES: Final = 107
"""Bytes of a socket's path (unix(7): the 108 bytes of sun_path less its NUL)."""


class Listener:
    """A listening socket.

    ``authz``: the id of the object that admits further peers to a control socket. ``owned``: its
    file is removed at the end; the service manager's is not. ``dialect``: its language.
    """

    def __init__(
        self,
        sock: socket.socket,
        role: SocketRole,
        path: str,
        authz: str | None = None,
        *,
        owned: bool = True,
        dialect: Dialect = "qmp",
    ) -> None:
        self.sock = sock
        self.role = role
        self.authz = authz
        self.dialect: Dialect = dialect
        self.path = path
        self.owned = owned
        if role is not SocketRole.CONTROL or authz is not None or _is_open_to_others(path):
            # Until a peer is admitted its descriptors could only be closed, and that may never
            # return.
            permit_descriptors(sock, permit=False)
        self._inode = os.stat(path).st_ino if owned else -1
        self.mode = stat.S_IMODE(os.stat(path).st_mode) if owned else 0
        self.gid = -1

    @property
    def is_reachable(self) -> bool:
        """True while the socket's file exists and is the original one."""
        if not self.owned:
            return True
        try:
            return os.lstat(self.path).st_ino == self._inode
        except OSError:
            return False

    def close(self, threads: BlockingCalls | None = None) -> None:
        """Stop listening, and remove the socket's file if it is still ours.

        Unaccepted connections may hold descriptors, and closing those may never return: a thread of
        ``threads`` does it.
        """
        if threads is None:
            self.sock.close()
        else:
            threads.close(os.getuid(), self.sock.detach())
        if not self.owned:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self.path).st_ino == self._inode:
                os.unlink(self.path)


def _is_open_to_others(path: str) -> bool:
    try:
        return bool(os.stat(path).st_mode & 0o077)
    except OSError:  # a socket without a file
        return True


def listen(  # noqa: PLR0917 - what a socket is
    path: str,
    role: SocketRole,
    mode: int,
    gid: int = -1,
    authz: str | None = None,
    dialect: Dialect = "qmp",
) -> Listener:
    """Bind and listen on a path. A stale socket is replaced.

    ``mode``, ``gid``: of the socket's file, -1 for no change of the group. ``authz``, ``dialect``:
    see Listener.
    Raises UsageError for a live socket, another kind of file, or a directory that other users can
    change.
    """
    if len(os.fsencode(path)) > PATH_BYTES:
        raise UsageError(f"{path}: the path of a socket may have {PATH_BYTES} bytes at most")
    if path.startswith("@"):
        raise UsageError(f"{path}: abstract sockets have no mode that protects them; give a path")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        check_directory(os.path.dirname(os.path.abspath(path)))
        _remove_stale(path)
        # The mode comes with the file: chmod(2) later would follow a link that was put in its
        # place.
        umask = os.umask(0o777 & ~mode)
        try:
            sock.bind(path)
        finally:
            os.umask(umask)
        if gid != -1:
            os.chown(path, -1, gid, follow_symlinks=False)
        if role is not SocketRole.CONTROL or authz is not None or mode & 0o077:
            permit_descriptors(sock, permit=False)
        sock.listen(LISTEN_BACKLOG)
    except OSError as error:
        sock.close()
        raise UsageError(f"{path}: {os.strerror(error.errno or 0)}") from None
    except BaseException:
        sock.close()
        raise
    listener = Listener(sock, role, path, authz, dialect=dialect)
    listener.gid = gid
    return listener


def check_directory(directory: str) -> None:
    """Raise UsageError if other users can replace files in a directory, or the directory itself.

    Directories with the sticky bit, such as /tmp, are accepted (chmod(2)).
    """
    # In a user namespace root's directories may belong to an unmapped id.
    own = (0, os.getuid(), UIDS.overflow)
    while True:
        status = os.stat(directory)
        others = stat.S_IWOTH | (0 if status.st_gid in (0, os.getgid()) else stat.S_IWGRP)
        if status.st_uid not in own or (
            status.st_mode & others and not status.st_mode & stat.S_ISVTX
        ):
            raise UsageError(
                f"{directory}: other users can replace what is in it (uid {status.st_uid}, mode "
                f"{stat.S_IMODE(status.st_mode):04o}); choose a directory of root's or your own"
            )
        parent = os.path.dirname(directory)
        if parent == directory:
            return
        directory = parent


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise UsageError(
                f"{path}: exists and is not a socket; remove it or choose another path"
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise UsageError(f"{path}: another process is listening there; stop it or choose another path")
