# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's Python client: `Client` for asyncio, `SyncClient` for other programs.

Both have the same methods. Plaintext never appears in JSON: it travels through descriptors, into
buffers of locked memory that are wiped when they are freed. Errors are qemu.qmp's, and all of them
are QMPError; text that is not UTF-8 raises ValueError.
"""

import importlib
from typing import TYPE_CHECKING, Any

from secretd.client.socket_path import default_socket
from secretd.client.sync import SyncClient
from secretd.client.types import (
    PLAIN,
    AliasInfo,
    Considered,
    Encoding,
    Event,
    Explanation,
    Format,
    GrantInfo,
    Sealed,
    SecretInfo,
    Usage,
)
from secretd.memory.arena import LockedBuffer

if TYPE_CHECKING:
    from qemu.qmp import (
        ConnectError,
        ExecInterruptedError,
        ExecuteError,
        QMPError,
        StateError,
    )

    from secretd.client.aio import Client

__all__ = [
    "PLAIN",
    "AliasInfo",
    "Client",
    "ConnectError",
    "Considered",
    "Encoding",
    "Event",
    "ExecInterruptedError",
    "ExecuteError",
    "Explanation",
    "Format",
    "GrantInfo",
    "LockedBuffer",
    "QMPError",
    "Sealed",
    "SecretInfo",
    "StateError",
    "SyncClient",
    "Usage",
    "default_socket",
]

_LATER = {
    "Client": "secretd.client.aio",
    **dict.fromkeys(
        ("ConnectError", "ExecInterruptedError", "ExecuteError", "QMPError", "StateError"),
        "qemu.qmp",
    ),
}


def __getattr__(name: str) -> Any:
    """Import the asyncio client and qemu.qmp at their first use: SyncClient needs neither."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
