# SPDX-License-Identifier: LGPL-2.1-or-later
"""The chain that holds the lines of an audit file together, and its verification.

Each line is a JSON object whose last member is the SHA-256 of the line before it and of the line
itself without that member: ``hash``, or ``mac`` where it is an HMAC under a key, which only who has
the key can make. audit writes with it, ctl verifies; it opens nothing.
"""

import hashlib
import hmac
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

GENESIS: Final = "0" * 64
"""What stands before the first record of all."""

FIRST_EVENTS: Final = ("start", "reopen")
"""The events that begin a file or a run; their ``prev`` is what the record before has as its last
member.
"""

LAST_EVENTS: Final = ("stop", "rotate")
"""The events that end a run or a file."""

_LINE: Final = re.compile(rb'(\{.*),"(hash|mac)":"([0-9a-f]{64})"\}', re.DOTALL)


def link(previous: str, body: bytes, key: memoryview | None) -> str:
    """Return the last member of a record: ``body`` is the line without it."""
    text = previous.encode() + body
    if key is None:
        return hashlib.sha256(text).hexdigest()
    return hmac.digest(key, text, "sha256").hex()


def write(previous: str, members: str, key: memoryview | None) -> tuple[str, str]:
    """Return a whole line, and what the next one is linked to. ``members``: what stands between the
    braces of a record's JSON.
    """
    if key is None:
        head = hashlib.sha256(f"{previous}{{{members}}}".encode()).hexdigest()
        return f'{{{members},"hash":"{head}"}}\n', head
    head = link(previous, f"{{{members}}}".encode(), key)
    return f'{{{members},"mac":"{head}"}}\n', head


class ChainedLine(NamedTuple):
    """A line as it was read. ``link``: its last member, an HMAC if ``keyed``."""

    body: bytes
    members: dict[str, Any]
    link: str
    keyed: bool

    @property
    def number(self) -> int:
        """Which record of the chain it says it is."""
        number = self.members.get("seq")
        return number if isinstance(number, int) else -1


def read(line: bytes) -> ChainedLine | None:
    """Return the record in a line, None if it is none."""
    match = _LINE.fullmatch(line.rstrip(b"\n"))
    if match is None:
        return None
    try:
        members = json.loads(match[1] + b"}")
    except (ValueError, RecursionError):
        return None
    return ChainedLine(match[1] + b"}", members, match[3].decode(), match[2] == b"mac")


class Finding(NamedTuple):
    """Something wrong with the line ``number``, counted from 1."""

    number: int
    words: str


class Verification:
    """Goes through lines of one or several files of a chain, oldest first.

    ``continues``: what came before is known to be elsewhere. A chain may go from hashes to a key,
    not back.
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
        """Yield what is wrong, in order."""
        for number, line in enumerate(lines, 1):
            record = read(line)
            if record is not None and line.endswith(b"\n"):
                words = self._judge(record)
                self.records += 1
                self.last = record
                self._previous = self.head = record.link
            elif line.endswith(b"\n"):
                words = "this is no audit record"
            else:
                words = f"cut after {len(line)} bytes, in the middle of a record"
            if words:
                yield Finding(number, words)

    def _judge(self, record: ChainedLine) -> str:
        """Return what is wrong with a record, given those before; "" if nothing is."""
        members, number = record.members, record.number
        follows = self._previous
        begins = members.get("event") in FIRST_EVENTS
        if begins:
            before, follows = follows, str(members.get("prev"))
            if before is not None and follows != before:
                return (
                    self._out_of_place(number) or f"record {number} does not follow the line before"
                )
        elif follows is None:
            return (
                f"the chain begins in the middle, with record {number}: what came before is missing"
            )
        if self._key is None and record.keyed:
            first, self._keyed = not self._keyed, True
            if out_of_place := self._out_of_place(number):
                return out_of_place
            return f"from record {number} on they are under a key, and none was given" * first
        if record.keyed:
            self._keyed = True
        elif self._keyed:
            return f"record {number} is not under the key"
        if link(follows, record.body, self._key if record.keyed else None) != record.link:
            return (
                self._out_of_place(number)
                or f"record {number} was changed, or is under another key"
            )
        if begins and self.last is None and not self._continues and follows != GENESIS:
            return f"the chain begins with record {number}: what came before is in another file, or missing"
        return self._out_of_place(number)

    def unkeyed(self) -> bool:
        """True if a key was given, and no record is under it."""
        return self._key is not None and not self._keyed

    def _out_of_place(self, number: int) -> str:
        if self.last is None or number == self.last.number + 1:
            return ""
        before = self.last.number
        if number <= before:
            return f"record {number} stands after record {before}: out of order, or there twice"
        missing = f"record {before + 1} is" if number == before + 2 else None
        return f"{missing or f'records {before + 1} to {number - 1} are'} missing before record {number}"
