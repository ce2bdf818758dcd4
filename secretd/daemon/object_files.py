# SPDX-License-Identifier: LGPL-2.1-or-later
"""The objects of a directory of JSON files, such as /etc/secretd/objects.d.

Each file has objects with the arguments of object-add: one, several one after the other, or an
array of them. Files are read in the order of their names. A file is not a place for a value:
secrets name another file. initial_objects creates what this module reads.
"""

import os
import re
import stat
from collections.abc import Iterator
from typing import Final, NamedTuple

from msgspec import UNSET

from secretd.descriptors.source import read_path
from secretd.errors import CommandError, SourceError, UsageError
from secretd.limits import Tuning
from secretd.memory.arena import Arena
from secretd.monitor.commands import COMMANDS
from secretd.qapi.command import check
from secretd.qapi.visitor import JSON_VISITOR
from secretd.qom.object_type import ObjectOptions
from secretd.qom.secret import SecretOptions
from secretd.wire.lexer import NeedData, Streamer
from secretd.wire.parser import JSON, Fault

_BLANK: Final = re.compile(rb"[ \t\r\n]*")
_NEWLINE: Final = re.compile(rb"\n")


class Place(NamedTuple):
    """A line of a file."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class ObjectInFile(NamedTuple):
    """An object, and the place at which it begins."""

    place: Place
    options: ObjectOptions


def read_directory(directory: str, scratch: Arena) -> Iterator[ObjectInFile]:
    """Yield the objects of all files NAME.json in a directory, which need not exist.

    Raises UsageError that names file and line.
    """
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"--object-dir {directory}: {error.strerror}") from None
    for name in names:
        if name.endswith(".json") and not name.startswith("."):
            yield from _read_file(os.path.join(directory, name), scratch)


def _read_file(path: str, scratch: Arena) -> Iterator[ObjectInFile]:
    try:
        status = os.stat(path)
        content = read_path(path, scratch, Tuning.source_seconds, magic_links=False)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except SourceError as error:
        raise UsageError(str(error)) from None
    with content:
        if status.st_uid not in (0, os.getuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UsageError(
                f"{path}: other users can change it (uid {status.st_uid}, mode "
                f"{status.st_mode & 0o7777:04o}); make it root's, and writable for root only"
            )
        # Between two spare bytes.
        for line, members in _objects(path, content.view[1:-1]):
            yield ObjectInFile(Place(path, line), _options(Place(path, line), members))


def _options(place: Place, members: dict[str, JSON]) -> ObjectOptions:
    try:
        options = check(COMMANDS.by_name["object-add"], members, JSON_VISITOR)
    except CommandError as error:
        raise UsageError(f"{place}: {error.desc}") from None
    assert isinstance(options, ObjectOptions)
    if isinstance(options, SecretOptions) and options.data is not UNSET:
        raise UsageError(
            f"{place}: the value of '{options.id}' must not be in this file; put it into another "
            "one, and name that with 'file'"
        )
    return options


def _objects(path: str, view: memoryview) -> Iterator[tuple[int, dict[str, JSON]]]:
    """Yield the objects of a text, each with the line at which it begins."""
    end = len(view)

    def skipped(position: int) -> int:
        match = _BLANK.match(view, position)
        assert match is not None
        return match.end()

    def line_of(position: int) -> int:
        return 1 + sum(1 for _ in _NEWLINE.finditer(view, 0, position))

    def wrong(position: int, words: str) -> UsageError:
        return UsageError(f"{path}:{line_of(position)}: {words}")

    position = skipped(0)
    in_array = position < end and view[position] == ord("[")
    if in_array:
        position = skipped(position + 1)
    while position < end:
        # 1. The end of the array, or an object.
        if in_array and view[position] == ord("]"):
            rest = skipped(position + 1)
            if rest < end:
                raise wrong(rest, "nothing is expected after the array")
            return
        if view[position] != ord("{"):
            raise wrong(position, "a JSON object is expected, with the arguments of object-add")
        begun = position
        position, value = Streamer(end + 1).next(view, position, end)
        if isinstance(value, NeedData):
            raise wrong(begun, "the object that begins here has no end")
        if isinstance(value, Fault):
            raise wrong(position, value.before.rstrip("'").rstrip(" ,"))
        assert isinstance(value, dict)
        yield line_of(begun), value
        # 2. What separates it from the next one.
        position = skipped(position)
        if in_array and position < end and view[position] == ord(","):
            position = skipped(position + 1)
            if position < end and view[position] == ord("]"):
                raise wrong(position, "an object is expected after the comma")
        elif in_array and position < end and view[position] != ord("]"):
            raise wrong(position, "a comma or the end of the array is expected")
    if in_array:
        raise wrong(end, "the array has no end")
