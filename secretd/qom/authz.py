# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object types `authz-simple`, `authz-list` and `authz-listfile`: QEMU's authz/*.c.

What these objects are and how each judges a peer; access asks them. The tree calls it.
"""

import os
import stat
import time
from collections.abc import Awaitable, Mapping
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Struct, UnsetType

from secretd.errors import CommandError
from secretd.linux.openat2 import open_without_magic_links
from secretd.memory.arena import LockedBuffer
from secretd.qapi.visitor import JSON_VISITOR, members
from secretd.qom.loading import Loading, use_content
from secretd.qom.object_type import Content, ObjectOptions, ObjectType, TypeInfo
from secretd.qom.patterns import (
    PATTERN_CHARACTERS,
    Match,
    literal_prefix,
    matcher,
)
from secretd.wire.hash_order import qdict_items
from secretd.wire.lexer import document
from secretd.wire.parser import JSON, Fault

_ANCESTORS: Final = ("authz", "object", "user-creatable", "interface")

AUTHZ: Final = TypeInfo("authz", "object", True, _ANCESTORS)

Policy = Literal["deny", "allow"]
MatchFormat = Literal["exact", "glob"]

LISTFILE_BYTES: Final = 1 << 20
"""Bytes of a list file that is read again; of a larger one, nobody is allowed anything."""

_WATCHED: Final = "watched"
_LOADED: Final = "loaded"
"""What the journal keeps beside the properties of an authz-listfile: the path to read again, or the
list.
"""

_SETTLED_NS: Final = 100_000_000
"""Nanoseconds by which a file's time must lie back for it to tell that the file was not changed
since.
"""


class Rule(Struct, forbid_unknown_fields=True):
    """QAuthZListRule of qapi/authz.json."""

    match: str
    policy: Policy
    format: MatchFormat | UnsetType = UNSET


class AuthZSimpleOptions(ObjectOptions, tag="authz-simple", kw_only=True):
    """AuthZSimpleProperties of qapi/authz.json."""

    identity: str


class AuthZListOptions(ObjectOptions, tag="authz-list", kw_only=True):
    """AuthZListProperties."""

    policy: Policy | UnsetType = UNSET
    rules: list[Rule] | UnsetType = UNSET


class AuthZListFileOptions(ObjectOptions, tag="authz-listfile", kw_only=True):
    """AuthZListFileProperties."""

    filename: str
    refresh: bool | UnsetType = UNSET


class Reach(NamedTuple):
    """Which identities an authz object can allow: ``exact`` ones, and those that begin with one of
    ``prefixes``, which is "" where it can be any.
    """

    exact: frozenset[str]
    prefixes: frozenset[str]


ANY: Final = Reach(frozenset(), frozenset(("",)))


class Verdict(NamedTuple):
    """What an authz object says of a peer, and in what words it says why."""

    allowed: bool
    why: str


class Rules:
    """Rules of which the first that fits any identity decides, and a policy where none does
    (qauthz_list_is_allowed()).
    """

    steady = True  # the verdict on a peer stays the same while the object does

    def __init__(self, properties: Mapping[str, Any]) -> None:
        self._policy: str = properties.get("policy", "deny")
        self._rules: list[tuple[str, Match | None, str]] = [
            (
                rule["match"],
                matcher(rule["match"]) if rule.get("format") == "glob" else None,
                rule["policy"],
            )
            for rule in properties.get("rules", ())
        ]

    def reach(self) -> Reach:
        """Return which identities these rules can allow."""
        if self._policy == "allow":
            return ANY
        allowing = [(match, fits) for match, fits, policy in self._rules if policy == "allow"]
        return Reach(
            frozenset(match for match, fits in allowing if fits is None),
            frozenset(literal_prefix(match) for match, fits in allowing if fits is not None),
        )

    def judge(self, identities: frozenset[str]) -> Verdict:
        """Say whether a peer with these identities is allowed."""
        for number, (match, fits, policy) in enumerate(self._rules):
            if match in identities if fits is None else any(map(fits, identities)):
                return Verdict(policy == "allow", f"rule {number} ('{match}') says {policy}")
        return Verdict(self._policy == "allow", f"no rule fits, and its policy says {self._policy}")


class FileRules:
    """The rules in a file, read again when it has changed.

    One that cannot be used allows nobody anything.
    """

    steady = False

    def __init__(self, filename: str) -> None:
        self._filename = filename
        self._seen: tuple[int, ...] | None = None
        self._rules: Rules | None = None
        self._fault = ""

    def reach(self) -> Reach:
        """The file may allow anybody at the next look."""
        return ANY

    def judge(self, identities: frozenset[str]) -> Verdict:
        """See `Rules`."""
        try:
            self._refresh()
        except (OSError, CommandError) as error:
            self._rules = None
            words = error.desc if isinstance(error, CommandError) else error.strerror
            self._fault = f"'{self._filename}' cannot be used: {words}"
        if self._rules is None:
            return Verdict(False, self._fault)
        return self._rules.judge(identities)

    def _refresh(self) -> None:
        try:
            fd = open_without_magic_links(os.fsencode(self._filename), os.O_PATH | os.O_CLOEXEC)
        except OSError:
            self._seen = None
            raise
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        now = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if now == self._seen:
            return
        if not stat.S_ISREG(status.st_mode):
            raise CommandError("it is not a regular file")
        # A file that was just written may be written again within the same tick of its clock. Whatever is
        # written to it changes st_ctime, which nobody can set.
        self._seen = now if time.time_ns() - status.st_ctime_ns > _SETTLED_NS else None
        self._rules = Rules(_parsed(self._filename, memoryview(self._read())))

    def _read(self) -> bytearray:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        fd = open_without_magic_links(os.fsencode(self._filename), flags)
        with open(fd, "rb") as file:
            content = file.read(LISTFILE_BYTES + 1)
        if len(content) > LISTFILE_BYTES:
            raise CommandError(f"it is larger than the limit of {LISTFILE_BYTES} bytes")
        return bytearray(content + b"\0")


class AuthZ(ObjectType):
    """What all of them have in common."""

    decides = True

    def create(self, options: Any, loading: Loading) -> Content | Awaitable[Content]:
        """Check the rules; there is nothing to load."""
        _check_patterns(msgspec.to_builtins(options))
        return super().create(options, loading)

    def set(self, name: str, value: JSON) -> dict[str, object]:
        """Any property."""
        changes = super().set(name, value)
        _check_patterns(changes)
        return changes

    def rules(self, properties: Mapping[str, Any]) -> Rules | FileRules:
        """Return what judges peers by these properties, as the journal has them."""
        return Rules(properties)


class AuthZSimple(AuthZ):
    """One identity that is allowed."""

    info = TypeInfo(
        "authz-simple",
        "authz",
        False,
        ("authz-simple", *_ANCESTORS),
        (("type", "string"), ("identity", "string")),
    )
    number = 3
    options = AuthZSimpleOptions
    defaults: Mapping[str, object] = {}

    def rules(self, properties: Mapping[str, Any]) -> Rules:
        """qauthz_simple_is_allowed()."""
        return Rules({"rules": [{"match": properties["identity"], "policy": "allow"}]})


class AuthZList(AuthZ):
    """Rules of which the first that matches decides, and a policy where none does."""

    info = TypeInfo(
        "authz-list",
        "authz",
        False,
        ("authz-list", *_ANCESTORS),
        (("type", "string"), ("policy", "QAuthZListPolicy"), ("rules", "QAuthZListRule")),
    )
    number = 4
    options = AuthZListOptions
    defaults: Mapping[str, object] = {"policy": "deny", "rules": []}


class AuthZListFile(AuthZ):
    """An authz-list in a file of JSON. In QEMU 10 none can be made, since its type is called
    otherwise than in object-add; both names are QEMU's.
    """

    info = TypeInfo(
        "authz-list-file",
        "authz",
        False,
        ("authz-list-file", *_ANCESTORS),
        (("type", "string"), ("filename", "string"), ("refresh", "bool")),
    )
    number = 5
    options = AuthZListFileOptions
    defaults: Mapping[str, object] = {"refresh": True}

    def create(self, options: Any, loading: Loading) -> Content | Awaitable[Content]:
        """qauthz_list_file_complete(): the file must hold a list now, whatever it holds later.

        Returns where the rules are: in the file, or as they were loaded.
        """
        assert isinstance(options, AuthZListFileOptions)
        filename = options.filename

        def load(content: LockedBuffer) -> Content:
            loaded = _parsed(filename, content.view[1:])
            if options.refresh is False:
                return {_LOADED: loaded}
            if os.path.dirname(filename) in ("", "."):
                raise CommandError("Filename must be an absolute path")
            return {_WATCHED: filename}

        return use_content(partial(loading.sources.file, filename), load, f"'{filename}'")

    def rules(self, properties: Mapping[str, Any]) -> Rules | FileRules:
        """As it was made: another ``filename`` or ``refresh`` set later changes nothing, as in
        QEMU.
        """
        if _LOADED in properties:
            return Rules(properties[_LOADED])
        return FileRules(properties[_WATCHED])


def _check_patterns(properties: Mapping[str, Any]) -> None:
    for rule in properties.get("rules", ()):
        if len(rule["match"]) > PATTERN_CHARACTERS:
            raise CommandError(
                f"Parameter 'match' is longer than the limit of {PATTERN_CHARACTERS} characters"
            )


def _parsed(filename: str, text: memoryview) -> dict[str, Any]:
    """Return the properties of the authz-list in a file's text, which ends in one byte to spare."""
    value = document(text)
    if isinstance(value, Fault):
        raise CommandError(value.before if value.quote is None else f"{value.before}…{value.after}")
    if not isinstance(value, dict):
        raise CommandError(f"File '{filename}' must contain a JSON object")
    known = {member.wire_name: member for member in members(AuthZListOptions)}
    properties = {}
    for name, part in qdict_items(value):
        if name == "id" or name not in known:
            raise CommandError(f"Property 'authz-list.{name}' not found")
        properties[name] = msgspec.to_builtins(known[name].check(JSON_VISITOR, name, name, part))
    _check_patterns(properties)
    return properties
