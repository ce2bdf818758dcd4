# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line's ``secret,id=x,file=y`` and JSON (QEMU's util/keyval.c).

Text to arguments and back; what the arguments mean is said elsewhere. daemon calls it.
"""

import re
from typing import Final

from secretd.errors import UsageError
from secretd.wire import encode
from secretd.wire.parser import JSON, Fault
from secretd.wire.qjson import NEED_DATA, Streamer

_KEY: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]*(?:\.(?:[0-9]+|[A-Za-z][A-Za-z0-9_-]*))*")


def parse(text: str, implied_key: str) -> dict[str, str]:
    """Return the members of ``[VALUE,]KEY=VALUE,…`` where ``,,`` is a comma; the last of a key wins.

    Raises UsageError in QEMU's words.
    """
    members: dict[str, str] = {}
    rest = text
    first = True
    while rest:
        key, found, after = _cut(rest)
        if found == "=":
            if not _KEY.fullmatch(key):
                raise UsageError(f"Invalid parameter '{key}'")
        elif first:
            key, after = implied_key, rest
        else:
            if not _KEY.fullmatch(key):
                raise UsageError(f"Invalid parameter '{key}'")
            raise UsageError(f"Expected '=' after parameter '{key}'")
        members[key], rest = _value(after)
        first = False
    return members


def _cut(text: str) -> tuple[str, str, str]:
    match = re.search("[=,]", text)
    if match is None:
        return text, "", ""
    return text[: match.start()], match[0], text[match.end() :]


def _value(text: str) -> tuple[str, str]:
    """Return the value up to a single comma, and what follows that."""
    end = 0
    while True:
        end = text.find(",", end)
        if end < 0:
            return text.replace(",,", ","), ""
        if text[end : end + 2] != ",,":
            return text[:end].replace(",,", ","), text[end + 1 :]
        end += 2


def arguments(text: str) -> dict[str, JSON]:
    """Return the arguments of ``--object TEXT``: JSON if it starts with a brace, else keyval.

    The values are as the wire's parser gives them. Raises UsageError in QEMU's words.
    """
    if not text.startswith("{"):
        text = encode.value(parse(text, "qom-type"))
    view = memoryview(bytearray(text.encode(errors="surrogateescape")))
    streamer = Streamer()
    position, message = streamer.next(view, 0, len(view))
    if message is NEED_DATA:
        raise UsageError("JSON parse error, premature EOI")
    if isinstance(message, Fault):
        quote = "" if message.quote is None else bytes(message.quote).decode(errors="replace")
        raise UsageError(f"{message.before}{quote}{message.after}")
    if bytes(view[position:]).strip():
        raise UsageError("Expecting at most one JSON value")
    assert isinstance(message, dict)
    return message


def compose(members: dict[str, str], implied_key: str) -> str:
    """Return the text that `parse` reads as ``members``."""
    parts = [members[implied_key].replace(",", ",,")] if implied_key in members else []
    parts += [
        f"{key}={value.replace(',', ',,')}" for key, value in members.items() if key != implied_key
    ]
    return ",".join(parts)
