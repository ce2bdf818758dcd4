# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a session refuses by itself, without a command: descriptors, memory, slow messages.

session is a `Refusals`; the transport calls these methods, as part of Receiver.
"""

from secretd.errors import LimitReached, LockedMemoryExhausted
from secretd.monitor.core import Core
from secretd.monitor.monitor import Monitor
from secretd.monitor.tables import Wire
from secretd.net.transport import Transport


class Refusals:
    """The refusals of one session, which sets the attributes."""

    _core: Core
    _wire: Wire
    monitor: Monitor
    transport: Transport

    def accepts_descriptors(self) -> bool:
        """See Receiver."""
        return self.monitor.descriptors_fault() is None

    def too_many_descriptors(self) -> None:
        """See Receiver."""
        fault = self.monitor.descriptors_fault()
        assert fault is not None
        self._refuse(fault)

    def descriptors(self, numbers: list[int]) -> bool:
        """See Receiver."""
        try:
            self.monitor.receive(numbers)
        except LimitReached as error:
            self._refuse(error)
            return False
        return True

    def no_memory(self, error: LockedMemoryExhausted | LimitReached) -> None:
        """See Receiver."""
        self._refuse(error)

    def message_timed_out(self) -> None:
        """See Receiver."""
        seconds = self._core.tuning.unfinished_seconds
        words = f"No end of the message within {seconds:g} seconds; connection closed"
        self._refuse(LimitReached("unfinished-seconds", words))

    def _refuse(self, error: LimitReached | LockedMemoryExhausted) -> None:
        self.transport.send(self._refusal(error))

    def _refusal(self, error: LimitReached | LockedMemoryExhausted) -> bytes:
        if isinstance(error, LimitReached):
            self._core.limits.note_hit(error.limit)
        return self._wire.refusal(error.desc)
