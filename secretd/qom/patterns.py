# SPDX-License-Identifier: LGPL-2.1-or-later
"""GLib's patterns (g_pattern_match_simple()): ``*`` is any text, ``?`` one character, others
literal.

Matching time is bounded by the product of the lengths, whatever the pattern: users choose names of
units that are matched against an administrator's patterns. This module knows no ids and no
identities.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from operator import methodcaller
from typing import Final

PATTERN_CHARACTERS: Final = 4096
"""Characters of a pattern; longer ones would take too much of the loop's time."""

Match = Callable[[str], bool]


def is_pattern(text: str) -> bool:
    """Return True if the text may match other texts than itself."""
    return "*" in text or "?" in text


def literal_prefix(pattern: str) -> str:
    """Return the part of a pattern before its first ``*`` or ``?``."""
    return re.split("[*?]", pattern, maxsplit=1)[0]


@lru_cache(4096)
def matcher(pattern: str) -> Match:
    """Return the function that returns True for a matching text."""
    if not is_pattern(pattern):
        return pattern.__eq__
    if pattern.find("*") == len(pattern) - 1 and "?" not in pattern:
        return methodcaller("startswith", pattern[:-1])
    # Each piece between two asterisks has a fixed length: its first match is the best.
    first, *middle = [_piece(part) for part in pattern.split("*")]
    if not middle:
        return lambda text: first.fullmatch(text) is not None
    last, last_size = middle.pop(), len(pattern.rsplit("*", 1)[1])

    def matches(text: str) -> bool:
        found = first.match(text)
        for piece in middle:
            if found is None:
                return False
            found = piece.search(text, found.end())
        start = len(text) - last_size
        return found is not None and start >= found.end() and last.match(text, start) is not None

    return matches


def _piece(text: str) -> re.Pattern[str]:
    return re.compile("".join("." if c == "?" else re.escape(c) for c in text), re.DOTALL)
