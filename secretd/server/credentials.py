# SPDX-License-Identifier: LGPL-2.1-or-later
"""The credentials socket, which serves systemd's ``LoadCredential=NAME:/path/of/the/socket``.

systemd connects and waits for the secret and the end (systemd.exec(5)). It never writes a byte, and
takes all bytes before the end, even none, for the whole credential. So the only refusal is to send
more than systemd accepts: then the unit fails, instead of starting with an empty or truncated
secret. server accepts and calls `accept`; access decides; descriptors writes.

A killed process must not look like an end either. So each connection is stored with the service
manager when it is accepted, and the next process refuses it, since it cannot know which bytes were
sent.
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
from secretd.monitor.failures import log_internal
from secretd.systemd.credential_address import (
    CREDENTIAL_ADDRESS_BYTES,
    CREDENTIAL_BYTES,
    CredentialAddress,
    credential_address,
)
from secretd.systemd.notify import KeptDescriptors

log = logging.getLogger("secretd")

STORED: Final = "credential-"
"""The prefix of the names of connections in the descriptor store."""

_REFUSAL: Final = bytes(64 << 10)
_REFUSAL_TIMES: Final = CREDENTIAL_BYTES // len(_REFUSAL) + 1


Start = Callable[[Coroutine[object, object, None]], "asyncio.Task[None]"]


class Credentials:
    """The connections of the credentials socket.

    ``start``: runs the coroutine of each connection. ``ended``: called after each.
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
        """Take over an accepted connection."""
        self._number += 1
        name = f"{STORED}{self._number}"
        if self._store is not None and self._store.kept:
            self._store.manager.keep(name, [sock.fileno()])
        self._begin(self._serve(sock, name))

    def refuse(self, sock: socket.socket, name: str) -> None:
        """Take over a connection that an earlier process accepted; ``name``: its name in the
        descriptor store.
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
        """Leave connections whose other end takes nothing to the next process."""
        for task in self._tasks:
            task.cancel()

    @property
    def busy(self) -> bool:
        """True while a connection is being served."""
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
        except Exception as error:  # noqa: BLE001 - systemd would take the end for the secret
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
                "credential '%s' of %s: their names have more than %d bytes together, so that "
                "systemd cannot ask for it most of the time (Protocol error)",
                claimed.credential, claimed.unit, CREDENTIAL_ADDRESS_BYTES,
            )  # fmt: skip
        # A descriptor of its own: the connection continues if the delivery fails.
        copy = Fd(os.dup(sock.fileno()))
        decision = core.access.credential(peer, subject, claimed)
        grant = await core.deliveries.release_decided(copy, decision, SocketTarget)
        core.delivered(grant, self)

    def _say(self, claimed: CredentialAddress | None, peer: Peer, error: Exception) -> None:
        """Log why a unit gets no credential: the unit learns only that it failed."""
        if isinstance(error, PeerUnknown):
            words = f"Cannot identify the peer completely: {error}"
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
        """Send more than a credential may have, however slowly it is read."""
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
        # The other end sees the end now, even if the service manager still stores the connection.
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        close_connection(sock, peer, self._core.threads, self._core.tree.scratch)
        if self._store is not None and self._store.kept:
            self._store.manager.drop(name, wait=False)
