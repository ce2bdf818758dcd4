# SPDX-License-Identifier: LGPL-2.1-or-later
"""The text of ``--object`` for errors: by the schema, without the values that carry a secret.

A value may carry a secret if the schema marks its member sensitive, or does not know the member: a
mistyped name, or a comma that was not doubled, turns a part of the secret into such a member. argv
removes secrets from the command line with the same functions; initial_objects prints errors.
"""

import json
import re
from collections.abc import Iterator
from typing import Final, NamedTuple, get_args

from msgspec import Raw

from secretd.qapi.visitor import alternatives, members
from secretd.qom.registry import AnyOptions

HIDDEN: Final = "…"

COMMA_HINT: Final = "a comma in a value is written twice"

_MEMBERS: Final = {
    member.wire_name: Raw in alternatives(member.hint)
    for options in get_args(AnyOptions)
    for member in members(options)
}
SENSITIVE: Final = frozenset(name for name, sensitive in _MEMBERS.items() if sensitive)
"""The members of objects that the schema marks sensitive."""

_KNOWN: Final = frozenset({"qom-type", *_MEMBERS} - SENSITIVE)
_PART: Final = re.compile(r"(?:[^,]|,,)*")
_JSON_MEMBER: Final = re.compile(r'("(?:[^"\\]|\\.)*"\s*:\s*)("(?:[^"\\]|\\.)*"|[^\s,{}\[\]"]+)')


class Part(NamedTuple):
    """A part of ``KEY=VALUE,…``, as it was typed; ``key`` is "" only for a first part without
    ``=``.
    """

    key: str
    text: str

    @property
    def may_hold_secret(self) -> bool:
        """True if the schema marks the member sensitive, or does not know it."""
        return self.key != "" and self.key.split(".")[0] not in _KNOWN


def parts(text: str) -> Iterator[Part]:
    """Split the text of an option at its commas; a doubled comma belongs to its value (QEMU's
    keyval).
    """
    position, first = 0, True
    while position <= len(text):
        match = _PART.match(text, position)
        assert match is not None
        key, equals, _ = match[0].partition("=")
        yield Part(key if equals or not first else "", match[0])
        position, first = match.end() + 1, False


def shown(text: str, hidden_files: "list[str]") -> str:
    """Return the text of an option without the values that may carry a secret.

    ``hidden_files``: values of ``file`` by which argv replaced ``data``.
    """
    if text.startswith("{"):
        return _shown_json(text, hidden_files)
    listed: list[str] = []
    for part in parts(text):
        if part.text.partition("=")[2] in hidden_files:
            listed.append(f"data={HIDDEN}")
        elif not part.may_hold_secret:
            listed.append(part.text)
        elif "=" in part.text:
            listed.append(f"{part.key}={HIDDEN}")
        else:
            listed.append(HIDDEN)
    return ",".join(listed)


def _shown_json(text: str, hidden_files: "list[str]") -> str:
    try:
        json.loads(text)
    except ValueError:  # includes QEMU's dialect, where the end of a value is uncertain
        return f"{{{HIDDEN}"

    def replaced(match: re.Match[str]) -> str:
        if match[2][1:-1] in hidden_files:
            return f'"data": {HIDDEN}'
        return match[0] if _name(match) in _KNOWN else f"{match[1]}{HIDDEN}"

    return _JSON_MEMBER.sub(replaced, text)


def _name(match: re.Match[str]) -> str:
    return match[1].rstrip().rstrip(":").rstrip()[1:-1]


def with_file(text: str, file: str) -> str | None:
    """Return the JSON text of an object with ``data`` replaced by ``file``; None if that is not
    certain.
    """
    found = [match for match in _JSON_MEMBER.finditer(text) if _name(match) == "data"]
    if len(found) != 1:
        return None
    (match,) = found
    replaced = f'{text[: match.start()]}"file": "{file}"{text[match.end() :]}'
    try:
        members = json.loads(replaced)
    except ValueError:
        return None
    return None if "data" in members else replaced


def is_unfinished_value(text: str) -> bool:
    """Return True if a part without ``=`` follows a sensitive member: probably the rest of its
    value.
    """
    if text.startswith("{"):
        return False
    before = ""
    for part in parts(text):
        if before in SENSITIVE and "=" not in part.text:
            return True
        before = part.key
    return False
