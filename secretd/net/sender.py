# SPDX-License-Identifier: LGPL-2.1-or-later
"""The outgoing half of a connection: send at once, or queue the bytes that the client does not
accept.

A client that does not read holds a backlog. Above BACKLOG_BYTES, or with a reply in locked memory
in it, the connection is ``backlogged``, and the transport stops reading from it. Only transport
calls this module.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from secretd.memory.arena import LockedBuffer
from secretd.net.receiver import Locked

BACKLOG_BYTES: Final = 64 << 10
"""Bytes of replies that may wait for a client that does not read; above it the connection is not
read.
"""

# A plain number: joining two flags of an IntFlag takes longer than the send itself.
_SEND: Final = int(socket.MSG_DONTWAIT) | int(socket.MSG_NOSIGNAL)


class Sender:
    """Sends on one socket, which is borrowed.

    ``failed``: called if the socket cannot be written to. ``changed``: called whenever the queue
    has changed.
    """

    def __init__(
        self, sock: socket.socket, failed: Callable[[], None], changed: Callable[[], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = sock.fileno()
        self._send = sock.send
        self._failed = failed
        self._changed = changed
        self._queue: deque[tuple[memoryview, LockedBuffer | None]] = deque()
        self.backlog = 0  # bytes in the queue
        self._locked = 0  # replies in locked memory in the queue
        self._closed = False
        self.backlogged = False

    @property
    def waiting(self) -> bool:
        """True if some bytes could not be sent yet."""
        return bool(self._queue)

    def send(self, data: bytes | Locked) -> None:
        """Send, or queue the bytes that the client does not accept now. Locked bytes are wiped once
        sent.
        """
        if self._closed:
            if isinstance(data, Locked):
                data.buffer.free()
            return
        if isinstance(data, Locked):
            self._queue.append((data.buffer.view[: data.length], data.buffer))
            self.backlog += data.length
            self._locked += 1
        else:
            sent, size = 0, len(data)
            if not self._queue:
                try:
                    sent = self._send(data, _SEND)
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError:
                    self._failed()
                    return
                if sent == size:
                    return
            self._queue.append((memoryview(data)[sent:], None))
            self.backlog += size - sent
        self._flush()

    def _flush(self) -> None:
        while self._queue:
            view, owner = self._queue[0]
            try:
                sent = self._send(view, _SEND)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                self._failed()
                return
            self.backlog -= sent
            if sent < len(view):
                self._queue[0] = (view[sent:], owner)
                break
            self._queue.popleft()
            if owner is not None:
                self._locked -= 1
                owner.free()
        self.backlogged = self.backlog > BACKLOG_BYTES or self._locked > 0
        if self._queue:
            self._loop.add_writer(self._fd, self._flush)
        else:
            self._loop.remove_writer(self._fd)
        self._changed()

    def close(self) -> None:
        """Wipe and drop unsent bytes."""
        self._closed = True
        self._loop.remove_writer(self._fd)
        for _, owner in self._queue:
            if owner is not None:
                owner.free()
        self._queue.clear()
