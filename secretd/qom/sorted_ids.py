# SPDX-License-Identifier: LGPL-2.1-or-later
"""A sorted list of ids whose updates take time that does not grow with the list.

It is a list of short lists: a change moves some hundred entries at most. So the time of a query
reveals nothing about earlier changes. The tree and the index of grants keep one each.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable, Iterator
from typing import Final

IDS_PER_LOOK: Final = 512
"""Ids that are examined before other connections get their turn."""


class SortedIds:
    """The ids, in order."""

    def __init__(self, ids: Iterable[str], *, block_ids: int = 512) -> None:
        """``block_ids``: ids of a block; a block with twice as many is split into two."""
        every = sorted(ids)
        self._block_ids = block_ids
        self._blocks = [every[i : i + block_ids] for i in range(0, len(every), block_ids)]
        self._last = [block[-1] for block in self._blocks]  # the last id of each block

    def add(self, object_id: str) -> None:
        """Add an id that is not in the list."""
        blocks, last = self._blocks, self._last
        index = bisect_left(last, object_id)
        if index == len(last):
            if not last:
                blocks.append([object_id])
                last.append(object_id)
                return
            index -= 1
            blocks[index].append(object_id)
            last[index] = object_id
        else:
            insort(blocks[index], object_id)
        block = blocks[index]
        size = self._block_ids
        if len(block) >= 2 * size:
            blocks[index : index + 1] = [block[:size], block[size:]]
            last.insert(index, block[size - 1])

    def remove(self, object_id: str) -> None:
        """Remove an id that is in the list."""
        blocks, last = self._blocks, self._last
        index = bisect_left(last, object_id)
        block = blocks[index]
        del block[bisect_left(block, object_id)]
        if not block:
            del blocks[index], last[index]
        else:
            last[index] = block[-1]

    def after(self, object_id: str, count: int, *, included: bool = False) -> list[str]:
        """Return at most ``count`` ids after one, in order; with ``included`` starting with
        itself.
        """
        cut = bisect_left if included else bisect_right
        index = cut(self._last, object_id)
        found: list[str] = []
        while index < len(self._blocks) and len(found) < count:
            block = self._blocks[index]
            start = 0 if found else cut(block, object_id)
            found += block[start : start + count - len(found)]
            index += 1
        return found

    def with_prefixes(self, after: str, prefixes: Collection[str]) -> Iterator[str | None]:
        """Yield the ids after ``after`` that begin with one of ``prefixes``, in order and each
        once.

        After each IDS_PER_LOOK ids it yields None: ids may be added and removed then.
        """
        last = after
        for prefix in sorted(prefixes):
            included = prefix > last
            last = max(last, prefix)
            if not last.startswith(prefix):
                continue
            while True:
                examined = self.after(last, IDS_PER_LOOK, included=included)
                for each in examined:
                    if not each.startswith(prefix):
                        break
                    last = each
                    yield each
                else:
                    if len(examined) < IDS_PER_LOOK:
                        break
                    included = False
                    yield None
                    continue
                break


def in_order(first: Iterator[str | None], second: Iterator[str | None]) -> Iterator[str | None]:
    """Merge two sorted iterators without duplicates; yield None whenever one of them does."""
    streams, heads = [first, second], ["", ""]
    while streams:
        for index in reversed(range(len(streams))):
            while not heads[index]:
                head = next(streams[index], "")
                if head == "":
                    del streams[index], heads[index]
                    break
                if head is None:
                    yield None
                else:
                    heads[index] = head
        if len(streams) == 1:
            yield heads[0]
            yield from streams[0]
            return
        if heads:
            least = min(heads)
            yield least
            heads = ["" if head == least else head for head in heads]
