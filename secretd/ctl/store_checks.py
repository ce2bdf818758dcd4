# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checks of `secretctl doctor` about the store: its state, and what brings its key back."""

import os
from collections.abc import Iterator
from typing import Final

from secretd import client as api
from secretd.client import SyncClient
from secretd.ctl.findings import Finding
from secretd.ctl.output import count
from secretd.ctl.recipients import opens
from secretd.ctl.store_keys import DeclaredStore, find_store
from secretd.errors import UsageError

_BY_HAND: Final = "age -d -i KEYFILE {}/age | secretctl store unlock --stdin"

_MENDS: Final = (
    ("the key is not", "delete it, and give the right one: {by_hand}"),
    ("rolled back", "put the newer copy back, or accept this one: docs/howto/recover.md"),
    ("there is no store", "make one with 'secretctl store init', or mount its file system"),
    ("in use by another", "one secretd at a time can have it"),
    ("", "docs/howto/recover.md says how to go on"),
)
"""What to do about the reason of a failure."""


def store_findings(client: SyncClient) -> Iterator[Finding]:
    """Check the store, if there is one."""
    try:
        found = find_store(client)
    except api.ExecuteError:  # the client socket has no such command
        return
    if found is None:
        return
    directory = found.recipients.directory
    by_hand = _BY_HAND.format(directory)
    if found.state == "open":
        yield Finding("store", "ok", f"open, {count(found.rows, 'row')}")
    elif found.state == "locked":
        mend = f"systemctl status secretd-unlock, or {by_hand}"
        yield Finding("store", "warning", f"locked: its key '{found.keyid}' is missing", mend)
    else:
        mend = next(words for part, words in _MENDS if part in found.reason)
        yield Finding("store", "failed", found.reason, mend.format(by_hand=by_hand))
    yield from _recipients(found, by_hand)


def _recipients(found: DeclaredStore, by_hand: str) -> Iterator[Finding]:
    try:
        present = found.recipients.present()
    except UsageError:
        return  # only root and secretd's own user may look
    if not present:
        yield Finding(
            "recipients", "warning", "none: after a reboot nothing opens the store",
            "secretctl store recipient add systemd, and age off the machine",
        )  # fmt: skip
        return
    if "age" not in present:
        yield Finding(
            "recipients", "warning", "none is off this machine: with it the store is lost",
            "secretctl store recipient add age age1…, with its identity elsewhere",
        )  # fmt: skip
    elif len(present) == 1:
        yield Finding(
            "recipients", "warning", "only age: after a reboot a person must unlock the store",
            "secretctl store recipient add systemd",
        )  # fmt: skip
    if "systemd" in present and os.getuid() == 0:
        try:
            opens(found.recipients)
        except UsageError as error:
            yield Finding(
                "recipients", "failed", f"systemd's cannot be opened any more: {error}",
                "the host key, machine id, TPM or PCRs have changed; unlock with "
                f"'{by_hand}', then 'secretctl store recipient add systemd'",
            )  # fmt: skip
        else:
            yield Finding("recipients", "ok", " and ".join(present))
