# SPDX-License-Identifier: LGPL-2.1-or-later
"""What accepts a secret's value, and must accept the new one before readers get it.

A `Resource` is a LUKS disk (luks_image, luks_node), a command of the administrator, or nothing. The
verb rotate calls its steps; each may be repeated, and leaves at least one version that works.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import Protocol

from secretd.client import SyncClient
from secretd.ctl.handover import as_memfd
from secretd.ctl.output import NOT_FOUND, Common
from secretd.errors import UsageError


class Resource(Protocol):
    """The resource of a rotation; all steps take ids of versions, and raise UsageError."""

    def apply(self, old: str, new: str) -> None:
        """Make it accept the new version, too; it accepts the old one."""

    def restore(self, old: str, new: str) -> None:
        """Make it accept ``new`` again, which it accepted before ``old``."""

    def retire(self, gone: str, kept: str) -> None:
        """Make it refuse one version; raises, and changes nothing, if it does not accept the
        other.
        """


class Nothing:
    """No resource: the secret is all there is."""

    def apply(self, old: str, new: str) -> None:
        """See Resource."""

    def restore(self, old: str, new: str) -> None:
        """See Resource."""

    def retire(self, gone: str, kept: str) -> None:
        """See Resource."""


class Command:
    """A command line that gives the new value to what accepts it."""

    def __init__(self, client: SyncClient, object_id: str, words: tuple[str, ...]) -> None:
        self._client = client
        self._object_id = object_id
        self._words = words

    def apply(self, old: str, new: str) -> None:
        """Run the command."""
        status = self._run(old, new)
        if status:
            raise UsageError(
                f"the command failed (exit status {status}); '{new}' is not the current version: "
                "run rotate again, or with --rollback"
            )

    restore = apply

    def retire(self, gone: str, kept: str) -> None:
        """The command has replaced one value by the other, so there is none to take away."""

    def _run(self, old: str, new: str) -> int:
        fds = {"old": as_memfd(self._client, old), "new": as_memfd(self._client, new)}
        try:
            words = list(self._words)
            for name, fd in fds.items():
                words = [word.replace(f"{{{name}}}", f"/dev/fd/{fd}") for word in words]
            reads = all("{new}" not in word for word in self._words)
            environment = {"SECRETD_ID": self._object_id, "SECRETD_OLD": old, "SECRETD_NEW": new}
            return subprocess.run(
                words,
                check=False,
                stdin=fds["new"] if reads else None,
                pass_fds=tuple(fds.values()),
                env=os.environ | environment,
            ).returncode
        except FileNotFoundError:
            return NOT_FOUND
        except OSError as error:
            raise UsageError(f"{self._words[0]}: {error.strerror}") from None
        finally:
            for fd in fds.values():
                os.close(fd)


@contextlib.contextmanager
def resource_of(
    common: Common, client: SyncClient, object_id: str, luks: str | None, words: tuple[str, ...]
) -> Iterator[Resource]:
    """Yield the resource of a command line; a LUKS disk before the command, if there are both."""
    command = Command(client, object_id, words) if words else Nothing()
    if luks is None:
        yield command
    elif luks.startswith("qmp="):
        from secretd.ctl.luks_node import LuksNode

        with LuksNode.of(common, client, luks) as node:
            yield Both(node, command)
    else:
        from secretd.ctl.luks_image import LuksImage

        yield Both(LuksImage(client, luks), command)


class Both:
    """Two resources."""

    def __init__(self, first: Resource, second: Resource) -> None:
        self._parts = (first, second)

    def apply(self, old: str, new: str) -> None:
        """See Resource."""
        for part in self._parts:
            part.apply(old, new)

    def restore(self, old: str, new: str) -> None:
        """See Resource."""
        for part in self._parts:
            part.restore(old, new)

    def retire(self, gone: str, kept: str) -> None:
        """See Resource."""
        for part in self._parts:
            part.retire(gone, kept)
