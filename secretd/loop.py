# SPDX-License-Identifier: LGPL-2.1-or-later
"""asyncio's event loop, with a shorter way from epoll_wait(2) to who reads a connection.

asyncio makes a list of what is ready, from that a queue of handles, and runs each in its context: some
fifteen calls before the one that counts. What is given to `Loop.watch` is called where epoll says that
there is something to read. All else is asyncio's own; transport uses this where it finds it, and
`add_reader` on any other loop.
"""

import asyncio
import contextlib
import select
import selectors
from collections.abc import Callable, Mapping
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey
from typing import Any

_IN = select.EPOLLIN
_OUT = select.EPOLLOUT


class _Selector(selectors.BaseSelector):
    """epoll(7), for descriptors by number."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._epoll = select.epoll()
        self._keys: dict[Any, SelectorKey] = {}
        self._watched: dict[int, Callable[[], None]] = {}
        self._failed = failed

    def _update(self, fd: int) -> None:
        """Have the kernel tell what is asked for."""
        key = self._keys.get(fd)
        events = _IN if fd in self._watched else 0
        if key is not None:
            events |= (_IN if key.events & EVENT_READ else 0) | (
                _OUT if key.events & EVENT_WRITE else 0
            )
        if not events:
            with contextlib.suppress(OSError):  # it was closed before
                self._epoll.unregister(fd)
            return
        try:
            self._epoll.modify(fd, events)
        except FileNotFoundError:
            self._epoll.register(fd, events)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever there is something to read, or nothing will ever be."""
        self._watched[fd] = callback
        self._update(fd)

    def unwatch(self, fd: int) -> None:
        """Undo `watch`."""
        if self._watched.pop(fd, None) is not None:
            self._update(fd)

    def register(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        """See BaseSelector."""
        if not isinstance(fileobj, int):
            raise TypeError("a descriptor is known by its number here")
        key = self._keys[fileobj] = SelectorKey(fileobj, fileobj, events, data)
        try:
            self._update(fileobj)
        except OSError:
            del self._keys[fileobj]
            raise
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> SelectorKey:
        """See BaseSelector."""
        return self.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> SelectorKey:
        """See BaseSelector."""
        key = self._keys.pop(fileobj)
        self._update(fileobj)
        return key

    def get_map(self) -> Mapping[Any, SelectorKey]:
        """See BaseSelector."""
        return self._keys

    def close(self) -> None:
        """See BaseSelector."""
        self._epoll.close()
        self._watched.clear()
        self._keys.clear()

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """See BaseSelector. Calls those who watch, and returns the rest."""
        wait = -1 if timeout is None else max(timeout, 0)
        watched, keys = self._watched, self._keys
        ready = []
        for fd, events in self._epoll.poll(wait, len(watched) + len(keys) or 1):
            mask = (EVENT_READ if events & ~_OUT else 0) | (EVENT_WRITE if events & ~_IN else 0)
            callback = watched.get(fd)
            if callback is not None and mask & EVENT_READ:
                try:
                    callback()
                except Exception as error:  # noqa: BLE001 - as asyncio does with a callback
                    self._failed(error)
                mask &= EVENT_WRITE
            key = keys.get(fd)  # the callback may have changed it
            if key is not None and mask & key.events:
                ready.append((key, mask & key.events))
        return ready


class Loop(asyncio.SelectorEventLoop):
    """The event loop of the daemon."""

    def __init__(self) -> None:
        selector = _Selector(self._watcher_failed)
        super().__init__(selector)
        self.watch = selector.watch
        self.unwatch = selector.unwatch

    def _watcher_failed(self, error: Exception) -> None:
        self.call_exception_handler({"message": "Exception in a watcher", "exception": error})


def readers(
    loop: asyncio.AbstractEventLoop,
) -> tuple[Callable[[int, Callable[[], None]], object], Callable[[int], object]]:
    """Return how to have a function called when a descriptor can be read, and how to end that."""
    if isinstance(loop, Loop):
        return loop.watch, loop.unwatch
    return loop.add_reader, loop.remove_reader
