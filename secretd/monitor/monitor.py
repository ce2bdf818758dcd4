# SPDX-License-Identifier: LGPL-2.1-or-later
"""One QMP session: the command of a request, its arguments, its reply (QEMU's monitor/qmp.c).

A `Monitor` has the state of one connection: negotiation, and the descriptors that it passed. The
socket's role decides in which table a command is looked up. It sees no socket: session feeds it
requests and sends its replies, and monitor.commands executes them. Only this module turns
exceptions into replies.
"""

import logging
import traceback
from collections.abc import Callable, Collection, Coroutine
from types import CoroutineType
from typing import Final, TypeAlias

from msgspec import UNSET, Struct
from msgspec.structs import astuple

from secretd.access.decision import Grant
from secretd.access.peer import Peer
from secretd.audit.records import Subject
from secretd.descriptors.fd import Fd
from secretd.descriptors.passed import (
    DESCRIPTORS_PER_CONNECTION,
    FdSets,
    NamedFds,
    PendingFd,
)
from secretd.descriptors.source import ConnectionSources
from secretd.descriptors.threads import THREADS_PER_UID
from secretd.errors import (
    AccessDenied,
    ArgumentError,
    CommandError,
    CommandNotFound,
    LimitReached,
)
from secretd.memory.arena import Arena
from secretd.monitor.core import QEMU_VERSION, Core
from secretd.monitor.tables import Table
from secretd.net.receiver import Locked
from secretd.net.transport import Transport
from secretd.qapi.command import Command, check
from secretd.wire import messages as wire
from secretd.wire.messages import Malformed, Request
from secretd.wire.parser import Fault

log = logging.getLogger("secretd")

QUOTED_BYTES: Final = 1024
"""Bytes of the sender's own text that an error quotes; they wait in locked memory until they are
read. QEMU quotes all of them.
"""

MAX_REPLY_BYTES: Final = 64 << 10
"""Bytes of a reply: clients read lines, and some (go-qemu) accept no longer ones. QEMU has no
limit.
"""

INTERNAL_ERROR: Final = "Internal error; the log of secretd has the details"

Reply: TypeAlias = "bytes | Locked | Coroutine[object, object, bytes]"


class Monitor:
    """The session of ``peer``.

    ``table``: the commands of its socket. ``on_negotiated``: called when the client leaves
    negotiation mode; a dialect without a greeting has none.
    """

    def __init__(
        self, core: Core, peer: Peer, table: Table, on_negotiated: Callable[[], None]
    ) -> None:
        self.core = core
        self._on_negotiated = on_negotiated
        self.tree = core.tree
        self.peer = peer
        self.trusted = peer.trusted
        self.table = table
        self._wire = table.wire
        self._by_request = table.by_request
        self.negotiated = not table.wire.GREETS
        self.pending = PendingFd()
        self.named = NamedFds()
        self._descriptors = core.limits.descriptors
        self.fdsets = FdSets()
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

    def announce(self, event: str, object_id: str) -> None:
        """Announce to the other sessions what this one did to a secret; its own client has the
        reply.
        """
        if self.core.broadcaster.subscribers:  # usually there are none
            self.core.announce(event, object_id, self.peer, self)

    def announce_grant(self, event: str, members: dict[str, object]) -> None:
        """Announce to the other control connections what this one did to a grant."""
        if self.core.broadcaster.subscribers:
            self.core.announce_grant(event, members, self.peer, self)

    def note(self, event: str, object_id: str, kind: str, size: int | None = None) -> None:
        """Append an audit record of what this session did to an object of type ``kind``."""
        self.core.audit.append_object_event(event, self.subject, object_id, kind, size)

    def note_connection(self) -> None:
        """Append an audit record of the connection; a person at a terminal is spared these."""
        if not self.core.audit.on_terminal:
            self.core.audit.append("connect", self.subject)

    def check(self, object_id: str, action: str) -> Grant:
        """Return permission to release a secret; see access.decision.Access.check."""
        try:
            return self.core.access.check(self.peer, self.subject, object_id, action)
        except AccessDenied:
            self.announce("SECRET_DENIED", object_id)
            raise

    def pending_descriptor(self) -> Fd:
        """Return the passed descriptor. Raises LimitReached if all threads of its uid are stuck."""
        fd = self.pending.take()
        uid = self.peer.uid
        if not self.trusted and self.core.threads.stuck(uid):
            fd.close()
            raise LimitReached(
                "threads-per-uid",
                f"uid {uid} has {THREADS_PER_UID} descriptors that block, and that is the limit "
                "(threads-per-uid)",
            )
        return fd

    def take_descriptor(self) -> Fd:
        """Return the passed descriptor, to be kept by the connection. Raises LimitReached without
        room for it.
        """
        fd = self.pending_descriptor()
        if len(self.named) + len(self.fdsets) >= DESCRIPTORS_PER_CONNECTION:
            fd.close()
            raise LimitReached(
                "descriptors-per-connection",
                f"This connection holds {DESCRIPTORS_PER_CONNECTION} descriptors, which is the "
                "limit; close some with closefd or remove-fd",
            )
        return fd

    def receive(self, numbers: list[int]) -> None:
        """Take over the descriptors of a message. Raises LimitReached if the peer passes too
        many.
        """
        if self.trusted:
            self.pending.receive([Fd(number) for number in numbers])
            return
        fault = self.descriptors_fault(len(numbers))
        self._descriptors.count(self.peer.uid, len(numbers))
        self.pending.receive(
            [Fd(number, self._close_received, self._count_released) for number in numbers]
        )
        if fault is not None:
            raise fault

    def descriptors_fault(self, more: int = 1) -> LimitReached | None:
        """Return the limit that ``more`` descriptors of this peer would exceed, None if there is
        none.

        Descriptors that wait to be closed count too. The check runs before each recvmsg(2), so a
        message exceeds a limit by less than SCM_MAX_FD.
        """
        threads, uid = self.core.threads, self.peer.uid
        try:
            self._descriptors.check(uid, more, threads.closing(uid))
            self.core.limits.check_descriptors(threads.closing_of_others, more)
        except LimitReached as error:
            return error
        return None

    def _close_received(self, fd: int) -> None:
        """Close a descriptor that an untrusted peer passed."""
        self.core.threads.close(self.peer.uid, fd)

    def _count_released(self) -> None:
        self._descriptors.release(self.peer.uid)

    def close(self) -> None:
        """Close all descriptors of the session."""
        self.pending.close()
        self.named.close()
        self.fdsets.close()

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


def log_internal(error: Exception) -> None:
    """Log an unknown exception by its type and place only: its text may quote its input."""
    place = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    log.error("internal error: %s\n%s", type(error).__name__, place)


def safely(transport: Transport, step: Callable[[], object]) -> None:
    """Take a step whose failure ends its connection, and not the daemon."""
    try:
        step()
    except Exception as error:  # noqa: BLE001 - see above
        log_internal(error)
        try:
            transport.close()
        except Exception as again:  # noqa: BLE001 - closing has gone as far as possible
            log_internal(again)
