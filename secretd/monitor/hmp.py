# SPDX-License-Identifier: LGPL-2.1-or-later
"""The human monitor, as far as qmp-shell -H needs it (QEMU's monitor/hmp.c).

One line in, text out. The functions of the QMP commands execute the line; the command
human-monitor-command calls this module. A line may hold a secret: it stays where it was received.
"""

import itertools
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

from secretd.errors import CommandError, UsageError
from secretd.monitor.core import QEMU_VERSION
from secretd.monitor.monitor import Monitor
from secretd.qapi import keyval
from secretd.qapi.command import check
from secretd.qapi.keyval import KeyvalError
from secretd.qom.identifiers import with_hint

QUOTED_BYTES: Final = 4
"""Bytes of a line's own text that an error quotes, since they may belong to a secret. QEMU quotes
all.
"""

QUOTED_WORD_BYTES: Final = 7
"""Bytes of an unknown command that is quoted whole; a longer one may be part of a secret, and is
cut like any text.
"""

SECRETS_PER_LISTING: Final = 1000
"""Secrets that `info secrets` lists: more would not fit into a reply."""

Output: TypeAlias = "str | Awaitable[str]"
Table: TypeAlias = Mapping[str, "Word"]

_BLANKS: Final = re.compile(rb"[ \t\n\v\f\r]*")
_NAME: Final = re.compile(rb"[^ \t\n\v\f\r/]*")
_WORD: Final = re.compile(rb"[^ \t\n\v\f\r]+")
_ARGUMENT: Final = re.compile(
    rb'"(?:[^"\\]|\\.){0,4096}"|[^" \t\n\v\f\r][^ \t\n\v\f\r]*', re.DOTALL
)
_UNEXPECTED: Final = re.compile(
    r"(?s)^(Parameters? ')(.*?)((?:\.\*)?' (?:is unexpected|are unexpected|used inconsistently))$"
)
_ESCAPES: Final = {b"\\n": b"\n", b"\\r": b"\r", b"\\\\": b"\\", b"\\'": b"'", b'\\"': b'"'}
_EXTRANEOUS: Final = "extraneous characters at the end of line"
_EXPECTED: Final = "string expected"


class Word(NamedTuple):
    """A command of the human monitor.

    ``run``: takes the session and a view of the rest of the line, with a spare byte on each side.
    """

    names: tuple[str, ...]
    arguments: str
    help: str
    run: Callable[[Monitor, memoryview], Output]

    @property
    def line(self) -> str:
        """The command's line in the help."""
        return f"{'|'.join(self.names)} {self.arguments} -- {self.help}\n"


class _Refused(Exception):
    """The arguments are wrong; the text says how."""


def execute(monitor: Monitor, line: memoryview) -> Output:
    """Execute a line and return its output. ``line`` has a spare byte on each side.

    Errors are part of the output, as in QEMU; all lines end in CR LF.
    """
    try:
        printed = _dispatch(monitor, line)
    except CommandError as error:
        printed = _error(error)
    return _crlf(printed) if isinstance(printed, str) else _later(printed)


async def _later(printed: Awaitable[str]) -> str:
    try:
        return _crlf(await printed)
    except CommandError as error:
        return _crlf(_error(error))


def _crlf(text: str) -> str:
    return text.replace("\n", "\r\n")


def _shortened(match: "re.Match[str]") -> str:
    before, name, after = match.groups()
    return match[0] if len(name) <= QUOTED_BYTES else f"{before}{name[:QUOTED_BYTES]}…{after}"


def _text(word: bytes) -> str:
    return word.replace(b"\xc0\x80", b"\0").decode(errors="replace")


def _error(error: CommandError) -> str:
    return f"Error: {with_hint(str(error))}\n"


def _dispatch(monitor: Monitor, line: memoryview) -> Output:
    end = len(line) - 1
    start = _after_blanks(line, 1)
    name, at = _name(line, start)
    if start == end:
        return ""
    word = _found(_WORDS, name)
    if word is _INFO:
        if _after_blanks(line, at) == end:
            return _help_of(_ABOUT, "info ")
        start = _after_blanks(line, at)
        name, at = _name(line, start)
        word = _found(_ABOUT, name)
    # QEMU quotes the line from its start, blanks included (monitor_parse_command()).
    before = _text(bytes(line[1:start]))
    if word is None:
        return _unknown(before, name)
    try:
        return word.run(monitor, line[at - 1 :])
    except _Refused as error:
        path = f"{before}{_text(bytes(name))}"
        return f'{"|".join(word.names)}: {error}\nTry "help {path}" for more information\n'


def _unknown(before: str, word: memoryview) -> str:
    """Return the error of an unknown command; ``before``: the text in front of the word."""
    if len(word) <= QUOTED_WORD_BYTES:
        shown = _text(bytes(word))
    else:
        shown = f"{_text(bytes(word[:QUOTED_BYTES]))}…"
    return f"unknown command: '{before}{shown}'\n"


def _after_blanks(line: memoryview, at: int) -> int:
    """Return the position of the next character that is not blank, at the latest the spare byte."""
    return _BLANKS.match(line, at, len(line) - 1).end()  # type: ignore[union-attr]


def _found(table: Table, name: memoryview) -> Word | None:
    """Return the command of this name. A longer word may belong to a secret, and is not copied."""
    return table.get(_text(bytes(name))) if len(name) <= _LONGEST_NAME else None


def _name(line: memoryview, at: int) -> tuple[memoryview, int]:
    """Return the name of a command, and its end: get_command_name()."""
    match = _NAME.match(line, at, len(line) - 1)
    assert match is not None
    return line[at : match.end()], match.end()


def _help_of(table: Table, prefix: str = "") -> str:
    return "".join(f"{prefix}{word.line}" for word in dict.fromkeys(table.values()))


def _arguments(rest: memoryview, most: int) -> list[str]:
    """Return the words of the rest of the line: get_str() of monitor/hmp.c.

    Raises _Refused if there are more than ``most``.
    """
    found: list[str] = []
    at = 1
    while (at := _after_blanks(rest, at)) < len(rest) - 1:
        if len(found) == most:
            raise _Refused(_EXTRANEOUS)
        match = _ARGUMENT.match(rest, at, len(rest) - 1)
        if match is None:
            raise _Refused(_EXPECTED)
        found.append(_text(_unquoted(match[0])))
        at = match.end()
    return found


def _unquoted(word: bytes) -> bytes:
    if not word.startswith(b'"'):
        return word
    pieces = re.split(rb"(\\.)", word[1:-1], flags=re.DOTALL)
    try:
        pieces[1::2] = [_ESCAPES[escape] for escape in pieces[1::2]]
    except KeyError:
        raise _Refused(_EXPECTED) from None
    return b"".join(pieces)


# --- the words


def _help(_monitor: Monitor, rest: memoryview) -> str:
    found = itertools.islice(_WORD.finditer(rest, 1, len(rest) - 1), 2)
    names = [rest[match.start() : match.end()] for match in found]
    if not names:
        return _help_of(_WORDS)
    word = _found(_WORDS, names[0])
    if word is not _INFO:
        return _unknown("", names[0]) if word is None else word.line
    if len(names) == 1:
        return _help_of(_ABOUT, "info ")
    word = _found(_ABOUT, names[1])
    return _unknown("info ", names[1]) if word is None else f"info {word.line}"


def _object_add(monitor: Monitor, rest: memoryview) -> Output:
    start = _after_blanks(rest, 1)
    if start == len(rest) - 1:
        raise _Refused(_EXPECTED)
    command = monitor.table.by_name["object-add"]
    try:
        given = keyval.arguments(rest[start - 1 :])
    except KeyvalError as error:
        return f"Error: {error.words(QUOTED_BYTES)}\n"
    except UsageError as error:
        return f"Error: {_UNEXPECTED.sub(_shortened, str(error))}\n"
    if given.help:
        return monitor.tree.types.help(given.members.get("qom-type"))
    try:
        options = check(command, given.members, given.visitor)
    except CommandError as error:
        raise CommandError(_UNEXPECTED.sub(_shortened, error.desc)) from None
    return _silent(command.function(monitor, options))


def _silent(outcome: Awaitable[None] | None) -> Output:
    """Return no output, maybe later."""

    async def later(done: Awaitable[None]) -> str:
        await done
        return ""

    return "" if outcome is None else later(outcome)


def _object_del(monitor: Monitor, rest: memoryview) -> Output:
    words = _arguments(rest, 1)
    if not words:
        raise _Refused(_EXPECTED)
    return _silent(monitor.table.by_name["object-del"].function(monitor, *words))


def _quit(monitor: Monitor, rest: memoryview) -> str:
    _arguments(rest, 0)
    monitor.table.by_name["quit"].function(monitor)
    return ""


def _info_version(monitor: Monitor, rest: memoryview) -> str:
    _arguments(rest, 0)
    return f"{'.'.join(map(str, QEMU_VERSION))}{monitor.core.package}\n"


def _info_name(_monitor: Monitor, rest: memoryview) -> str:
    _arguments(rest, 0)
    return ""


def _info_secrets(monitor: Monitor, rest: memoryview) -> str:
    _arguments(rest, 0)
    lines = []
    for object_id in monitor.core.access.readable_after(monitor.peer, ""):
        if object_id is None:
            continue
        qom_type, size = monitor.tree.secret(object_id)
        lines.append(f"{object_id}: {qom_type}, {size} bytes, memory {monitor.core.memory}\n")
        if len(lines) > SECRETS_PER_LISTING:
            raise CommandError(
                f"There are more secrets than the limit of {SECRETS_PER_LISTING}; "
                "query-secrets lists any number in pieces"
            )
    return "".join(lines)


def _table(*words: Word) -> Table:
    return {name: word for word in words for name in word.names}


_INFO: Final = Word(
    ("info",), "[subcommand]", "show various information about the system state", _help
)
_WORDS: Final = _table(
    Word(("help", "?"), "[cmd]", "show the help", _help),
    _INFO,
    Word(
        ("object_add",),
        "[qom-type=]type,id=str[,prop=value][,...]",
        "create QOM object",
        _object_add,
    ),
    Word(("object_del",), "id", "destroy QOM object", _object_del),
    Word(("quit", "q"), "", "quit secretd", _quit),
)
_ABOUT: Final = _table(
    Word(("name",), "", "show the current VM name", _info_name),
    Word(("secrets",), "", "show the secrets", _info_secrets),
    Word(("version",), "", "show the version of QEMU", _info_version),
)
_LONGEST_NAME: Final = max(map(len, (*_WORDS, *_ABOUT)))
