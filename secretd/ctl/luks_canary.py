# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a QEMU survives the live amend of a LUKS node: tried with the same binary, on an image in
memory.

QEMU 10.0 aborts, guest and all, when it amends a ``luks`` node (an assertion in
block/graph-lock.c); the same on ``qcow2`` is fine. Versions do not tell, since distributions patch
them.

The binary of a process can be anything, and its user may be hostile. So the trial runs as the user
and group of that process, with no variable of its environment and in no namespace of its choice,
without a terminal, and for a limited time; it gets a memfd and a socket, and nothing secret. Where
it does not run (in a container, for example) the live change is refused.
"""

import contextlib
import os
import socket
import subprocess
import threading
from typing import Any, Final

from secretd.client.channel import Channel, Lost, Refused
from secretd.ctl.qemu import ask, run_job
from secretd.errors import UsageError

_IMAGE_BYTES: Final = 16 << 20
_SAID_BYTES: Final = 4096
_ADVICE: Final = "shut the guest down and use --luks IMAGE"

TRIAL_SECONDS: Final = 60.0
"""Seconds after which the trial is ended."""


def check_survives(pid: int, driver: str) -> None:
    """Raise UsageError unless the QEMU of a process survives an amend of a node with ``driver``."""
    canary = _Canary(pid, driver)
    try:
        words = canary.outcome()
    finally:
        canary.close()
    if words:
        raise UsageError(
            f"this QEMU must not change the keyslots of a running {driver} disk: {words}; nothing "
            f"was changed, {_ADVICE}"
        )


class _Canary:
    """A process of the same binary as ``pid``, without a guest."""

    def __init__(self, pid: int, driver: str) -> None:
        self._driver = driver
        try:
            # One look at the process: its number may become another's.
            process = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._owner = os.fstat(process)
                self._name = os.readlink("exe", dir_fd=process)
                self._binary = os.open("exe", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
            finally:
                os.close(process)
        except OSError as error:
            raise UsageError(
                f"the QEMU with pid {pid} cannot be looked at ({error.strerror}), so it is not "
                f"known whether it survives; run this as root, or {_ADVICE}"
            ) from None
        if "qemu" not in os.path.basename(self._name):
            self.close()
            raise UsageError(
                f"the socket belongs to {self._name} (pid {pid}), which is no QEMU; name QEMU's "
                "process with pid=N"
            )

    def close(self) -> None:
        """Close the binary."""
        os.close(self._binary)

    def outcome(self) -> str:
        """Return "" if it survived, else what happened."""
        ours, its = socket.socketpair()
        image = os.memfd_create("canary", os.MFD_CLOEXEC)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, image)
            stack.callback(ours.close)
            os.ftruncate(image, _IMAGE_BYTES)
            if os.getuid() == 0:
                os.fchown(image, self._owner.st_uid, self._owner.st_gid)
            try:
                process = self._started(its, image)
            finally:
                its.close()
            assert process.stderr is not None
            stack.enter_context(process.stderr)
            stack.callback(process.wait)
            stack.callback(process.kill)
            watchdog = threading.Timer(TRIAL_SECONDS, process.kill)
            watchdog.start()
            stack.callback(watchdog.cancel)
            try:
                return self._tried(ours, image)
            except (Refused, Lost, TimeoutError, OSError, UsageError):
                return f"a trial of the same binary ended ({self._said(process)})"
            except (KeyError, TypeError, AttributeError, ValueError):
                return "a trial of the same binary does not answer as a QEMU does"

    def _said(self, process: "subprocess.Popen[bytes]") -> str:
        """Return the last line that the trial has written, or how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        process.kill()
        status = process.wait()
        assert process.stderr is not None
        os.set_blocking(process.stderr.fileno(), False)
        said = b""
        with contextlib.suppress(BlockingIOError):  # a child of it may have the pipe
            while piece := os.read(process.stderr.fileno(), 1 << 16):
                said = (said + piece)[-_SAID_BYTES:]
        lines = said.decode(errors="replace").strip().splitlines()
        words = "".join(c if c.isprintable() else "?" for c in lines[-1]) if lines else ""
        return words or f"exit status {status}"

    def _started(self, its: socket.socket, image: int) -> "subprocess.Popen[bytes]":
        chardev = f"socket,id=c,fd={its.fileno()}"
        if "storage-daemon" in self._name:
            words = ["--chardev", chardev, "--monitor", "chardev=c"]
        else:
            words = ["-machine", "none", "-nodefaults", "-display", "none", "-chardev", chardev]
            words += ["-mon", "chardev=c,mode=control"]
        variables = ("PATH", "LD_LIBRARY_PATH")  # the administrator's, never the process's
        user: dict[str, Any] = {}
        if os.getuid() == 0:
            user = {"user": self._owner.st_uid, "group": self._owner.st_gid, "extra_groups": []}
        return subprocess.Popen(
            [os.path.basename(self._name), *words],
            executable=f"/proc/self/fd/{self._binary}",
            env={name: os.environ[name] for name in variables if name in os.environ},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(its.fileno(), image, self._binary),
            start_new_session=True,
            **user,
        )

    def _tried(self, ours: socket.socket, image: int) -> str:
        """Create an encrypted image, and amend it while it is open; return QEMU's error, or ""."""
        qemu = Channel("the trial", TRIAL_SECONDS, sock=ours)
        for name in ("k", "new"):
            ask(qemu, "object-add", {"qom-type": "secret", "id": name, "data": f"trial {name}"})
        ask(
            qemu,
            "blockdev-add",
            {"driver": "file", "node-name": "f", "filename": f"/dev/fd/{image}", "locking": "off"},
        )
        key: dict[str, Any] = {"key-secret": "k", "iter-time": 10}
        opened: dict[str, Any] = {"key-secret": "k"}
        change: dict[str, Any] = {"state": "active", "new-secret": "new", "iter-time": 10}
        if self._driver == "qcow2":
            key, opened, change = (
                {"encrypt": {"format": "luks", **each}} for each in (key, opened, change)
            )
        create = {"driver": self._driver, "file": "f", "size": 1 << 20, **key}
        words = run_job(qemu, "blockdev-create", "create", {"options": create})
        if words:
            return f"a trial of the same binary cannot make an image: {words}"
        ask(qemu, "blockdev-add", {"driver": self._driver, "node-name": "d", "file": "f", **opened})
        arguments = {"node-name": "d", "options": {"driver": self._driver, **change}}
        words = run_job(qemu, "x-blockdev-amend", "amend", arguments)
        return words and f"a trial of the same binary says: {words}"
