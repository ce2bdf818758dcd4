# SPDX-License-Identifier: LGPL-2.1-or-later
"""The replies of one session that wait for a store, in order.

Changes of a store are written in groups, so a client that sends many additions without waiting
should not wait for each. While an addition is being written, further additions are executed, and
their replies queue here; any other request waits until all are answered. session calls this module.
"""

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from secretd.errors import CommandError
from secretd.monitor.failures import safely
from secretd.monitor.outbox import Outbox
from secretd.net.transport import Transport
from secretd.store.commit import Commit

COMMITS_PER_SESSION: Final = 256
"""Replies of one session that wait for a store; at this number its connection is not read."""


class Stored(NamedTuple):
    """A reply that waits for a store: its change, and what makes the reply then."""

    commit: Commit
    reply: Callable[[Commit], bytes]


Waiting: TypeAlias = "bytes | Stored"


class Commits:
    """The queue of one session."""

    def __init__(self, outbox: Outbox, transport: Transport) -> None:
        self._outbox = outbox
        self._transport = transport
        self._queue: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, reply: Waiting) -> None:
        """Queue a reply."""
        self._queue.append(reply)

    async def drain(self, framed: Callable[[bytes], bytes]) -> None:
        """Give all replies to the outbox, in order, as they get ready."""
        while self._queue:
            reply = self._queue[0]
            if isinstance(reply, Stored) and not reply.commit.done:
                safely(self._transport, self._outbox.flush)
                with contextlib.suppress(CommandError):  # the reply says it
                    await reply.commit
            data = reply.reply(reply.commit) if isinstance(reply, Stored) else reply
            safely(self._transport, lambda: self._outbox.add(framed(data)))  # noqa: B023 - now
            with contextlib.suppress(IndexError):  # it is empty if the connection has ended
                self._queue.popleft()

    def clear(self) -> None:
        """Drop everything."""
        self._queue.clear()
