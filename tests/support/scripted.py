# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server that answers as it is told."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def server(path: str, *answers: bytes) -> Iterator[list[bytes]]:
    """A server that sends one answer at a time, each after the next thing it receives; b"" hangs
    up.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    received: list[bytes] = []
    kept: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            kept.append(sock)
            for number, answer in enumerate(answers):
                if number:
                    data = sock.recv(1 << 16)
                    received.append(data)
                    if not data:
                        break
                if not answer:
                    sock.close()
                    break
                sock.sendall(answer)

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
