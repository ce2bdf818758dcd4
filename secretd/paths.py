# SPDX-License-Identifier: LGPL-2.1-or-later
"""The default paths of the sockets.

daemon creates the sockets there; client and ctl look for them.
"""

import os
import stat
from typing import Final


def default_directory() -> str:
    """Return the directory of the default sockets, which may not exist.

    It is /run/secretd for root, else $XDG_RUNTIME_DIR/secretd, else secretd-UID in the temporary
    directory.
    """
    uid = os.getuid()
    if uid == 0:
        return "/run/secretd"
    if has_runtime_directory():
        return os.path.join(os.environ["XDG_RUNTIME_DIR"], "secretd")
    import tempfile

    return os.path.join(tempfile.gettempdir(), f"secretd-{uid}")


def has_runtime_directory() -> bool:
    """Return True if the sockets lie in a directory that only root or this user can have
    created.
    """
    return os.getuid() == 0 or bool(os.environ.get("XDG_RUNTIME_DIR"))


def is_trusted(directory: str) -> bool:
    """Return True if root or this user owns a directory, so that no other user placed a socket
    there.
    """
    try:
        status = os.lstat(directory)
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid in (0, os.getuid())


def control_path() -> str:
    """Return the default path of the control socket."""
    return os.path.join(default_directory(), "control.sock")


def client_path() -> str:
    """Return the default path of the client socket."""
    return os.path.join(default_directory(), "client.sock")


OBJECTS_DIR: Final = "/etc/secretd/objects.d"
"""The directory of objects that the system's unit adds at its start."""
