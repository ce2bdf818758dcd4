# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a connection's bytes come from: what an untrusted peer may bring, and what it leaves."""

import asyncio
import select
import socket
from pathlib import Path

import pytest

from secretd.access.peer import SocketRole
from secretd.net.control_messages import peek_and_wipe
from secretd.net.listener import Listener, _is_open_to_others, listen
from secretd.net.pause import Pause
from secretd.net.transport import Transport
from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served


def transport_of(in_loop: Served) -> Transport:
    (session,) = in_loop.server.sessions
    return session.transport


async def test_a_reset_is_the_end_where_bytes_are_looked_at_first(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """As on connections that may bring no descriptors."""
    transport = transport_of(in_loop)
    await aqmp.send(b'{"execute":"query-name"}')
    while not select.select([aqmp.sock], [], [], 0)[0]:
        await asyncio.sleep(0)
    aqmp.sock.close()
    assert transport._without_descriptors(memoryview(bytearray(10))) is None
    assert transport.is_closed


async def test_a_turn_during_a_yield_changes_nothing(in_loop: Served, aqmp: AsyncClient) -> None:
    """The next one counts."""
    transport = transport_of(in_loop)
    transport.pause(Pause.TURN)
    transport._readable_in_turn()
    transport.resume(Pause.TURN)
    assert await aqmp.ok("query-name") == {}


@pytest.mark.tuning(retry_room_seconds=1000.0)
async def test_room_that_is_offered_twice_is_taken_once(in_loop: Served, aqmp: AsyncClient) -> None:
    """The second offer finds nothing that waits."""
    tail = transport_of(in_loop)._tail
    tail._room()
    assert await aqmp.ok("query-name") == {}


def test_a_peek_at_nothing_is_nothing() -> None:
    """It does not wait."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        view = memoryview(bytearray(10))
        assert peek_and_wipe(ours, view) == (None, False)
        theirs.send(b"abc")
        assert peek_and_wipe(ours, view) == (3, False)
        assert bytes(view) == bytes(10)


def test_a_socket_without_a_file_is_open_to_others(tmp_path: Path) -> None:
    """Nothing says that it is not."""
    listener: Listener = listen(str(tmp_path / "s"), SocketRole.CONTROL, 0o600)
    assert not _is_open_to_others(listener.path)
    listener.close()
    assert _is_open_to_others(listener.path)
