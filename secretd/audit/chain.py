# SPDX-License-Identifier: LGPL-2.1-or-later
"""The chain that links the lines of an audit file, and its verification.

Each line is a JSON object whose last member is the SHA-256 of the previous line and of the line
itself without that member. It is called ``hash``, or ``mac`` where it is an HMAC under a key.
audit.log writes with this module, and secretctl verifies with it; it opens nothing.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

GENESIS: Final = "0" * 64
"""The link before the very first record."""

FIRST_EVENTS: Final = ("start", "reopen")
"""The events that begin a file or a run; their ``prev`` is the last member of the previous
record.
"""

LAST_EVENTS: Final = ("stop", "rotate")
"""The events that end a run or a file."""

_LINE: Final = re.compile(rb'(\{.*),"(hash|mac)":"([0-9a-f]{64})"\}', re.DOTALL)


def link(previous: str, body: bytes, key: memoryview | None) -> str:
    """Return the last member of a record; ``body`` is the line without it."""
    text = previous.encode() + body
    if key is None:
        return hashlib.sha256(text).hexdigest()
    return hmac.digest(key, text, "sha256").hex()


def write(previous: str, members: str, key: memoryview | None) -> tuple[str, str]:
    """Return a whole line, and the link for the next one.

    ``members``: the text between the braces of a record's JSON.
    """
    if key is None:
        head = hashlib.sha256(f"{previous}{{{members}}}".encode()).hexdigest()
        return f'{{{members},"hash":"{head}"}}\n', head
    head = link(previous, f"{{{members}}}".encode(), key)
    return f'{{{members},"mac":"{head}"}}\n', head


class ChainedLine(NamedTuple):
    """A parsed line. ``link``: its last member, an HMAC if ``keyed``."""

    body: bytes
    members: dict[str, Any]
    link: str
    keyed: bool

    @property
    def number(self) -> int:
        """The number that the record claims."""
        number = self.members.get("seq")
        return number if isinstance(number, int) else -1


def read(line: bytes) -> ChainedLine | None:
    """Return the record in a line, None if there is none."""
    match = _LINE.fullmatch(line.rstrip(b"\n"))
    if match is None:
        return None
    try:
        members = json.loads(match[1] + b"}")
    except (ValueError, RecursionError):
        return None
    return ChainedLine(match[1] + b"}", members, match[3].decode(), match[2] == b"mac")


class Finding(NamedTuple):
    """A fault of the line ``number``, counted from 1."""

    number: int
    words: str


class Verification:
    """Checks the lines of one or several files of a chain, oldest first.

    ``key``: the HMAC's key, None for a chain of hashes. ``continues``: the records before the first
    are known to be elsewhere. A chain may change from hashes to a key, but not back.
    """

    def __init__(self, key: memoryview | None, *, continues: bool = False) -> None:
        self._key = key
        self._continues = continues
        self._keyed = False  # a record under a key was seen
        self._previous: str | None = None
        self.last: ChainedLine | None = None
        self.records = 0
        self.head = GENESIS

    def findings(self, lines: Iterable[bytes]) -> Iterator[Finding]:
        """Yield the faults, in order."""
        for number, line in enumerate(lines, 1):
            record = read(line)
            if record is not None and line.endswith(b"\n"):
                words = self._judge(record)
                self.records += 1
                self.last = record
                self._previous = self.head = record.link
            elif line.endswith(b"\n"):
                words = "this is not an audit record"
            else:
                words = f"cut after {len(line)} bytes, in the middle of a record"
            if words:
                yield Finding(number, words)

    def _judge(self, record: ChainedLine) -> str:
        """Return the fault of a record, given those before it; "" if there is none."""
        # 1. Its predecessor: the first record of a file or run names it in ``prev``.
        members, number = record.members, record.number
        follows = self._previous
        begins = members.get("event") in FIRST_EVENTS
        if begins:
            before, follows = follows, str(members.get("prev"))
            if before is not None and follows != before:
                return (
                    self._out_of_place(number)
                    or f"record {number} does not follow the previous line"
                )
        elif follows is None:
            return (
                f"the chain begins in the middle, with record {number}: the earlier records are "
                "missing"
            )
        # 2. Hash or key. A chain may change from hashes to a key only.
        if self._key is None and record.keyed:
            first, self._keyed = not self._keyed, True
            if out_of_place := self._out_of_place(number):
                return out_of_place
            return (
                f"the records from {number} on need a key; give it with --key or --key-file" * first
            )
        if record.keyed:
            self._keyed = True
        elif self._keyed:
            return f"record {number} is not under the key"
        # 3. The link, and the number.
        if link(follows, record.body, self._key if record.keyed else None) != record.link:
            return (
                self._out_of_place(number)
                or f"record {number} was changed, or is under another key"
            )
        if begins and self.last is None and not self._continues and follows != GENESIS:
            return (
                f"the chain begins with record {number}: earlier records are in another file or "
                "missing"
            )
        return self._out_of_place(number)

    def unkeyed(self) -> bool:
        """True if a key was given, and no record uses it."""
        return self._key is not None and not self._keyed

    def _out_of_place(self, number: int) -> str:
        if self.last is None or number == self.last.number + 1:
            return ""
        before = self.last.number
        if number <= before:
            return f"record {number} follows record {before}: out of order or repeated"
        missing = f"record {before + 1} is" if number == before + 2 else None
        return (
            f"{missing or f'records {before + 1} to {number - 1} are'} missing before record "
            f"{number}"
        )
