# SPDX-License-Identifier: LGPL-2.1-or-later
"""200 clients at once, most of them bad: the others see no error, and nothing leaks."""

import contextlib
import random
import socket

from tests.e2e.conftest import Process
from tests.support.needs import need_root

SCRIPT = (
    b'{"execute":"qmp_capabilities"}\n{"execute":"getfd","arguments":{"fdname":"a"}}\n'
    b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"c","data":"xyz"}}\n'
    b'{"execute":"query-commands"}\n{"execute":"object-del","arguments":{"id":"c"}}\n'
)


def test_200_clients_at_once_disturb_no_other_and_leak_nothing(secretd: Process) -> None:
    """Silent, half-way, flooding, never reading, 253 descriptors a message, closing at any byte."""
    need_root()  # only root may count the descriptors of a process that is not dumpable
    rng = random.Random(11)
    good = [secretd.connect() for _ in range(5)]
    good[0].add("s", data="letmein")
    before = secretd.fds()
    crowd: list[socket.socket] = []
    with open("/dev/null") as null:
        for number in range(200):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(secretd.control)
            sock.setblocking(False)
            crowd.append(sock)
            kind = number % 8
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                if kind == 1:
                    sock.send(SCRIPT[: rng.randrange(len(SCRIPT))])
                elif kind == 2:
                    for _ in range(50):
                        sock.send(SCRIPT * 100)
                elif kind == 3:
                    for _ in range(8):
                        socket.send_fds(sock, [SCRIPT], [null.fileno()] * 253)
                elif kind == 4:
                    sock.send(SCRIPT[: rng.randrange(len(SCRIPT))])
                    crowd.pop().close()
                elif kind == 5:
                    sock.send(rng.randbytes(20000))
                elif kind == 6:
                    sock.send(b'{"execute":"' + b"x" * 100000)
                elif kind == 7:
                    for at in range(0, len(SCRIPT), 3):
                        sock.send(SCRIPT[at : at + 3])
            client = good[number % 5]
            assert client.cmd("query-name") == {"return": {}}
            if number % 10 == 0:
                assert client.read("s") == b"letmein"
                assert client.add("g", data="x") == {"return": {}}
                assert client.cmd("object-del", {"id": "g"}) == {"return": {}}
    for sock in crowd:
        sock.close()
    while secretd.fds() > before:
        assert good[0].cmd("query-name") == {"return": {}}
    assert good[1].read("s") == b"letmein"
    assert "internal error" not in secretd.stop()
