# SPDX-License-Identifier: LGPL-2.1-or-later
"""A fleet's root and daemons, for tests: what is signed is made by hand here."""

import base64
import hashlib
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secretd.crypto.host_keys import PublicKeys
from secretd.crypto.roster import Publisher, Roster, signed_part
from secretd.qom.hosts import decoded
from tests.support.async_qmp import AsyncClient

FLEET = "trial"


def b64(data: bytes) -> str:
    """As commands take bytes."""
    return base64.b64encode(data).decode()


class Root:
    """The key of a fleet."""

    def __init__(self) -> None:
        self.key = Ed25519PrivateKey.generate()

    @property
    def public(self) -> str:
        """As secret-fleet takes it."""
        return b64(self.key.public_key().public_bytes_raw())

    def signed(self, data: bytes) -> bytes:
        """With a signature."""
        return data + self.key.sign(signed_part(data))

    def roster(
        self,
        number: int,
        hosts: dict[str, PublicKeys],
        publishers: dict[str, Publisher],
        *,
        until: int = 0,
        fleet: str = FLEET,
    ) -> str:
        """A roster, as secret-fleet-accept takes it."""
        return b64(self.signed(Roster(fleet, number, until, hosts, publishers).encoded()))


async def make_host(
    client: AsyncClient, name: str, root: str, store: str, **more: Any
) -> PublicKeys:
    """Give a daemon a store, a name and a fleet; return the public half of its keys."""
    await client.add("key", data=hashlib.sha256(name.encode()).hexdigest()[:32])
    options = {"qom-type": "secret-store", "id": "store", "path": store, "keyid": "key"}
    await client.ok("object-add", {**options, "create": True})
    await client.ok("secret-store-unlock", {"id": "store"})
    await client.ok("secret-generate", {"id": "host.key", "size": 32})
    host = {"qom-type": "secret-host", "id": "host", "name": name, "keyid": "host.key"}
    await client.ok("object-add", host)
    fleet = {"qom-type": "secret-fleet", "id": "fleet", "name": FLEET, "root": root, **more}
    await client.ok("object-add", fleet)
    (found,) = await client.ok("query-secret-host")
    return decoded(found["public"])
