# SPDX-License-Identifier: LGPL-2.1-or-later
"""Threads for calls that a client can make block, a few for each uid.

close(2), open(2) and read(2) on descriptors and paths of others may never return (docs/design.md,
"Descriptors are hostile"). This module knows nothing about secrets. monitor, server and
net.listener close through it, descriptors.source reads, deliveries writes, and daemon.process
reopens the audit file.
"""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

from secretd.access.peer import Peer
from secretd.descriptors.fd import Fd
from secretd.errors import LockedMemoryExhausted
from secretd.limits import Tuning
from secretd.linux.sockopt import holds_descriptors, kernel_version, unread_bytes
from secretd.memory.arena import Arena

R = TypeVar("R")

CLOSE_COLLECTS_GARBAGE: Final = kernel_version() < (6, 8)
"""True where close(2) of an AF_UNIX socket may close descriptors that others passed around in
circles (unix_gc() of net/unix/garbage.c; a work queue does it since Linux 6.8).
"""

_PEEK_BYTES: Final = 8 << 10

THREADS_PER_UID: Final = 4
"""Threads that one uid may keep busy with blocking descriptors."""

THREADS_OF_TRUSTED: Final = 64
"""The same for uid 0 and the daemon's own uid, whose many programs wait for FIFOs and slow
files.
"""

_IDLE_THREADS: Final = 4
_IDLE_SECONDS: Final = 10.0
"""Threads that wait for the next call of any uid, and for how long: starting one costs more than a
read.
"""


class _IdleThread:
    """A thread that waits for its next uid."""

    __slots__ = ("uid", "woken")

    def __init__(self) -> None:
        self.uid = -1
        self.woken = threading.Lock()
        self.woken.acquire()


class BlockingCalls:
    """Runs calls that a client can make block, in at most THREADS_PER_UID threads for each uid.

    Further calls of a uid wait for one of its own threads. An abandoned call continues in its
    thread. ``stuck_seconds``: see Tuning.
    """

    def __init__(self, stuck_seconds: float = Tuning.stuck_seconds) -> None:
        self._stuck_seconds = stuck_seconds
        self._lock = threading.Lock()
        self._threads: dict[int, int] = {}
        self._queues: dict[int, deque[Callable[[], object]]] = {}
        self._since: dict[int, dict[int, float]] = {}  # by uid and thread: start of its call
        self._idle: list[_IdleThread] = []
        self._trusted = (0, os.getuid())
        self._closing: dict[int, int] = {}
        self.closing_of_others = 0
        """Descriptors of all but the trusted that are not closed yet."""

    def closing(self, uid: int) -> int:
        """Return the number of descriptors of a uid that were given to `close` and are still
        open.
        """
        return self._closing.get(uid, 0)

    def stuck(self, uid: int) -> bool:
        """Return True if all threads of a uid are busy, each with one call for
        ``stuck_seconds``.
        """
        with self._lock:
            began = self._since.get(uid, {}).values()
            return (
                len(began) >= _threads(uid) and max(began) < time.monotonic() - self._stuck_seconds
            )

    def idle(self) -> bool:
        """Return True if no call runs or waits."""
        return not self._threads

    def close(self, uid: int, fd: int) -> None:
        """Close a descriptor in a thread of its uid, and count it for that uid until it is
        closed.
        """
        self._count_closing(uid, 1)
        self._submit(uid, lambda: self._close(uid, fd))

    def _close(self, uid: int, fd: int) -> None:
        try:
            os.close(fd)
        finally:
            self._count_closing(uid, -1)

    def _count_closing(self, uid: int, change: int) -> None:
        with self._lock:
            left = self._closing.get(uid, 0) + change
            if left:
                self._closing[uid] = left
            else:
                del self._closing[uid]
            if uid not in self._trusted:
                self.closing_of_others += change

    async def run(
        self,
        uid: int,
        discard: Callable[[R], object],
        function: Callable[[], R],
        unused: Callable[[], object] | None = None,
        fd: Fd | None = None,
    ) -> R:
        """Return ``function()``, called in a thread of ``uid``.

        ``discard``: called in the loop with the result if the caller was cancelled meanwhile.
        ``unused``: called in the thread instead of the function if the caller was cancelled before.
        ``fd``: a descriptor that the thread closes after the call, without delaying the result.
        Raises what the function raises.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        # In the loop, after the call.
        def settle(outcome: tuple[R | None, BaseException | None], taken: bool) -> None:
            result, error = outcome
            if taken and fd is not None and fd.released is not None:
                fd.released()
            if future.cancelled():
                if error is None:
                    discard(result)  # type: ignore[arg-type]
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        # In the thread.
        def call() -> None:
            if future.cancelled():
                if unused is not None:
                    unused()
                return
            outcome: tuple[R | None, BaseException | None]
            try:
                outcome = (function(), None)
            except BaseException as error:  # noqa: BLE001 - for the caller
                outcome = (None, error)
            number = -1 if fd is None else fd.take()
            if number >= 0:
                self._count_closing(uid, 1)
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all with it
                loop.call_soon_threadsafe(settle, outcome, number >= 0)
            if number >= 0:
                self._close(uid, number)

        self._submit(uid, call)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                discard(future.result())
            raise

    def _submit(self, uid: int, call: Callable[[], object]) -> None:
        with self._lock:
            self._queues.setdefault(uid, deque()).append(call)
            count = self._threads.get(uid, 0)
            if count >= _threads(uid):
                return
            self._threads[uid] = count + 1
            idle = self._idle.pop() if self._idle else None
        if idle is not None:
            idle.uid = uid
            idle.woken.release()
            return
        # A daemon thread: one that is stuck for ever must not keep the process alive.
        thread = threading.Thread(
            target=self._work, args=(uid,), name=f"blocking-{uid}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            # No thread could start. Another one of this uid, or the next call, finds the queue.
            self._retire(uid)

    def _work(self, uid: int) -> None:
        """Serve one uid, and then others."""
        this = _IdleThread()
        while self._serve(uid, this):
            if not this.woken.acquire(timeout=_IDLE_SECONDS):
                with self._lock:
                    if this in self._idle:
                        self._idle.remove(this)
                        return
                this.woken.acquire()  # it was woken at the last moment
            uid = this.uid
            threading.current_thread().name = f"blocking-{uid}"

    def _serve(self, uid: int, this: _IdleThread) -> bool:
        """Run all calls of a uid; return True if the thread should wait for another uid."""
        while True:
            with self._lock:
                queue = self._queues[uid]
                if not queue:
                    self._retire_locked(uid)
                    if len(self._idle) == _IDLE_THREADS:
                        return False
                    self._idle.append(this)
                    return True
                call = queue.popleft()
                self._since.setdefault(uid, {})[threading.get_ident()] = time.monotonic()
            with contextlib.suppress(OSError):
                call()
            with self._lock:
                del self._since[uid][threading.get_ident()]

    def _retire(self, uid: int) -> None:
        with self._lock:
            self._retire_locked(uid)

    def _retire_locked(self, uid: int) -> None:
        self._threads[uid] -= 1
        if not self._threads[uid]:
            del self._threads[uid]
            self._since.pop(uid, None)
            if not self._queues[uid]:
                del self._queues[uid]


def _threads(uid: int) -> int:
    return THREADS_OF_TRUSTED if uid in (0, os.getuid()) else THREADS_PER_UID


def close_connection(
    sock: socket.socket, peer: Peer, threads: BlockingCalls, scratch: Arena
) -> None:
    """Close a connection after its shutdown, so that no further bytes arrive on it.

    close(2) also closes the unread descriptors in it, which may never return. Then a thread of the
    peer's uid closes it, and always on kernels that collect the garbage of all sockets in close(2).
    ``scratch``: for the bytes before such descriptors.
    """
    if CLOSE_COLLECTS_GARBAGE or (not peer.trusted and _holds_descriptors(sock, scratch)):
        threads.close(peer.uid, sock.detach())
    else:
        sock.close()


def _holds_descriptors(sock: socket.socket, scratch: Arena) -> bool:
    if not unread_bytes(sock.fileno()):
        return False
    try:
        with scratch.allocate(_PEEK_BYTES) as buffer:
            return holds_descriptors(sock, buffer.view)
    except (LockedMemoryExhausted, OSError):
        return True
