# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object type `secret-store`: it declares which objects a store on disk keeps.

secretd's own. The object only has the declaration and what is known of the store; qom.keeper opens
the store once the secret that ``keyid`` names exists.
"""

import os
from collections.abc import Mapping
from typing import Any, Final, Literal

from msgspec import UNSET, UnsetType

from secretd.errors import AccessDenied, CommandError
from secretd.qom.loading import Loading
from secretd.qom.object_type import Content, ObjectOptions, ObjectType, TypeInfo
from secretd.qom.patterns import PATTERN_CHARACTERS
from secretd.wire.parser import JSON

UNLOCK_SECONDS: Final = 60
"""The default of ``unlock-timeout``."""

LONGEST_UNLOCK_SECONDS: Final = 3600

DOOMED: Final = "doomed"
"""The journal's name for the ids whose removal is not in the store yet."""

COVERAGE: Final = "coverage"
"""The journal's name for what decided which objects were rows: pattern and command line."""

UUID: Final = "uuid"
"""The journal's name for the identity of the store that it knows."""

StoreState = Literal["locked", "open", "failed"]


class SecretStoreOptions(ObjectOptions, tag="secret-store", rename="kebab", kw_only=True):
    """``path``: an absolute directory. ``keyid``: the id of a secret of 32 bytes. ``secrets``: the
    pattern of ids. ``unlock_timeout``: seconds for which units wait for the store. ``create``: make
    an empty store if there is none.
    """

    path: str
    keyid: str
    secrets: str | UnsetType = UNSET
    unlock_timeout: int | UnsetType = UNSET
    create: bool | UnsetType = UNSET


class SecretStore(ObjectType):
    """A store on disk."""

    info = TypeInfo(
        "secret-store",
        "object",
        False,
        ("secret-store", "object", "user-creatable", "interface"),
        (
            ("type", "string"),
            ("path", "string"),
            ("keyid", "string"),
            ("secrets", "string"),
            ("unlock-timeout", "int"),
            ("create", "bool"),
            ("state", "SecretStoreState"),
            ("sequence", "int"),
        ),
    )
    number = 7
    options = SecretStoreOptions
    defaults: Mapping[str, object] = {
        "secrets": "*",
        "unlock-timeout": UNLOCK_SECONDS,
        "create": False,
        "state": "locked",
        "sequence": 0,
    }
    declares_store = True

    def create(self, options: Any, loading: Loading) -> Content:
        """Check the values; the store is opened later."""
        assert isinstance(options, SecretStoreOptions)
        if loading.sources.uid not in (0, os.getuid()):
            raise AccessDenied("Only uid 0 and the daemon's own uid may name a directory")
        if not options.path.startswith("/"):
            raise CommandError("Parameter 'path' expects an absolute path of a directory")
        if options.secrets is not UNSET and not 0 < len(options.secrets) <= PATTERN_CHARACTERS:
            raise CommandError(
                "Parameter 'secrets' expects a pattern of ids of at most "
                f"{PATTERN_CHARACTERS} characters"
            )
        seconds = options.unlock_timeout
        if seconds is not UNSET and not 0 <= seconds <= LONGEST_UNLOCK_SECONDS:
            raise CommandError(
                "Parameter 'unlock-timeout' expects a number of seconds between 0 and "
                f"{LONGEST_UNLOCK_SECONDS}"
            )
        return None

    def set(self, name: str, _value: JSON) -> dict[str, object]:
        """Refuse: a store is declared once."""
        raise CommandError(f"Property 'secret-store.{name}' is not writable")
