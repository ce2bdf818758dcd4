# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `secretd-fleet enrol` does on a host, through ssh or another program that runs commands
there.
"""

import io
import os
import shlex
import subprocess
import tarfile
from collections.abc import Sequence

from secretd.errors import UsageError


class Remote:
    """A host that commands reach.

    ``prefix``: the words before a command, such as ssh and an address. ``at``: where the files of
    the host's agent go.
    """

    def __init__(self, prefix: Sequence[str], host: str, at: str) -> None:
        self._prefix, self._host, self._at = prefix, host, at

    def public(self) -> str:
        """Return the public half of the host's keys, which it gets if it has none. Raises
        UsageError.
        """
        name = shlex.quote(self._host)
        words = self._run(f"secretctl host show 2> /dev/null || secretctl host init {name}")
        name, _, public = words.partition(" ")
        if name != self._host:
            raise UsageError(f"the host that '{shlex.join(self._prefix)}' reaches is '{name}'")
        return public

    def bring(self, where: str) -> None:
        """Bring the files of the host, and let its secretd know the fleet. Raises UsageError."""
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as archive:
            for name in sorted(os.listdir(where)):
                archive.add(os.path.join(where, name), name)
        at = shlex.quote(self._at)
        # What was added to the file there by hand stays.
        keep = f"cp {at}/fleet.toml {at}/fleet.toml.old 2> /dev/null || :"
        add = (
            f'for name in socket metrics; do grep -q "^$name *=" {at}/fleet.toml || '
            f'grep -sh "^$name *=" {at}/fleet.toml.old >> {at}/fleet.toml || :; done'
        )
        take = f"tar -x --no-same-owner -C {at} -f -"
        self._run(f"umask 077; mkdir -p {at} && {{ {keep}; }} && {take} && {add}", data.getvalue())
        self._run(f"secretd-fleet join --config {at}/fleet.toml")

    def _run(self, command: str, data: bytes = b"") -> str:
        try:
            done = subprocess.run(
                [*self._prefix, command], input=data, capture_output=True, check=False
            )
        except OSError as error:
            raise UsageError(f"{self._prefix[0]}: {error.strerror}") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip() or f"status {done.returncode}"
            raise UsageError(f"{self._host}: {said}")
        return done.stdout.decode(errors="replace").strip()
