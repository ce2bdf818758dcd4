# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a user's code may do with secretd.client, checked by mypy in strict mode; it is not run.

`assert_type` fails where a type is not what stands there, and an unused `type: ignore` where
something is allowed that should not be.
"""

from typing import Literal, assert_type

from secretd.client import (
    Client,
    Encoding,
    Event,
    Format,
    LockedBuffer,
    Sealed,
    SecretInfo,
    SyncClient,
)


async def with_asyncio(client: Client, fd: int) -> None:
    """All methods of the asyncio client."""
    async with Client() as made, Client("/run/x.sock", retry_seconds=0) as other:
        assert_type(made, Client)
        assert_type(other.path, str)
    assert_type(await client.add("a", fd), None)
    assert_type(await client.add("a", fd, Encoding("base64", "k", "aXY=")), None)
    assert_type(await client.list(), list[SecretInfo])
    assert_type((await client.list())[0].expires_in, int | None)
    buffer = await client.read("a")
    assert_type(buffer, LockedBuffer)
    with buffer as secret:
        assert_type(secret.view, memoryview)
        await client.add_bytes("b", secret.view)
    assert_type(await client.read_into("a", fd, format="raw"), int)
    assert_type(await client.seal("a", "k"), Sealed)
    assert_type(await client.version(), str)
    async for event in client.events():
        assert_type(event, Event)
        assert_type(event.peer, dict[str, object] | None)
    await client.read("a", format="hex")  # type: ignore[arg-type]
    await client.add("a", "path")  # type: ignore[arg-type]
    await client.add_bytes("a", "letmein")  # type: ignore[arg-type]


def without_asyncio(client: SyncClient, fd: int) -> None:
    """All methods of the other."""
    with SyncClient("/run/x.sock") as made:
        assert_type(made, SyncClient)
    assert_type(client.add("a", fd), None)
    assert_type(client.list(), list[SecretInfo])
    assert_type(client.read("a"), LockedBuffer)
    assert_type(client.read_into("a", fd), int)
    assert_type(client.seal("a", "k").iv, str)
    for event in client.events():
        assert_type(event.time, float)
    client.read("a", format="hex")  # type: ignore[arg-type]
    client.expire("a", "1h")  # type: ignore[arg-type]


def formats(format: Format) -> Literal["raw", "base64"]:  # noqa: A002 - the wire's name
    """Formats are words."""
    return format
