# SPDX-License-Identifier: LGPL-2.1-or-later
"""One QMP session: the command of a request, its arguments, its reply (QEMU's monitor/qmp.c).

A `Monitor` has the state of one connection: negotiation, and the descriptors that it passed. The
socket's role decides in which table a command is looked up. It sees no socket: session feeds it
requests and sends its replies, and monitor.commands executes them. Only this module turns
exceptions into replies.
"""

from collections.abc import Callable, Collection, Coroutine
from types import CoroutineType
from typing import Final, TypeAlias

from msgspec import UNSET, Struct
from msgspec.structs import astuple

from secretd.access.decision import Grant
from secretd.access.peer import Peer
from secretd.audit.records import Subject
from secretd.descriptors.source import ConnectionSources
from secretd.errors import (
    INTERNAL_ERROR,
    AccessDenied,
    ArgumentError,
    CommandError,
    CommandNotFound,
    LimitReached,
)
from secretd.memory.arena import Arena
from secretd.monitor.commits import Stored
from secretd.monitor.core import QEMU_VERSION, Core
from secretd.monitor.failures import log_internal
from secretd.monitor.passed_descriptors import PassedDescriptors
from secretd.monitor.tables import Table
from secretd.net.receiver import Locked
from secretd.qapi.command import Command, check
from secretd.store.commit import Commit
from secretd.wire import messages as wire
from secretd.wire.messages import Malformed, Request
from secretd.wire.parser import Fault, Text

QUOTED_BYTES: Final = 1024
"""Bytes of the sender's own text that an error quotes; they wait in locked memory until they are
read. QEMU quotes all of them.
"""

MAX_REPLY_BYTES: Final = 64 << 10
"""Bytes of a reply: clients read lines, and some (go-qemu) accept no longer ones. QEMU has no
limit.
"""

_INDEPENDENT: Final = ("secret", "secret-grant", "authz-simple", "authz-list")
"""The types of objects whose addition never waits for a source, without these members."""

_DEPENDING: Final = ("keyid", "file")

Reply: TypeAlias = "bytes | Locked | Stored | Coroutine[object, object, bytes]"


class Monitor(PassedDescriptors):
    """The session of ``peer``.

    ``table``: the commands of its socket. ``on_negotiated``: called when the client leaves
    negotiation mode; a dialect without a greeting has none. ``is_alone()``: True while no other
    connection waits for its turn.
    """

    def __init__(
        self, core: Core, peer: Peer, table: Table, on_negotiated: Callable[[], None]
    ) -> None:
        super().__init__(core, peer)
        self._on_negotiated = on_negotiated
        self.tree = core.tree
        self.table = table
        self._wire = table.wire
        self._by_request = table.by_request
        self.negotiated = not table.wire.GREETS
        self.loading = core.tree.loading(
            ConnectionSources(
                self.fdsets,
                self.scratch,
                core.threads,
                peer.uid,
                core.tuning.source_seconds,
                trusted=self.trusted,
            )
        )
        self.oob = False
        self.on_events: Callable[[Collection[str] | None], None] | None = None
        self.is_alone: Callable[[], bool] = lambda: False
        self.subject = Subject(peer.role.value, peer.info)

    @property
    def scratch(self) -> Arena:
        """Locked memory for intermediate results."""
        return self.tree.scratch

    def greeting(self) -> bytes:
        """Return the first line of the session."""
        return wire.greeting(QEMU_VERSION, self.core.package, ["oob"])

    def negotiate(self, *, oob: bool) -> None:
        """Leave negotiation mode; ``oob``: permit exec-oob from now on."""
        self.oob = oob
        self._on_negotiated()
        self.negotiated = True

    def announce(self, event: str, object_id: str, **members: str) -> None:
        """Announce to the other sessions what this one did to a secret; its own client has the
        reply.
        """
        if self.core.broadcaster.subscribers:  # usually there are none
            self.core.announce(event, object_id, self.peer, self, members)

    def announce_grant(self, event: str, members: dict[str, object]) -> None:
        """Announce to the other control connections what this one did to a grant."""
        if self.core.broadcaster.subscribers:
            self.core.announce_to_control(event, members, self.peer, self)

    def note(self, event: str, object_id: str, kind: str, size: int | None = None) -> None:
        """Append an audit record of what this session did to an object of type ``kind``."""
        self.core.audit.append_object_event(event, self.subject, object_id, kind, size)

    def note_connection(self) -> None:
        """Append an audit record of the connection; a person at a terminal is spared these."""
        if not self.core.audit.on_terminal:
            self.core.audit.append("connect", self.subject)

    def check_own(self, object_id: str) -> None:
        """Raise AccessDenied if an untrusted peer changes one of the daemon's keys, or a store."""
        tree = self.tree
        if self.trusted:
            return
        kind = tree.type_of(object_id)
        if (
            object_id in tree.own_keys
            or object_id in tree.declared
            or (kind is not None and kind.trusted_only)
        ):
            raise AccessDenied(
                f"Only uid 0 and the daemon's own uid may add, change or delete '{object_id}'"
            )

    def check(self, object_id: str, action: str, host: str = "") -> Grant:
        """Return permission to release a secret; see access.decision.Access.check."""
        try:
            return self.core.access.check(self.peer, self.subject, object_id, action, host)
        except AccessDenied:
            self.announce("SECRET_DENIED", object_id)
            raise

    def handle(self, request: Request | Malformed | Struct) -> Reply:
        """Execute a request; return its reply, or a coroutine of it."""
        id_text: str | None = None
        try:
            # 1. The command, its arguments and the id to echo.
            if isinstance(request, Struct):
                command = self._by_request[type(request)]
                raw_id, arguments = request.id, request.arguments  # type: ignore[attr-defined]
                if raw_id is not UNSET:
                    id_text = str(memoryview(raw_id), "ascii")
                if not self.negotiated:
                    _check_negotiation(command.name)
            elif isinstance(request, Malformed):
                return self._malformed(request)
            else:
                id_text = request.id
                command, arguments = self._find(request)
            # 2. The peer's rights, and the work.
            if not self.trusted:
                self._check_peer(command)
            if command.boxed:
                result = command.function(self, arguments)
            elif arguments is UNSET:
                result = command.function(self)
            else:
                result = command.function(self, *astuple(arguments))
            # 3. The reply, now or later.
            if result is None:
                empty = id_text is None
                return self._wire.EMPTY_RETURN if empty else self._wire.success(None, id_text)
            if isinstance(result, CoroutineType):
                self.core.limits.requests.count(self.peer.uid)
                return self._later(result, id_text)
            if isinstance(result, Commit):
                return self._stored(result, id_text)
            return self._success(result, id_text)
        except Exception as error:  # noqa: BLE001 - a reply must never be lost
            return self._failure(error, id_text)

    def _find(self, request: Request) -> tuple[Command, Struct]:
        """Return the command that the reference parser has read, and its arguments. Raises
        CommandError.
        """
        if not self.negotiated:
            _check_negotiation(request.command)
        command = self.table.by_name.get(request.command)
        if command is None:
            raise CommandNotFound(f"The command {request.command} has not been found")
        if request.oob and not command.oob:
            raise CommandError(f"The command {command.name} does not support OOB")
        return command, check(command, request.arguments)

    def _check_peer(self, command: Command) -> None:
        """Check an untrusted peer at each request: it may use the socket, and may wait if the
        command waits.
        """
        if not self.core.access.admits(self.peer):
            raise AccessDenied(f"uid {self.peer.uid} may not use the control socket any more")
        if command.waits:
            self.core.limits.requests.check(self.peer.uid)

    async def _later(self, result: Coroutine[object, object, object], id_text: str | None) -> bytes:
        try:
            return self._success(await result, id_text)
        except Exception as error:  # noqa: BLE001 - a reply must never be lost
            return self._failure(error, id_text)
        finally:
            self.core.limits.requests.release(self.peer.uid)

    def _stored(self, commit: Commit, id_text: str | None) -> Stored:
        """Return the reply to a change that waits for a store."""
        requests, uid = self.core.limits.requests, self.peer.uid
        requests.count(uid)
        commit.then(lambda _error: requests.release(uid))

        def reply(written: Commit) -> bytes:
            if written.error is not None:
                return self._failure(written.error, id_text)
            return self._wire.success(None, id_text)

        return Stored(commit, reply)

    def may_add_meanwhile(self, request: Request | Malformed | Struct) -> bool:
        """Return True for an addition that depends on no other object and on no source, so that it
        may be executed while earlier ones are being written.
        """
        if isinstance(request, Malformed):
            return False
        if isinstance(request, Request):
            given = request.arguments
            kind = given.get("qom-type")
            return (
                request.command == "object-add"
                and isinstance(kind, Text)
                and kind.to_str() in _INDEPENDENT
                and given.keys().isdisjoint(_DEPENDING)
            )
        command = self._by_request.get(type(request))  # a batch has none
        if command is None or command.name != "object-add":
            return False
        arguments = request.arguments  # type: ignore[attr-defined]
        return arguments.__struct_config__.tag in _INDEPENDENT and all(
            getattr(arguments, name, UNSET) is UNSET for name in _DEPENDING
        )

    def _failure(self, error: Exception, id_text: str | None) -> bytes:
        if isinstance(error, CommandError):
            if isinstance(error, LimitReached):
                self.core.limits.note_hit(error.limit)
            wire = self._wire
            wrong_argument = isinstance(error, ArgumentError)
            code = wire.INVALID_PARAMS if wrong_argument else wire.SERVER_ERROR
            return wire.failure(error.error_class, error.desc, id_text, code)
        log_internal(error)
        wire = self._wire
        return wire.failure("GenericError", INTERNAL_ERROR, id_text, wire.INTERNAL_ERROR)

    def _success(self, result: object, id_text: str | None) -> bytes:
        reply = self._wire.success(result, id_text)
        if len(reply) > MAX_REPLY_BYTES:
            raise LimitReached(
                "reply-bytes",
                f"The reply has {len(reply)} bytes, more than the limit of {MAX_REPLY_BYTES} bytes",
            )
        return reply

    def _malformed(self, request: Malformed) -> bytes | Locked:
        fault = request.fault
        if fault.quote is None:
            return self._wire.failure("GenericError", fault.before, request.id, request.code)
        if len(fault.quote) > QUOTED_BYTES:
            fault = Fault(fault.before, fault.quote[:QUOTED_BYTES], fault.after)
        buffer = self.scratch.allocate(self._wire.quoted_failure_size(fault))
        return Locked(buffer, self._wire.write_quoted_failure(fault, buffer.view))


def _check_negotiation(name: str) -> None:
    if name != "qmp_capabilities":
        raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
