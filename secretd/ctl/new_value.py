# SPDX-License-Identifier: LGPL-2.1-or-later
"""The new value of a rotation: generated, from a file, or typed; the verb rotate adds it."""

import os
from typing import Final, NamedTuple

from secretd.client import PLAIN, SyncClient
from secretd.ctl.prompt import ask_twice
from secretd.ctl.secrets import Adding
from secretd.errors import UsageError

_DIGITS: Final = b"0123456789abcdef"


class Value(NamedTuple):
    """The source of a new value.

    ``generate``: the number of random bytes; with ``text`` twice as many hexadecimal digits.
    """

    generate: int | None
    text: bool
    file: str | None
    prompt: bool

    @property
    def given(self) -> bool:
        """True if there is a source."""
        return self.generate is not None or self.file is not None or self.prompt

    def add(self, client: SyncClient, version: str) -> None:
        """Add the value as a version. Raises UsageError and ExecuteError."""
        if self.generate is not None and self.text:
            _add_digits(client, version, self.generate)
        elif self.generate is not None:
            client.generate(version, self.generate)
        elif self.file is not None:
            opened = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                Adding(client, version, PLAIN, False).from_fd(opened, self.file)
            finally:
                os.close(opened)
        elif self.prompt:
            with ask_twice(client, f"New value of {version}: ") as typed:
                client.add_bytes(version, typed.view)
        else:
            raise UsageError(
                f"'{version}' is staged and has no value yet; give --generate N, --file FILE or "
                "--prompt"
            )


def _add_digits(client: SyncClient, version: str, size: int) -> None:
    """Add ``size`` random bytes as hexadecimal digits, which never leave locked memory."""
    if not 1 <= size <= 1 << 16:
        raise UsageError("--generate takes 1 to 65,536 bytes with --text")
    with client.buffer(size) as random, client.buffer(2 * size) as digits:
        source = os.open("/dev/urandom", os.O_RDONLY | os.O_CLOEXEC)
        try:
            filled = 0
            while filled < size:
                filled += os.readv(source, [random.view[filled:]])
        finally:
            os.close(source)
        view = digits.view
        for index, byte in enumerate(random.view):
            view[2 * index] = _DIGITS[byte >> 4]
            view[2 * index + 1] = _DIGITS[byte & 15]
        client.add_bytes(version, view)
