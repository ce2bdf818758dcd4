# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tables of commands: those of a kind of socket, in one dialect, and how it is decoded.

`Core` holds a `Table` for each role and dialect; a connection's Monitor and Session use one.
"""

from functools import cached_property
from typing import Any, Final, Protocol

from secretd.access.peer import SocketRole
from secretd.monitor.events import EVENTS
from secretd.net.listener import Dialect
from secretd.qapi.command import Command
from secretd.qapi.fast_decoder import FastDecoder
from secretd.qapi.introspect import SchemaInfo, schema
from secretd.qapi.openrpc import OpenRPCDocument, openrpc
from secretd.qapi.usual_lines import UsualLines
from secretd.wire import connection, encoder, jsonrpc, messages
from secretd.wire.encoder import JSONText
from secretd.wire.lexer import MAX_MESSAGE_BYTES
from secretd.wire.parser import Fault

CLIENT_MESSAGE_BYTES: Final = 6 << 10
"""Bytes of one message on the client socket, where no command carries a secret. It is so small that
clients never compete for the room that large messages need.
"""

CLIENT_MESSAGE_TOKENS: Final = 128
"""Tokens of one message on the client socket. Each takes a microsecond or more of the loop's time,
and a command there has three arguments at most.
"""

CLIENT_BATCH_TOKENS: Final = 1280
"""The same with JSON-RPC: a batch of 64 members, of which each is a request of its own."""

USUAL: Final = (("object-add", "secret"), ("object-del", ""), ("secret-read", ""))
"""The commands that programs send by the thousand."""


class Wire(Protocol):
    """The messages of a dialect: the modules wire.messages (QMP) and wire.jsonrpc."""

    GREETS: bool
    EMPTY_RETURN: bytes
    SERVER_ERROR: int
    INVALID_PARAMS: int
    INTERNAL_ERROR: int

    def success(self, data: object, id_text: str | None) -> bytes:
        """Return a response with a result."""

    def failure(self, error_class: str, desc: str, id_text: str | None, _code: int = 0, /) -> bytes:
        """Return a response with an error."""

    def refusal(self, desc: str) -> bytes:
        """Return an error that answers no request."""

    def quoted_failure_size(self, fault: Fault) -> int:
        """Return the bytes that `write_quoted_failure` may need."""

    def write_quoted_failure(self, fault: Fault, into: memoryview) -> int:
        """Write an error that quotes the sender's bytes; return its length in bytes."""

    def events(self, lines: bytes) -> bytes:
        """Return QMP events in this dialect."""


class Table:
    """The commands of a socket, by name and by the type of a decoded request.

    ``wire``: the messages of its dialect. ``max_bytes``, ``max_tokens``: limits of one message.
    """

    def __init__(
        self,
        commands: list[Command],
        dialect: Dialect,
        max_bytes: int,
        max_tokens: int | None = None,
    ) -> None:
        self._commands = commands
        self.dialect = dialect
        self.by_name = {command.name: command for command in commands}
        self.max_bytes = max_bytes
        self.max_tokens = max_tokens
        rpc = dialect == "jsonrpc"
        self.wire: Wire = jsonrpc if rpc else messages
        pairs = [(c.rpc_request if rpc else c.request, c) for c in commands]
        self.by_request = {request: c for request, c in pairs if request is not None}
        fast = FastDecoder({r: list(c.arguments.values()) for r, c in self.by_request.items()})
        self.decode = UsualLines(commands, USUAL, fast.decode, rpc=rpc).decode

    def codec(self, *, in_batch: bool = False) -> "connection.Connection[Any]":
        """Return the codec of a connection; ``in_batch``: of a member of a batch."""
        if self.dialect == "qmp":
            return connection.Connection(self.decode, self.max_bytes, self.max_tokens)
        made: jsonrpc.Connection[Any] = jsonrpc.Connection(
            self.decode, self.max_bytes, self.max_tokens
        )
        made.in_batch = in_batch
        return made

    @cached_property
    def schema(self) -> JSONText[list[SchemaInfo]]:
        """The result of query-qmp-schema."""
        return JSONText(encoder.value(schema(self._commands, EVENTS)))

    @cached_property
    def openrpc(self) -> JSONText[OpenRPCDocument]:
        """The result of rpc.discover."""
        return JSONText(encoder.value(openrpc(self._commands, EVENTS)))


Tables = dict[tuple[SocketRole, Dialect], Table]


def tables(commands: list[Command]) -> Tables:
    """Return the tables of all sockets."""
    made: Tables = {}
    dialects: tuple[Dialect, ...] = ("qmp", "jsonrpc")
    for dialect in dialects:
        every = [command for command in commands if command.only in ("", dialect)]
        made[SocketRole.CONTROL, dialect] = Table(every, dialect, MAX_MESSAGE_BYTES)
        most = CLIENT_MESSAGE_TOKENS if dialect == "qmp" else CLIENT_BATCH_TOKENS
        made[SocketRole.CLIENT, dialect] = Table(
            [c for c in every if c.client], dialect, CLIENT_MESSAGE_BYTES, most
        )
    return made
