# SPDX-License-Identifier: LGPL-2.1-or-later
"""What accepts a secret's value, and must accept the new one before readers get it.

A `Resource` is a LUKS disk (luks_image, luks_node), a command of the administrator, or nothing. The
verb rotate calls its steps; each may be repeated, and leaves at least one version that works.
"""

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from secretd.client import SyncClient
from secretd.ctl.handover import as_memfd
from secretd.ctl.output import NOT_FOUND, Common
from secretd.errors import UsageError


class Resource(Protocol):
    """The resource of a rotation; all steps take ids of versions, and raise UsageError."""

    def accepts(self, version: str) -> bool:
        """Return True if it is known to accept a version."""

    def apply(self, old: str, new: str) -> None:
        """Make it accept the new version, too; it accepts the old one."""

    def restore(self, old: str, new: str) -> None:
        """Make it accept ``new`` again, which it accepted before ``old``."""

    def undo(self, gone: str, kept: str) -> None:
        """Undo `apply`, which may not have happened: ``gone`` was the new one."""

    def retire(self, gone: str, kept: str) -> None:
        """Make it refuse one version; raises, and changes nothing, if it does not accept the
        other.
        """


class Nothing:
    """No resource: the secret is all there is."""

    def accepts(self, version: str) -> bool:  # noqa: ARG002 - see Resource
        """Return False: nothing is known."""
        return False

    def apply(self, old: str, new: str) -> None:
        """See Resource."""

    def restore(self, old: str, new: str) -> None:
        """See Resource."""

    def undo(self, gone: str, kept: str) -> None:
        """See Resource."""

    def retire(self, gone: str, kept: str) -> None:
        """See Resource."""


class Command(Nothing):
    """A command line that gives the new value to what accepts it."""

    def __init__(
        self, common: Common, client: SyncClient, object_id: str, words: tuple[str, ...]
    ) -> None:
        self._common = common
        self._client = client
        self._object_id = object_id
        self._words = words

    def apply(self, old: str, new: str) -> None:
        """Run the command."""
        status = self._run(old, new)
        if status:
            raise UsageError(
                f"the command failed (exit status {status}), and the current version stays; run "
                "rotate again with the same options"
            )

    def restore(self, old: str, new: str) -> None:
        """Run the command with the version before as the new one."""
        self.apply(old, new)

    def undo(self, gone: str, kept: str) -> None:
        """Run the command with the version before as the new one."""
        self.apply(gone, kept)

    def _run(self, old: str, new: str) -> int:
        text = " ".join(self._words)
        fds: dict[str, int] = {}
        try:
            # It gets what it names, and else the new value as its input.
            for name, version in (("old", old), ("new", new)):
                if f"{{{name}}}" in text or (name == "new"):
                    fds[name] = as_memfd(self._client, version)
            reads = "{new}" not in text
            words = list(self._words)
            for name, fd in fds.items():
                words = [word.replace(f"{{{name}}}", f"/dev/fd/{fd}") for word in words]
            environment = {"SECRETD_ID": self._object_id, "SECRETD_OLD": old, "SECRETD_NEW": new}
            return subprocess.run(
                words,
                check=False,
                stdin=fds["new"] if reads else None,
                pass_fds=[fd for name, fd in fds.items() if not (reads and name == "new")],
                env=os.environ | environment,
                preexec_fn=self._as_from_a_shell,
            ).returncode
        except FileNotFoundError:
            return NOT_FOUND
        except OSError as error:
            raise UsageError(f"{self._words[0]}: {error.strerror}") from None
        finally:
            for fd in fds.values():
                os.close(fd)

    def _as_from_a_shell(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, self._common.core_limit)


class Wanted(NamedTuple):
    """The resources of a command line: a LUKS disk, the milliseconds that trying a new passphrase
    takes, and the words of a command.
    """

    luks: str | None
    iter_time: int | None
    words: tuple[str, ...]


def absolute(luks: str | None) -> str:
    """Return a disk with an absolute path, so that another run in another directory finds it."""
    if luks is None:
        return ""
    if not luks.startswith("qmp="):
        return os.path.abspath(luks)
    path, comma, rest = luks.removeprefix("qmp=").partition(",")
    return f"qmp={os.path.abspath(path)}{comma}{rest}"


@contextlib.contextmanager
def resource_of(
    common: Common, client: SyncClient, object_id: str, wanted: Wanted
) -> Iterator[Resource]:
    """Yield the resource of a rotation; a LUKS disk before the command, if there are both."""
    words, luks = wanted.words, wanted.luks
    command = Command(common, client, object_id, words) if words else Nothing()
    if not luks:
        yield command
    elif luks.startswith("qmp="):
        from secretd.ctl.luks_node import LuksNode

        with LuksNode.of(common, client, luks, wanted.iter_time) as node:
            yield Both(node, command)
    else:
        from secretd.ctl.luks_image import LuksImage

        yield Both(LuksImage(client, luks, wanted.iter_time), command)


class Both:
    """Two resources."""

    def __init__(self, first: Resource, second: Resource) -> None:
        self._parts = (first, second)

    def accepts(self, version: str) -> bool:
        """See Resource."""
        return any(part.accepts(version) for part in self._parts)

    def apply(self, old: str, new: str) -> None:
        """See Resource."""
        for part in self._parts:
            part.apply(old, new)

    def restore(self, old: str, new: str) -> None:
        """See Resource."""
        for part in self._parts:
            part.restore(old, new)

    def undo(self, gone: str, kept: str) -> None:
        """See Resource."""
        for part in self._parts:
            part.undo(gone, kept)

    def retire(self, gone: str, kept: str) -> None:
        """See Resource."""
        for part in self._parts:
            part.retire(gone, kept)
