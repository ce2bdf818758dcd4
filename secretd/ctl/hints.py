# SPDX-License-Identifier: LGPL-2.1-or-later
"""The next step for errors that do not suggest one; output prints it below the error."""

import re
from typing import Final

ID_RULES: Final = "an id begins with a letter and has only letters, digits, '-', '.' and '_'"

_NEXT_STEPS: Final = (
    (
        r"expects an identifier",
        ID_RULES,
    ),
    (
        r"IV should be 16 bytes in length not 24",
        "--iv takes base64, not hexadecimal: 16 bytes are 24 characters",
    ),
    (r"IV should be 16 bytes in length", "--iv takes 16 bytes in base64, which are 24 characters"),
    (
        r"Key should be 32 bytes in length",
        "it means the secret that --keyid names; 'secretctl list' shows the sizes",
    ),
    (
        r"Store '.*' is locked",
        "'secretctl store unlock' opens it; 'secretctl doctor' says why it is not open",
    ),
    (r"Store '.*' has failed", "'secretctl doctor' says what to do"),
    (r"No secret with id|object '.*' not found", "'secretctl list' shows all secrets"),
    (
        r"Reading secret '(.*)' is not permitted",
        r"root can permit it: secretctl grant \1 --to user:NAME",
    ),
    (
        r"attempt to add duplicate property '.*' to object",
        "the id is taken; choose another one, or 'secretctl add --replace' replaces the secret",
    ),
    (r"The command (\S+) has not been found", "the control socket has it: --socket names that one"),
    (r"No locked memory left|\(object-bytes-per-uid\)", "'secretctl doctor' says how to get more"),
    (
        r"has no data|is not a secret",
        "'secretctl list' shows which are secrets; 'secretctl rotate' gives an alias a new value",
    ),
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
