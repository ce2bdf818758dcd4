# SPDX-License-Identifier: LGPL-2.1-or-later
"""A disk whose writes wait until a test lets them go, and may fail."""

import threading

import pytest

from secretd.errors import CommandError
from secretd.store.disk import Change, Disk


class SlowDisk:
    """Every store of this process; ``batches``: the ids of each transaction."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error = ""
        self.batches: list[list[str]] = []
        self._gate = threading.Event()
        real = Disk.write

        def write(disk: Disk, batch: list[Change]) -> list[CommandError | None]:
            self.batches.append([change.object_id for change in batch])
            assert self._gate.wait(20)
            if not self.error:
                return real(disk, batch)
            for change in batch:
                if change.content is not None:
                    change.content.free()
            return [CommandError(self.error)] * len(batch)

        monkeypatch.setattr(Disk, "write", write)

    def go(self, error: str = "") -> None:
        """Let everything go on; with an error, fail."""
        self.error = error
        self._gate.set()

    def stop(self) -> None:
        """Let the next writes wait."""
        self._gate.clear()
        self.error = ""
