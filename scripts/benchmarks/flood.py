# SPDX-License-Identifier: LGPL-2.1-or-later
"""A uid that floods a client socket, as a program: flood.py SOCKET KIND CONNECTIONS UID, until it
is killed.

KIND: costly (each connection sends one costly message after the other) or refused (one connection
reads secrets that it may not, each of another name).
"""

import contextlib
import os
import select
import socket
import sys

COSTLY = ('{"execute": "query-version", "id": "' + "\\n\u00e9" * 1200 + '"}\n').encode()


def connect(path: str) -> socket.socket:
    """Connect and negotiate."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    sock.recv(1 << 16)
    sock.sendall(b'{"execute": "qmp_capabilities"}\n')
    sock.recv(1 << 16)
    return sock


def costly(path: str, connections: int) -> None:
    """Keep one message under way on each connection."""
    poll = select.epoll()
    socks = {}
    for _ in range(connections):
        sock = connect(path)
        socks[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
        sock.send(COSTLY)
    print("ready", flush=True)
    while True:
        for fd, _ in poll.poll():
            if socks[fd].recv(1 << 16).endswith(b"\n"):
                socks[fd].send(COSTLY)


def refused(path: str) -> None:
    """Ask for one secret after the other."""
    sock = connect(path)
    _, sink = os.pipe()
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        name = f"n{number}-{'x' * 1000}"
        line = f'{{"execute": "secret-read", "arguments": {{"id": "{name}"}}}}\n'
        socket.send_fds(sock, [line.encode()], [sink])
        sock.recv(1 << 16)


def main() -> None:
    """See above."""
    path, kind, connections, uid = sys.argv[1:5]
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    with contextlib.suppress(OSError):
        if kind == "costly":
            costly(path, int(connections))
        else:
            refused(path)


if __name__ == "__main__":
    main()
