# SPDX-License-Identifier: LGPL-2.1-or-later
"""The default socket of a client."""

import os

from secretd import paths

SYSTEM_CLIENT_SOCKET = "/run/secretd/client.sock"


def default_socket() -> str:
    """Return $SECRETD_SOCKET, else the first socket that this user may use of the control socket,
    the client socket and the system's client socket, else the control socket's path.
    """
    given = os.environ.get("SECRETD_SOCKET")
    if given:
        return given
    control = paths.control_path()
    for path in (control, paths.client_path(), SYSTEM_CLIENT_SOCKET):
        if os.access(path, os.W_OK) and paths.is_trusted(os.path.dirname(path)):
            return path
    return control
