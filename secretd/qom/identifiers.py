# SPDX-License-Identifier: LGPL-2.1-or-later
"""The form of an object's id (QEMU's util/id.c), and the hint for people."""

import re
from typing import Final

from secretd.errors import CommandError

ID_BYTES: Final = 4096
"""Bytes of an object's id. QEMU has no limit."""

_BAD_ID: Final = "Parameter 'id' expects an identifier"
_ID_HINT: Final = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."

IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


def check_identifier(object_id: str) -> None:
    """Raise CommandError unless a text can be an object's id."""
    if not IDENTIFIER.fullmatch(object_id):
        raise CommandError(_BAD_ID)
    if len(object_id) > ID_BYTES:
        raise CommandError(f"Parameter 'id' is longer than the limit of {ID_BYTES} bytes")


def with_hint(words: str) -> str:
    """Return an error with a hint for people; programs get none (error_append_hint())."""
    return f"{words}\n{_ID_HINT}" if words == _BAD_ID else words
