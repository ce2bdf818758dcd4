# SPDX-License-Identifier: LGPL-2.1-or-later
"""Messages to the service manager (sd_notify(3)), and its descriptor store.

systemd.service(5), FileDescriptorStoreMax=, describes the store. This module decides nothing and
knows no secret; daemon.fd_store, daemon.status and server.credentials call it. It uses no library:
the protocol is a few lines, and documented as stable.
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
"""Seconds for which a barrier waits for the service manager, which usually takes a millisecond."""


class NotifySocket:
    """The service manager at the other end of $NOTIFY_SOCKET.

    ``watchdog``: the seconds within which it expects a sign of life, None for no limit.
    ``barrier_seconds``: the longest wait of `barrier`.
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
        """Return the service manager that started this process, None if there is none."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        usec, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        if address[:1] not in ("/", "@"):
            return None
        ours = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 1_000_000 if ours else None)

    def notify(self, *fields: str, fds: Sequence[int] = (), wait: bool = False) -> bool:
        """Send fields such as STATUS= (sd_notify(3)); return False if the message could not be
        sent.

        ``fds`` are borrowed. ``wait``: wait for room in the socket.
        """
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        flags = 0 if wait else socket.MSG_DONTWAIT
        try:
            self._sock.sendmsg(["\n".join(fields).encode()], rights, flags, self._address)
        except OSError:
            return False
        return True

    def ready(self, status: str) -> None:
        """Report the end of a start or reload."""
        self.notify("READY=1", _status(status), wait=True)

    def reloading(self) -> None:
        """Report the begin of a reload. systemd 253 needs the time with it."""
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.notify("RELOADING=1", f"MONOTONIC_USEC={usec}", wait=True)

    def stopping(self, status: str) -> None:
        """Report the begin of the end."""
        self.notify("STOPPING=1", _status(status), wait=True)

    def status(self, text: str) -> bool:
        """Set the status line of `systemctl status`; return False if the message could not be
        sent.
        """
        return self.notify(_status(text))

    def alive(self) -> None:
        """Send the watchdog a sign of life."""
        self.notify("WATCHDOG=1")

    # --- the descriptor store

    def keep(self, name: str, fds: Sequence[int], *, wait: bool = True) -> bool:
        """Store descriptors for the next process, under ``name``.

        Returns False if the message could not be sent. Only `probe` shows whether they are stored.
        """
        return self.notify("FDSTORE=1", f"FDNAME={name}", fds=fds, wait=wait)

    def drop(self, name: str, *, wait: bool = True) -> None:
        """Have the descriptors that are stored under ``name`` closed."""
        self.notify("FDSTOREREMOVE=1", f"FDNAME={name}", wait=wait)

    def probe(self, *, wait: bool = True) -> int:
        """Store an end of a pipe; return the other end, which the caller owns.

        systemd does not report a full or missing store: it closes what it was given, in the
        background. So the pipe ends soon after systemd has handled its messages if there was no
        room. If it stays open, everything that was stored before it has its place.
        """
        source, sink = os.pipe2(os.O_CLOEXEC)
        self.keep("probe", [sink], wait=wait)
        os.close(sink)
        return source

    def barrier(self) -> bool:
        """Wait until the service manager has handled all messages (sd_notify_barrier(3)).

        Returns False if that takes longer than ``barrier_seconds``, or if the message could not be
        sent.
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
        """Close the socket."""
        self._sock.close()


class KeptDescriptors:
    """The service manager's descriptor store, as far as the server uses it; daemon.fd_store
    implements it.

    ``kept``: True if everything that the next process needs is stored, as far as is known.
    """

    def __init__(self, manager: NotifySocket, *, kept: bool) -> None:
        self.manager = manager
        self.kept = kept

    @abstractmethod
    def give_up(self) -> None:
        """Store nothing any longer."""


def has_ended(source: int) -> bool:
    """Return True if no process has the other end of a pipe open."""
    poll = select.poll()
    poll.register(source, 0)
    return bool(poll.poll(0))


def _status(text: str) -> str:
    return f"STATUS={text}"
