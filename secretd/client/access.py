# SPDX-License-Identifier: LGPL-2.1-or-later
"""The clients' methods about grants and figures, and the hand-over to a QEMU, with asyncio and
without.

Both classes carry out the same plans, and have the same methods.
"""

from collections.abc import Sequence
from typing import Any

from secretd.client import plans, types
from secretd.client.channel import Channel
from secretd.client.plans import Plan, T
from secretd.client.sync_connection import returned
from secretd.client.types import Explanation, GrantInfo, Sealed, Usage


def _limits(
    expires_after: int | None, max_reads: int | None, credential: str | None
) -> dict[str, object]:
    limits = {"expires-after": expires_after, "max-reads": max_reads, "credential": credential}
    return {name: value for name, value in limits.items() if value is not None}


class SyncAccess:
    """The part of SyncClient that is about grants and figures."""

    def carry_out(self, plan: Plan[T]) -> T:
        """Carry out a plan; return its result."""
        raise NotImplementedError

    def seal(self, object_id: str, keyid: str) -> Sealed:
        """See SyncClient."""
        raise NotImplementedError

    def execute(self, command: str, arguments: Any = None) -> object:
        """See SyncClient."""
        raise NotImplementedError

    def grant(
        self,
        secret: str,
        to: Sequence[str],
        *,
        grant_id: str | None = None,
        expires_after: int | None = None,
        max_reads: int | None = None,
        credential: str | None = None,
    ) -> str:
        """Let clients with one of the identities ``to`` read secrets; return the grant's id.

        ``secret``: an id, or a pattern with * and ?. ``to``: such as "uid:33" and
        "unit:nginx.service". ``expires_after``: seconds. ``credential``: the name by which units
        know the secret. Raises ExecuteError, and then nothing was added.
        """
        chosen = grant_id or plans.default_grant_id(secret, to)
        limits = _limits(expires_after, max_reads, credential)
        return self.carry_out(plans.grant(chosen, secret, to, limits))

    def revoke(self, grant_id: str) -> bool:
        """Withdraw a grant, and its authz-list if `grant` made it; return False if there is none.

        Running reads end, too. Raises ValueError if the object is no grant.
        """
        return self.carry_out(plans.revoke(grant_id))

    def grants(
        self, *, secret: str | None = None, to: Sequence[str] | None = None
    ) -> list[GrantInfo]:
        """Return the grants, sorted by id.

        ``secret``: only those for this id; ``to``: only those that allow a client with these
        identities.
        """
        return self.carry_out(plans.grants(secret, to))

    def explain(self, object_id: str, identities: Sequence[str]) -> Explanation:
        """Return whether a client with these identities may read a secret, and why."""
        found = self.execute("secret-explain", {"id": object_id, "peer": list(identities)})
        return types.explanation(found)

    def stats(self) -> dict[str, int]:
        """Return the figures of query-secret-stats by name."""
        return types.figures(self.execute("query-secret-stats"))

    def stat(self, name: str) -> int:
        """Return one figure of query-secret-stats. Raises KeyError for an unknown name."""
        return self.stats()[name]

    def usage(self, object_id: str) -> Usage:
        """Return a secret's owner, and how often it was released since the daemon started."""
        return types.usage(self.execute("query-secret-usage", {"id": object_id}))

    def push(
        self,
        object_id: str,
        keyid: str,
        qmp: str,
        *,
        qemu_id: str | None = None,
        qemu_keyid: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Seal a secret under ``keyid``, and add it to the QEMU at the QMP socket ``qmp``.

        QEMU must hold the same key, as ``qemu_keyid`` (the same id by default); there the secret
        gets ``qemu_id``. Only ciphertext is on the way. Raises ExecuteError with QEMU's words,
        OSError or channel.Refused without a connection, and channel.Lost or TimeoutError if QEMU
        may have the secret.
        """
        sealed = self.seal(object_id, keyid)
        wanted = plans.for_qemu(sealed, qemu_id or object_id, qemu_keyid or keyid)
        qemu = Channel(qmp, timeout)
        try:
            returned(qemu.exchange("object-add", wanted))
        finally:
            qemu.close()


class AsyncAccess:
    """The part of Client that is about grants and figures."""

    async def carry_out(self, plan: Plan[T]) -> T:
        """Carry out a plan; return its result."""
        raise NotImplementedError

    async def seal(self, object_id: str, keyid: str) -> Sealed:
        """See Client."""
        raise NotImplementedError

    async def execute(self, command: str, arguments: Any = None) -> object:
        """See Client."""
        raise NotImplementedError

    async def grant(
        self,
        secret: str,
        to: Sequence[str],
        *,
        grant_id: str | None = None,
        expires_after: int | None = None,
        max_reads: int | None = None,
        credential: str | None = None,
    ) -> str:
        """See SyncClient.grant."""
        chosen = grant_id or plans.default_grant_id(secret, to)
        limits = _limits(expires_after, max_reads, credential)
        return await self.carry_out(plans.grant(chosen, secret, to, limits))

    async def revoke(self, grant_id: str) -> bool:
        """See SyncClient.revoke."""
        return await self.carry_out(plans.revoke(grant_id))

    async def grants(
        self, *, secret: str | None = None, to: Sequence[str] | None = None
    ) -> list[GrantInfo]:
        """See SyncClient.grants."""
        return await self.carry_out(plans.grants(secret, to))

    async def explain(self, object_id: str, identities: Sequence[str]) -> Explanation:
        """See SyncClient.explain."""
        found = await self.execute("secret-explain", {"id": object_id, "peer": list(identities)})
        return types.explanation(found)

    async def stats(self) -> dict[str, int]:
        """See SyncClient.stats."""
        return types.figures(await self.execute("query-secret-stats"))

    async def stat(self, name: str) -> int:
        """See SyncClient.stat."""
        return (await self.stats())[name]

    async def usage(self, object_id: str) -> Usage:
        """See SyncClient.usage."""
        return types.usage(await self.execute("query-secret-usage", {"id": object_id}))

    async def push(
        self,
        object_id: str,
        keyid: str,
        qmp: str,
        *,
        qemu_id: str | None = None,
        qemu_keyid: str | None = None,
    ) -> None:
        """See SyncClient.push; without a connection to QEMU it raises qemu.qmp's ConnectError."""
        from qemu.qmp import QMPClient

        sealed = await self.seal(object_id, keyid)
        wanted = plans.for_qemu(sealed, qemu_id or object_id, qemu_keyid or keyid)
        qemu = QMPClient()
        await qemu.connect(qmp)
        try:
            await qemu.execute("object-add", wanted)
        finally:
            await qemu.disconnect()
