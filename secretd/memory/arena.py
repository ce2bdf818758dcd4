# SPDX-License-Identifier: LGPL-2.1-or-later
"""Arenas: locked memory, the only home of plaintext.

An `Arena` hands out `LockedBuffer`s from memory that never reaches swap, a core dump or a child
process. It is not a general allocator and knows nothing about secrets. journal (secrets), net
(receive space), crypto and the loaders call it.

Theory of operation. One memory file of a huge size is mapped in windows, since only mapped pages
count as locked. A window is cut into slots of one power-of-two size (a slab), or belongs to a
buffer of its own.

- A slot is fresh (never used, all zeros), in use, or freed (wiped, all zeros).
- `allocate` prefers freed slots, then fresh ones, then a new window. `free` wipes before it returns
  the slot.
- A window is spare (mapped, all zeros, unused), or has a slab or a large buffer. A window that
  becomes empty is spare or unmapped; one empty slab is kept.
- After a takeover `adopt` maps what is in use and wipes everything else.

What can go wrong: RLIMIT_MEMLOCK is reached, and `allocate` raises LockedMemoryExhausted and no
buffer has changed. A thread may still hold a view when the arena is closed: such a window is wiped,
and stays mapped until the process ends.

Why no copy stays behind: code sees memoryviews of the mapping (linux.locked_pages makes them),
which return no bytes copies when sliced. A buffer is wiped when it is freed, and a window is
unmapped only after all of it was wiped, since its pages keep their content (memfd_secret has no
hole punching). The level is chosen once, at the start of the process, and never degrades.
"""

import os
import threading
from collections.abc import Callable
from typing import Self

from secretd.linux.locked_pages import (
    Level,
    map_pages,
    open_file,
    unmap_pages,
)
from secretd.memory.takeover import SMALLEST_SLOT, Plan
from secretd.memory.wipe import wipe

SECRET_WINDOW = 256 << 10
"""Bytes mapped at once for secrets."""

SCRATCH_WINDOW = 64 << 10
"""Bytes mapped at once for receive and scratch space; they are few, so that each size class costs
little.
"""

SCRATCH_RESERVE = 1 << 20
"""Bytes of receive and scratch space that are mapped at start. With it 114,688 secrets of up to 64
bytes fit in the 8 MiB RLIMIT_MEMLOCK of an ordinary user.
"""


class _Slab:
    """A window cut into ``count`` slots of one size, of which ``room`` are free."""

    __slots__ = ("base", "count", "freed", "fresh", "room", "size", "view", "zeros")

    def __init__(self, base: int, size: int, view: memoryview) -> None:
        self.base = base  # the window's offset in the file
        self.size = size
        self.view = view
        self.zeros = bytes(size)
        self.count = self.room = len(view) // size
        self.fresh = 0  # slots from here on were never used
        self.freed: list[int] = []  # offsets in the window of slots that are free again

    def adopt(self, used: set[int]) -> None:
        """Mark the slots in use, given by their offsets in the file, and wipe all others."""
        self.room = self.count - len(used)
        self.fresh = max(used) - self.base + self.size
        free = set(range(self.base, self.base + self.fresh, self.size)) - used
        self.freed = sorted(offset - self.base for offset in free)
        for start in self.freed:
            self.view[start : start + self.size] = self.zeros
        wipe(self.view[self.fresh :])


class LockedBuffer:
    """Bytes of an arena, owned until `free` or `disown`. It has no text form and cannot be pickled.

    ``view``: a writable memoryview of exactly the requested bytes. ``offset``: their offset in the
    arena's file.
    """

    __slots__ = ("_arena", "offset", "size", "view")

    def __init__(self, arena: "Arena", offset: int, view: memoryview) -> None:
        self._arena: Arena | None = arena
        self.offset = offset
        self.size = len(view)
        self.view = view

    def free(self) -> None:
        """Wipe the bytes and return them to the arena. A second call does nothing."""
        arena = self.disown()
        if arena is not None:
            arena.free(self.offset, self.size)

    def disown(self) -> "Arena | None":
        """Give up ownership to the caller, which has noted offset and size; return the bytes'
        arena.
        """
        arena, self._arena = self._arena, None
        return arena

    def __len__(self) -> int:
        return self.size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.free()

    def __repr__(self) -> str:
        return f"<LockedBuffer of {self.size} bytes>"

    def __reduce__(self) -> str:
        raise TypeError("a LockedBuffer cannot be pickled")


class Arena:
    """Slots of power-of-two size classes in windows of one memory file. All sizes are bytes.

    ``level``: the protection of the file's pages. ``held``: bytes that are handed out; ``spare``:
    bytes that are mapped and unused. Buffers of a window or more get windows of their own. ``fd``:
    the file of an earlier process's arena, owned; call `adopt` then. ``on_window``: a callback with
    the number of windows of the file that were ever used, before one is used for the first time.
    """

    def __init__(
        self,
        level: Level,
        *,
        window: int = SECRET_WINDOW,
        reserve: int = 0,
        fd: int | None = None,
    ) -> None:
        self.level = level
        self.held = 0
        self.spare = 0
        self.on_window: Callable[[int], None] = lambda _count: None
        self._lock = threading.Lock()  # threads read sources
        self._window = window
        self._shift = window.bit_length() - 1
        self._reserve = reserve // window
        self._fd = open_file(level) if fd is None else fd
        self._taken = bytearray()  # one byte for each window of the file: 1 = in use
        self._views: dict[int, memoryview] = {}  # windows in use
        self._addresses: dict[int, int] = {}
        self._slabs: dict[int, _Slab] = {}  # window -> slab
        self._open: dict[int, list[_Slab]] = {}  # slot size -> slabs with a free slot
        self._spare: dict[int, memoryview] = {}  # mapped windows without a user
        self._idle: _Slab | None = None  # the latest slab without a used slot, which stays mapped
        try:
            for index in range(self._reserve):
                self._spare[index] = self._map(index, 1)
                self.spare += window
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The file's descriptor, borrowed."""
        return self._fd

    def adopt(self, plan: Plan) -> None:
        """Take over the buffers that an earlier process left in the file, and wipe everything else.

        Raises LockedMemoryExhausted if they cannot be mapped.
        """
        self.held = plan.held
        self._taken = plan.taken
        # Wipe unused windows first, one at a time: that needs no more locked memory than before.
        for index, taken in enumerate(plan.taken):
            if not taken:
                view = self._map(index, 1)
                wipe(view)
                self._unmap(index, view)
        for index, count in plan.windows():
            self._views[index] = self._map(index, count)
        # The rest of each slot in use holds zeros: `free` wipes whole slots.
        for index, (slot, begins) in plan.slots.items():
            slab = self._slabs[index] = _Slab(index << self._shift, slot, self._views[index])
            slab.adopt(begins)
            if slab.room:
                self._open.setdefault(slot, []).append(slab)

    @property
    def window(self) -> int:
        """Bytes of a window."""
        return self._window

    @property
    def mapped(self) -> int:
        """Bytes that are mapped now, and thus locked."""
        return sum(map(len, self._views.values())) + sum(map(len, self._spare.values()))

    def allocate(self, size: int) -> LockedBuffer:
        """Return a zeroed buffer of ``size`` bytes. Raises LockedMemoryExhausted."""
        # slot_size(), inlined: a call for each secret costs time.
        slot = SMALLEST_SLOT if size <= SMALLEST_SLOT else 1 << (size - 1).bit_length()
        with self._lock:
            slabs = self._open.get(slot)
            if slabs:
                slab = slabs[-1]
            elif slot < self._window:
                slab = self._new_slab(slot)
                slabs = self._open[slot]
            else:
                index = self._allocate_windows(-(-size // self._window))
                self.held += size
                return LockedBuffer(self, index << self._shift, self._views[index][:size])
            if slab.freed:
                start = slab.freed.pop()
            else:
                start = slab.fresh
                slab.fresh = start + slot
            if slab is self._idle:
                self._idle = None
            slab.room -= 1
            if not slab.room:
                slabs.pop()
            self.held += size
            return LockedBuffer(self, slab.base + start, slab.view[start : start + size])

    def _new_slab(self, slot: int) -> _Slab:
        index = self._allocate_windows(1)
        slab = self._slabs[index] = _Slab(index << self._shift, slot, self._views[index])
        self._open.setdefault(slot, []).append(slab)
        return slab

    def view(self, offset: int, size: int) -> memoryview:
        """Return a writable view of ``size`` bytes that an earlier `allocate` returned at
        ``offset``.
        """
        start = offset & (self._window - 1)
        return self._views[offset >> self._shift][start : start + size]

    def free(self, offset: int, size: int) -> None:
        """Wipe and take back the ``size`` bytes that `allocate` returned at ``offset``."""
        with self._lock:
            if self._fd < 0:
                return
            index = offset >> self._shift
            slab = self._slabs.get(index)
            self.held -= size
            if slab is None:
                view = self._views[index]
                wipe(view[:size])
                self._release_windows(index, len(view) >> self._shift)
                return
            start = offset - slab.base
            slab.view[start : start + slab.size] = slab.zeros
            if not slab.room:
                self._open.setdefault(slab.size, []).append(slab)
            slab.freed.append(start)
            slab.room += 1
            if slab.room == slab.count:
                # It stays mapped, so that a lone buffer does not map it each time.
                self._release_idle(slab)

    def wipe(self) -> None:
        """Wipe everything, at the end of a process whose threads may still hold views.

        Spare windows were wiped when they were freed; touching them would only allocate pages.
        """
        for view in self._views.values():
            wipe(view)

    def close(self) -> None:
        """Wipe and close everything. A buffer that is still held stays readable, as zeros, until
        the process ends.
        """
        self.wipe()
        if not self.held:
            for index, view in (self._views | self._spare).items():
                self._unmap(index, view)
            for known in (self._views, self._spare, self._slabs, self._open):
                known.clear()
            self._idle = None
        self._close_file()

    def leave(self) -> None:
        """Close the file, and leave its content to the next process."""
        self._close_file()

    def _close_file(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _release_idle(self, instead: _Slab | None = None) -> None:
        """Release the idle slab's window, or else a spare one; keep ``instead`` idle."""
        slab, self._idle = self._idle, instead
        if slab is not None:
            index = slab.base >> self._shift
            self._open[slab.size].remove(slab)
            del self._slabs[index]
            self._release_windows(index, 1)
        elif len(self._spare) > self._reserve:
            index, view = self._spare.popitem()
            self.spare -= self._window
            self._unmap(index, view)

    def _allocate_windows(self, count: int) -> int:
        if count > 1 or not self._spare:
            self._release_idle()
        if count == 1 and self._spare:
            index, view = self._spare.popitem()
            self.spare -= self._window
        else:
            free = bytes(count)
            index = self._taken.find(free)
            while index >= 0 and any(i in self._spare for i in range(index, index + count)):
                index = self._taken.find(free, index + 1)
            if index < 0:
                index = max([len(self._taken), *(i + 1 for i in self._spare)])
            view = self._map(index, count)
        if len(self._taken) < index + count:
            self.on_window(index + count)
            self._taken.extend(bytes(index + count - len(self._taken)))
        self._taken[index : index + count] = b"\1" * count
        self._views[index] = view
        return index

    def _release_windows(self, index: int, count: int) -> None:
        view = self._views.pop(index)
        self._taken[index : index + count] = bytes(count)
        # One window beyond the reserve stays, so that adding and deleting at a boundary does not
        # map and unmap every time.
        if count == 1 and len(self._spare) + (self._idle is not None) <= self._reserve:
            self._spare[index] = view
            self.spare += self._window
        else:
            self._unmap(index, view)

    def _map(self, index: int, count: int) -> memoryview:
        self._addresses[index], view = map_pages(
            self._fd, index << self._shift, count << self._shift, self.level
        )
        return view

    def _unmap(self, index: int, view: memoryview) -> None:
        unmap_pages(self._addresses.pop(index), len(view))
