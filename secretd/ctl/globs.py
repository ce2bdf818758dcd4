# SPDX-License-Identifier: LGPL-2.1-or-later
"""Patterns of ids on the command line, as grants have them: * is any text, ? one character."""

import re
from collections.abc import Iterable

from secretd.errors import UsageError


def is_pattern(text: str) -> bool:
    """Return True if the text may match other texts than itself."""
    return "*" in text or "?" in text


def pattern(text: str) -> "re.Pattern[str]":
    """Return the expression whose fullmatch() is the match of a pattern."""
    parts = {"*": ".*", "?": "."}
    return re.compile("".join(parts.get(c) or re.escape(c) for c in text), re.DOTALL)


def chosen(patterns: Iterable[str], ids: Iterable[str]) -> list[str]:
    """Return the ids that patterns name, each once; an id that is no pattern names itself.

    Raises UsageError for a pattern that matches nothing.
    """
    known = list(ids)
    found: dict[str, None] = {}
    for text in patterns:
        if not is_pattern(text):
            found[text] = None
            continue
        fits = pattern(text)
        matching = [each for each in known if fits.fullmatch(each)]
        if not matching:
            raise UsageError(f"no secret matches '{text}'")
        found.update(dict.fromkeys(matching))
    return list(found)
