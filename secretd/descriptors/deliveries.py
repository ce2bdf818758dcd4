# SPDX-License-Identifier: LGPL-2.1-or-later
"""Releasing secrets to descriptors: the one sequence that secret-read and LoadCredential= share.

`Deliveries.release` asks what the descriptor is, has access decide, writes, and undoes a read that
delivered nothing. The loop writes to the descriptors of trusted peers, a thread of the peer's uid
to all others. A delivery waits for a full descriptor, up to a time limit; no other request waits
for the delivery. The commands and server.credentials call this module.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

from secretd.access.decision import NOT_COUNTED, Grant
from secretd.descriptors.delivery import Delivery, LoopDelivery
from secretd.descriptors.fd import Fd
from secretd.descriptors.target import Target, open_target
from secretd.descriptors.threaded_delivery import ThreadedDelivery
from secretd.descriptors.threads import BlockingCalls
from secretd.errors import CommandError, LimitReached
from secretd.limits import Tuning
from secretd.memory.arena import Arena

_DISCONNECTED: Final = CommandError("the client has disconnected")


class Deliveries:
    """Starts deliveries, and keeps track of the running ones.

    ``undo``: called with the grant and the reason of a read that delivered nothing.
    """

    def __init__(
        self,
        scratch: Arena,
        threads: BlockingCalls,
        undo: Callable[[Grant, str], object],
        tuning: Tuning,
    ) -> None:
        self._scratch = scratch
        self._threads = threads
        self._undo = undo
        self._seconds = tuning.delivery_seconds
        self._write_seconds = tuning.write_seconds
        self._running: dict[str, set[Delivery]] = {}

    # --- release

    def release(
        self,
        fd: Fd,
        decide: Callable[[], Grant],
        *,
        opened: Callable[[int], Target] = open_target,
        base64: bool = False,
        seal: Callable[[Grant], bytes] | None = None,
    ) -> Delivery:
        """Write a secret to a descriptor, which is consumed.

        ``decide``: returns the permission or raises. It is called after the descriptor was
        classified, so that an unusable descriptor consumes no read. ``seal``: returns the bytes to
        write instead of the plaintext. ``opened``: makes the target of a borrowed descriptor.
        Returns the delivery; its ``rest`` is a coroutine if not everything could be written at
        once. Raises CommandError.
        """
        # 1. Classify the descriptor, then decide.
        try:
            target = opened(fd.fileno())
            grant = decide()
            sealed = None if seal is None else seal(grant)
        except BaseException:
            fd.close()
            raise
        # 2. A thread writes to the descriptors of untrusted peers.
        if not grant.peer.trusted:
            threaded = ThreadedDelivery(
                grant, target, fd, self._undo, base64, sealed, self._scratch, self._write_seconds
            )
            # `withdraw` must know it now, not only when the coroutine first runs.
            self._remember(threaded)
            threaded.rest = self._write_in_thread(threaded)
            return threaded
        # 3. The loop writes to those of trusted peers, usually all at once.
        delivery = LoopDelivery(grant, target, fd, self._undo, base64, sealed)
        if grant.counted is not None:
            self._remember(delivery)
            delivery.rest = self._write_counted(delivery)
        elif not self._write_at_once(delivery):
            self._remember(delivery)
            delivery.rest = self._write_rest(delivery)
        return delivery

    def _write_at_once(self, delivery: LoopDelivery) -> bool:
        """Write as much as possible without waiting; return True once everything is written. Raises
        CommandError.
        """
        try:
            if delivery.base64:
                delivery.encode(self._scratch)
            delivery.target.begin(delivery.size)
            complete = delivery.write()
        except OSError as error:
            delivery.close()
            raise delivery.fail_system(error) from None
        except CommandError as error:
            delivery.close()
            raise delivery.fail(error) from None
        except BaseException:
            delivery.close()
            raise
        if complete:
            delivery.close()
        return complete

    async def _counted(self, delivery: Delivery) -> None:
        """Wait until a store has the count of the read, if one keeps it. Raises CommandError; the
        delivery has ended then.
        """
        if delivery.grant.counted is None:
            return
        words = NOT_COUNTED.format(delivery.grant.object_id)
        try:
            await delivery.grant.counted
            if delivery.withdrawn:
                raise delivery.withdrawal()
        except CommandError as error:
            self._end(delivery)
            # Why the store did not take it is the administrator's to know.
            raise delivery.fail(error if delivery.withdrawn else CommandError(words)) from None
        except asyncio.CancelledError:
            self._end(delivery)
            delivery.fail(_DISCONNECTED)
            raise

    async def _write_counted(self, delivery: LoopDelivery) -> None:
        """Write everything once the read is counted."""
        await self._counted(delivery)
        self._forget(delivery)
        if not self._write_at_once(delivery):
            self._remember(delivery)
            await self._write_rest(delivery)

    def _end(self, delivery: Delivery) -> None:
        self._forget(delivery)
        delivery.close()

    async def release_decided(
        self, fd: Fd, decision: Awaitable[Grant], opened: Callable[[int], Target]
    ) -> Grant:
        """Release with a decision that must be awaited; return its grant once all is written."""
        try:
            grant = await decision
        except BaseException:
            fd.close()
            raise
        rest = self.release(fd, lambda: grant, opened=opened).rest
        if rest is not None:
            await rest
        return grant

    async def _write_rest(self, delivery: LoopDelivery) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                complete = False
                while not complete:
                    await delivery.wait()
                    if delivery.withdrawn:
                        raise delivery.withdrawal()
                    complete = delivery.write()
        except TimeoutError:
            raise delivery.fail(self._timed_out()) from None
        except OSError as error:
            raise delivery.fail_system(error) from None
        except CommandError as error:
            raise delivery.fail(error) from None
        except asyncio.CancelledError:
            delivery.fail(_DISCONNECTED)
            raise
        finally:
            self._end(delivery)

    async def _write_in_thread(self, delivery: ThreadedDelivery) -> None:
        loop = asyncio.get_running_loop()

        def unused() -> None:  # runs in the thread, instead of write()
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all with it
                loop.call_soon_threadsafe(delivery.close)

        await self._counted(delivery)
        try:
            async with asyncio.timeout(self._seconds) as delivery.scope:
                if delivery.withdrawn:
                    delivery.scope.reschedule(loop.time())
                failure = await self._threads.run(
                    delivery.grant.peer.uid,
                    lambda _failure: delivery.close(),
                    delivery.write,
                    unused,
                    delivery.fd,
                )
        except TimeoutError:
            error = delivery.withdrawal() if delivery.withdrawn else self._timed_out()
            raise delivery.abandon(error) from None
        except asyncio.CancelledError:
            delivery.abandon(_DISCONNECTED)
            raise
        finally:
            self._forget(delivery)
            delivery.withdraw()
        delivery.close()
        if isinstance(failure, OSError):
            raise delivery.fail_system(failure)
        if failure is not None:
            raise delivery.fail(failure)

    # --- running deliveries

    def withdraw(self, object_id: str) -> None:
        """End the deliveries of a secret; none touches its plaintext after this returns."""
        for delivery in self._running.pop(object_id, ()):
            delivery.withdraw()

    def recheck(self, holds: Callable[[Grant], bool]) -> None:
        """End the deliveries whose grant no longer holds."""
        for deliveries in list(self._running.values()):
            for delivery in list(deliveries):
                if not holds(delivery.grant):
                    self._forget(delivery)
                    delivery.withdraw()

    def _remember(self, delivery: Delivery) -> None:
        self._running.setdefault(delivery.grant.object_id, set()).add(delivery)

    def _forget(self, delivery: Delivery) -> None:
        object_id = delivery.grant.object_id
        others = self._running.get(object_id)
        if others is not None:
            others.discard(delivery)
            if not others:
                del self._running[object_id]

    def _timed_out(self) -> CommandError:
        return LimitReached(
            "delivery-seconds",
            f"The descriptor did not take the secret within {self._seconds:g} seconds",
        )
