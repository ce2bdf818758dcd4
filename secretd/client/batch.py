# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many commands on one connection, several under way at a time; their lines lie in locked memory.

`sync.SyncClient.batch` makes a `Batch`. It starts no command twice: where the connection is lost,
the caller learns which commands have no reply.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from secretd.client.channel import Channel, Message
from secretd.memory.arena import LockedBuffer

IN_FLIGHT: Final = 64
"""Commands that were sent and have no reply yet, at most."""


class Batch:
    """Sends lines in groups of half of IN_FLIGHT, so that the server has work meanwhile.

    ``buffer``: memory for the lines of a group, which the caller frees.
    """

    def __init__(self, channel: Channel, buffer: LockedBuffer) -> None:
        self._channel = channel
        self._view = buffer.view
        self._fill = 0
        self._collected = 0  # lines in the buffer
        self._sent = 0  # commands without a reply

    def put(self, line: Sequence[bytes | memoryview]) -> Iterator[Message]:
        """Add a command, given as the pieces of its line; yield the replies that have come.

        A line that is longer than the buffer is sent from where it lies. Raises Lost or
        TimeoutError.
        """
        size = sum(map(len, line))
        if self._fill + size > len(self._view) and self._collected:
            yield from self._send()
        if size > len(self._view):
            for piece in line:
                self._channel.send(piece)
            self._sent += 1
            yield from self._replies()
            return
        fill = self._fill
        for piece in line:
            self._view[fill : fill + len(piece)] = piece
            fill += len(piece)
        self._fill = fill
        self._collected += 1
        if self._collected == IN_FLIGHT // 2:
            yield from self._send()

    def _send(self) -> Iterator[Message]:
        self._channel.send(self._view[: self._fill])
        self._sent += self._collected
        self._fill = self._collected = 0
        yield from self._replies()

    def _replies(self) -> Iterator[Message]:
        """Yield replies until there is room for another group."""
        while self._sent > IN_FLIGHT // 2:
            yield self._reply()

    def _reply(self) -> Message:
        reply = self._channel.reply("the command")
        self._sent -= 1
        return reply

    def finish(self) -> Iterator[Message]:
        """Send what is left, and yield all outstanding replies. Raises Lost or TimeoutError."""
        if self._collected:
            yield from self._send()
        yield from self.outstanding()

    def outstanding(self) -> Iterator[Message]:
        """Yield the replies to the commands that were sent, and drop the others."""
        self._fill = self._collected = 0
        while self._sent:
            yield self._reply()
