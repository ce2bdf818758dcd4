# SPDX-License-Identifier: LGPL-2.1-or-later
"""The requests of a session that wait: behind a running one, or as members of a batch.

They are kept as bytes in locked memory and parsed again in their turn, so that no parsed request
outlives the buffer that it is a view of. Only session calls this module.
"""

import re
from collections import deque
from typing import Final, TypeAlias

from secretd.errors import LimitReached, LockedMemoryExhausted
from secretd.memory.arena import Arena, LockedBuffer
from secretd.monitor.batch import BATCH_END, BatchEnd
from secretd.net.receiver import Locked
from secretd.net.transport import Transport
from secretd.wire.jsonrpc import Batch

_BRACE: Final = re.compile(rb"{")

Waiting: TypeAlias = "LockedBuffer | bytes | Locked | BatchEnd"
"""A request, a reply that is ready, or the end of a batch."""


class WaitingRequests:
    """The queue of one session; its bytes count for the uid of the transport's account."""

    def __init__(self, scratch: Arena, transport: Transport) -> None:
        self._scratch = scratch
        self._transport = transport
        self.queue: deque[Waiting] = deque()

    def add(self, message: memoryview) -> bool:
        """Queue a request; return False if locked memory or the uid's quota is used up."""
        # Bytes that the parser skipped after an error may precede its brace.
        match = _BRACE.search(message)
        assert match is not None
        try:
            self._keep(message[match.start() :])
        except (LockedMemoryExhausted, LimitReached):
            return False
        return True

    def add_batch(self, batch: Batch) -> None:
        """Queue the members of a batch, or none of them. Raises LockedMemoryExhausted or
        LimitReached.
        """
        try:
            for start, end in batch.members:
                self._keep(batch.view[start:end], b"\n")
        except BaseException:
            self.clear()
            raise
        self.queue.append(BATCH_END)

    def _keep(self, message: memoryview, end: bytes = b"") -> None:
        """Copy a message, and ``end`` behind it."""
        size = len(message) + len(end)
        account = self._transport.account
        if account is not None:
            account.quota.check(account.uid, size)
        kept = self._scratch.allocate(size)
        if account is not None:
            account.quota.count(account.uid, size)
        kept.view[: len(message)] = message
        kept.view[len(message) :] = end
        self.queue.append(kept)

    def next(self) -> Waiting:
        """Return the first one; the caller frees its buffer."""
        first = self.queue.popleft()
        account = self._transport.account
        if account is not None and isinstance(first, LockedBuffer):
            account.quota.release(account.uid, len(first))
        return first

    def clear(self) -> None:
        """Drop everything."""
        while self.queue:
            dropped = self.next()
            if isinstance(dropped, Locked):
                dropped.buffer.free()
            elif isinstance(dropped, LockedBuffer):
                dropped.free()
