# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real QEMU as a QMP server, for transcripts and fuzzing: Debian's 7.2, and 10 from backports
beside it.
"""

import contextlib
import json
import os
import re
import select
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.support.needs import need, need_program
from tests.support.transcript import (
    Scene,
    SocketPeer,
    Vector,
    play,
)

ROOT = Path(__file__).resolve().parent.parent.parent
QEMU10 = ROOT / "scripts" / "dev" / "qemu10"
UNPACKED = ROOT / ".qemu10" / "done"


def need_qemu(version: str) -> None:
    """Skip a test or fail it without real QEMU; without 10 only where it cannot be had."""
    need_program("qemu-system-x86_64", "keyctl")
    if version == "qemu10":
        if os.environ.get("SECRETD_NO_QEMU10"):
            pytest.skip("scripts/dev/qemu10 could not fetch QEMU 10 from bookworm-backports")
        need(UNPACKED.exists(), "no QEMU 10: run scripts/dev/qemu10")
        need(os.getuid() == 0, "QEMU 10 beside 7.2 needs root to mount")


class Qemu:
    """A QEMU without a machine. ``version``: "qemu7" (the installed one) or "qemu10"."""

    def __init__(self, version: str) -> None:
        self.version = version
        self._directory = tempfile.TemporaryDirectory(prefix="q")
        self.path = os.path.join(self._directory.name, "qmp.sock")
        self._start()

    def _start(self) -> None:
        wrapper = [str(QEMU10), "run"] if self.version == "qemu10" else []
        # It goes into the background once all sockets listen.
        pidfile = os.path.join(self._directory.name, "pid")
        status = subprocess.call(
            [*wrapper, "qemu-system-x86_64", "-machine", "none", "-display", "none",
             "-qmp", f"unix:{self.path},server=on,wait=off", "-daemonize", "-pidfile", pidfile],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if status:
            raise AssertionError(f"{self.version} does not start")
        self._pid = int(Path(pidfile).read_text())
        self._pidfd = os.pidfd_open(self._pid)

    @property
    def has_died(self) -> bool:
        """True if the process has ended, as after an assertion."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def start_again(self) -> None:
        """Start another process in the place of one that has died."""
        os.close(self._pidfd)
        self._start()

    def play(self, vector: Vector) -> None:
        """Play a vector; afterwards there is nothing left of it."""
        with contextlib.closing(Scene(vector)) as scene:
            peer = SocketPeer(self.path)
            try:
                play(vector, peer, scene, server=self.version)
            finally:
                peer.close()
                self.clean(vector)

    def record(self, vector: Vector) -> list[list[str]]:
        """Play a vector and return the answers to each step, as a transcript has them."""
        with contextlib.closing(Scene(vector)) as scene:
            peer = SocketPeer(self.path)
            try:
                return _Recorder(vector, peer, scene).run()
            finally:
                peer.close()
                self.clean(vector)

    def clean(self, vector: Vector) -> None:
        """Remove objects and descriptor sets, or start again after `quit`."""
        if vector.has("quits"):
            self._wait()
            self._start()
            return
        peer = SocketPeer(self.path)
        peer.line()
        ask(peer, "qmp_capabilities")
        for entry in ask(peer, "qom-list", path="/objects").get("return", []):
            if entry["name"] != "type":
                ask(peer, "object-del", id=entry["name"])
        for entry in ask(peer, "query-fdsets")["return"]:
            ask(peer, "remove-fd", **{"fdset-id": entry["fdset-id"]})
        peer.close()

    def _wait(self) -> None:
        if not select.select([self._pidfd], [], [], 20)[0]:
            raise AssertionError(f"{self.version} does not end")
        os.close(self._pidfd)

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, 9)
        self._wait()
        self._directory.cleanup()


def ask(peer: SocketPeer, command: str, **arguments: object) -> dict:
    """Execute a command."""
    peer.send(json.dumps({"execute": command, "arguments": arguments}).encode(), [])
    return json.loads(peer.line())


class _Recorder:
    def __init__(self, vector: Vector, peer: SocketPeer, scene: Scene) -> None:
        self._vector = vector
        self._peer = peer
        self._scene = scene
        self._names: dict[str, str] = {}

    def run(self) -> list[list[str]]:
        """Return the answers to each step."""
        peer, vector, scene = self._peer, self._vector, self._scene
        peer.line()
        if not vector.has("no-negotiation"):
            ask(peer, "qmp_capabilities", **({"enable": vector.enable} if vector.enable else {}))
        answers = []
        whole = vector.has("together")
        if vector.has("quits"):
            peer.send(b"".join(scene.message(step.text)[0] for step in vector.steps), [])
            rest = peer.end().decode().splitlines()
            return [[] for _ in vector.steps[1:]] + [[self._general(line) for line in rest]]
        for number, step in enumerate(vector.steps):
            data, fds = scene.message(step.text)
            peer.send(data, fds)
            for fd in fds:
                os.close(fd)
            answers.append([] if whole else self._until(f"sync-{number}"))
        left = peer.end()
        if whole:
            answers[-1] = [self._general(line) for line in left.decode().splitlines()]
        elif left:
            raise AssertionError(f"{vector}: at the end {left!r}")
        return answers

    def _until(self, mark: str) -> list[str]:
        self._peer.send(f'{{"execute": "query-name", "id": "{mark}"}}\n'.encode(), [])
        found: list[str] = []
        while True:
            line = self._peer.line().decode("ascii")
            if f'"id": "{mark}"' in line:
                return found
            if not line.endswith("\r\n"):
                raise AssertionError(f"{self._vector}: {line!r}")
            found.append(self._general(line.removesuffix("\r\n")))

    def _general(self, line: str) -> str:
        """Put names where the numbers and paths of this run stand."""
        scene = self._scene
        for number in re.findall(r'"fd": (\d+)', line):
            if number not in self._names:
                self._names[number] = f"fd{len(self._names) + 1}"
                scene.values[self._names[number]] = number
        for number, name in self._names.items():
            line = re.sub(rf'("fd": |fd:|/dev/fd/){number}\b', rf"\1${name}", line)
        for name in sorted(scene.values, key=len, reverse=True):
            if not name.startswith("fd"):
                line = line.replace(scene.values[name], f"${name}")
        return re.sub(
            r'"seconds": \d+, "microseconds": \d+',
            '"seconds": $seconds, "microseconds": $microseconds',
            line,
        )


def storage_daemon(text: str, version: str = "qemu10") -> tuple[str, str]:
    """Return the words of the error and what is printed if ``text`` stands after --object."""
    wrapper = [str(QEMU10), "run"] if version == "qemu10" else []
    # The second option is always an error, so that it never starts.
    options = ["--object", text, "--object", "!"]
    done = subprocess.run(
        [*wrapper, "qemu-storage-daemon", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=30,
    )
    if (
        done.stderr
        == "qemu-storage-daemon: --object !: Parameter 'qom-type' does not accept value '!'\n"
    ):
        return "", done.stdout
    prefix = f"qemu-storage-daemon: --object {text}: "
    if done.stderr and not done.stderr.startswith(prefix):
        raise AssertionError(done.stderr)
    return done.stderr.removeprefix(prefix).removesuffix("\n"), done.stdout
