# SPDX-License-Identifier: LGPL-2.1-or-later
"""The outgoing messages of one session: replies in order, and events between them.

The replies of one read are collected and leave in one send, after their audit records. Events
follow the due replies. A client that does not read its replies loses events, and learns the number
once it reads again. session calls this module, and broadcast sends events through it.
"""

import asyncio
from collections.abc import Callable

from secretd.audit.log import Audit
from secretd.monitor.core import wire_event
from secretd.net.receiver import Locked
from secretd.net.transport import Transport


class Outbox:
    """The unsent replies and events of a session, in order; ``size``: the bytes of the replies.

    ``held``: True while requests are being handled; additions are sent at its end. ``in_dialect``:
    writes QMP events as the client's dialect has them.
    """

    def __init__(
        self,
        transport: Transport,
        audit: Audit,
        batch_bytes: int,
        in_dialect: Callable[[bytes], bytes],
    ) -> None:
        self._in_dialect = in_dialect
        self._transport = transport
        self._audit = audit
        self._batch_bytes = batch_bytes
        self.replies: list[bytes] = []
        self.size = 0  # bytes of replies
        self._lost = 0  # events
        self.in_array = False  # the reply to a batch is under way, which events must not break
        self.held = False

    def add(self, reply: bytes) -> None:
        """Send a reply, soon and together with others."""
        self.replies.append(reply)
        self.size += len(reply)
        if self.size >= self._batch_bytes:
            self.flush()

    def add_locked(self, reply: Locked) -> None:
        """Send a reply from locked memory, after all others."""
        self.flush()
        self._transport.send(reply)

    def flush(self) -> None:
        """Send all replies and events now."""
        replies = self.replies
        if replies:
            self._audit.end_turn()  # a reply leaves after the record of what it reports
            self._audit.in_turn = self.held
            data = b"".join(replies)
            replies.clear()
            self.size = 0
            self._transport.send(data)

    # --- events

    def send_events(self, events: bytes, count: int) -> None:
        """Send ``count`` events, or count them as lost if the client does not read."""
        if self._transport.backlogged:
            self._lost += count
            return
        self.replies.append(self._in_dialect(events))
        if not self.held:
            self.flush()

    def lose(self, count: int) -> None:
        """Count ``count`` events as lost, and report that soon."""
        self._lost += count
        asyncio.get_running_loop().call_soon(self.report_lost)

    def report_lost(self) -> None:
        """Report the number of lost events, if the client reads."""
        transport = self._transport
        if self._lost and not (transport.backlogged or transport.is_closed or self.in_array):
            lost, self._lost = self._lost, 0
            self.send_events(wire_event("SECRET_EVENTS_LOST", f'{{"count": {lost}}}'), 1)
