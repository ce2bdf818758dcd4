# SPDX-License-Identifier: LGPL-2.1-or-later
"""The least that a server in Python can do: receive, decode, keep in a dictionary, answer.

No locked memory, no check of anything, no audit, no journal, no error. scripts/bench measures it
beside secretd, since what it reaches on a machine is what all else has to fit under there.
"""

import asyncio
import socket
import sys
from typing import Any, Final

import msgspec
from msgspec import Struct

VERSION: Final = (
    b'{"return": {"qemu": {"major": 10, "minor": 0, "micro": 0}, "package": "bare"}}\r\n'
)
DONE: Final = b'{"return": {}}\r\n'


class Options(Struct):
    """What object-add is given."""

    id: str
    data: str


class Id(Struct):
    """What object-del is given."""

    id: str


class Add(Struct, tag_field="execute", tag="object-add"):
    """object-add."""

    arguments: Options


class Delete(Struct, tag_field="execute", tag="object-del"):
    """object-del."""

    arguments: Id


class Version(Struct, tag_field="execute", tag="query-version"):
    """query-version."""


class Capabilities(Struct, tag_field="execute", tag="qmp_capabilities"):
    """qmp_capabilities."""


decode = msgspec.json.Decoder(Add | Delete | Version | Capabilities).decode


async def main(path: str) -> None:
    """Serve for ever."""
    loop = asyncio.get_running_loop()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(path)
    listener.listen()
    held: dict[str, str] = {}
    buffer = memoryview(bytearray(64 << 10))

    def serve(sock: socket.socket) -> None:
        count = sock.recvmsg_into((buffer,), socket.CMSG_SPACE(4 * 253))[0]
        if not count:
            loop.remove_reader(sock)
            sock.close()
            return
        replies = []
        for line in bytes(buffer[:count]).splitlines():
            request: Any = decode(line)
            kind = type(request)
            if kind is Add:
                held[request.arguments.id] = request.arguments.data
            elif kind is Delete:
                held.pop(request.arguments.id, None)
            replies.append(VERSION if kind is Version else DONE)
        sock.send(b"".join(replies))

    def accept() -> None:
        sock, _ = listener.accept()
        sock.setblocking(False)
        sock.send(b'{"QMP": {}}\r\n')
        loop.add_reader(sock, serve, sock)

    loop.add_reader(listener, accept)
    await loop.create_future()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
