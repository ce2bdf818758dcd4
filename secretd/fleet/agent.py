# SPDX-License-Identifier: LGPL-2.1-or-later
"""The agent: follows etcd, brings what is for this host to secretd, and says what it has.

It has a network and no plaintext. It starts whether etcd or secretd is there or not, and never
gives up: what was accepted is in secretd's store meanwhile.
"""

import asyncio
import json
import logging
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from qemu.qmp import QMPError

from secretd.client.record_client import RecordClient
from secretd.fleet.carrier import Carrier
from secretd.fleet.config import Config
from secretd.fleet.etcd import Refused, Unreachable, prefix_end
from secretd.fleet.health import Health
from secretd.fleet.keyspace import Keyspace
from secretd.fleet.watch import Change, Watch
from secretd.systemd.notify import NotifySocket

log: Final = logging.getLogger("secretd-fleet")

ACK_SECONDS: Final = 1.0
"""Seconds between two acks."""

ACK_AGAIN_SECONDS: Final = 300.0
"""Seconds after which an agent says again what it has, though nothing has changed."""

COMPARE_SECONDS: Final = 3600.0
"""Seconds after which etcd and secretd are compared without an event, with a random part."""

SECRETD_SECONDS: Final = 5.0
"""The longest pause before secretd is tried again."""

LOOK_SECONDS: Final = 15.0
"""Seconds after which secretd is asked how it is."""

FETCH_SECONDS: Final = 10.0
"""Seconds for some records from one node."""

STEADY_SECONDS: Final = 5.0
"""Seconds after which what works is steady, and the next failure the first again."""

_SECRETD_TIMEOUT: Final = 30.0


class Agent:
    """An agent of one host."""

    def __init__(self, config: Config, manager: NotifySocket | None) -> None:
        self._keyspace = Keyspace(config.fleet)
        self._host = config.host
        self._client = RecordClient(config.socket, retry_seconds=0, timeout=_SECRETD_TIMEOUT)
        self._etcd = config.etcd()
        self._carrier = Carrier(self._client, self._keyspace, config.host)
        self._health = Health(config, self._carrier, manager)
        self._manager = manager
        self._changed = asyncio.Event()
        self._compare = asyncio.Event()
        self._bringing = asyncio.Lock()
        self._due = time.monotonic() + COMPARE_SECONDS
        self._again = LOOK_SECONDS

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT; SIGHUP connects anew and compares everything."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._anew)
        if self._manager is not None:
            self._manager.ready("starting")
        tasks = [
            asyncio.create_task(self._always(each))
            for each in (self._follow, self._acks, self._comparisons, self._looks)
        ]
        await stop.wait()
        if self._manager is not None:
            self._manager.stopping("stopping")
        for each in tasks:
            each.cancel()
            with suppress(asyncio.CancelledError):
                await each
        self._etcd.close()
        self._client.close()

    def _anew(self) -> None:
        self._etcd.close()
        self._compare.set()

    async def _always(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do a part of the work for ever. secretd may go away; a fault must not end the others."""
        failures = 0
        while True:
            begin = time.monotonic()
            try:
                await work()
            except (QMPError, OSError) as error:
                self._health.set_secretd(str(error))
            except Exception:
                log.exception("a fault in %s", work.__name__)
            if time.monotonic() - begin > STEADY_SECONDS:
                failures = 0
            failures += 1
            pause = min(SECRETD_SECONDS, 0.1 * 2 ** min(failures, 10))
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - no secret

    async def _follow(self) -> None:
        """Bring what etcd says, all of it after secretd was lost."""
        await self._look()  # etcd is asked only if there is a secretd to bring something to
        roster, own = self._keyspace.host_roster(self._host), self._keyspace.host(self._host)
        manifests = self._keyspace.manifests(self._host)
        # Records come with the events; at the beginning only those that are missing are fetched.
        following = Watch(
            self._etcd, [(own, prefix_end(own))], self._etcd_state,
            listed=[(roster, b""), (manifests, prefix_end(manifests))],
        ).follow()  # fmt: skip
        try:
            async for found in following:
                await self._bring(dict(found.values), is_change=isinstance(found, Change))
        finally:
            await following.aclose()

    def _etcd_state(self, reason: str) -> None:
        self._health.set_etcd(reason, str(self._etcd.endpoint))

    async def _bring(
        self, values: Mapping[bytes, bytes | None], *, is_change: bool = False
    ) -> None:
        loop = asyncio.get_running_loop()

        async def get(digests: Sequence[str]) -> list[bytes | None]:
            keys = [self._keyspace.record(self._host, each) for each in digests]
            gets = [self._etcd.get(each, FETCH_SECONDS) for each in keys]
            return [each for each, _ in await asyncio.gather(*gets)]

        def fetch(digests: Sequence[str]) -> list[bytes | None]:
            return asyncio.run_coroutine_threadsafe(get(digests), loop).result()

        async with self._bringing:
            state = await asyncio.to_thread(self._carrier.bring, values, fetch, is_change=is_change)
        self._knows(state)
        if self._carrier.is_new_roster:
            self._carrier.is_new_roster = False
            self._compare.set()

    async def _look(self) -> None:
        async with self._bringing:
            state = await asyncio.to_thread(self._carrier.state)
        self._knows(state)

    def _knows(self, state: dict[str, Any]) -> None:
        """Note what secretd has said."""
        if self._health.secretd:
            self._health.set_secretd("")
        joined = self._health.fleet["state"] == "none" and state["state"] != "none"
        self._health.set_fleet(state)
        self._changed.set()
        if joined:
            self._compare.set()

    async def _acks(self) -> None:
        """Say in etcd what this host has, when that has changed, and now and then."""
        said, said_at = b"", 0.0
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), ACK_AGAIN_SECONDS)
            self._changed.clear()
            ack = self._health.ack()
            if ack != said or time.monotonic() - said_at >= ACK_AGAIN_SECONDS:
                text = json.dumps({**json.loads(ack), "time": int(time.time())}).encode()
                try:
                    await self._etcd.write({self._keyspace.ack(self._host): text})
                    said, said_at = ack, time.monotonic()
                except (Refused, Unreachable) as error:
                    log.debug("the ack was not written: %s", error)
                    self._changed.set()
                    await asyncio.sleep(random.uniform(1, 5))  # noqa: S311 - no secret
            await asyncio.sleep(ACK_SECONDS)

    async def _comparisons(self) -> None:
        """Compare what etcd has with what secretd has, whenever that is due."""
        while True:
            await self._compare.wait()
            self._compare.clear()
            await self._compare_once()
            self._again = min(2 * self._again, COMPARE_SECONDS) if self._lacks else LOOK_SECONDS
            wait = COMPARE_SECONDS * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
            self._due = time.monotonic() + wait

    async def _compare_once(self) -> None:
        own = self._keyspace.manifests(self._host)
        try:
            found = await self._etcd.range(own, prefix_end(own))
            key = self._keyspace.host_roster(self._host)
            roster, _ = await self._etcd.get(key)
        except (Refused, Unreachable) as error:
            log.debug("etcd could not be compared: %s", error)
            return
        values = {each.key: each.value for each in found.kvs}
        await self._bring({key: roster, **values})

    @property
    def _lacks(self) -> bool:
        """True while something is missing or was refused, which may change."""
        return bool(self._health.missing or self._carrier.refusals)

    async def _looks(self) -> None:
        """Ask secretd how it is: time changes that, too, and it may have joined or come back."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._look()
            if self._lacks:
                self._due = min(self._due, time.monotonic() + self._again)
            if time.monotonic() >= self._due:
                self._compare.set()


def run(config: Config) -> None:
    """Run the agent of a host."""
    manager = NotifySocket.from_environment()
    asyncio.run(Agent(config, manager).run())
