# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test needs of this machine.

Without it the test is skipped, or fails if real parts are required.
"""

import os
import resource
import shutil

import pytest

from secretd.memory.level import choose_level

REQUIRE_REAL = bool(os.environ.get("SECRETD_REQUIRE_REAL"))


ARENA_LEVEL = choose_level(require=False)


def need(condition: bool, reason: str) -> None:
    """Skip a test that needs a real part; fail it where all real parts are required."""
    if not condition:
        if REQUIRE_REAL:
            pytest.fail(f"required here: {reason}")
        pytest.skip(reason)


def need_program(*names: str) -> None:
    """Skip or fail without these programs."""
    missing = [name for name in names if shutil.which(name) is None]
    need(not missing, f"not installed: {', '.join(missing)}")


def need_level(level: str) -> None:
    """Skip or fail where the kernel has no memfd_secret (5.14, and not switched off)."""
    need(level != "secretmem" or ARENA_LEVEL == "secretmem", "this kernel gives no memfd_secret")


def need_root() -> None:
    """Skip or fail without root."""
    need(os.getuid() == 0, "needs root")


def need_locked_memory(size: int) -> None:
    """Skip or fail where this process, daemon and client in one, may not lock so many bytes."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    enough = os.getuid() == 0 or soft == resource.RLIM_INFINITY or soft >= size
    need(enough, f"RLIMIT_MEMLOCK is {soft}, less than {size}")
