# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reply to a JSON-RPC batch: an array that is sent member by member.

session queues the members like requests that wait, and asks this module for the text around each
reply. Events that come meanwhile follow the array.
"""

from typing import Final

DEFERRED_EVENTS: Final = 1000
"""Events that wait for the end of a batch; further ones are lost and counted."""


class BatchReply:
    """The array of one batch. ``events``: texts and numbers of deferred events."""

    def __init__(self) -> None:
        self._sent = 0
        self.events: list[tuple[bytes, int]] = []

    def framed(self, reply: bytes) -> bytes:
        """Return a reply as a member of the array; nothing for a notification, which has none."""
        if not reply:
            return reply
        self._sent += 1
        return (b"[" if self._sent == 1 else b", ") + reply.rstrip(b"\n")

    def defer(self, events: bytes, count: int) -> bool:
        """Keep events for later; return False without room."""
        if sum(number for _, number in self.events) + count > DEFERRED_EVENTS:
            return False
        self.events.append((events, count))
        return True

    def deferred(self) -> tuple[bytes, int]:
        """Return all deferred events as one text, so that none meets a full socket that the others
        filled; and their number.
        """
        return b"".join(text for text, _ in self.events), sum(number for _, number in self.events)

    @property
    def end(self) -> bytes:
        """The end of the array; nothing if all members were notifications."""
        return b"]\n" if self._sent else b""


class BatchEnd:
    """Stands in the queue behind the members of a batch."""


BATCH_END: Final = BatchEnd()
