# SPDX-License-Identifier: LGPL-2.1-or-later
"""How scripts/bench measures: servers, their load, and the rows of the table.

Each server is pinned to one processor together with its load (load.c), since what a wake-up across
processors costs says more of the machine than of the server. Servers take turns within a round, and
the figures are medians of the rounds, so that what else goes on here hits all of them alike. The
ratios count; absolute figures are this machine's.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.qmp import Client  # noqa: E402

CPU = "1" if (os.cpu_count() or 1) > 1 else "0"
BIN = Path(sys.executable).parent
SECRETD = str(BIN / "secretd")
KEY = bytes(range(32))
IV = bytes(16)
HERE = Path(__file__).parent


class Result(NamedTuple):
    """What one run of the load has measured: operations a second, percentiles in µs, the server's
    µs of processor time for each operation.
    """

    rate: float
    p50: float
    p99: float
    cpu: float


class Row(NamedTuple):
    """A line of the table. ``goal``: what the ratio is to be, and its direction; ``note``: what
    else there is to say.
    """

    name: str
    ours: float | None
    theirs: float | None
    ratio: float | None
    goal: float
    at_least: bool
    unit: str
    against: str
    note: str = ""

    @property
    def met(self) -> bool | None:
        """True if the goal is reached, None if it could not be measured."""
        if self.ratio is None:
            return None
        return self.ratio >= self.goal if self.at_least else self.ratio <= self.goal


# --- servers


class Server:
    """A process that is measured, on its socket."""

    def __init__(self, name: str, command: list[str], path: str, **popen: Any) -> None:
        self.name = name
        self.path = path
        self.process = subprocess.Popen(
            ["taskset", "-c", CPU, *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, **popen,
        )  # fmt: skip
        wait_for(path)

    @property
    def pid(self) -> int:
        """The process itself, also where a wrapper was started."""
        pid = self.process.pid
        while True:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if not children:
                return pid
            pid = int(children[0])

    def cpu(self) -> float:
        """Seconds of processor time so far, of all threads."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def memory(self) -> int:
        """Bytes that are resident."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        return 0

    def stop(self) -> None:
        """End it."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        self.process.wait()


def wait_for(path: str, seconds: float = 30) -> None:
    """Wait until a server listens."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.connect(path)
            return
    raise TimeoutError(path)


class Machine:
    """Where everything lies, and what servers there can be."""

    def __init__(self, directory: Path, scale: float) -> None:
        self.directory = directory
        self.seconds = 0.6 * scale
        self.rounds = 3 if scale >= 1 else 1
        self.load = str(directory / "load")
        subprocess.run(
            ["gcc", "-O2", "-o", self.load, str(HERE / "load.c"), "-ldl"],
            check=True,
            capture_output=True,
        )
        self._numbers = iter(range(1_000_000))
        self.sealed, self.iv = seal(b"x" * 32)
        self.sealed_large, _ = seal(b"x" * 4096)

    def path(self, suffix: str = "sock") -> str:
        """A new name for a socket or a file."""
        return str(self.directory / f"{next(self._numbers)}.{suffix}")

    def secretd(self, *options: str) -> Server:
        """All that it does by default, and its audit in a file."""
        path = self.path()
        return Server(
            "secretd",
            [
                SECRETD,
                "--control",
                path,
                f"--audit={self.path('audit')}",
                *options,
            ],
            path,
        )

    def least(self) -> Server:
        """A server in C with the system calls of secretd, and nothing else."""
        path = self.path()
        return Server("C epoll", [self.load, "serve", path, self.path("audit")], path)

    def bare(self) -> Server:
        """The least that a server in Python can do."""
        path = self.path()
        return Server("bare Python", [sys.executable, str(HERE / "bare.py"), path], path)

    def qemu(self, monitors: int = 1) -> Server | None:
        """QEMU 10 if it is there, else what is installed."""
        path = self.path()
        words = ["qemu-system-x86_64", "-machine", "none", "-display", "none", "-S", "-nodefaults"]
        for number in range(monitors):
            words += ["-qmp", f"unix:{path}{number or ''},server=on,wait=off"]
        if (ROOT / ".qemu10/done").exists() and os.getuid() == 0:
            return Server("QEMU 10.0", [str(ROOT / "scripts/dev/qemu10"), "run", *words], path)
        if shutil.which(words[0]):
            return Server("QEMU 7.2", words, path)
        return None

    def run(self, server: Server, *words: str, kind: str = "qmp", cpu: str = CPU) -> Result:
        """Put a load on a server; ``words`` follow the socket on load's command line."""
        before = server.cpu()
        done = subprocess.run(
            ["taskset", "-c", cpu, self.load, kind, server.path, *words],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{server.name}: {words}: {done.stderr}")
        found = json.loads(done.stdout)
        ops = max(1, found["ops"])
        return Result(
            ops / found["seconds"], found["p50"], found["p99"], (server.cpu() - before) / ops * 1e6
        )

    def compare(
        self, servers: "list[Server]", *words: str, kinds: "dict[str, str] | None" = None
    ) -> dict[str, Result]:
        """Run the same load on each in turn; the medians of the rounds."""
        found: dict[str, list[Result]] = {server.name: [] for server in servers}
        for _ in range(self.rounds):
            for server in servers:
                kind = (kinds or {}).get(server.name, "qmp")
                given = (str(self.seconds),) if kind == "gpg" else words
                found[server.name].append(self.run(server, *given, kind=kind))
        return {
            name: Result(*(statistics.median(values) for values in zip(*results, strict=True)))
            for name, results in found.items()
        }


def seal(content: bytes) -> tuple[str, str]:
    """Encrypt under KEY, as object-add takes it."""
    import base64

    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    size = 16 - len(content) % 16
    encryptor = Cipher(algorithms.AES(KEY), modes.CBC(IV)).encryptor()
    data = encryptor.update(content + bytes([size]) * size) + encryptor.finalize()
    return base64.b64encode(data).decode(), base64.b64encode(IV).decode()


def master(server: Server) -> None:
    """Add the key that AES loads use."""
    import base64

    with contextlib.closing(Client(server.path)) as client:
        data = base64.b64encode(KEY).decode()
        assert client.add("master", data=data, format="base64") == {"return": {}}


# --- rows


def ratio_row(  # noqa: PLR0917 - a row has that many columns
    name: str, ours: float | None, theirs: float | None, goal: float, unit: str, against: str,
    *, at_least: bool = True, note: str = "",
) -> Row:  # fmt: skip
    """A row of a ratio, ours to theirs."""
    ratio = ours / theirs if ours is not None and theirs else None
    return Row(name, ours, theirs, ratio, goal, at_least, unit, against, note)


def fill(machine: Machine, server: Server, count: int, first: int = 0) -> None:
    """Add so many secrets of 32 bytes."""
    machine.run(server, "add", "600", "64", "1", f"COUNT={count}", f"FROM={first}")
