# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plan for taking over an earlier process's arena, checked before anything is mapped.

The journal knows which buffers are in use. `plan` computes their windows and slots, and refuses a
set that no arena can have left; `Arena.adopt` then maps and wipes. So an arena that cannot be taken
over stays as it was.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping

from secretd.errors import StateError

SMALLEST_SLOT = 64
"""Bytes of the smallest size class: a 32-byte key fits, 100,000 of them in 6.2 MiB."""


def slot_size(size: int) -> int:
    """Return the bytes of the size class of a buffer of ``size`` bytes."""
    return SMALLEST_SLOT if size <= SMALLEST_SLOT else 1 << (size - 1).bit_length()


class Plan:
    """The buffers that an earlier process left; ``held`` is their total size in bytes.

    ``taken``: one byte for each window, 1 if in use. ``large``: by first window, the number of
    windows of a large buffer. ``slots``: by window, the size of its slots, and the offsets of those
    in use.
    """

    def __init__(self, taken: bytearray) -> None:
        self.taken = taken
        self.held = 0
        self.large: dict[int, int] = {}
        self.slots: dict[int, tuple[int, set[int]]] = {}

    def windows(self) -> Iterator[tuple[int, int]]:
        """Yield the first window and the number of windows of each mapping."""
        yield from self.large.items()
        for index in self.slots:
            yield index, 1


def plan(window: int, windows: int, buffers: Mapping[int, list[int]]) -> Plan:
    """Return the plan for buffers in the first ``windows`` windows, of ``window`` bytes each.

    ``buffers``: the offsets of the buffers in use, by size in bytes. Raises StateError if two of
    them overlap, or lie where no arena places them.
    """
    shift = window.bit_length() - 1
    made = Plan(bytearray(windows))
    # 1. Buffers of a window or more have windows of their own; the others share slabs.
    by_slot: dict[int, list[int]] = {}
    for size, offsets in buffers.items():
        made.held += size * len(offsets)
        slot = slot_size(size)
        if slot < window:
            by_slot.setdefault(slot, []).extend(offsets)
            continue
        for offset in offsets:
            index = offset >> shift
            if offset & (window - 1) or index in made.large:
                raise _overlap()
            made.large[index] = -(-size // window)
    # 2. A window has slots of one size.
    for slot, offsets in by_slot.items():
        offsets.sort()
        last = 0
        while last < len(offsets):
            first, index = last, offsets[last] >> shift
            base = index << shift
            last = bisect_left(offsets, base + window, first)
            begins = set(offsets[first:last])
            if index in made.slots or len(begins) < last - first:
                raise _overlap()
            if not begins.issubset(range(base, base + window, slot)):
                raise _overlap()
            made.slots[index] = (slot, begins)
    # 3. No window is used twice.
    for index, count in made.windows():
        if index + count > windows or any(made.taken[index : index + count]):
            raise _overlap()
        made.taken[index : index + count] = b"\1" * count
    return made


def _overlap() -> StateError:
    return StateError("two secrets lie in one place")
