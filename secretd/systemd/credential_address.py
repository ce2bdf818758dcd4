# SPDX-License-Identifier: LGPL-2.1-or-later
"""The address that systemd connects from for LoadCredential= (systemd.exec(5)), and its limits.

Any process can claim such an address: access.credential compares it with what the kernel says.
"""

import re
from typing import Final, NamedTuple

CREDENTIAL_BYTES: Final = 1 << 20
"""What systemd takes for all credentials of a unit together, their names included
(CREDENTIALS_TOTAL_SIZE_MAX)."""

CREDENTIAL_ADDRESS_BYTES: Final = 83
"""Bytes of a unit's and a credential's name together that always fit into the address: 107 less the
NUL in front, 16 digits, "/unit/" and "/". systemd fails with longer ones before it connects.
"""

_ADDRESS: Final = re.compile(rb"\0[0-9a-f]{1,16}/unit/([^/\0-\x1f\x7f]+)/([^/\0-\x1f\x7f]+)")


class CredentialAddress(NamedTuple):
    """What a unit's LoadCredential= says in the address it connects from: anybody can claim
    that.
    """

    unit: str
    credential: str


def credential_address(address: bytes | str) -> CredentialAddress | None:
    """Read a peer's address: NUL, digits, ``/unit/UNIT/CREDENTIAL``.

    None if it has another form.
    """
    match = _ADDRESS.fullmatch(address) if isinstance(address, bytes) else None
    if match is None:
        return None
    try:
        return CredentialAddress(match[1].decode(), match[2].decode())
    except UnicodeDecodeError:
        return None
