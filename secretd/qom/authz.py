# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object types `authz-simple`, `authz-list` and `authz-listfile`: QEMU's authz/*.c.

This module defines these objects and how each judges a peer. The tree creates them, and access
asks them.
"""

import os
import stat
import time
from collections.abc import Awaitable, Mapping
from functools import partial
from typing import Any, Final, Literal

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
from secretd.qom.verdict import ANY, SIGNED, Named, Reach, Verdict
from secretd.wire.hash_order import qdict_items
from secretd.wire.lexer import document
from secretd.wire.parser import JSON, Fault

_ANCESTORS: Final = ("authz", "object", "user-creatable", "interface")

AUTHZ: Final = TypeInfo("authz", "object", True, _ANCESTORS)

Policy = Literal["deny", "allow"]
MatchFormat = Literal["exact", "glob"]

LISTFILE_BYTES: Final = 1 << 20
"""Bytes of a list file that is read again; a larger one allows no peer anything."""

_WATCHED: Final = "watched"
_LOADED: Final = "loaded"
"""The journal's names, beside the properties of an authz-listfile: of the path to read again, and
of the loaded list.
"""

_SETTLED_NS: Final = 100_000_000
"""Nanoseconds after a file's last change from which an unchanged time proves unchanged content."""


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


class Rules:
    """Rules and a policy: the first rule that matches any identity decides, else the policy
    (qauthz_list_is_allowed()).
    """

    steady = True  # the verdict on a peer changes only with the object

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
        """Return the identities that these rules can allow or deny."""
        if self._policy == "allow":
            return ANY
        return Reach(
            frozenset(match for match, fits, _ in self._rules if fits is None),
            frozenset(literal_prefix(match) for match, fits, _ in self._rules if fits is not None),
        )

    def named(self) -> Named:
        """Return the identities and patterns that the rules name, "*" for an allowing policy."""
        by_policy: dict[str, list[str]] = {"allow": [], "deny": []}
        for match, _, policy in self._rules:
            by_policy[policy].append(match)
        if self._policy == "allow":
            by_policy["allow"].append("*")
        return Named(by_policy["allow"], by_policy["deny"], "")

    def judge(self, identities: frozenset[str]) -> Verdict:
        """Return whether a peer with these identities is allowed, and why."""
        signed = any(each.startswith(SIGNED) for each in identities)
        for number, (match, fits, policy) in enumerate(self._rules):
            if match in identities if fits is None else any(map(fits, identities)):
                if signed and policy == "allow" and not match.startswith(SIGNED):
                    continue
                why = f"rule {number} ('{match}') says {policy}"
                return Verdict(policy == "allow", why, policy == "deny")
        if signed:
            return Verdict(False, "no rule names it")
        return Verdict(
            self._policy == "allow", f"no rule matches, and its policy says {self._policy}"
        )


class FileRules:
    """The rules in a file, read again when it has changed.

    An unusable file allows no peer anything.
    """

    steady = False

    def __init__(self, filename: str) -> None:
        self._filename = filename
        self._seen: tuple[int, ...] | None = None
        self._rules: Rules | None = None
        self._fault = ""

    def reach(self) -> Reach:
        """Return any: the file may allow any identity at the next decision."""
        return ANY

    def named(self) -> Named:
        """See `Rules`."""
        rules = self._current()
        return Named([], [], self._fault) if rules is None else rules.named()

    def judge(self, identities: frozenset[str]) -> Verdict:
        """See `Rules`."""
        rules = self._current()
        return Verdict(False, self._fault) if rules is None else rules.judge(identities)

    def _current(self) -> Rules | None:
        """Return the rules that the file has now; None if it is unusable, for a reason that
        ``_fault`` has then.
        """
        try:
            self._refresh()
        except (OSError, CommandError) as error:
            self._rules = None
            words = error.desc if isinstance(error, CommandError) else error.strerror
            self._fault = f"'{self._filename}' cannot be used: {words}"
        return self._rules

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
        # A file that was just written may be written again within the same tick of its clock.
        # Each write changes st_ctime, which no process can set.
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
    """The behaviour that all three types share."""

    decides = True

    def create(self, options: Any, loading: Loading) -> Content | Awaitable[Content]:
        """Check the lengths of the patterns; only AuthZListFile loads something."""
        _check_patterns(msgspec.to_builtins(options))
        return super().create(options, loading)

    def set(self, name: str, value: JSON) -> dict[str, object]:
        """Accept a new value of any property."""
        changes = super().set(name, value)
        _check_patterns(changes)
        return changes

    def rules(self, properties: Mapping[str, Any]) -> Rules | FileRules:
        """Return the judge for these properties, as the journal has them."""
        return Rules(properties)


class AuthZSimple(AuthZ):
    """One allowed identity."""

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
    """A list of rules with a policy."""

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
    """An authz-list in a JSON file.

    QEMU 10 cannot create one, since object-add and its type use different names; both names are
    kept here.
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

        Returns the place of the rules: the file, or the loaded list.
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
        """Return the judge of the file or list at creation: as in QEMU, setting ``filename`` or
        ``refresh`` later has no effect.
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
    """Return the properties of the authz-list in a file's text, which ends in one spare byte."""
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
