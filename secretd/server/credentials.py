# SPDX-License-Identifier: LGPL-2.1-or-later
"""The credentials socket: what systemd's ``LoadCredential=NAME:/path/of/the/socket`` gets.

systemd connects and waits for the secret and the end (systemd.exec(5)); it never writes a byte, and
takes whatever came until the end, even nothing, for the whole credential. So the only way to refuse
is to send more than it takes: then the unit fails, where it would start with an empty or cut secret
otherwise. server accepts and calls `accept`; access decides; deliver writes.

A connection must not end because this process was killed, either. So the service manager is given
it to keep as soon as it is accepted, and the next process refuses it: what it was sent already
nobody knows.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Final

from secretd.access.peer import Peer, SocketRole, identify
from secretd.audit.records import Subject
from secretd.descriptors.fd import Fd
from secretd.descriptors.target import SocketTarget
from secretd.descriptors.threads import close_connection
from secretd.errors import AccessDenied, CommandError, PeerUnknown
from secretd.monitor.core import Core
from secretd.monitor.monitor import log_internal
from secretd.systemd.credential_address import (
    CREDENTIAL_ADDRESS_BYTES,
    CREDENTIAL_BYTES,
    CredentialAddress,
    credential_address,
)
from secretd.systemd.notify import KeptDescriptors

log = logging.getLogger("secretd")

STORED: Final = "credential-"
"""What the names of connections in the descriptor store begin with."""

_REFUSAL: Final = bytes(64 << 10)
_REFUSAL_TIMES: Final = CREDENTIAL_BYTES // len(_REFUSAL) + 1


Start = Callable[[Coroutine[object, object, None]], "asyncio.Task[None]"]


class Credentials:
    """The connections of the credentials socket. ``start`` runs what each of them waits for;
    ``ended`` is called after each.
    """

    def __init__(
        self, core: Core, start: Start, ended: Callable[[], None], store: KeptDescriptors | None
    ) -> None:
        self._core = core
        self._start = start
        self._ended = ended
        self._store = store
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, sock: socket.socket) -> None:
        """Take over a connection that was accepted."""
        self._number += 1
        name = f"{STORED}{self._number}"
        if self._store is not None and self._store.kept:
            self._store.manager.keep(name, [sock.fileno()])
        self._begin(self._serve(sock, name))

    def refuse(self, sock: socket.socket, name: str) -> None:
        """Take over a connection that an earlier process had accepted, and the name it is kept
        by.
        """
        log.warning("a unit's LoadCredential= was cut off by the end of secretd; the unit fails")
        self._number = max(self._number, int(name.removeprefix(STORED)))
        self._begin(self._refuse(sock, name, Peer(-1, -1, -1, SocketRole.CREDENTIALS)))

    def _begin(self, work: Coroutine[object, object, None]) -> None:
        task = self._start(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._ended()

    def stop(self) -> None:
        """Leave those connections whose other end takes nothing to the next process."""
        for task in self._tasks:
            task.cancel()

    @property
    def busy(self) -> bool:
        """True while a connection is served."""
        return bool(self._tasks)

    async def _serve(self, sock: socket.socket, name: str) -> None:
        peer, claimed = Peer(-1, -1, -1, SocketRole.CREDENTIALS), None
        try:
            claimed = credential_address(sock.getpeername())
            peer = identify(sock, SocketRole.CREDENTIALS)
            await self._deliver(sock, peer, claimed)
        except (CommandError, PeerUnknown) as error:
            self._say(claimed, peer, error)
            await self._refuse(sock, name, peer)
        except asyncio.CancelledError:
            sock.close()
            raise
        except Exception as error:  # noqa: BLE001 - systemd would take an end for the secret
            log_internal(error)
            await self._refuse(sock, name, peer)
        else:
            self._end(sock, name, peer)

    async def _deliver(
        self, sock: socket.socket, peer: Peer, claimed: CredentialAddress | None
    ) -> None:
        """Send the secret, or raise CommandError."""
        core = self._core
        subject = Subject(peer.role.value, peer.info)
        if claimed is not None and len("".join(claimed).encode()) > CREDENTIAL_ADDRESS_BYTES:
            log.warning(
                "credential '%s' of %s: their names have more than %d bytes together, so that systemd "
                "cannot ask for it most of the time (Protocol error)",
                claimed.credential, claimed.unit, CREDENTIAL_ADDRESS_BYTES,
            )  # fmt: skip
        # A descriptor of its own: the connection continues if the delivery fails.
        copy = Fd(os.dup(sock.fileno()))
        decision = core.access.credential(peer, subject, claimed)
        grant = await core.deliveries.release_decided(copy, decision, SocketTarget)
        core.announce("SECRET_READ", grant.object_id, peer, self)

    def _say(self, claimed: CredentialAddress | None, peer: Peer, error: Exception) -> None:
        """Log why a unit does not get a credential: the unit learns only that it failed."""
        if isinstance(error, PeerUnknown):
            words = f"It cannot be told in full who has connected: {error}"
            subject = Subject(peer.role.value, None)
            self._core.audit.append_refusal("credential", peer.uid, subject, reason=words)
        else:
            words = str(error)
        if claimed is None:
            log.warning("a connection to the credentials socket was refused: %s", words)
            return
        unit, credential = claimed
        log.warning(
            "credential '%s' of %s refused: %s; the unit fails with 243/CREDENTIALS",
            credential, unit, words,
        )  # fmt: skip
        if isinstance(error, AccessDenied):
            self._core.announce("SECRET_DENIED", credential, peer, self)

    async def _refuse(self, sock: socket.socket, name: str, peer: Peer) -> None:
        """Send more than a credential may have, however long it takes to be read."""
        loop = asyncio.get_running_loop()
        try:
            with contextlib.suppress(OSError):
                for _ in range(_REFUSAL_TIMES):
                    await loop.sock_sendall(sock, _REFUSAL)
        except asyncio.CancelledError:
            sock.close()
            raise
        self._end(sock, name, peer)

    def _end(self, sock: socket.socket, name: str, peer: Peer) -> None:
        # For the other end it ends here, whoever else keeps it.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        close_connection(sock, peer, self._core.threads, self._core.tree.scratch)
        if self._store is not None and self._store.kept:
            self._store.manager.drop(name, wait=False)
