# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the sockets are when nobody says otherwise. daemon makes them, client and ctl look there."""

import os
import tempfile


def default_directory() -> str:
    """Return the directory of the default sockets; it need not exist.

    /run/secretd for root, else $XDG_RUNTIME_DIR/secretd, else secretd-UID in the temporary directory.
    """
    uid = os.getuid()
    if uid == 0:
        return "/run/secretd"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return os.path.join(runtime, "secretd")
    return os.path.join(tempfile.gettempdir(), f"secretd-{uid}")


def control_path() -> str:
    """Return the default path of the control socket."""
    return os.path.join(default_directory(), "control.sock")


def client_path() -> str:
    """Return the default path of the client socket."""
    return os.path.join(default_directory(), "client.sock")
