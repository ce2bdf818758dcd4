# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object type `secret-alias`: one name for the versions of a secret, of which one is current.

secretd's own. Versions are ordinary secrets: those of the alias ``ID`` have the ids ``ID.v1``,
``ID.v2`` and so on. An alias can name nothing else, so it never lends its grants to another secret.
The tree holds the aliases, access resolves them, and qom.rotation changes them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from msgspec import UNSET, UnsetType

from secretd.errors import CommandError
from secretd.qom.loading import Loading
from secretd.qom.object_type import Content, ObjectOptions, ObjectType, TypeInfo
from secretd.wire import encoder
from secretd.wire.parser import JSON

CONSUMERS: Final = 256
"""The identities that ``consumers`` may have, and the readers that an alias remembers."""

CONSUMERS_BYTES: Final = 8 << 10
"""Bytes of the JSON text of these identities: one reply has room for both."""

ALIAS_ID_BYTES: Final = 1024
"""Bytes of the id of an alias; a reply has it several times."""

NOTE_CHARACTERS: Final = 1024
"""Characters of ``note``."""

LAST_NUMBER: Final = 999_999_999
"""The highest number of a version."""

READERS: Final = "readers"
"""The journal's name for the number of the version that each identity has read last."""

LAST: Final = "last"
"""The journal's name for the highest number that a version of the alias has had."""

MORE: Final = "more"
"""The journal's name for: more identities have read than an alias remembers."""

_VERSION: Final = re.compile(r"(.+)\.v([1-9][0-9]{0,8})")


class SecretAliasOptions(ObjectOptions, tag="secret-alias", rename="kebab", kw_only=True):
    """``current``: the id of the version that readers get. ``staged``: one that is to become
    current; ``previous``: one that was current. ``consumers``: the identities that must have read
    the current version before the previous one ends. ``note``: a text of the program that rotates.
    """

    current: str
    staged: str | UnsetType = UNSET
    previous: str | UnsetType = UNSET
    consumers: list[str] | UnsetType = UNSET
    note: str | UnsetType = UNSET


class Alias(NamedTuple):
    """An alias as the journal has it; "" stands for no version.

    ``readers``: the number of the version that each identity has read last; of those versions that
    are current or previous. ``last``: the highest number that a version has had. ``more``: more
    identities have read than are remembered.
    """

    current: str
    staged: str
    previous: str
    consumers: tuple[str, ...]
    readers: dict[str, int]
    last: int
    more: bool
    note: str

    @property
    def missing(self) -> list[str]:
        """The identities that are to read the current version and have not."""
        number = number_of(self.current)
        return [each for each in self.awaited if self.readers.get(each) != number]

    @property
    def next(self) -> int:
        """The number of another version."""
        return self.last + 1 if self.last < LAST_NUMBER else number_of(self.current) + 1

    @property
    def awaited(self) -> tuple[str, ...]:
        """The consumers; by default those that have read the current or previous version."""
        return self.consumers or tuple(sorted(self.readers))


def alias_in(properties: Mapping[str, Any]) -> Alias:
    """Return the alias in an object's properties, with readers of these versions only."""
    current, previous = properties["current"], properties.get("previous", "")
    numbers = (number_of(current), number_of(previous) or -1)
    return Alias(
        current,
        properties.get("staged", ""),
        previous,
        tuple(dict.fromkeys(properties.get("consumers", ()))),
        {each: n for each, n in properties.get(READERS, {}).items() if n in numbers},
        properties[LAST],
        properties.get(MORE, False),
        properties.get("note", ""),
    )


def alias_of(version: str) -> str:
    """Return the id of the alias that may name a secret as its version, "" if none may."""
    found = _VERSION.fullmatch(version)
    return found[1] if found else ""


def number_of(version: str) -> int:
    """Return the number of a version, 0 if the id has none."""
    found = _VERSION.fullmatch(version)
    return int(found[2]) if found else 0


def check_versions(alias_id: str, versions: Mapping[str, str]) -> None:
    """Raise CommandError unless all versions, by their property, belong to the alias and differ;
    "" is no version.
    """
    if len(alias_id) > ALIAS_ID_BYTES:
        raise CommandError(
            f"Parameter 'id' is longer than the limit of {ALIAS_ID_BYTES} bytes for an alias"
        )
    for name, version in versions.items():
        if alias_of(version) != alias_id and (version or name == "current"):
            raise CommandError(
                f"Parameter '{name}' expects a version of '{alias_id}', such as '{alias_id}.v1'"
            )
    given = [version for version in versions.values() if version]
    if len(given) != len(set(given)):
        raise CommandError("Parameters 'current', 'staged' and 'previous' expect different ids")


def check_consumers(consumers: list[str]) -> None:
    """Raise CommandError for too many consumers, and for what is no single identity."""
    if len(consumers) > CONSUMERS:
        raise CommandError(f"Parameter 'consumers' expects at most {CONSUMERS} identities")
    for each in consumers:
        if not each or "*" in each or "?" in each:
            raise CommandError(
                "Parameter 'consumers' expects identities, such as 'unit:nginx.service', and no "
                "patterns"
            )
    if text_size(consumers) > CONSUMERS_BYTES:
        raise CommandError(
            f"Parameter 'consumers' expects at most {CONSUMERS_BYTES} bytes of identities"
        )


def check_note(note: str) -> None:
    """Raise CommandError for a note that is too long."""
    if len(note) > NOTE_CHARACTERS:
        raise CommandError(f"Parameter 'note' expects at most {NOTE_CHARACTERS} characters")


def text_size(identities: Iterable[str]) -> int:
    """Return the bytes that identities take in JSON."""
    return sum(len(encoder.string(each)) + 2 for each in identities)


class SecretAlias(ObjectType):
    """A name for the versions of a secret."""

    info = TypeInfo(
        "secret-alias",
        "object",
        False,
        ("secret-alias", "object", "user-creatable", "interface"),
        (
            ("type", "string"),
            ("current", "string"),
            ("staged", "string"),
            ("previous", "string"),
            ("consumers", "strList"),
            ("note", "string"),
        ),
    )
    number = 8
    options = SecretAliasOptions
    defaults: Mapping[str, object] = {"staged": "", "previous": "", "consumers": [], "note": ""}
    names_versions = True
    acquired = frozenset(("current", "staged", "previous", "note", READERS, LAST, MORE))

    def create(self, options: Any, _loading: Loading) -> Content:
        """Check the values. As with grants, the versions may be added later."""
        assert isinstance(options, SecretAliasOptions)
        given = {"current": options.current}
        given["staged"] = "" if options.staged is UNSET else options.staged
        given["previous"] = "" if options.previous is UNSET else options.previous
        check_versions(options.id, given)
        if options.consumers is not UNSET:
            check_consumers(options.consumers)
        if options.note is not UNSET:
            check_note(options.note)
        return {LAST: max(map(number_of, given.values()))}

    def set(self, name: str, _value: JSON) -> dict[str, object]:
        """Refuse: secret-alias-set compares before it sets."""
        raise CommandError(f"Property 'secret-alias.{name}' is not writable")
