# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object types `authz-simple`, `authz-list` and `authz-listfile`: QEMU's authz/*.c.

What these objects are; access decides by them. The tree calls it.
"""

import os
from collections.abc import Awaitable, Mapping
from functools import partial
from typing import Any, Final, Literal

from msgspec import UNSET, Struct, UnsetType

from secretd.errors import CommandError
from secretd.memory import LockedBuffer
from secretd.qom.object import ObjectTree
from secretd.qom.source import use_content
from secretd.qom.typeinfo import ObjectOptions, ObjectType, Sources, TypeInfo
from secretd.visitor import JSON_VISITOR, members
from secretd.wire.order import qdict_items
from secretd.wire.parser import Fault
from secretd.wire.qjson import document

_ANCESTORS: Final = ("authz", "object", "user-creatable", "interface")

AUTHZ: Final = TypeInfo("authz", "object", True, _ANCESTORS)

Policy = Literal["deny", "allow"]
Format = Literal["exact", "glob"]


class Rule(Struct, forbid_unknown_fields=True):
    """QAuthZListRule of qapi/authz.json."""

    match: str
    policy: Policy
    format: Format | UnsetType = UNSET


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


class AuthZSimple(ObjectType):
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


class AuthZList(ObjectType):
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


class AuthZListFile(ObjectType):
    """An authz-list in a file of JSON. In QEMU 10 none can be made, since its type is called otherwise
    than in object-add; both names are QEMU's.
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

    def create(
        self, _tree: ObjectTree, options: Any, sources: Sources
    ) -> LockedBuffer | Awaitable[LockedBuffer | None] | None:
        """qauthz_list_file_complete(): the file must hold a list now, whatever it holds later."""
        assert isinstance(options, AuthZListFileOptions)
        filename, refresh = options.filename, options.refresh is not False
        return use_content(
            partial(sources.file, filename),
            lambda content: _check(filename, content, refresh=refresh),
            f"'{filename}'",
        )


def _check(filename: str, content: LockedBuffer, *, refresh: bool) -> None:
    value = document(content.view[1:])
    if isinstance(value, Fault):
        raise CommandError(value.before if value.quote is None else f"{value.before}…{value.after}")
    if not isinstance(value, dict):
        raise CommandError(f"File '{filename}' must contain a JSON object")
    known = {member.wire_name: member for member in members(AuthZListOptions)}
    for name, part in qdict_items(value):
        if name == "id" or name not in known:
            raise CommandError(f"Property 'authz-list.{name}' not found")
        known[name].check(JSON_VISITOR, name, name, part)
    if refresh and os.path.dirname(filename) in ("", "."):
        raise CommandError("Filename must be an absolute path")
