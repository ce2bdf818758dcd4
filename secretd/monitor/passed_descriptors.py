# SPDX-License-Identifier: LGPL-2.1-or-later
"""The descriptors that the client of one session passed, and their limits.

monitor.monitor is a `PassedDescriptors`; the commands and session call these methods.
"""

from secretd.access.peer import Peer
from secretd.descriptors.fd import Fd
from secretd.descriptors.passed import (
    DESCRIPTORS_PER_CONNECTION,
    FdSets,
    NamedFds,
    PendingFd,
)
from secretd.descriptors.threads import THREADS_PER_UID
from secretd.errors import LimitReached
from secretd.monitor.core import Core


class PassedDescriptors:
    """The descriptors of ``peer``: ``pending`` for the next command, ``named`` by getfd, and the
    ``fdsets``.
    """

    def __init__(self, core: Core, peer: Peer) -> None:
        self.core = core
        self.peer = peer
        self.trusted = peer.trusted
        self.pending = PendingFd()
        self.named = NamedFds()
        self.fdsets = FdSets()
        self._descriptors = core.limits.descriptors

    def pending_descriptor(self) -> Fd:
        """Return the passed descriptor. Raises LimitReached if all threads of its uid are stuck."""
        fd = self.pending.take()
        uid = self.peer.uid
        if not self.trusted and self.core.threads.stuck(uid):
            fd.close()
            raise LimitReached(
                "threads-per-uid",
                f"uid {uid} has {THREADS_PER_UID} descriptors that block, and that is the limit "
                "(threads-per-uid)",
            )
        return fd

    def take_descriptor(self) -> Fd:
        """Return the passed descriptor, to be kept by the connection. Raises LimitReached without
        room for it.
        """
        fd = self.pending_descriptor()
        if len(self.named) + len(self.fdsets) >= DESCRIPTORS_PER_CONNECTION:
            fd.close()
            raise LimitReached(
                "descriptors-per-connection",
                f"This connection holds {DESCRIPTORS_PER_CONNECTION} descriptors, which is the "
                "limit; close some with closefd or remove-fd",
            )
        return fd

    def receive(self, numbers: list[int]) -> None:
        """Take over the descriptors of a message. Raises LimitReached if the peer passes too
        many.
        """
        if self.trusted:
            self.pending.receive([Fd(number) for number in numbers])
            return
        fault = self.descriptors_fault(len(numbers))
        self._descriptors.count(self.peer.uid, len(numbers))
        self.pending.receive(
            [Fd(number, self._close_received, self._count_released) for number in numbers]
        )
        if fault is not None:
            raise fault

    def descriptors_fault(self, more: int = 1) -> LimitReached | None:
        """Return the limit that ``more`` descriptors of this peer would exceed, None if there is
        none.

        Descriptors that wait to be closed count too. The check runs before each recvmsg(2), so a
        message exceeds a limit by less than SCM_MAX_FD.
        """
        threads, uid = self.core.threads, self.peer.uid
        try:
            self._descriptors.check(uid, more, threads.closing(uid))
            self.core.limits.check_descriptors(threads.closing_of_others, more)
        except LimitReached as error:
            return error
        return None

    def _close_received(self, fd: int) -> None:
        """Close a descriptor that an untrusted peer passed."""
        self.core.threads.close(self.peer.uid, fd)

    def _count_released(self) -> None:
        self._descriptors.release(self.peer.uid)

    def close(self) -> None:
        """Close all descriptors of the session."""
        self.pending.close()
        self.named.close()
        self.fdsets.close()
