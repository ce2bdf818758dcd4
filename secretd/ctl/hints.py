# SPDX-License-Identifier: LGPL-2.1-or-later
"""The next step for errors that do not suggest one; output prints it below the error."""

import re
from typing import Final

_NEXT_STEPS: Final = (
    (r"No secret with id|object '.*' not found", "'secretctl list' shows all secrets"),
    (
        r"Reading secret '(.*)' is not permitted",
        r"root can permit it: secretctl grant \1 --to user:NAME",
    ),
    (
        r"attempt to add duplicate property '.*' to object",
        "the id is taken, so nothing was changed; choose another one",
    ),
    (r"The command (\S+) has not been found", "the control socket has it: --socket names that one"),
    (r"No locked memory left|\(object-bytes-per-uid\)", "'secretctl doctor' says how to get more"),
    (r"has no data|is not a secret", "'secretctl list' shows which are secrets"),
    (r"IV is required to decrypt secret", "--iv gives it"),
    (
        r"Invalid base64 data|non-base64|not valid base64",
        "--format says how the content is encoded",
    ),
)


def next_step(message: str) -> str | None:
    """Return what to do about an error, None if nothing is known. QEMU's own errors get no hint."""
    if message.startswith("QEMU says"):
        return None
    for pattern, step in _NEXT_STEPS:
        match = re.search(pattern, message)
        if match:
            return match.expand(step)
    return None
