# SPDX-License-Identifier: LGPL-2.1-or-later
"""An optimisation in front of fast_decoder: one regular expression for the lines of a few commands.

A form is a line as JSON writers make it: the command, its one required argument, which is a string,
then the argument that carries the secret, if the command has one; then the id, if there is one.
Strings are plain ASCII without escapes, so that a match is the value. FastDecoder decodes each of
these lines in the same way, in three times the time; a property test holds them equal.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from msgspec import UNSET, Raw, Struct, UnsetType

from secretd.qapi.command import Command
from secretd.qapi.visitor import alternatives, members

_STRING: Final = rb'"([ !#-\[\]-~]{1,128})"'
_SECRET: Final = rb'("[ !#-\[\]-~]*")'
_PLAIN_END: Final = memoryview(b"}\n")
_END: Final = re.compile(rb'(?:, ?"id": ?("[ !#-\[\]-~]{0,64}"|[1-9][0-9]{0,8}))?\}\r?\n')


class _Form(NamedTuple):
    """``string``: the name of the string argument, and its group; ``secret``: its name."""

    request: type[Struct]
    arguments: type[Struct]
    string: str
    group: int
    secret: str | None


class UsualLines:
    """Decodes the usual lines of some commands.

    ``usual``: their names, each with the value of the argument that selects the other arguments, ""
    if there is none. ``others``: decodes the lines that have no such form, or declines. ``rpc``:
    the lines are JSON-RPC's.
    """

    def __init__(
        self,
        commands: Iterable[Command],
        usual: Iterable[tuple[str, str]],
        others: Callable[[memoryview], Struct | None],
        *,
        rpc: bool = False,
    ) -> None:
        self._others = others
        self._before = ("2.0",) if rpc else ()  # values of the request before its arguments
        head, place = (
            (b'"jsonrpc": ?"2[.]0", ?"method": ?', b"params")
            if rpc
            else (b'"execute": ?', b"arguments")
        )
        by_name = {command.name: command for command in commands}
        self._forms: dict[int, _Form] = {}  # by the last group of each
        patterns = []
        groups = 0
        for name, tag in usual:
            command = by_name.get(name)
            request = command and (command.rpc_request if rpc else command.request)
            if command is None or request is None:
                continue
            struct = command.arguments[tag]
            (string,) = [m for m in members(struct) if m.required]
            assert alternatives(string.hint) == [str]
            secret = next((m for m in members(struct) if Raw in alternatives(m.hint)), None)
            parts = [b'"%s": ?"%s"' % (command.tag_field.encode(), tag.encode())] if tag else []
            parts += [b'"%s": ?%s' % (string.wire_name.encode(), _STRING)]
            parts += [b'"%s": ?%s' % (secret.wire_name.encode(), _SECRET)] if secret else []
            patterns.append(b'%s", ?"%s": ?\\{%s\\}' % (name.encode(), place, b", ?".join(parts)))
            group, groups = groups + 1, groups + 1 + bool(secret)
            self._forms[groups] = _Form(
                request, struct, string.name, group, secret.name if secret else None
            )
        any_form = b"|".join(patterns or [b"(?!)"])
        self._match = re.compile(b'\\{%s"(?:%s)' % (head, any_form)).match

    def decode(self, line: memoryview) -> Struct | None:
        """Return the request of a line, None to decline."""
        match = self._match(line)
        if match is None:
            return self._others(line)
        request_id: Raw | UnsetType = UNSET
        if line[match.end() :] != _PLAIN_END:
            end = _END.fullmatch(line, match.end())
            if end is None:
                return self._others(line)
            start, stop = end.span(1)
            if start >= 0:
                request_id = Raw(line[start:stop])
        last: Any = match.lastindex
        request, struct, string, group, secret = self._forms[last]
        arguments = struct(**{string: match[group].decode()})
        if secret is not None:
            # By its place in the line: match[last] would copy it into the heap.
            start, stop = match.span(last)
            setattr(arguments, secret, Raw(line[start:stop]))
        return request(*self._before, arguments, request_id)
