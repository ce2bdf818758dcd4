# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real daemon process for each test that wants one."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.box import installed
from tests.support.qmp import Client

__all__ = ["installed"]

BIN = Path(sys.executable).parent
SECRETD = str(BIN / "secretd")
SECRETCTL = str(BIN / "secretctl")
WITHOUT_IPC_LOCK = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]


def pytest_collection_modifyitems(items: "list[pytest.Item]") -> None:
    """Tests that share a box run in one worker, so that each box is booted once."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        shared = callspec.params.get("booted") if callspec is not None else None
        if shared is not None or "test_units" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group(f"box-{shared}"))


class Process:
    """secretd as a process of its own, ready to be connected to."""

    def __init__(
        self, directory: Path, *options: str, command: list[str] | None = None, **popen: Any
    ):
        self.control = str(directory / "control.sock")
        self.directory = directory
        self._clients: list[Client] = []
        self.said = ""
        self.popen = subprocess.Popen(
            [*(command or [SECRETD]), "--control", self.control, *options],
            stderr=subprocess.PIPE,
            text=True,
            cwd=directory,
            **popen,
        )
        for line in self.popen.stderr:
            self.said += line
            if line.startswith("secretd: try: "):
                break
        else:
            self.popen.stderr.close()
            raise AssertionError(f"secretd ended with {self.popen.wait()}: {self.said}")

    @property
    def pid(self) -> int:
        """Its process."""
        return self.popen.pid

    def connect(self) -> Client:
        """A client on the control socket."""
        client = Client(self.control)
        self._clients.append(client)
        return client

    def ctl(self, *words: str, **options: Any) -> bytes:
        """What secretctl prints."""
        done: subprocess.CompletedProcess[bytes] = subprocess.run(
            [SECRETCTL, "--socket", self.control, *words],
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
            **options,
        )
        return done.stdout

    def fds(self) -> int:
        """How many descriptors it has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def stop(self) -> str:
        """End it; return all it said."""
        for client in self._clients:
            client.close()
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        self.said += self.popen.stderr.read()
        self.popen.stderr.close()
        assert self.popen.wait(20) == 0, self.said
        assert not os.path.exists(self.control)
        return self.said


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start daemons; they are stopped at the end, whatever happens."""
    started: list[Process] = []

    def make(*options: str, **keywords: Any) -> Process:
        started.append(Process(tmp_path, *options, **keywords))
        return started[-1]

    yield make
    for process in started:
        if not process.popen.stderr.closed:
            process.stop()


@pytest.fixture
def secretd(start: Callable[..., Process]) -> Process:
    """One daemon with no options but its socket."""
    return start()
