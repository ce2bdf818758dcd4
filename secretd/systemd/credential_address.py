# SPDX-License-Identifier: LGPL-2.1-or-later
"""The address from which systemd connects for LoadCredential= (systemd.exec(5)), and its limits.

Any process can claim such an address: access.credential compares it with the kernel's report.
"""

import re
from typing import Final, NamedTuple

CREDENTIAL_BYTES: Final = 1 << 20
"""Bytes of all credentials of a unit together, including their names, that systemd accepts
(CREDENTIALS_TOTAL_SIZE_MAX).
"""

CREDENTIAL_ADDRESS_BYTES: Final = 83
"""Bytes of a unit's and a credential's name together that always fit into the address: 107 less the
leading NUL, 16 digits, "/unit/" and "/". systemd fails with longer ones before it connects.
"""

_ADDRESS: Final = re.compile(rb"\0[0-9a-f]{1,16}/unit/([^/\0-\x1f\x7f]+)/([^/\0-\x1f\x7f]+)")


class CredentialAddress(NamedTuple):
    """The unit and the credential's name in the address of a LoadCredential= connection, which any
    process can claim.
    """

    unit: str
    credential: str


def credential_address(address: bytes | str) -> CredentialAddress | None:
    """Parse a peer's address: NUL, digits, ``/unit/UNIT/CREDENTIAL``. Returns None for another
    form.
    """
    match = _ADDRESS.fullmatch(address) if isinstance(address, bytes) else None
    if match is None:
        return None
    try:
        return CredentialAddress(match[1].decode(), match[2].decode())
    except UnicodeDecodeError:
        return None
