# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking for a secret on the terminal: without echo, of any length, into locked memory.

The terminal's line editing is off, since it cuts a line at 4,095 bytes (termios(3)); backspace,
Ctrl-U and Ctrl-D work as usual. A paste may have several lines. Terminals with bracketed paste mark
it; on others it is recognised because it arrives at once. The verb add calls `ask_twice`.
"""

import os
import select
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Self

from secretd.client import SyncClient
from secretd.errors import UsageError
from secretd.memory.arena import LockedBuffer

SECRET_BYTES: Final = 1 << 20
"""Bytes of the largest secret."""

PASTE_SECONDS: Final = 0.1
"""Seconds within which the next line of a paste arrives, where the terminal does not mark
pastes.
"""

_PASTE_BEGINS: Final = b"\x1b[200~"
_PASTE_ENDS: Final = b"\x1b[201~"
_MARK_PASTES: Final = b"\x1b[?2004h"
_MARK_NO_PASTES: Final = b"\x1b[?2004l"
_ERASE: Final = (0x7F, 0x08)
_KILL: Final = 0x15
_END: Final = 0x04
_ESCAPE: Final = 0x1B
_READ_BYTES: Final = 4096


@contextmanager
def ask_twice(client: SyncClient, text: str) -> Iterator[LockedBuffer]:
    """Ask for a new secret, and once more, since a typing error cannot be seen. Raises
    UsageError.
    """
    fd = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        with (
            _Silent(fd),
            _Entry(client, fd, text) as first,
            _Entry(client, fd, "Again: ") as second,
        ):
            first.read()
            if not first.fill:
                raise UsageError("nothing was typed, so nothing was added")
            second.read()
            if first.typed != second.typed:
                raise UsageError("the two entries differ, so nothing was added")
            with client.buffer(first.fill) as exact:
                exact.view[:] = first.typed
                yield exact
    except termios.error:
        raise UsageError("the terminal cannot be used to ask; give --stdin or --file") from None
    finally:
        os.close(fd)


class _Silent:
    """A terminal without echo and line editing, but with Ctrl-C."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before = termios.tcgetattr(fd)

    def __enter__(self) -> None:
        silent = termios.tcgetattr(self._fd)
        silent[3] &= ~(termios.ECHO | termios.ICANON)
        silent[6][termios.VMIN], silent[6][termios.VTIME] = 1, 0
        # This discards earlier input.
        termios.tcsetattr(self._fd, termios.TCSAFLUSH, silent)
        os.write(self._fd, _MARK_PASTES)

    def __exit__(self, *exc: object) -> None:
        os.write(self._fd, _MARK_NO_PASTES)
        termios.tcsetattr(self._fd, termios.TCSAFLUSH, self._before)


class _Entry:
    """The input after one prompt. ``fill``: its bytes."""

    def __init__(self, client: SyncClient, fd: int, text: str) -> None:
        self._client = client
        self._fd = fd
        self._text = text
        self.fill = 0

    def __enter__(self) -> Self:
        self._buffer = self._client.buffer(SECRET_BYTES + _READ_BYTES)
        self._chunk = self._client.buffer(_READ_BYTES)
        return self

    def __exit__(self, *exc: object) -> None:
        self._buffer.free()
        self._chunk.free()

    @property
    def typed(self) -> memoryview:
        """The secret."""
        return self._buffer.view[: self.fill]

    def read(self) -> None:
        """Prompt, and read up to the end of the line or paste."""
        os.write(self._fd, self._text.encode())
        try:
            pasting = False
            while True:
                count = os.readv(self._fd, [self._chunk.view])
                if not count:
                    return
                position = 0
                while position < count:
                    byte = self._chunk.view[position]
                    if byte == _ESCAPE:
                        while count - position < len(_PASTE_BEGINS) and self._goes_on():
                            # Read the rest of the mark, after moving its beginning to the front.
                            rest = count - position
                            self._chunk.view[:rest] = self._chunk.view[position:count]
                            position = 0
                            more = os.readv(self._fd, [self._chunk.view[rest:]])
                            count = rest + more
                            if not more:  # the terminal was hung up
                                break
                        mark = bytes(self._chunk.view[position : position + len(_PASTE_BEGINS)])
                        if mark in (_PASTE_BEGINS, _PASTE_ENDS):
                            pasting = mark == _PASTE_BEGINS
                            position += len(mark)
                            continue
                        raise UsageError(
                            "a key without a character was pressed (an arrow?), so nothing was "
                            "added"
                        )
                    position += 1
                    if pasting:
                        self._add(0x0A if byte == 0x0D else byte)
                    elif byte == _END or (
                        byte in (0x0A, 0x0D) and position == count and not self._goes_on()
                    ):
                        return
                    elif byte in _ERASE:
                        self._erase()
                    elif byte == _KILL:
                        self.fill = 0
                    else:
                        self._add(0x0A if byte == 0x0D else byte)
        finally:
            os.write(self._fd, b"\n")

    def _goes_on(self) -> bool:
        """Return True if more input follows at once, as in a paste of several lines."""
        return bool(select.select([self._fd], [], [], PASTE_SECONDS)[0])

    def _add(self, byte: int) -> None:
        if self.fill == SECRET_BYTES:
            raise UsageError(f"more than {SECRET_BYTES:,} bytes were given, so nothing was added")
        self._buffer.view[self.fill] = byte
        self.fill += 1

    def _erase(self) -> None:
        """Remove the last character, which in UTF-8 may have several bytes."""
        while self.fill:
            self.fill -= 1
            if self._buffer.view[self.fill] & 0xC0 != 0x80:
                return
