# SPDX-License-Identifier: LGPL-2.1-or-later
"""A thin client of etcd's API v3 over grpclib: ranges and transactions. watch has the rest.

Every call has TLS, a time limit and `hasleader`, so that a node without a leader says so instead of
hanging. Users are known by their client certificate. A node is not trusted: what matters is signed.
"""

import asyncio
import random
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from google.protobuf.message import DecodeError
from grpclib.client import Channel, UnaryUnaryMethod
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError

from secretd.fleet import messages as m

CALL_SECONDS: Final = 3.0
"""Seconds for a call to one node."""

REQUEST_BYTES, REQUEST_OPERATIONS = 1_000_000, 100
"""Bytes and operations of a transaction: etcd's limits are 1.5 MiB and 128."""

METADATA: Final = {"hasleader": "true"}


class Refused(Exception):
    """etcd refuses a call, and would refuse it again; the text is etcd's."""


class Unreachable(Exception):
    """No node of etcd has answered; the text says what the last one did."""


class Endpoint(NamedTuple):
    """A node."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"https://{bracketed(self.host)}:{self.port}"


@contextmanager
def undamaged() -> Iterator[None]:
    """Raise Damaged for what cannot be decoded, or is compressed without being asked for."""
    try:
        yield
    except (DecodeError, NotImplementedError) as error:
        raise Damaged(f"its answer is no message of etcd: {type(error).__name__}") from None


def bracketed(host: str) -> str:
    """Return a host as URLs have it."""
    return f"[{host}]" if ":" in host else host


def endpoint(text: str) -> Endpoint:
    """Return the endpoint in ``https://HOST[:PORT]``. Raises ValueError."""
    parts = urlsplit(text)
    if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError(f"'{text}' is no endpoint such as https://127.0.0.1:2379")
    return Endpoint(parts.hostname, parts.port or 2379)


def tls(ca: str, certificate: str, key: str) -> ssl.SSLContext:
    """Return TLS with a certificate of our own; the files are read now."""
    for path in (ca, certificate, key):
        with open(path, "rb"):  # ssl's errors do not name the file
            pass
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    return context


def prefix_end(prefix: bytes) -> bytes:
    """Return the key behind all keys with a prefix, as etcd's range_end takes it."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


class Damaged(Exception):
    """A node's answer is no message of etcd."""


LOST: Final = (Damaged, OSError, asyncio.TimeoutError, StreamTerminatedError, ssl.SSLError)
_AGAIN: Final = (
    Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.CANCELLED, Status.UNKNOWN,
    Status.INTERNAL, Status.RESOURCE_EXHAUSTED,
)  # fmt: skip


_OLD_RIGHTS: Final = "auth store is old"
"""Enrolling others renews etcd's store of rights, and it refuses reads of anyone for a moment."""


def _is_passing(error: GRPCError) -> bool:
    """Return True if another try, or another node, may succeed."""
    return error.status in _AGAIN or _OLD_RIGHTS in (error.message or "")


def words_of(error: BaseException) -> str:
    """Return the reason in an error of a call."""
    if isinstance(error, GRPCError):
        return error.message or error.status.name.lower()
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__


def range_request(key: bytes, end: bytes, *, keys_only: bool = False) -> Any:
    """Return the request for one key, or for those before ``end``.

    An end that is present and empty would be the end of all keys, for etcd and for its rights.
    """
    request = m.RangeRequest(key=key, keys_only=keys_only)
    if end:
        request.range_end = end
    return request


class Etcd:
    """A cluster's client.

    ``endpoints``: its nodes. ``make_tls``: returns the TLS context for a new connection: a renewed
    certificate counts from then on.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], make_tls: Callable[[], ssl.SSLContext]
    ) -> None:
        self._endpoints = list(endpoints)
        random.shuffle(self._endpoints)
        self._make_tls = make_tls
        self._channel: Channel | None = None

    @property
    def endpoint(self) -> Endpoint:
        """The node in use."""
        return self._endpoints[0]

    def close(self) -> None:
        """End the connection."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def leave(self, channel: Channel | None) -> None:
        """Go on to another node, unless that was done since ``channel`` was in use."""
        if channel is self._channel:
            self.close()
            self._endpoints.append(self._endpoints.pop(0))

    def connected(self) -> Channel:
        """Return the connection to the node in use; the first call on it connects."""
        if self._channel is None:
            host, port = self.endpoint
            self._channel = Channel(host, port, ssl=self._make_tls())
        return self._channel

    async def once(self, path: str, request: Any, reply: Any, seconds: float = CALL_SECONDS) -> Any:
        """Call the node in use. Raises GRPCError and what a lost connection raises."""
        method: Any = UnaryUnaryMethod(self.connected(), path, type(request), reply)
        with undamaged():
            return await method(request, timeout=seconds, metadata=METADATA)

    async def call(self, path: str, request: Any, reply: Any, seconds: float = CALL_SECONDS) -> Any:
        """Call any node; each is tried twice. Raises Refused and Unreachable.

        A node may have executed what another one is asked for again.
        """
        last = ""
        for attempt in range(2 * len(self._endpoints)):
            channel = None
            try:
                channel = self.connected()
                return await self.once(path, request, reply, seconds)
            except GRPCError as error:
                last = words_of(error)
                if not _is_passing(error):
                    raise Refused(last) from None
                if _OLD_RIGHTS in last:
                    continue
            except LOST as error:
                last = words_of(error)
            self.leave(channel)
            if attempt >= len(self._endpoints) - 1:
                await asyncio.sleep(random.uniform(0, 0.5))  # noqa: S311 - no secret
        raise Unreachable(last)

    async def range(self, key: bytes, end: bytes = b"", *, keys_only: bool = False) -> Any:
        """Return the response of a linearizable range. Raises Refused and Unreachable."""
        request = range_request(key, end, keys_only=keys_only)
        return await self.call("/etcdserverpb.KV/Range", request, m.RangeResponse)

    async def get(self, key: bytes, seconds: float = CALL_SECONDS) -> tuple[bytes | None, int]:
        """Return a key's value, None if there is none, and the revision of its last change."""
        request = range_request(key, b"")
        reply = await self.call("/etcdserverpb.KV/Range", request, m.RangeResponse, seconds)
        found = [each for each in reply.kvs if each.key == key]
        return (found[0].value, found[0].mod_revision) if found else (None, 0)

    async def transact(
        self, operations: Sequence[Any], compare: Mapping[bytes, int] | None = None
    ) -> bool:
        """Execute operations at once, if the last changes of some keys are still these; return
        whether they were. Raises Refused and Unreachable.
        """
        request = m.TxnRequest(success=operations)
        for key, revision in (compare or {}).items():
            request.compare.append(
                m.Compare(result=m.EQUAL, target=m.MOD, key=key, mod_revision=revision)
            )
        reply = await self.call("/etcdserverpb.KV/Txn", request, m.TxnResponse)
        return bool(reply.succeeded)

    async def write(self, puts: Mapping[bytes, bytes], deletes: Sequence[bytes] = ()) -> None:
        """Put and delete any number of keys, in transactions that etcd takes."""
        operations = [m.Operation(put=m.PutRequest(key=k, value=v)) for k, v in puts.items()]
        operations += [m.Operation(delete=m.DeleteRequest(key=key)) for key in deletes]
        batch: list[Any] = []
        size = 0
        for each in operations:
            if batch and (
                len(batch) == REQUEST_OPERATIONS or size + each.ByteSize() > REQUEST_BYTES
            ):
                await self.transact(batch)
                batch, size = [], 0
            batch.append(each)
            size += each.ByteSize()
        if batch:
            await self.transact(batch)
