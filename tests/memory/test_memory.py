# SPDX-License-Identifier: LGPL-2.1-or-later
"""Locked memory: slots, wiping, levels and limits."""

import os
import pickle
import random
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from secretd.errors import LockedMemoryExhausted as Exhausted
from secretd.linux import locked_pages
from secretd.memory import arena, wipe
from secretd.memory.arena import Arena, LockedBuffer
from secretd.memory.level import choose_level
from tests.support import seccomp
from tests.support.needs import ARENA_LEVEL, need_level


@pytest.fixture(params=["secretmem", "mlock", "none"])
def any_arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    need_level(request.param)
    made = Arena(request.param, window=arena.SCRATCH_WINDOW)
    yield made
    made.close()


def test_one_that_comes_and_goes_alone_costs_no_window_each_time(any_arena: Arena) -> None:
    """What it lay in is kept for the next one; another size takes its place, not a further
    window.
    """
    any_arena.allocate(100).free()
    kept, mapped = dict(any_arena._slabs), any_arena.mapped
    for _ in range(3):
        any_arena.allocate(100).free()
    assert any_arena._slabs == kept
    for size in (1000, 100, 3000):
        any_arena.allocate(size).free()
        assert len(any_arena._slabs) == 1
        assert any_arena.mapped == mapped


def test_buffers_hold_their_bytes_and_are_zero_when_reused(any_arena: Arena) -> None:
    """No two buffers overlap, and nothing of an earlier owner is left."""
    rng = random.Random(1)
    held: list[tuple[LockedBuffer, bytes]] = []
    for _ in range(1500):
        if held and rng.random() < 0.5:
            buffer, content = held.pop(rng.randrange(len(held)))
            assert bytes(buffer.view) == content
            buffer.free()
            buffer.free()
        else:
            size = rng.choice([0, 1, 63, 64, 65, 1000, 4096, 30000, 65536, 65537, 200000])
            buffer = any_arena.allocate(size)
            assert len(buffer) == len(buffer.view) == size
            assert not any(buffer.view[:100])
            content = rng.randbytes(size)
            buffer.view[:] = content
            held.append((buffer, content))
    for buffer, content in held:
        assert bytes(buffer.view) == content
        with buffer:
            pass
    assert any_arena.held == 0
    assert any_arena.mapped <= arena.SCRATCH_WINDOW


def test_the_arenas_file_does_not_grow_over_many_cycles(arena: Arena) -> None:
    """Windows are reused, those of one buffer and those of many."""
    for _ in range(3):
        buffers = [arena.allocate(size) for size in (100, 1 << 20, 300000, 5000, 1 << 20)]
        for buffer in buffers:
            buffer.free()
    assert len(arena._taken) <= 4 + 2 + 1 + 1 + 4 + 1


def test_a_large_buffer_does_not_lie_over_a_spare_window() -> None:
    """Mapped windows that nothing uses are not mapped a second time."""
    arena = Arena(ARENA_LEVEL, window=4096, reserve=3 * 4096)
    small = [arena.allocate(2048) for _ in range(8)]
    for buffer in small[4:]:
        buffer.free()
    large = [arena.allocate(3 * 4096) for _ in range(3)]
    for number, buffer in enumerate((*small[:4], *large)):
        buffer.view[:] = bytes([number + 1]) * len(buffer)
    for number, buffer in enumerate((*small[:4], *large)):
        assert bytes(buffer.view) == bytes([number + 1]) * len(buffer)
    arena.close()


def test_freed_bytes_are_wiped(arena: Arena) -> None:
    """The view that outlives its buffer sees zeros."""
    keep = arena.allocate(64)
    buffer = arena.allocate(64)
    view = buffer.view
    view[:] = b"x" * 64
    buffer.free()
    assert bytes(view) == bytes(64)
    keep.free()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 12288])
def test_wipe_zeroes_every_byte(size: int) -> None:
    """At and around the size of its step."""
    data = bytearray(b"x" * size)
    wipe.wipe(memoryview(data))
    assert data == bytes(size)
    data = bytearray(b"x" * size)
    wipe.wipe_bytearray(data)
    assert data == bytes(size)


def test_a_buffer_tells_its_size_and_nothing_else(arena: Arena) -> None:
    """No text form, no pickle."""
    with arena.allocate(7) as buffer:
        buffer.view[:] = b"letmein"
        assert repr(buffer) == str(buffer) == "<LockedBuffer of 7 bytes>"
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(buffer)


def test_a_disowned_buffer_stays(arena: Arena) -> None:
    """Whoever noted offset and size owns it then."""
    buffer = arena.allocate(5)
    buffer.view[:] = b"abcde"
    assert buffer.disown() is arena
    buffer.free()
    assert bytes(arena.view(buffer.offset, buffer.size)) == b"abcde"
    arena.free(buffer.offset, buffer.size)


def test_windows_are_locked_not_dumped_and_not_inherited() -> None:
    """What /proc says of the mappings: lo(cked), dd (do not dump), dc (do not copy on fork)."""
    arena = Arena("mlock")
    address = next(iter((arena.allocate(1), arena)[1]._addresses.values()))
    with open("/proc/self/smaps") as smaps:
        text = smaps.read()
    entry = text[text.index(f"{address:x}-") :]
    flags = entry[entry.index("VmFlags:") :].partition("\n")[0].split()
    assert {"lo", "dd", "dc"} <= set(flags)
    arena.close()


def in_subprocess(code: str) -> subprocess.CompletedProcess:
    """Run code as a process of its own without CAP_IPC_LOCK, which would lift the limit."""
    command = [sys.executable, "-c", code]
    if os.getuid() == 0:
        command = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, ({0}, {0}))\n"


@pytest.mark.parametrize("level", ["secretmem", "mlock"])
def test_running_out_names_the_limit_and_leaves_the_rest_working(level: str) -> None:
    """The one too many is refused; what is freed can be used again."""
    need_level(level)
    done = in_subprocess(
        LIMIT.format(1 << 20)
        + f"""
from secretd.memory.arena import Arena
from secretd.errors import LockedMemoryExhausted
arena = Arena("{level}")
buffers = [arena.allocate(200000) for _ in range(4)]
try:
    arena.allocate(1)
except LockedMemoryExhausted as error:
    print(error.desc)
buffers.pop().free()
arena.allocate(1).free()
try:
    Arena("{level}", reserve=2 << 20)
except LockedMemoryExhausted as error:
    print("reserve")
"""
    )
    assert done.stderr == ""
    assert done.stdout == (
        "No locked memory left for another 262144 bytes: RLIMIT_MEMLOCK is 1048576 bytes; "
        "raise it with LimitMEMLOCK= in the unit or 'ulimit -l'\nreserve\n"
    )


def test_without_any_lock_the_level_is_none_or_a_refusal() -> None:
    """RLIMIT_MEMLOCK of 0: a warning's worth under prefer, an error under require."""
    done = in_subprocess(
        LIMIT.format(0)
        + """
from secretd.memory.level import choose_level
from secretd.errors import MemoryLockError
print(choose_level(require=False))
try:
    choose_level(require=True)
except MemoryLockError as error:
    print(error)
"""
    )
    assert done.stderr == ""
    assert done.stdout == (
        "none\nmemory cannot be locked and --memory-lock=require was given: RLIMIT_MEMLOCK is "
        "0 bytes; raise it with LimitMEMLOCK= in the unit or 'ulimit -l'\n"
    )


def test_the_best_level_is_chosen() -> None:
    """memfd_secret where the kernel has it."""
    assert choose_level(require=True) in ("secretmem", "mlock")


def test_a_kernel_without_memfd_secret_falls_back_to_mlock() -> None:
    """Forced for real, by a seccomp filter."""
    done = in_subprocess(
        NO_SECRETMEM
        + "from secretd.memory.level import choose_level; print(choose_level(require=True))"
    )
    assert done.stderr == ""
    assert done.stdout == "mlock\n"


NO_SECRETMEM = f"""
import sys
sys.path.insert(0, "{os.path.dirname(seccomp.__file__)}")
from seccomp import refuse
refuse(447)
"""


def test_odd_mapping_errors_are_said_as_they_are(
    monkeypatch: pytest.MonkeyPatch, arena: Arena
) -> None:
    """Not every failure is the limit."""
    assert "Bad file descriptor" in locked_pages._exhausted(1, 9).desc
    monkeypatch.setattr(
        resource, "getrlimit", lambda _which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    assert "RLIMIT_MEMLOCK is unlimited" in locked_pages.limit_text()


def test_a_closed_arena_can_be_closed_again() -> None:
    """Closing is idempotent."""
    arena = Arena("none")
    arena.close()
    arena.close()


def test_dumps_are_forbidden() -> None:
    """PR_GET_DUMPABLE and RLIMIT_CORE afterwards."""
    done = in_subprocess(
        "import ctypes, resource; from secretd.linux.locked_pages import forbid_dumps; "
        "forbid_dumps();"
        "print(ctypes.CDLL(None).prctl(3), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    assert done.stdout == f"0 (0, {resource.getrlimit(resource.RLIMIT_CORE)[1]})\n"


def test_a_file_that_cannot_have_its_size_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is passed on; the leak check of the suite sees the rest."""
    monkeypatch.setattr(locked_pages, "FILE_BYTES", -1)
    with pytest.raises(OSError, match="Invalid argument"):
        Arena("none")


def test_a_closed_arena_gives_out_nothing_that_is_not_there(any_arena: Arena) -> None:
    """Not what it kept for the next one, which is unmapped."""
    any_arena.allocate(10).free()
    any_arena.close()
    with pytest.raises(Exhausted):
        any_arena.allocate(10)
