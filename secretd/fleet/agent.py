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
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, Final

from qemu.qmp import QMPError

from secretd.client.record_client import RecordClient
from secretd.fleet.carrier import Carrier
from secretd.fleet.config import Config
from secretd.fleet.etcd import Refused, Unreachable, prefix_end
from secretd.fleet.health import Health
from secretd.fleet.keyspace import Keyspace
from secretd.fleet.watch import Watch
from secretd.systemd.notify import NotifySocket

log: Final = logging.getLogger("secretd-fleet")

ACK_SECONDS: Final = 1.0
"""Seconds between two acks."""

COMPARE_SECONDS: Final = 3600.0
"""Seconds after which etcd and secretd are compared without an event, with a random part."""

SECRETD_SECONDS: Final = 5.0
"""The longest pause before secretd is tried again."""

_EVERY_SECONDS: Final = 15.0
_SECRETD_TIMEOUT: Final = 30.0


class Agent:
    """An agent of one host."""

    def __init__(self, config: Config, manager: NotifySocket | None) -> None:
        self._keyspace = Keyspace(config.fleet)
        self._host = config.host
        self._client = RecordClient(config.socket, retry_seconds=0, timeout=_SECRETD_TIMEOUT)
        self._etcd = config.etcd()
        self._carrier = Carrier(self._client, self._keyspace)
        self._health = Health(config, self._carrier, manager)
        self._manager = manager
        self._changed = asyncio.Event()
        self._compare = asyncio.Event()
        self._bringing = asyncio.Lock()

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
            asyncio.create_task(each)
            for each in (self._follow(), self._acks(), self._comparisons(), self._looks())
        ]
        stopped = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for each in done - {stopped}:
                each.result()  # raise what has ended it
        finally:
            if self._manager is not None:
                self._manager.stopping("stopping")
            for each in (stopped, *tasks):
                each.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await each
            self._etcd.close()
            self._client.close()

    def _anew(self) -> None:
        self._etcd.close()
        self._compare.set()

    async def _follow(self) -> None:
        """Bring what etcd says, all of it again after secretd was lost."""
        own = self._keyspace.host(self._host)
        ranges = [(self._keyspace.roster, b""), (own, prefix_end(own))]
        failures = 0
        while True:
            watch = Watch(self._etcd, ranges, self._etcd_state)
            following = watch.follow()
            try:
                async for found in following:
                    await self._bring(dict(found.values))
                    failures = 0
            except (QMPError, OSError) as error:
                self._health.set_secretd(str(error))
                self._carrier.forget()
                failures += 1
                pause = min(SECRETD_SECONDS, 0.1 * 2 ** min(failures, 10))
                await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - no secret
            finally:
                await following.aclose()

    def _etcd_state(self, reason: str) -> None:
        self._health.set_etcd(reason, str(self._etcd.endpoint))

    async def _bring(self, values: Mapping[bytes, bytes | None]) -> None:
        async with self._bringing:
            loop = asyncio.get_running_loop()

            def fetch(digest: str) -> bytes | None:
                key = self._keyspace.record(self._host, digest)
                waiting: Coroutine[Any, Any, tuple[bytes | None, int]] = self._etcd.get(key)
                try:
                    return asyncio.run_coroutine_threadsafe(waiting, loop).result()[0]
                except (Refused, Unreachable):
                    return None

            state = await asyncio.to_thread(self._carrier.bring, values, fetch)
        if self._health.secretd:
            self._health.set_secretd("")
        self._health.set_fleet(state)
        self._changed.set()

    async def _acks(self) -> None:
        """Say in etcd what this host has, when that has changed, and now and then."""
        said, said_at = b"", 0.0
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), COMPARE_SECONDS)
            self._changed.clear()
            ack = self._health.ack()
            if ack != said or time.monotonic() - said_at >= COMPARE_SECONDS:
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
        """Compare what etcd has with what secretd has, every hour: an event may be missing."""
        while True:
            wait = COMPARE_SECONDS * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
            with suppress(TimeoutError):
                await asyncio.wait_for(self._compare.wait(), wait)
            self._compare.clear()
            try:
                own = self._keyspace.host(self._host) + b"manifest/"
                found = await self._etcd.range(own, prefix_end(own))
                roster, _ = await self._etcd.get(self._keyspace.roster)
                values = {each.key: each.value for each in found.kvs}
                self._carrier.forget()
                await self._bring({self._keyspace.roster: roster, **values})
            except (Refused, Unreachable) as error:
                log.warning("etcd could not be compared: %s", error)
            except (QMPError, OSError) as error:
                self._health.set_secretd(str(error))

    async def _looks(self) -> None:
        """Ask secretd how it is: time changes that, too, and it may have joined or come back."""
        while True:
            await asyncio.sleep(_EVERY_SECONDS)
            before = (self._health.secretd, self._health.fleet["state"] == "none")
            try:
                async with self._bringing:
                    state = await asyncio.to_thread(self._carrier.state)
            except (QMPError, OSError) as error:
                self._health.set_secretd(str(error))
                continue
            if self._health.secretd:
                self._health.set_secretd("")
            self._health.set_fleet(state)
            self._changed.set()
            if before != ("", state["state"] == "none"):
                self._compare.set()


def run(config: Config) -> None:
    """Run the agent of a host."""
    manager = NotifySocket.from_environment()
    asyncio.run(Agent(config, manager).run())
