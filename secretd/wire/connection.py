# SPDX-License-Identifier: LGPL-2.1-or-later
"""The server's side of a QMP connection, sans-IO: bytes in, requests out.

A `Connection` finds the end of each message and checks that it is a command object, with QEMU's
words where it is not (monitor/qmp.c, qapi/qmp-dispatch.c). It knows no command and holds no bytes:
the caller keeps the buffer and reports when bytes move. monitor.session calls it.

The fast path is an optimisation that may only accept or decline: it gets one line at a time, and
the reference, wire.lexer, reads what it declines.
"""

import re
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from secretd.wire import encoder
from secretd.wire.hash_order import qdict_items
from secretd.wire.lexer import (
    MAX_MESSAGE_BYTES,
    NEED_DATA,
    NeedData,
    Streamer,
)
from secretd.wire.messages import Malformed, Request
from secretd.wire.parser import JSON, Fault, Text

T = TypeVar("T")

MAX_ID_BYTES: Final = 16 << 10
"""Bytes of a command's id, as it is echoed. QEMU has no limit."""

_NEWLINE: Final = re.compile(rb"\n")
_BLANK: Final = re.compile(rb"[ \t\r\n]*")
_BRACE: Final = 0x7B


class Connection(Generic[T]):
    """Requests out of a stream of bytes.

    ``fast``: takes the view of one line and returns the typed request, or None to decline.
    """

    streamer: type[Streamer] = Streamer

    def __init__(
        self,
        fast: Callable[[memoryview], T | None],
        max_bytes: int = MAX_MESSAGE_BYTES,
        max_tokens: int | None = None,
    ) -> None:
        self._fast = fast
        self._streamer = self.streamer(max_bytes, max_tokens)
        self.idle = True
        """True if no message is unfinished."""
        self._declined = 0  # the fast path has declined everything up to here
        self.oob = False
        """Whether the client has enabled out-of-band execution."""
        self.first_needed = self._streamer.first_needed

    def shifted(self, distance: int) -> None:
        """Note that the unconsumed bytes now lie ``distance`` bytes lower in the view."""
        self._streamer.shifted(distance)
        self._declined = 0

    def next(
        self, view: memoryview, position: int, end: int
    ) -> tuple[int, Request | Malformed | T | NeedData]:
        """Read from ``position`` to ``end``; return the position reached and what was found.

        That is the fast path's request, a `Request`, a `Malformed` (QMP spec, section "Protocol
        Specification"), or NEED_DATA. Views inside a request are valid until the caller moves or
        wipes the bytes.
        """
        if self.idle:
            first = view[position] if position < end else 0
            if first <= 0x20:
                position = _BLANK.match(view, position, end).end()  # type: ignore[union-attr]
                if position == end:
                    self._declined = 0
                    return position, NEED_DATA
                first = view[position]
            if first == _BRACE and self._declined <= position:
                newline = _NEWLINE.search(view, position, end)
                line_end = end if newline is None else newline.end()
                request = self._fast(view[position:line_end])
                if request is not None:
                    if line_end == end:
                        self._declined = 0
                    return line_end, request
                self._declined = line_end
        return self._reference(view, position, end)

    def _reference(
        self, view: memoryview, position: int, end: int
    ) -> tuple[int, Request | Malformed | NeedData]:
        position, message = self._streamer.next(view, position, end)
        self.idle = self._streamer.idle
        if message is NEED_DATA:
            self._declined = 0
            return position, NEED_DATA
        if isinstance(message, Fault):
            return position, self._fault(message)
        return position, self._checked(message, view)  # type: ignore[arg-type]

    def _checked(self, message: JSON, _view: memoryview) -> Any:
        """Return the request of a parsed message, or its fault."""
        return _check_object(message, oob=self.oob)

    def _fault(self, fault: Fault) -> Malformed:
        """Return what a fault of the stream is."""
        return Malformed(fault)


def _check_object(message: JSON, *, oob: bool) -> Request | Malformed:
    """qmp_dispatch_check_obj(): return the request of a command object, or the fault.

    ``oob``: exec-oob is a permitted member.
    """
    # 1. The id, which even an error echoes.
    if not isinstance(message, dict):
        return Malformed(Fault("QMP input must be a JSON object"))
    id_text = encoder.value(message["id"]) if "id" in message else None
    if id_text is not None and len(id_text) > MAX_ID_BYTES:
        words = f"QMP input member 'id' is longer than the limit of {MAX_ID_BYTES} bytes"
        return Malformed(Fault(words))
    # 2. The members, in the order in which QEMU meets them.
    execute = ""
    wrong = ""
    for key, value in qdict_items(message):
        if key == "execute" or (key == "exec-oob" and oob):
            if not isinstance(value, Text):
                wrong = f"QMP input member '{key}' must be a string"
            elif execute:
                wrong = f"QMP input member '{key}' clashes with '{execute}'"
            execute = key
        elif key == "arguments":
            if not isinstance(value, dict):
                wrong = "QMP input member 'arguments' must be an object"
        elif key != "id":
            wrong = f"QMP input member '{key}' is unexpected"
        if wrong:
            return Malformed(Fault(wrong), id_text)
    if not execute:
        return Malformed(Fault("QMP input lacks member 'execute'"), id_text)
    command, arguments = message[execute], message.get("arguments", {})
    assert isinstance(command, Text)
    assert isinstance(arguments, dict)
    return Request(command.to_str(), arguments, id_text, execute == "exec-oob")
