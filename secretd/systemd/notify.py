# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages to the service manager (sd_notify(3)), and its descriptor store.

systemd.service(5), FileDescriptorStoreMax=, describes the store. This module decides nothing and
knows no secret; daemon.fd_store, daemon.status and server.credentials call it. No library: the
protocol is a few lines, and documented as the interface.
"""

import array
import os
import select
import socket
import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Final, Self

BARRIER_SECONDS: Final = 5.0
"""Seconds that the service manager may take to work through its messages; usually it is a
millisecond.
"""


class NotifySocket:
    """The service manager at the other end of $NOTIFY_SOCKET.

    ``watchdog``: seconds within which it wants to hear from us, None for no limit.
    ``barrier_seconds``: how long `barrier` waits.
    """

    def __init__(
        self,
        address: str,
        watchdog: float | None = None,
        *,
        barrier_seconds: float = BARRIER_SECONDS,
    ) -> None:
        self.watchdog = watchdog
        self._barrier_seconds = barrier_seconds
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @classmethod
    def from_environment(cls) -> Self | None:
        """Return the one that started this process and wants to hear from it, None if there is
        none.
        """
        address = os.environ.pop("NOTIFY_SOCKET", "")
        usec, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        if address[:1] not in ("/", "@"):
            return None
        ours = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 1_000_000 if ours else None)

    def notify(self, *fields: str, fds: Sequence[int] = (), wait: bool = False) -> bool:
        """Send what changed (sd_notify(3)); False if the message could not be sent.

        ``wait``: until there is room for the message. ``fds`` are borrowed.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        flags = 0 if wait else socket.MSG_DONTWAIT
        try:
            self._sock.sendmsg(["\n".join(fields).encode()], rights, flags, self._address)
        except OSError:
            return False
        return True

    def ready(self, status: str) -> None:
        """Start or reload is over."""
        self.notify("READY=1", _status(status), wait=True)

    def reloading(self) -> None:
        """A reload begins. systemd 253 waits in vain without the time."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.notify("RELOADING=1", f"MONOTONIC_USEC={usec}", wait=True)

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self.notify("STOPPING=1", _status(status), wait=True)

    def status(self, text: str) -> bool:
        """What `systemctl status` shows."""
        return self.notify(_status(text))

    def alive(self) -> None:
        """The loop turns."""
        self.notify("WATCHDOG=1")

    # --- the descriptor store

    def keep(self, name: str, fds: Sequence[int], *, wait: bool = True) -> bool:
        """Have descriptors kept for the next process, as ``name``.

        Whether they are only `probe` tells.
        """
        return self.notify("FDSTORE=1", f"FDNAME={name}", fds=fds, wait=wait)

    def drop(self, name: str, *, wait: bool = True) -> None:
        """Have what is kept as ``name`` closed."""
        self.notify("FDSTOREREMOVE=1", f"FDNAME={name}", wait=wait)

    def probe(self, *, wait: bool = True) -> int:
        """Have an end of a pipe kept, too; return the other end, which the caller owns.

        systemd says nothing when its store is full, or when there is none: it closes what it was
        given. So the pipe ends if there was no room for it, soon after systemd has worked through
        its messages (it closes in the background), and what was to be kept before has its place if
        the pipe stays.
        """
        source, sink = os.pipe2(os.O_CLOEXEC)
        self.keep("probe", [sink], wait=wait)
        os.close(sink)
        return source

    def barrier(self) -> bool:
        """Wait until the service manager has worked through all messages (sd_notify_barrier(3));
        False if that takes longer than ``barrier_seconds``.
        """
        source, sink = os.pipe2(os.O_CLOEXEC)
        try:
            sent = self.notify("BARRIER=1", fds=[sink], wait=True)
        finally:
            os.close(sink)
        try:
            poll = select.poll()
            poll.register(source, 0)
            return sent and bool(poll.poll(self._barrier_seconds * 1000))
        finally:
            os.close(source)

    def close(self) -> None:
        """Forget it."""
        self._sock.close()


class KeptDescriptors:
    """The service manager's descriptor store, as far as the server uses it. daemon.fd_store
    completes it.

    ``kept``: what is needed of an earlier process's descriptors is stored, as far as is known.
    """

    def __init__(self, manager: NotifySocket, *, kept: bool) -> None:
        self.manager = manager
        self.kept = kept

    @abstractmethod
    def give_up(self) -> None:
        """Have nothing stored any more, for good."""


def has_ended(source: int) -> bool:
    """True if no process has the other end of a pipe any more."""
    poll = select.poll()
    poll.register(source, 0)
    return bool(poll.poll(0))


def _status(text: str) -> str:
    return f"STATUS={text}"
