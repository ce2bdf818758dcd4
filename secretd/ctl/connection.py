# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client that all verbs use, and the messages when secretd does not answer."""

import os
import sys
from typing import Final

from secretd import client as api
from secretd import paths
from secretd.client import SyncClient, default_socket
from secretd.client.channel import Refused
from secretd.client.record_client import RecordClient
from secretd.ctl.output import REFUSED, Common, fail, note
from secretd.errors import UsageError

RETRY_SECONDS: Final = 5.0
"""Seconds for which a lost connection is retried: a restart takes less."""


def cannot_connect(error: "api.ConnectError", common: Common) -> int:
    """Print why there is no connection, and what to do; return the exit status."""
    cause = error.exc
    path = common.socket or default_socket()
    if isinstance(cause, Refused):
        return fail(f"{path}: {cause}")
    reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else cause
    absent = isinstance(cause, (FileNotFoundError, ConnectionRefusedError))
    fail(f"cannot connect to {path}: {reason}{'; is it running?' if absent else ''}")
    if absent:
        print(
            "secretctl: start it with 'secretd', or name its socket with --socket; "
            "'secretctl doctor' finds the reason",
            file=sys.stderr,
        )
    elif isinstance(cause, PermissionError):
        print(
            "secretctl: only root and secretd's own user may; 'secretctl doctor' says more",
            file=sys.stderr,
        )
    return REFUSED


class _Client(RecordClient):
    """The client of all verbs, which checks that secretd answers."""

    def connect(self, *, retry_seconds: float = 0) -> None:
        """See SyncClient."""
        super().connect(retry_seconds=retry_seconds)
        if not self.package.startswith("secretd"):
            raise UsageError(
                f"{self.path}: this is the monitor of a QEMU, not a socket of secretd; "
                "name that with --socket"
            )


def client_of(common: Common) -> RecordClient:
    """Return the client of all verbs."""
    if common.socket is None and not os.environ.get("SECRETD_SOCKET"):
        path = default_socket()
        control = paths.control_path()
        if path != control:
            note(f"no usable control socket at {control}; asking the client socket {path}")
    return _Client(
        common.socket,
        retry_seconds=RETRY_SECONDS if common.timeout is None else common.timeout,
        timeout=common.timeout,
        on_wait=say_waiting,
    )


def say_waiting(what: str) -> None:
    """Print the reason of a long wait."""
    note(f"waiting for {what} ... (--timeout S gives up)")


def unsure_denials(client: SyncClient, authz: str) -> list[str]:
    """Return the matches of an authz-list's deny rules that a process can evade.

    A process can drop a group in a user namespace, and leave a unit; only its uid stays.
    """
    try:
        rules = client.execute("qom-get", {"path": f"/objects/{authz}", "property": "rules"})
    except api.ExecuteError:
        return []
    assert isinstance(rules, list)
    return [
        r["match"] for r in rules if r["policy"] == "deny" and not r["match"].startswith("uid:")
    ]
