# SPDX-License-Identifier: LGPL-2.1-or-later
"""The protection level of locked memory.

daemon.inherited, the clients and secretctl choose it once, when the process starts.
"""

from secretd.errors import LockedMemoryExhausted, MemoryLockError
from secretd.linux.locked_pages import Level, limit_text
from secretd.memory.arena import SCRATCH_RESERVE, SCRATCH_WINDOW, Arena


def choose_level(*, require: bool) -> Level:
    """Return the best protection level that this process can use: secretmem, mlock or none.

    ``require``: raise MemoryLockError instead of returning ``none``.
    """
    levels: tuple[Level, ...] = ("secretmem", "mlock")
    for level in levels:
        try:
            arena = Arena(level, window=SCRATCH_WINDOW, reserve=SCRATCH_RESERVE)
        except (OSError, LockedMemoryExhausted):
            continue
        arena.close()
        return level
    if require:
        raise MemoryLockError(
            f"memory cannot be locked and --memory-lock=require was given: {limit_text()}"
        )
    return "none"
