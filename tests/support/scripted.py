# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server that follows a script."""

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Answer = bytes | Callable[[list[int]], object] | None


@contextmanager
def server(
    path: str, *answers: Answer, later: Sequence[Answer] | None = None
) -> Iterator[list[bytes]]:
    """A server that sends one answer at a time, each after the next thing it receives.

    The answer b"" closes the connection; None closes it with something unread. A function is called
    with the descriptors that clients have passed, which stay open to the end unless it takes them;
    neither it nor the answer after it waits to receive something.
    Connections after the first get ``later``, if it is given.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    received: list[bytes] = []
    kept: list[socket.socket] = []
    descriptors: list[int] = []

    def follow(sock: socket.socket, script: Sequence[Answer]) -> None:
        for number, answer in enumerate(script):
            if answer is None:
                select.select([sock], [], [])
                sock.close()
                return
            if number and not callable(answer) and not callable(script[number - 1]):
                data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 8)
                descriptors.extend(fds)
                received.append(data)
                if not data:
                    return
            if callable(answer):
                answer(descriptors)
                continue
            if not answer:
                sock.close()
                return
            sock.sendall(answer)

    def serve() -> None:
        script: Sequence[Answer] = answers
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
