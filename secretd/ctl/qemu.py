# SPDX-License-Identifier: LGPL-2.1-or-later
"""Jobs of a QEMU over QMP, for changes of keyslots; luks_node and luks_canary use it."""

import time
from typing import Any, Final

from secretd.client.channel import Channel
from secretd.errors import UsageError

WRONG: Final = "Invalid password, cannot unlock any keyslot"
"""QEMU's words for a passphrase that opens no keyslot."""

NOT_TEXT: Final = "is not valid UTF-8"
"""QEMU's words for a value that can be no passphrase."""

BUSY: Final = "Unable to get accurate CPU usage"
"""QEMU's words for a machine on which it cannot measure PBKDF2; another try helps."""

TRIES: Final = 20

POLL_SECONDS: Final = 0.1
"""Seconds between two questions about a job."""


def ask(qemu: Channel, command: str, arguments: object = None) -> Any:
    """Execute a command; return its result. Raises UsageError with QEMU's words."""
    reply = qemu.exchange(command, arguments)
    if "error" in reply:
        raise UsageError(f"QEMU says: {reply['error'].get('desc')}")
    return reply["return"]


def run_job(qemu: Channel, command: str, job: str, arguments: dict[str, Any]) -> str:
    """Run a job until it ends; return QEMU's error, or "".

    A job of that id that an interrupted run has left ends before.
    """
    words = ""
    for _ in range(TRIES):
        _ended(qemu, job)
        reply = qemu.exchange(command, {"job-id": job, **arguments})
        words = str(reply["error"].get("desc")) if "error" in reply else _ended(qemu, job)
        if BUSY not in words:
            break
    return words


def _ended(qemu: Channel, job: str) -> str:
    """Wait until a job has ended, if there is one; return its error, or ""."""
    while True:
        jobs = ask(qemu, "query-jobs")
        found = next((each for each in jobs if each["id"] == job), None)
        if found is None:
            return ""
        if found["status"] == "concluded":
            ask(qemu, "job-dismiss", {"id": job})
            return str(found.get("error", ""))
        time.sleep(POLL_SECONDS)


def no_way_back(where: str, version: str) -> UsageError:
    """Return the error of going back to a version that the disk has lost."""
    return UsageError(
        f"{where}: '{version}' does not open it any more, so there is no way back; run rotate "
        "again without --rollback to end the rotation"
    )
