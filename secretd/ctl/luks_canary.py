# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a QEMU survives the live amend of a LUKS node: tried with the same binary, on an image in
memory.

QEMU 10.0 aborts, guest and all, when it amends a ``luks`` node (an assertion in
block/graph-lock.c); the same on ``qcow2`` is fine. Versions do not tell, since distributions patch
them. The binary of a process can be anything, so it runs with that process's user, group and mount
namespace, and gets nothing but a memfd and a socket pair.
"""

import contextlib
import os
import socket
import subprocess
from typing import Any, Final

from secretd.client.channel import Channel, Lost
from secretd.ctl.qemu import ask, run_job
from secretd.errors import UsageError

_IMAGE_BYTES: Final = 16 << 20
_SECONDS: Final = 60
_ADVICE: Final = "shut the guest down and use --luks IMAGE"


def check_survives(pid: int, driver: str) -> None:
    """Raise UsageError unless the QEMU of a process survives an amend of a node with ``driver``."""
    words = _Canary(pid, driver).outcome()
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
            self._binary = os.readlink(f"/proc/{pid}/exe")
            self._owner = os.stat(f"/proc/{pid}")
            namespaces = [os.stat(f"/proc/{each}/ns/mnt").st_ino for each in (pid, "self")]
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = dict(each.partition(b"=")[::2] for each in file.read().split(b"\0"))
        except OSError as error:
            raise UsageError(
                f"the QEMU with pid {pid} cannot be looked at ({error.strerror}), so it is not "
                f"known whether it survives; run this as root, or {_ADVICE}"
            ) from None
        if "qemu" not in os.path.basename(self._binary):
            raise UsageError(
                f"the socket belongs to {self._binary} (pid {pid}), which is no QEMU; name QEMU's "
                "process with pid=N"
            )
        if self._binary.endswith(" (deleted)"):
            self._binary = f"/proc/{pid}/exe"
        self._enter: list[str] = []
        if namespaces[0] != namespaces[1]:
            self._enter = ["nsenter", f"--target={pid}", "--mount", "--"]
        library_path = variables.get(b"LD_LIBRARY_PATH")
        self._environment = {} if library_path is None else {b"LD_LIBRARY_PATH": library_path}

    def outcome(self) -> str:
        """Return "" if it survived, else what happened."""
        ours, its = socket.socketpair()
        image = os.memfd_create("canary", os.MFD_CLOEXEC)
        try:
            os.ftruncate(image, _IMAGE_BYTES)
            if os.getuid() == 0:
                os.fchown(image, self._owner.st_uid, self._owner.st_gid)
            process = self._started(its, image)
        except BaseException:
            ours.close()
            os.close(image)
            raise
        finally:
            its.close()
        try:
            return self._tried(ours, image)
        except (Lost, TimeoutError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS)
            lines = (process.stderr.read() if process.stderr else b"").decode(errors="replace")
            said = (lines.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            return f"a trial of the same binary ended ({said})"
        finally:
            ours.close()
            os.close(image)
            process.kill()
            process.wait()
            if process.stderr:
                process.stderr.close()

    def _started(self, its: socket.socket, image: int) -> "subprocess.Popen[bytes]":
        chardev = f"socket,id=c,fd={its.fileno()}"
        if "storage-daemon" in self._binary:
            words = ["--chardev", chardev, "--monitor", "chardev=c"]
        else:
            words = ["-machine", "none", "-nodefaults", "-display", "none", "-chardev", chardev]
            words += ["-mon", "chardev=c,mode=control"]
        if os.getuid() == 0 and self._owner.st_uid:
            drop = [f"--reuid={self._owner.st_uid}", f"--regid={self._owner.st_gid}"]
            self._enter += ["setpriv", *drop, "--clear-groups", "--"]
        return subprocess.Popen(
            [*self._enter, self._binary, *words],
            env={**self._environment, b"PATH": b"/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(its.fileno(), image),
        )

    def _tried(self, ours: socket.socket, image: int) -> str:
        """Create an encrypted image, and amend it while it is open; return QEMU's error, or ""."""
        qemu = Channel("the trial", _SECONDS, sock=ours)
        for name in ("k", "new"):
            ask(qemu, "object-add", {"qom-type": "secret", "id": name, "data": f"trial {name}"})
        file = {
            "driver": "file",
            "node-name": "f",
            "filename": f"/dev/fd/{image}",
            "locking": "off",
        }
        ask(qemu, "blockdev-add", file)
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
