# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's Python client, for programs that keep their secrets in it: `Client` for asyncio,
`SyncClient` for the rest.

Both have the same methods. Plaintext never stands in JSON: it goes through descriptors, into buffers in
locked memory that are wiped when they are freed. Errors are qemu.qmp's, and all of them are QMPError.
"""

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPError, StateError

from secretd.client.aio import (
    PLAIN,
    Client,
    Encoding,
    Event,
    Format,
    Sealed,
    SecretInfo,
    readable,
)
from secretd.client.connection import default_socket
from secretd.client.sync import SyncClient
from secretd.memory import LockedBuffer

__all__ = [
    "PLAIN",
    "Client",
    "ConnectError",
    "Encoding",
    "Event",
    "ExecInterruptedError",
    "ExecuteError",
    "Format",
    "LockedBuffer",
    "QMPError",
    "Sealed",
    "SecretInfo",
    "StateError",
    "SyncClient",
    "default_socket",
    "readable",
]
