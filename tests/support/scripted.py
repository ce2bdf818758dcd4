# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server that follows a script."""

import os
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def server(
    path: str, *answers: bytes | None, later: Sequence[bytes | None] | None = None
) -> Iterator[list[bytes]]:
    """A server that sends one answer at a time, each after the next thing it receives.

    The answer b"" closes the connection; None closes it with something unread. Connections after
    the first get ``later``, if it is given. Descriptors that clients pass stay open to the end.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    received: list[bytes] = []
    kept: list[socket.socket] = []
    descriptors: list[int] = []

    def follow(sock: socket.socket, script: Sequence[bytes | None]) -> None:
        for number, answer in enumerate(script):
            if answer is None:
                select.select([sock], [], [])
                sock.close()
                return
            if number:
                data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 8)
                descriptors.extend(fds)
                received.append(data)
                if not data:
                    return
            if not answer:
                sock.close()
                return
            sock.sendall(answer)

    def serve() -> None:
        script: Sequence[bytes | None] = answers
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            kept.append(sock)
            follow(sock, script)
            script = answers if later is None else later

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield received
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for sock in kept:
            sock.close()
        thread.join(10)
        for fd in descriptors:
            os.close(fd)
