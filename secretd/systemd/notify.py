# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service manager: what it passes, what it is told, what it keeps, who it says it asks for.

Descriptors that it passes (sd_listen_fds(3)), messages to it (sd_notify(3)), its descriptor store
(systemd.service(5), FileDescriptorStoreMax=), the journal's priorities (sd-daemon(3)), and the address
that a unit's LoadCredential= connects from (systemd.exec(5)). It decides nothing and knows no secret.
daemon, server and credentials call it. No library: the protocols are a few lines each, and documented as
the interface.
"""

import array
import contextlib
import logging
import os
import re
import select
import socket
import time
from collections.abc import Sequence
from typing import Final, NamedTuple, Self

FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START."""

BARRIER_SECONDS: Final = 5.0
"""Seconds that the service manager may take to work through what it was told; usually it is a millisecond."""

CREDENTIAL_BYTES: Final = 1 << 20
"""What systemd takes for all credentials of a unit together, their names included
(CREDENTIALS_TOTAL_SIZE_MAX)."""

CREDENTIAL_ADDRESS_BYTES: Final = 83
"""Bytes of a unit's and a credential's name together that always fit into the address: 107 less the NUL in
front, 16 digits, "/unit/" and "/". systemd fails with longer ones before it connects."""

_ADDRESS: Final = re.compile(rb"\0[0-9a-f]{1,16}/unit/([^/\0-\x1f\x7f]+)/([^/\0-\x1f\x7f]+)")

_PRIORITIES: Final = {
    logging.DEBUG: "<7>",
    logging.INFO: "<6>",
    logging.WARNING: "<4>",
    logging.ERROR: "<3>",
    logging.CRITICAL: "<2>",
}


class Passed(NamedTuple):
    """A descriptor that the service manager passed, and its FileDescriptorName= or FDNAME=."""

    name: str
    fd: int


def passed() -> list[Passed]:
    """Return what the service manager passed; the caller owns the descriptors.

    They are closed on exec from now on, and the variables are gone from the environment, so that no child
    takes them for its own (sd_listen_fds_with_names()). Names, not numbers, say what is what: the order
    is another one at each start.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for number in range(int(count)):
        fd = FIRST_FD + number
        os.set_inheritable(fd, False)
        found.append(Passed(names[number] if number < len(names) else "unknown", fd))
    return found


class Manager:
    """The service manager at the other end of $NOTIFY_SOCKET.

    ``watchdog``: seconds within which it wants to hear from us, None for no limit.
    """

    def __init__(self, address: str, watchdog: float | None = None) -> None:
        self.watchdog = watchdog
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @classmethod
    def from_environment(cls) -> Self | None:
        """Return the one that started this process and wants to hear from it, None if there is none."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        usec, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        if address[:1] not in ("/", "@"):
            return None
        ours = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))
        return cls(address, int(usec) / 1_000_000 if ours else None)

    def notify(self, *fields: str, fds: Sequence[int] = (), wait: bool = False) -> bool:
        """Send what changed (sd_notify(3)); False if it could not be told.

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
        """Have descriptors kept for the next process, as ``name``. Whether they are only `probe` tells."""
        return self.notify("FDSTORE=1", f"FDNAME={name}", fds=fds, wait=wait)

    def drop(self, name: str, *, wait: bool = True) -> None:
        """Have what is kept as ``name`` closed."""
        self.notify("FDSTOREREMOVE=1", f"FDNAME={name}", wait=wait)

    def probe(self, *, wait: bool = True) -> int:
        """Have an end of a pipe kept, too; return the other end, which the caller owns.

        systemd says nothing when its store is full, or when there is none: it closes what it was given. So
        the pipe ends if there was no room for it, soon after systemd has worked through its messages (it
        closes in the background), and what was to be kept before has its place if the pipe stays.
        """
        source, sink = os.pipe2(os.O_CLOEXEC)
        self.keep("probe", [sink], wait=wait)
        os.close(sink)
        return source

    def barrier(self) -> bool:
        """Wait until the service manager has worked through all messages (sd_notify_barrier(3)); False if
        that takes longer than BARRIER_SECONDS.
        """
        source, sink = os.pipe2(os.O_CLOEXEC)
        try:
            sent = self.notify("BARRIER=1", fds=[sink], wait=True)
        finally:
            os.close(sink)
        try:
            poll = select.poll()
            poll.register(source, 0)
            return sent and bool(poll.poll(BARRIER_SECONDS * 1000))
        finally:
            os.close(source)

    def close(self) -> None:
        """Forget it."""
        self._sock.close()


def has_ended(source: int) -> bool:
    """True if nobody has the other end of a pipe any more."""
    poll = select.poll()
    poll.register(source, 0)
    return bool(poll.poll(0))


def _status(text: str) -> str:
    return f"STATUS={text}"


# --- the journal


def journal_on_stderr() -> bool:
    """True if stderr is the journal: then each line may begin with its priority (sd-daemon(3))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    with contextlib.suppress(OSError):
        status = os.fstat(2)
        return (device, inode) == (str(status.st_dev), str(status.st_ino))
    return False


class JournalFormatter(logging.Formatter):
    """Lines as the journal takes them: each with its priority; whose they are it knows."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        priority = _PRIORITIES[record.levelno]
        return priority + super().format(record).replace("\n", f"\n{priority}")


# --- LoadCredential=


class CredentialAddress(NamedTuple):
    """What a unit's LoadCredential= says in the address it connects from: anybody can claim that."""

    unit: str
    credential: str


def credential_address(address: bytes | str) -> CredentialAddress | None:
    """Read a peer's address: NUL, digits, ``/unit/UNIT/CREDENTIAL``. None if it has another form."""
    match = _ADDRESS.fullmatch(address) if isinstance(address, bytes) else None
    if match is None:
        return None
    try:
        return CredentialAddress(match[1].decode(), match[2].decode())
    except UnicodeDecodeError:
        return None
