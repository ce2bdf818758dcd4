# SPDX-License-Identifier: LGPL-2.1-or-later
"""An optimisation in front of fast_decoder: one regular expression for the lines of a few commands.

A form is a line as JSON writers make it: the command, its required string arguments in the schema's
order, then the argument that carries the secret, if the command has one; then the id, if there is
one. Strings are plain ASCII without escapes, so that a match is the value. FastDecoder would decode
each of these lines in the same way, in three times the time; a property test holds them equal.
"""

import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from msgspec import UNSET, Raw, Struct, UnsetType

from secretd.qapi.command import Command
from secretd.qapi.visitor import alternatives, members

_STRING: Final = rb'"([ !#-\[\]-~]{1,128})"'
_SECRET: Final = rb'("[ !#-\[\]-~]*")'
_PLAIN_END: Final = memoryview(b"}\n")
_END: Final = re.compile(rb'(?:, ?"id": ?("[ !#-\[\]-~]{0,64}"|[1-9][0-9]{0,8}))?\}\r?\n')


class _Form(NamedTuple):
    """``strings``: the names of the string arguments, and their groups; ``secret``: its name."""

    request: type[Struct]
    arguments: type[Struct]
    strings: tuple[tuple[str, int], ...]
    secret: str | None


class UsualLines:
    """Decodes the usual lines of some commands.

    ``usual``: their names, each with the value of the argument that selects the other arguments, ""
    if there is none.
    """

    def __init__(self, commands: Iterable[Command], usual: Iterable[tuple[str, str]]) -> None:
        by_name = {command.name: command for command in commands}
        self._forms: dict[int, _Form] = {}  # by the last group of each
        patterns = []
        groups = 0
        for name, tag in usual:
            command = by_name.get(name)
            if command is None or command.request is None:
                continue
            struct = command.arguments[tag]
            strings = [m for m in members(struct) if m.required]
            assert all(alternatives(m.hint) == [str] for m in strings)
            secret = next((m for m in members(struct) if Raw in alternatives(m.hint)), None)
            parts = [b'"%s": ?"%s"' % (command.tag_field.encode(), tag.encode())] if tag else []
            parts += [b'"%s": ?%s' % (m.wire_name.encode(), _STRING) for m in strings]
            parts += [b'"%s": ?%s' % (secret.wire_name.encode(), _SECRET)] if secret else []
            patterns.append(b'%s", ?"arguments": ?\\{%s\\}' % (name.encode(), b", ?".join(parts)))
            first, groups = groups + 1, groups + len(strings) + bool(secret)
            self._forms[groups] = _Form(
                command.request,
                struct,
                tuple((m.name, first + place) for place, m in enumerate(strings)),
                secret.name if secret else None,
            )
        self._match = re.compile(b'\\{"execute": ?"(?:%s)' % b"|".join(patterns or [b"(?!)"])).match

    def __call__(self, line: memoryview) -> Struct | None:
        """Return the request of a line, None to decline."""
        match = self._match(line)
        if match is None:
            return None
        request_id: Raw | UnsetType = UNSET
        if line[match.end() :] != _PLAIN_END:
            end = _END.fullmatch(line, match.end())
            if end is None:
                return None
            start, stop = end.span(1)
            if start >= 0:
                request_id = Raw(line[start:stop])
        last: Any = match.lastindex
        request, struct, strings, secret = self._forms[last]
        arguments = struct(**{name: match[group].decode() for name, group in strings})
        if secret is not None:
            # By its place in the line: match[last] would copy it into the heap.
            start, stop = match.span(last)
            setattr(arguments, secret, Raw(line[start:stop]))
        return request(arguments, request_id)
