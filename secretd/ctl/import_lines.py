# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lines of `import`: they are read into locked memory, and decoded there.

The data of a line never becomes a str, and no error quotes it. bulk adds the secrets.
"""

import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from secretd.errors import UsageError
from secretd.memory.arena import LockedBuffer

LINE_BYTES: Final = 2 << 20
"""Bytes of a line of `import`: a secret of the largest size in base64, and its names."""

_NEWLINE: Final = re.compile(rb"\n")
_QUOTE: Final = ord('"')
_NUL: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_TEXT: Final = re.compile(
    rb'"(?:[ !#-\[\]-\x7f]++|\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4})|[\xc2-\xdf][\x80-\xbf]'
    rb"|(?:\xe0[\xa0-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]|\xed[\x80-\x9f])[\x80-\xbf]"
    rb'|(?:\xf0[\x90-\xbf]|[\xf1-\xf3][\x80-\xbf]|\xf4[\x80-\x8f])[\x80-\xbf]{2})*+"'
)
"""A string of JSON in UTF-8, so that secretd has no reason to quote a part of it in an error."""
_BOM: Final = b"\xef\xbb\xbf"
_OTHER_BOMS: Final = (b"\xff\xfe", b"\xfe\xff")
_MEMBERS: Final = ("id", "data", "format", "keyid", "iv", "qom-type", "expires-in")
_NAME_CHARACTERS: Final = 32
_BLANK: Final = re.compile(rb"[ \t\r]*")


def lines(fd: int, buffer: LockedBuffer) -> Iterator[memoryview]:
    """Yield the lines, each in locked memory until the next one is requested; a blank line is
    empty.
    """
    view, fill, ended = buffer.view, 0, False
    skipped = 0  # of a byte order mark
    begun = False
    while not ended:
        count = os.readv(fd, [view[fill:]])
        ended = count == 0
        fill += count
        if not begun and (fill >= len(_BOM) or ended):
            begun = True
            mark = bytes(view[: len(_BOM)])
            if mark[:2] in _OTHER_BOMS:
                raise UsageError("the lines are in UTF-16; UTF-8 is expected")
            skipped = len(_BOM) if mark == _BOM else 0
        start, skipped = skipped, 0
        for end in _ends(view[:fill], last=ended) if begun else ():
            if end - start > LINE_BYTES:
                raise UsageError(f"a line has more than {LINE_BYTES} bytes")
            line = view[start:end]
            yield line[:0] if _BLANK.fullmatch(line) else line
            start = min(end + 1, fill)
        if fill - start > LINE_BYTES:
            raise UsageError(f"a line has more than {LINE_BYTES} bytes")
        view[: fill - start] = view[start:fill]
        fill -= start


def _ends(view: memoryview, *, last: bool) -> Iterator[int]:
    """Yield the ends of lines."""
    end = 0
    for match in _NEWLINE.finditer(view):
        end = match.end()
        yield match.start()
    if last and end < len(view):
        yield len(view)


@cache
def _decoder() -> Any:
    """Return the decoder of a line, which leaves the data in place; msgspec is imported late."""
    import msgspec

    names = {"keyid": str, "iv": str, "format": str, "qom_type": str, "expires_in": int}
    fields = [("id", str), ("data", msgspec.Raw)] + [
        (n, kind | None, None) for n, kind in names.items()
    ]
    line = msgspec.defstruct("Line", fields, forbid_unknown_fields=True, rename="kebab")
    decoder = msgspec.json.Decoder(line)

    def decode(view: memoryview) -> Any:
        try:
            return decoder.decode(view)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None  # the error may quote the line

    return decode


def decoded(line: memoryview, where: str) -> Any:
    """Return the members of a line; its data stays in the line, with its escapes, which secretd
    decodes. Raises UsageError.
    """
    found = _decoder()(line)
    if found is None:
        raise UsageError(f"{where}: {_fault(line)}")
    if found.qom_type not in (None, "secret"):
        raise UsageError(f"{where}: qom-type must be secret")
    quoted = memoryview(found.data)
    if quoted[0] != _QUOTE:
        raise UsageError(f"{where}: data must be a string")
    if not _TEXT.fullmatch(quoted):
        raise UsageError(
            f"{where}: data is not valid JSON text in UTF-8; give other bytes in base64, with "
            '"format": "base64"'
        )
    if found.format not in (None, "raw", "base64"):
        raise UsageError(f"{where}: format must be raw or base64")
    if _NUL.search(quoted):
        raise UsageError(
            f"{where}: data has a \\u0000, which QMP cannot carry; give it in base64, with "
            '"format": "base64"'
        )
    return found


def _fault(line: memoryview) -> str:
    """Return what is wrong with a line that cannot be decoded: the member, and never a value."""
    import msgspec

    try:
        members = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        members = None
    if members is None:
        return (
            "not a secret: a JSON object is expected with id, data and, as needed, format, keyid, "
            "iv and expires-in"
        )
    for name in members:
        if name not in _MEMBERS:
            shown = name if name.isprintable() and len(name) <= _NAME_CHARACTERS else "?"
            return f"the member '{shown}' is unexpected; a line has {', '.join(_MEMBERS)}"
    missing = [name for name in ("id", "data") if name not in members]
    if missing:
        return f"the member '{missing[0]}' is missing"
    for name, raw in members.items():
        number = name == "expires-in"
        first = memoryview(raw)[0]
        if number and not chr(first).isdecimal():
            return f"the member '{name}' must be a number of seconds"
        if not number and name != "data" and first != _QUOTE:
            return f"the member '{name}' must be a string"
    return "a member has a value that cannot be read"
