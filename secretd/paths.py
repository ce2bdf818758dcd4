# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the sockets are by default. daemon makes them, client and ctl look
there.
"""

import os
import stat


def default_directory() -> str:
    """Return the directory of the default sockets; it need not exist.

    /run/secretd for root, else $XDG_RUNTIME_DIR/secretd, else secretd-UID in the temporary
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
    """True where sockets lie in a directory that only root or this user can have made."""
    return os.getuid() == 0 or bool(os.environ.get("XDG_RUNTIME_DIR"))


def is_trusted(directory: str) -> bool:
    """True if a directory is root's or this user's, so that no other user put a socket there."""
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
