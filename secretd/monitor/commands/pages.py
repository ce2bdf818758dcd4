# SPDX-License-Identifier: LGPL-2.1-or-later
"""Lists in pages of JSON text: query-secret-grants and query-secret-alias."""

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from secretd.monitor.monitor import Monitor
from secretd.net.loop import turn
from secretd.wire import encoder
from secretd.wire.encoder import JSONText

T = TypeVar("T")

PAGE_BYTES: Final = 48 << 10
"""Bytes of JSON text in one page; a single entry may have more."""


class Page(Generic[T]):
    """One reply: entries until there is no room."""

    def __init__(self) -> None:
        self._listed: list[str] = []
        self._room = PAGE_BYTES

    @property
    def text(self) -> JSONText[list[T]]:
        """The list as JSON."""
        return JSONText(f"[{', '.join(self._listed)}]")

    def fill(self, found: Iterator[T | None]) -> bool:
        """List entries until the page is full or none is left; return False to let others have
        their turn.
        """
        for each in found:
            if each is None:
                return False
            text = encoder.value(each)
            self._room -= len(text) + 2
            if self._listed and self._room < 0:
                break
            self._listed.append(text)
        return True


async def fill_later(
    page: Page[T], monitor: Monitor, found: Iterator[T | None]
) -> JSONText[list[T]]:
    """Fill a page in several turns; return its text."""
    done = False
    while not done:
        await turn(None if monitor.trusted else monitor.peer.uid)
        done = page.fill(found)
    return page.text
