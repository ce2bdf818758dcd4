# SPDX-License-Identifier: LGPL-2.1-or-later
"""An optimisation: read a usual command line without click, whose import takes half of the start.

The reference is frame. `read` may only accept a command line that click reads in the same way, or
decline. It declines whatever is not plain: options that are abbreviated, joined with "=" or given
twice, values that begin with a dash, missing parameters, help, and everything that is wrong.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from secretd.ctl.output import Common
from secretd.ctl.verb import COMMAND, Parameter, Verb
from secretd.ctl.verbs import MODULES, find

_SECONDS: Final = re.compile(r"[1-9][0-9]{0,8}(\.[0-9]{1,6})?", re.ASCII)
_INTEGER: Final = re.compile(r"0|[1-9][0-9]{0,17}", re.ASCII)


def read(words: Sequence[str]) -> tuple[Verb, dict[str, Any], Common] | None:
    """Return the verb of a command line, the values of its parameters, and the common options.

    Returns None for a command line that click should read.
    """
    # 1. The common options before the verb.
    common: dict[str, str] = {}
    rest = list(reversed(words))
    while rest and rest[-1] in ("--socket", "--timeout"):
        if not _take(rest, common):
            return None
    if not rest or rest[-1] not in MODULES:
        return None
    verb = find(rest.pop())
    # 2. The verb's options, and the same common ones.
    known = {name: each for each in verb.parameters for name in each.options}
    places = [each for each in verb.parameters if each.kind == "argument"]
    after: dict[str, str] = {}
    given: dict[str, Any] = {each.name: _default(each) for each in verb.parameters}
    seen: set[str] = set()
    arguments: list[str] = []
    json = False
    while rest:
        word = rest[-1]
        if word in ("--socket", "--timeout"):
            if not _take(rest, after):
                return None
            continue
        rest.pop()
        if word == "--json":
            json = True
        elif not word or word[0] == "-":
            if word not in known or not _option(known[word], rest, given, seen):
                return None
        else:
            arguments.append(word)
    # 3. Everything that must be there, and nothing else.
    if any(e.settings.get("required") and e.name not in seen for e in known.values()):
        return None
    if not _place(places, arguments, given):
        return None
    chosen = common | after
    timeout = chosen.get("timeout")
    if timeout is not None and not _SECONDS.fullmatch(timeout):
        return None
    seconds = None if timeout is None else float(timeout)
    return verb, given, Common(chosen.get("socket"), seconds, json)


def _default(parameter: Parameter) -> Any:
    if parameter.kind == "flag":
        return False
    many = parameter.settings.get("multiple") or parameter.settings.get("nargs") == -1
    return () if many else parameter.settings.get("default")


def _take(rest: list[str], into: dict[str, str]) -> bool:
    """Move a common option and its value; return False if that is not plain."""
    name = rest.pop()[2:]
    if name in into or not rest or not rest[-1] or rest[-1][0] == "-":
        return False
    into[name] = rest.pop()
    return True


def _option(parameter: Parameter, rest: list[str], given: dict[str, Any], seen: set[str]) -> bool:
    """Note an option and its value; return False if that is not plain."""
    name = parameter.name
    multiple = parameter.settings.get("multiple")
    if name in seen and not multiple:
        return False
    seen.add(name)
    if parameter.kind == "flag":
        given[name] = True
        return True
    if not rest or not rest[-1] or rest[-1][0] == "-":
        return False
    value = _value(parameter, rest.pop())
    given[name] = (*given[name], value) if multiple else value
    return value is not None


def _place(places: list[Parameter], arguments: list[str], given: dict[str, Any]) -> bool:
    """Note the arguments; return False if they are not as many as the verb has."""
    for parameter in places:
        settings = parameter.settings
        if settings.get("type") == COMMAND:
            return False
        if settings.get("nargs") == -1:
            if settings.get("required") and not arguments:
                return False
            given[parameter.name] = tuple(arguments)
            return parameter is places[-1]
        if not arguments:
            return "default" in settings and parameter is places[-1]
        given[parameter.name] = value = _value(parameter, arguments.pop(0))
        if value is None:
            return False
    return not arguments


def _value(parameter: Parameter, text: str) -> str | int | None:
    """Return the value of a parameter, None if click should read it."""
    kind = parameter.settings.get("type", str)
    if kind is int:
        return int(text) if _INTEGER.fullmatch(text) else None
    if isinstance(kind, tuple):
        return text if text in kind else None
    return text
