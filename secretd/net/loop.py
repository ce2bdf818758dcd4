# SPDX-License-Identifier: LGPL-2.1-or-later
"""An asyncio event loop that calls connection readers directly from epoll_wait(2), and shares time
by uid.

asyncio builds a list of ready descriptors, queues handles for them, and runs each in its context:
some fifteen calls before the reader. A callback given to `Loop.watch` is called as soon as epoll
reports its descriptor. While asyncio has nothing scheduled, epoll is asked again at once.

Work for untrusted peers goes through `Turns`: a little at a time, in turn by uid, between two looks
at epoll. So neither the number of a uid's connections nor the cost of their messages delays the
trusted, or another uid, by more than a few messages. net.transport uses this loop.
"""

import asyncio
import select
import selectors
from collections.abc import Callable, Mapping
from contextvars import Context
from selectors import EVENT_READ, EVENT_WRITE, SelectorKey
from time import monotonic
from typing import Any, Final, TypeVarTuple, Unpack

from secretd.net.turns import Turns

_Ts = TypeVarTuple("_Ts")
_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT

_EVENTS: Final = 128
"""Events that one epoll_wait(2) reports; more come with the next call."""


class _Selector(selectors.BaseSelector):
    """epoll(7), for descriptors by number.

    ``failed``: called with the exception of a reader. ``undisturbed``: True while no callback or
    timer has been scheduled since `select` was entered.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._epoll = select.epoll()
        self._keys: dict[Any, SelectorKey] = {}
        self._watched: dict[int, Callable[[], object]] = {}
        self._registered: set[int] = set()
        self._failed = failed
        self.turns = Turns(failed)
        self.undisturbed = True

    def _update(self, fd: int) -> None:
        """Update the kernel's interest in a descriptor."""
        key = self._keys.get(fd)
        events = _IN if fd in self._watched else 0
        if key is not None:
            events |= (_IN if key.events & EVENT_READ else 0) | (
                _OUT if key.events & EVENT_WRITE else 0
            )
        registered = self._registered
        try:
            if not events:
                registered.discard(fd)
                self._epoll.unregister(fd)
            elif fd in registered:
                self._epoll.modify(fd, events)
            else:
                self._epoll.register(fd, events)
                registered.add(fd)
        except FileNotFoundError:
            # The descriptor was closed before; its number may be in use again.
            if events:
                self._epoll.register(fd, events)
        except OSError:
            if events:
                raise

    def watch(self, fd: int, callback: Callable[[], object]) -> None:
        """Call ``callback`` whenever the descriptor is readable or hung up."""
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
        """See BaseSelector. Calls the readers, and returns the other events.

        It repeats while there are no other events and asyncio has nothing scheduled.
        """
        wait, deadline = -1.0, 0.0
        if timeout is not None:
            wait = max(timeout, 0)
            deadline = monotonic() + wait
        poll, watched, turns = self._epoll.poll, self._watched, self.turns
        waiting = turns.waiting
        others: list[tuple[int, int]] = []
        self.undisturbed = True
        while True:
            # 1. Call the readers; collect the events that asyncio asked for.
            for fd, events in poll(0 if waiting else wait, _EVENTS):
                callback, rest = watched.get(fd), events
                if callback is not None and events != _OUT:
                    try:
                        callback()
                    except Exception as error:  # noqa: BLE001 - as asyncio does with a callback
                        self._failed(error)
                    if events == _IN:
                        continue
                    rest = events & ~_IN
                others.append((fd, rest))
            # 2. Some work for untrusted peers.
            if waiting:
                turns.run()
            # 3. Return if asyncio has something to do.
            ready = self._wanted(others) if others else []
            if ready or not self.undisturbed:
                return ready
            others.clear()
            if timeout is not None:
                wait = deadline - monotonic()
                if wait <= 0:
                    return ready

    def others_ready(self, fd: int) -> bool:
        """Return True if asyncio or Turns has work, or if another descriptor than ``fd`` is
        readable.
        """
        return (
            not self.undisturbed
            or bool(self.turns.waiting)
            or any(other != fd for other, _ in self._epoll.poll(0, 2))
        )

    def _wanted(self, others: list[tuple[int, int]]) -> list[tuple[SelectorKey, int]]:
        """Return the events that asyncio has asked for, as of now: readers may have changed
        that.
        """
        ready = []
        for fd, events in others:
            mask = (EVENT_READ if events & ~_OUT else 0) | (EVENT_WRITE if events & ~_IN else 0)
            key = self._keys.get(fd)
            if key is not None and mask & key.events:
                ready.append((key, mask & key.events))
        return ready


class Loop(asyncio.SelectorEventLoop):
    """The event loop of the daemon."""

    def __init__(self) -> None:
        self._waiting = selector = _Selector(self._watcher_failed)
        super().__init__(selector)
        self.others_ready = selector.others_ready
        self.turns = selector.turns
        self.watch = selector.watch
        self.unwatch = selector.unwatch

    # These methods schedule all work; other threads and signals arrive on a descriptor that
    # asyncio reads.

    def call_soon(
        self,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """See AbstractEventLoop."""
        self._waiting.undisturbed = False
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[_Ts]], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """See AbstractEventLoop; call_later() calls this."""
        self._waiting.undisturbed = False
        return super().call_at(when, callback, *args, context=context)

    def stop(self) -> None:
        """See AbstractEventLoop."""
        self._waiting.undisturbed = False
        super().stop()

    def _watcher_failed(self, error: Exception) -> None:
        self.call_exception_handler({"message": "Exception in a watcher", "exception": error})


def running_loop() -> Loop:
    """Return the running loop, which must be a `Loop`."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Loop), loop
    return loop


async def turn(uid: int | None) -> None:
    """Yield to others: return in the next turn of ``uid``, or of the loop if it is None."""
    loop = running_loop()
    come = loop.create_future()

    def wake() -> None:
        if not come.done():
            come.set_result(None)

    if uid is None:
        loop.call_soon(wake)
    else:
        loop.turns.add(uid, wake)
    await come
