# SPDX-License-Identifier: LGPL-2.1-or-later
"""A LUKS disk that no guest uses: its keyslots are changed by qemu-img(1).

``luks`` images and ``qcow2`` with LUKS. Passphrases reach qemu-img and qemu-io as memfds. Which
passphrase opens the disk is always tried, never remembered, so each step can be repeated.
"""

import contextlib
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from typing import Any

from secretd.client import SyncClient
from secretd.ctl.handover import as_memfd
from secretd.ctl.qemu import BUSY, NOT_TEXT, TRIES, WRONG, no_way_back
from secretd.errors import UsageError


class LuksImage:
    """The disk in the file or block device ``path``; ``iter_time``: milliseconds to try a new
    passphrase, None for QEMU's default.
    """

    def __init__(self, client: SyncClient, path: str, iter_time: int | None) -> None:
        self._client = client
        self._more = {} if iter_time is None else {"iter-time": str(iter_time)}
        self._path = path
        self._format = self._found_format()

    # --- the steps of a Resource

    def accepts(self, version: str) -> bool:
        """Return True if a version opens it."""
        return self._opens(version)

    def apply(self, old: str, new: str) -> None:
        """Add a keyslot for the new passphrase, unless it has one."""
        self._check_opens(old)
        if not self._opens(new):
            self._amend(old, new, {"state": "active", "new-secret": "changed", **self._more})
            self._check_opens(new)

    def restore(self, old: str, new: str) -> None:  # noqa: ARG002 - the other one of a Resource
        """Check the passphrase, whose keyslot is there until it is retired."""
        if not self._opens(new):
            raise no_way_back(self._path, new)

    def undo(self, gone: str, kept: str) -> None:
        """Remove the keyslot of the new passphrase, if it has one."""
        if self._opens(gone):
            self.retire(gone, kept)

    def retire(self, gone: str, kept: str) -> None:
        """Remove the keyslots of a passphrase, if the other one opens the disk."""
        self._check_opens(kept)
        if self._opens(gone):
            self._amend(kept, gone, {"state": "inactive", "old-secret": "changed"})
            self._check_opens(kept)

    # --- qemu-img, qemu-io

    def _found_format(self) -> str:
        try:
            status = os.stat(self._path)
        except OSError as error:
            raise UsageError(f"{self._path}: {error.strerror}") from None
        self._driver = "host_device" if stat.S_ISBLK(status.st_mode) else "file"
        path = os.path.abspath(self._path)
        found = self._run(["qemu-img", "info", "-U", "--output=json", path], ())
        info = json.loads(found.stdout) if not found.returncode else {}
        data = info.get("format-specific", {}).get("data", {})
        if info.get("format") == "luks":
            return "luks"
        if info.get("format") == "qcow2" and data.get("encrypt", {}).get("format") == "luks":
            return "qcow2"
        words = "it is neither a luks image nor qcow2 with LUKS"
        raise self._failure(found.stderr) if found.returncode else UsageError(f"{path}: {words}")

    def _opens(self, version: str) -> bool:
        with self._secrets(version) as (options, fds):
            opened = self._run(["qemu-io", *options, "-r", "-c", "quit", self._opened("s0")], fds)
        if opened.returncode and WRONG not in opened.stderr and NOT_TEXT not in opened.stderr:
            raise self._failure(opened.stderr)
        return not opened.returncode

    def _check_opens(self, version: str) -> None:
        if not self._opens(version):
            raise UsageError(f"{self._path}: '{version}' does not open it; nothing was removed")

    def _amend(self, opening: str, changed: str, change: dict[str, str]) -> None:
        prefix = "" if self._format == "luks" else "encrypt."
        given = {n: "s1" if v == "changed" else v for n, v in change.items()}
        option = ",".join(f"{prefix}{name}={value}" for name, value in given.items())
        with self._secrets(opening, changed) as (options, fds):
            words = ["qemu-img", "amend", *options, "-o", option, self._opened("s0")]
            for _ in range(TRIES):
                done = self._run(words, fds)
                if not done.returncode:
                    return
                if BUSY not in done.stderr:
                    break
        raise self._failure(done.stderr)

    def _opened(self, secret: str) -> str:
        key: dict[str, Any] = {"key-secret": secret}
        if self._format == "qcow2":
            key = {"encrypt": {"format": "luks", **key}, "backing": None}
        return self._json({"driver": self._format, **key})

    def _json(self, options: dict[str, Any]) -> str:
        """Return the disk's name for QEMU's tools, whatever characters its path has."""
        file = {"driver": self._driver, "filename": os.path.abspath(self._path)}
        return f"json:{json.dumps({**options, 'file': file})}"

    @contextlib.contextmanager
    def _secrets(self, *versions: str) -> Iterator[tuple[list[str], tuple[int, ...]]]:
        """Yield the options that give versions to QEMU's tools as s0 and s1, and descriptors."""
        fds: list[int] = []
        options: list[str] = []
        try:
            for number, version in enumerate(versions):
                fds.append(as_memfd(self._client, version))
                options += ["--object", f"secret,id=s{number},file=/dev/fd/{fds[-1]}"]
            yield options, tuple(fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _run(self, words: list[str], fds: tuple[int, ...]) -> "subprocess.CompletedProcess[str]":
        try:
            return subprocess.run(
                words, check=False, capture_output=True, text=True, pass_fds=fds,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except FileNotFoundError:
            raise UsageError(
                f"there is no {words[0]} here; Debian's package qemu-utils has it"
            ) from None

    def _failure(self, stderr: str) -> UsageError:
        """Return the error of one of QEMU's tools, in its own words."""
        # The first line names the tool, the image and the reason.
        words = (stderr.strip().splitlines() or ["it failed"])[0].rpartition(": ")[2]
        hint = "" if "lock" not in words else (
            "; while a guest uses it, --luks qmp=SOCKET,node=NODE changes it through QEMU"
        )  # fmt: skip
        return UsageError(f"{self._path}: {words}{hint}")
