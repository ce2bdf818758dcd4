# SPDX-License-Identifier: LGPL-2.1-or-later
"""The protection level of locked memory.

daemon.inherited, the clients and secretctl choose it once, when the process starts.
"""

from typing import Literal

from secretd.errors import LockedMemoryExhausted, MemoryLockError
from secretd.linux.locked_pages import Level, limit_text
from secretd.memory.arena import SCRATCH_RESERVE, SCRATCH_WINDOW, Arena

Choice = Literal["auto", "secretmem", "mlock"]
"""What a user may ask for."""


def choose_level(*, require: bool, choice: Choice = "auto") -> Level:
    """Return the best protection level that this process can use: secretmem, mlock or none.

    ``require``: raise MemoryLockError instead of returning ``none``. ``choice``: a level that was
    asked for; MemoryLockError if it is secretmem and this process cannot use it.
    """
    levels: tuple[Level, ...] = ("secretmem", "mlock") if choice == "auto" else (choice,)
    for level in levels:
        try:
            arena = Arena(level, window=SCRATCH_WINDOW, reserve=SCRATCH_RESERVE)
        except (OSError, LockedMemoryExhausted):
            continue
        arena.close()
        return level
    if choice == "secretmem":
        raise MemoryLockError(
            "--memory=secretmem was given, and memfd_secret(2) cannot be used: the kernel lacks it "
            f"(or needs secretmem.enable=1), or {limit_text()}"
        )
    if require:
        raise MemoryLockError(
            f"memory cannot be locked and --memory-lock=require was given: {limit_text()}"
        )
    return "none"
