# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting in asyncio until a descriptor is readable or writable."""

import asyncio
from collections.abc import Callable


async def readable(fd: int) -> None:
    """Wait until a pipe, socket or terminal is readable."""
    loop = asyncio.get_running_loop()
    await ready(fd, loop.add_reader, loop.remove_reader)


async def ready(
    fd: int,
    add: Callable[..., object],
    remove: Callable[[int], object],
) -> None:
    """Wait until ``add``, the loop's method for it, reports the descriptor; then ``remove`` it."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    add(fd, _settle, future)
    try:
        await future
    finally:
        remove(fd)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
