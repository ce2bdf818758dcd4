# SPDX-License-Identifier: LGPL-2.1-or-later
"""The default socket of a client."""

import os

from secretd import paths

SYSTEM_CLIENT_SOCKET = "/run/secretd/client.sock"


def default_socket() -> str:
    """Return $SECRETD_SOCKET, else the control socket's default path if this user may use it, else
    the client socket's.
    """
    given = os.environ.get("SECRETD_SOCKET")
    if given:
        return given
    control = paths.control_path()
    for path in (control, paths.client_path(), SYSTEM_CLIENT_SOCKET):
        if os.access(path, os.W_OK) and paths.is_trusted(os.path.dirname(path)):
            return path
    return control
