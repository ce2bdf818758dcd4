# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handing a secret's plaintext to a descriptor that the client passed.

Takes a `Grant` (access made it) and a `Target`, and writes from locked memory. What is full is
waited for, with a time limit; nobody else waits. commands calls it.

For peers who are not trusted even a write that asks not to wait may never return (docs/design.md,
"Descriptors are hostile"), so it happens in one of their few threads. Such a thread holds only a
piece of the secret, in a buffer of its own: a write that is stuck reads from there whenever it goes
on, so the buffer is wiped when the secret is withdrawn, and is used for nothing else until the
write has returned.
"""

import asyncio
import contextlib
import os
import select
import threading
from collections.abc import Callable, Coroutine
from typing import Final, Protocol

from secretd.access.decision import Grant
from secretd.crypto.cipher import encode_base64
from secretd.descriptors.fd import Fd
from secretd.descriptors.target import Target
from secretd.descriptors.threads import Offload
from secretd.errors import CommandError, LimitReached
from secretd.linux.locked_pages import wipe
from secretd.memory.arena import Arena, LockedBuffer

DELIVERY_SECONDS: Final = 10.0
"""Seconds within which the other end must have taken the whole secret."""

WRITE_SECONDS: Final = 0.002
"""Seconds that a write which does not wait may take before its thread counts as held up."""

PIECE_BYTES: Final = 16 << 10
"""Bytes of a secret that a thread holds at a time."""


_NOTHING: Final = memoryview(b"")
_GONE: Final = "the client has disconnected"


class Content:
    """What is to be written: the plaintext that a grant carries, its base64, or what was made of it,
    ``instead``. ``size``: bytes of that.

    ``untaken`` is called with the reason once it is certain that the delivery has ended and the other end
    has taken no byte: at once, or when a write that was under way has returned.
    """

    def __init__(
        self,
        grant: Grant,
        untaken: Callable[[str], object],
        *,
        base64: bool = False,
        instead: bytes | None = None,
    ) -> None:
        self._untaken = untaken
        self.grant = grant
        self.base64 = base64
        self.plaintext = grant.plaintext if instead is None else memoryview(instead)
        self.size = -(-len(self.plaintext) // 3) * 4 if base64 else len(self.plaintext)
        self.view = self.plaintext
        self.written = 0  # bytes that the other end has taken
        self._encoded: LockedBuffer | None = None

    def encode(self, scratch: Arena) -> None:
        """Have ``view`` be the base64."""
        self._encoded = encode_base64(self.plaintext, scratch)
        self.view = self._encoded.view

    def failed(self, reason: str) -> None:
        """The delivery has ended early, and nothing more will be written."""
        if not self.written:
            self._untaken(reason)

    def drop(self) -> None:
        """Forget it; wipe what is only here."""
        self.view = self.plaintext = _NOTHING
        encoded, self._encoded = self._encoded, None
        if encoded is not None:
            encoded.free()


class _Delivery(Protocol):
    """A delivery that goes on."""

    content: Content

    def withdraw(self) -> None:
        """End it: it touches no plaintext after this returns."""


class Deliveries:
    """The deliveries that wait for their reader, or for a thread."""

    def __init__(self, scratch: Arena, offload: Offload) -> None:
        self._scratch = scratch
        self._offload = offload
        self._running: dict[str, set[_Delivery]] = {}

    def withdraw(self, object_id: str) -> None:
        """End the running deliveries of a secret: none touches its plaintext after this returns."""
        for delivery in self._running.pop(object_id, ()):
            delivery.withdraw()

    def recheck(self, holds: Callable[[Grant], bool]) -> None:
        """End those deliveries whose grant no longer holds."""
        for deliveries in list(self._running.values()):
            for delivery in list(deliveries):
                if not holds(delivery.content.grant):
                    self._forget(delivery)
                    delivery.withdraw()

    def deliver(
        self, content: Content, target: Target, fd: Fd
    ) -> Coroutine[object, object, None] | None:
        """Write all of it and close the descriptor, which ``target`` borrows. Raises CommandError.

        Returns a coroutine if that cannot be done now, or not here.
        """
        if not content.grant.peer.trusted:
            return self._submit(content, target, fd)
        try:
            if content.base64:
                content.encode(self._scratch)
            target.begin(content.size)
            position = content.written = target.write(content.view, 0)
        except OSError as error:
            _release(content, target, fd)
            raise _failed(content, error) from None
        except CommandError as error:
            _release(content, target, fd)
            content.failed(error.desc)
            raise
        except BaseException:
            _release(content, target, fd)
            raise
        if position < content.size:
            # Known to `withdraw` from now on, not only when the coroutine first runs.
            waiting = _Waiting(content)
            self._remember(waiting)
            return self._go_on(waiting, position, target, fd)
        _release(content, target, fd)
        return None

    def _remember(self, delivery: _Delivery) -> None:
        self._running.setdefault(delivery.content.grant.object_id, set()).add(delivery)

    def _forget(self, delivery: _Delivery) -> None:
        object_id = delivery.content.grant.object_id
        others = self._running.get(object_id)
        if others is not None:
            others.discard(delivery)
            if not others:
                del self._running[object_id]

    async def _go_on(self, waiting: "_Waiting", position: int, target: Target, fd: Fd) -> None:
        content = waiting.content
        try:
            async with asyncio.timeout(DELIVERY_SECONDS):
                while position < content.size:
                    await waiting.writable(fd.fileno())
                    if waiting.withdrawn:
                        raise _withdrawn(content)
                    position += target.write(content.view[position:], position)
                    content.written = position
        except TimeoutError:
            raise _ended(content, _too_slow()) from None
        except OSError as error:
            raise _failed(content, error) from None
        except CommandError as error:
            raise _ended(content, error) from None
        except asyncio.CancelledError:
            content.failed(_GONE)
            raise
        finally:
            self._forget(waiting)
            _release(content, target, fd)

    # --- in a thread

    def _submit(self, content: Content, target: Target, fd: Fd) -> Coroutine[object, object, None]:
        target.may_block = True
        job = _Job(content, target, fd, self._scratch)
        self._remember(job)
        return self._in_thread(job)

    async def _in_thread(self, job: "_Job") -> None:
        loop = asyncio.get_running_loop()
        uid = job.content.grant.peer.uid

        def unused() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all with it
                loop.call_soon_threadsafe(job.release)

        try:
            async with asyncio.timeout(DELIVERY_SECONDS) as job.scope:
                if job.withdrawn:
                    job.scope.reschedule(loop.time())
                failure = await self._offload.run(
                    uid, lambda _failure: job.release(), job.write, unused
                )
        except TimeoutError:
            error = _withdrawn(job.content) if job.withdrawn else _too_slow()
            job.abandon(error.desc)
            raise error from None
        except asyncio.CancelledError:
            job.abandon(_GONE)
            raise
        finally:
            self._forget(job)
            job.withdraw()
        job.release()
        if isinstance(failure, OSError):
            raise _failed(job.content, failure)
        if failure is not None:
            raise _ended(job.content, failure)


class _Waiting:
    """A delivery by the loop whose other end is full."""

    def __init__(self, content: Content) -> None:
        self.content = content
        self.withdrawn = False
        self._woken: asyncio.Future[None] | None = None

    def withdraw(self) -> None:
        """See _Delivery."""
        self.withdrawn = True
        self.content.drop()
        self._wake()

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    async def writable(self, fd: int) -> None:
        """Wait until something may be written, or the delivery is withdrawn."""
        if self.withdrawn:
            return
        loop = asyncio.get_running_loop()
        self._woken = loop.create_future()
        loop.add_writer(fd, self._wake)
        try:
            await self._woken
        finally:
            loop.remove_writer(fd)


class _Job:
    """A delivery by a thread. ``write`` runs there; everything else in the loop.

    Two locks: ``_copying`` while the secret is looked at, which never takes long; ``_writing`` from there
    until what was copied is written, which may never end.
    """

    def __init__(self, content: Content, target: Target, fd: Fd, scratch: Arena) -> None:
        self.content = content
        self.withdrawn = False
        self.scope: asyncio.Timeout | None = None
        self._target = target
        self._fd = fd
        self._scratch = scratch
        self._copying = threading.Lock()
        self._writing = threading.Lock()
        self._released = False
        self._reason: str | None = None  # why it failed, while that may not be the whole truth
        # What follows is made by the thread: as long as it waits for one, a delivery holds nothing.
        self._piece: LockedBuffer | None = None
        self._rest = memoryview(b"")  # of the piece, not written yet
        self._copied = 0  # bytes of the plaintext
        self._bell = -1  # an eventfd(2) that wakes the thread

    def withdraw(self) -> None:
        """See _Delivery."""
        if self._released:
            return
        # A write that goes on is waited for, as long as it takes if nobody holds it up: else the client gets
        # zeros behind what it has, instead of the end.
        idle = not self.withdrawn and self._writing.acquire(timeout=WRITE_SECONDS)
        with self._copying:
            self.withdrawn = True
            if self._piece is not None:
                wipe(self._piece.view)
            self.content.drop()
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)
        if idle:
            self._writing.release()
        if self.scope is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self.scope.reschedule(asyncio.get_running_loop().time())

    def abandon(self, reason: str) -> None:
        """The delivery has failed while the thread may still be writing: only when that write returns is it
        known whether the other end has taken something.
        """
        self.withdraw()
        if self._writing.acquire(blocking=False):
            self._writing.release()
            self.content.failed(reason)
        else:
            self._reason = reason

    def release(self) -> None:
        """The thread is done with it, or never began."""
        self._released = True
        if self._piece is not None:
            self._piece.free()
        if self._bell >= 0:
            os.close(self._bell)
        _release(self.content, self._target, self._fd)
        if self._reason is not None:
            self.content.failed(self._reason)

    def write(self) -> OSError | CommandError | None:
        """Write it all, or until it is withdrawn; return what went wrong."""
        position = 0
        try:
            self._target.begin(self.content.size)
            while True:
                with self._writing:
                    if not self._copy():
                        return None
                    taken = self._target.write(self._rest, position)
                    self._rest = self._rest[taken:]
                    position += taken
                    self.content.written = position
                if self._rest:
                    self._wait()
        except (OSError, CommandError) as error:
            return error

    def _copy(self) -> bool:
        """Have something to write; False at the end, or if the secret was withdrawn."""
        with self._copying:
            if self._rest and not self.withdrawn:
                return True
            # What is encoded is a third larger, and only whole triples can be.
            size = PIECE_BYTES // 4 * 3 if self.content.base64 else PIECE_BYTES
            source = self.content.plaintext[self._copied : self._copied + size]
            if self._piece is not None:
                self._piece.free()
                self._piece = None
            if not source:
                return False
            self._copied += len(source)
            if self.content.base64:
                self._piece = encode_base64(source, self._scratch)
            else:
                self._piece = self._scratch.allocate(len(source))
                self._piece.view[:] = source
            self._rest = self._piece.view
            return True

    def _wait(self) -> None:
        """Wait until something may be written or the secret is withdrawn, as it is when time is over."""
        with self._copying:
            if self._bell < 0:
                self._bell = os.eventfd(int(self.withdrawn), os.EFD_CLOEXEC)
        poll = select.poll()
        poll.register(self._target.fd, select.POLLOUT)
        poll.register(self._bell, select.POLLIN)
        poll.poll()


def _release(content: Content, target: Target, fd: Fd) -> None:
    content.drop()
    target.close()
    fd.close()


def _ended(content: Content, error: CommandError) -> CommandError:
    content.failed(error.desc)
    return error


def _failed(content: Content, error: OSError) -> CommandError:
    words = f"Unable to write the secret: {os.strerror(error.errno or 0)}"
    return _ended(content, CommandError(words))


def _withdrawn(content: Content) -> CommandError:
    return CommandError(f"Secret '{content.grant.object_id}' was withdrawn")


def _too_slow() -> CommandError:
    return LimitReached(
        "delivery-seconds",
        f"The descriptor did not take the secret within {DELIVERY_SECONDS:g} seconds",
    )
