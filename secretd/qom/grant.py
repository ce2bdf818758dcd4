# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object type `secret-grant`: it lets peers read the secrets that a pattern names.

access decides by these objects, and the tree creates them. As in QEMU (the ``tls-authz`` of a
character device) the authz object is looked up at the time of use. It may be deleted and added
again; while it is missing, access is denied.
"""

from collections.abc import Mapping
from typing import Any, Final

from msgspec import UNSET, UnsetType

from secretd.errors import CommandError
from secretd.journal.files import ObjectRecord
from secretd.qom.deadlines import DEADLINE, LIFETIME_SECONDS, now
from secretd.qom.loading import Loading
from secretd.qom.object_type import Content, ObjectOptions, ObjectType, TypeInfo
from secretd.qom.patterns import PATTERN_CHARACTERS
from secretd.systemd.credential_address import CREDENTIAL_ADDRESS_BYTES
from secretd.wire.parser import JSON

MAX_READS: Final = 1 << 31
"""The largest ``max-reads``."""

READS: Final = "reads"
"""The property that counts the reads a grant with ``max-reads`` has allowed."""


class SecretGrantOptions(ObjectOptions, tag="secret-grant", rename="kebab", kw_only=True):
    """secretd's own: the pattern of ids, the id of the authz object, and the limits of the
    grant.
    """

    secret: str
    authz: str
    credential: str | UnsetType = UNSET
    expires_after: int | UnsetType = UNSET
    max_reads: int | UnsetType = UNSET


class SecretGrant(ObjectType):
    """Permission to read."""

    info = TypeInfo(
        "secret-grant",
        "object",
        False,
        ("secret-grant", "object", "user-creatable", "interface"),
        (
            ("type", "string"),
            ("secret", "string"),
            ("authz", "string"),
            ("credential", "string"),
            ("expires-after", "int"),
            ("max-reads", "int"),
            (READS, "int"),
        ),
    )
    number = 6
    options = SecretGrantOptions
    defaults: Mapping[str, object] = {
        "credential": "",
        "expires-after": 0,
        "max-reads": 0,
        READS: 0,
    }
    decides = True

    def create(self, options: Any, _loading: Loading) -> Content:
        """Check the values; this type loads nothing."""
        assert isinstance(options, SecretGrantOptions)
        for name, value in super().stored(options).items():
            _check(name, value)
        return None

    def stored(self, options: ObjectOptions) -> dict[str, object]:
        """Return the given properties, and the deadline."""
        given = super().stored(options)
        return given | _deadline(given)

    def set(self, name: str, value: JSON) -> dict[str, object]:
        """Accept any property but the count; ``expires-after`` counts from now."""
        if name == READS:
            raise CommandError(f"Property 'secret-grant.{READS}' is not writable")
        changes = super().set(name, value)
        _check(name, changes[name])
        return changes | _deadline(changes)


def _check(name: str, value: object) -> None:
    if name == "expires-after":
        check_seconds(name, value)
    elif name == "max-reads" and not (isinstance(value, int) and 1 <= value <= MAX_READS):
        raise CommandError(f"Parameter 'max-reads' expects a value between 1 and {MAX_READS}")
    elif name == "secret" and len(str(value)) > PATTERN_CHARACTERS:
        raise CommandError(
            f"Parameter 'secret' is longer than the limit of {PATTERN_CHARACTERS} characters"
        )
    elif name == "secret" and not value:
        raise CommandError("Parameter 'secret' expects an id, or a pattern of ids with '*' and '?'")
    elif name == "credential" and "/" in str(value):
        raise CommandError("Parameter 'credential' expects a credential's name, without '/'")
    elif name == "credential" and len(str(value).encode()) > CREDENTIAL_ADDRESS_BYTES:
        raise CommandError(
            f"Parameter 'credential' is longer than the {CREDENTIAL_ADDRESS_BYTES} bytes that "
            "systemd has for it and the unit's name"
        )


def check_seconds(name: str, value: object) -> int:
    """Return a lifetime in seconds, or raise CommandError."""
    if not (isinstance(value, int) and 1 <= value <= LIFETIME_SECONDS):
        raise CommandError(
            f"Parameter '{name}' expects a number of seconds between 1 and {LIFETIME_SECONDS}"
        )
    return value


def _deadline(given: Mapping[str, object]) -> dict[str, object]:
    seconds = given.get("expires-after")
    return {DEADLINE: now() + seconds * 1_000_000_000} if isinstance(seconds, int) else {}


def used_up(record: ObjectRecord) -> bool:
    """Return True if the grant has allowed all its reads."""
    limit, reads = record.properties.get("max-reads"), record.properties.get(READS, 0)
    return isinstance(limit, int) and isinstance(reads, int) and reads >= limit
