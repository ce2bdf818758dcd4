# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service manager of few words, for tests of what secretd says to one and gets from it.

It speaks what sd_notify(3) and sd_listen_fds(3) describe: it passes sockets and keeps descriptors.
What a real systemd does with all this is in tests/e2e.
"""

import array
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.support.qmp import Client

SECRETD = str(Path(sys.executable).parent / "secretd")
START = """
import os, sys
count = int(sys.argv[1])
moved = [os.dup2(int(fd), 100 + n) for n, fd in enumerate(sys.argv[2:2 + count])]
for number, fd in enumerate(moved):
    os.dup2(fd, 3 + number)
os.closerange(3 + count, 200)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2 + count], sys.argv[2 + count:])
"""


class Manager:
    """Listens on a socket as $NOTIFY_SOCKET; ``room``: descriptors that it keeps. ``deaf``: it
    works through nothing. ``late``: what it has no room for it closes only when it has heard that
    secretd is ready, as systemd does in the background.
    """

    def __init__(
        self, directory: Path, *, room: int = 16, deaf: bool = False, late: bool = False
    ) -> None:
        self._late: list[int] | None = [] if late else None
        self.directory = directory
        self.room = room
        self.deaf = deaf
        self.said: list[str] = []
        self.store: list[tuple[str, int]] = []
        self._started: list[subprocess.Popen[str]] = []
        self._changed = threading.Condition()
        self.path = str(directory / "notify.sock")
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self.path)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            data, ancillary, _, _ = self._sock.recvmsg(4096, 4096)
            if data == b"END":
                return
            fds = array.array("i")
            for _, _, rights in ancillary:
                fds.frombytes(rights)
            with self._changed:
                self._take(data.decode().splitlines(), list(fds))
                self._changed.notify_all()

    def _take(self, lines: list[str], fds: list[int]) -> None:
        fields = dict(line.partition("=")[::2] for line in lines)
        name = fields.get("FDNAME", "stored")
        if self.deaf:
            self.store += [("barrier", fd) for fd in fds]  # so that it stays open
            return
        if "FDSTORE" in fields:
            for fd in fds:
                if any(os.path.sameopenfile(fd, kept) for _, kept in self.store):
                    os.close(fd)  # as systemd does with what it has
                elif len(self.store) < self.room:
                    self.store.append((name, fd))
                elif self._late is not None:
                    self._late.append(fd)
                else:
                    os.close(fd)
        elif "FDSTOREREMOVE" in fields:
            self._remove(name)
        else:
            for fd in fds:  # BARRIER=1
                os.close(fd)
        if "READY" in fields:
            while self._late:
                os.close(self._late.pop())
        self.said += [line for line in lines if not line.startswith(("FD", "BARRIER"))]

    def _remove(self, name: str) -> None:
        for stored in [each for each in self.store if each[0] == name]:
            self.store.remove(stored)
            os.close(stored[1])

    def empty(self) -> None:
        """Drop everything that is kept."""
        with self._changed:
            while self.store:
                os.close(self.store.pop()[1])

    def wait(self, line: str) -> None:
        """Wait until it was said; forget what was said up to there."""
        with self._changed:
            assert self._changed.wait_for(lambda: line in self.said, 20), (line, self.said)
            del self.said[: self.said.index(line) + 1]

    def wait_for_store(self, *names: str) -> None:
        """Wait until just these are kept."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: sorted(name for name, _ in self.store) == sorted(names), 20
            ), (names, self.store)

    def start(
        self,
        *options: str,
        sockets: "dict[str, socket.socket] | None" = None,
        extra: "list[tuple[str, int]] | None" = None,
        watchdog: float | None = None,
        prefix: Sequence[str] = (),
        ready: bool = True,
    ) -> "Started":
        """Start secretd, by the command ``prefix``, with sockets and what is kept of the one
        before.
        """
        passed = [(name, sock.fileno()) for name, sock in (sockets or {}).items()]
        with self._changed:
            passed += [*self.store, *(extra or [])]
        environment = os.environ | {
            "NOTIFY_SOCKET": self.path,
            "LISTEN_FDS": str(len(passed)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in passed),
        }
        if watchdog is not None:
            environment["WATCHDOG_USEC"] = str(int(watchdog * 1_000_000))
        fds = [fd for _, fd in passed]
        process = subprocess.Popen(
            [
                *prefix, sys.executable, "-S", "-c", START, str(len(fds)), *map(str, fds), SECRETD,
                *options
            ],
            pass_fds=fds, env=environment, stderr=subprocess.PIPE, text=True, cwd=self.directory,
        )  # fmt: skip
        started = Started(process)
        self._started.append(process)
        if ready:
            self.wait("READY=1")
        return started

    def close(self) -> None:
        """Forget everything; end what a test that failed has left."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"END", self.path)
        self._thread.join()
        self._sock.close()
        for _, fd in self.store:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Started:
    """A secretd that was started."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def end(self, number: int = signal.SIGTERM, status: int = 0) -> str:
        """Send a signal; return what it said on stderr until it ended with that status."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        said: str = self.process.stderr.read()
        self.process.stderr.close()
        assert self.process.wait(20) == status, said
        return said


def listening(path: Path) -> socket.socket:
    """A socket as systemd passes them: blocking."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def ask(sock: socket.socket) -> Client:
    """A client of the socket that such a socket is."""
    return Client(sock.getsockname())
