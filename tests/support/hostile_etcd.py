# SPDX-License-Identifier: LGPL-2.1-or-later
"""What stands between an agent and etcd and is not honest: it answers as etcd does, from values
that the test lets through, changes or makes up.
"""

import asyncio
import ssl
import threading
from collections.abc import Coroutine
from typing import Any

from grpclib.const import Cardinality, Handler
from grpclib.encoding.proto import ProtoCodec
from grpclib.server import Server, Stream

from secretd.fleet import messages as m
from secretd.fleet.etcd import Endpoint
from tests.support.etcd import Cluster, free_ports


class RawCodec(ProtoCodec):
    """Sends bytes as they are, too."""

    def encode(self, message: Any, message_type: Any) -> bytes:
        """See ProtoCodec."""
        if isinstance(message, bytes):
            return message
        return super().encode(message, message_type)


class HostileEtcd:
    """``values`` are what a list gives; ``damage``: the bytes of every answer, if any."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.values: dict[bytes, bytes] = {}
        self.damage: bytes | None = None
        self.asked: list[bytes] = []
        self._revision = 1000
        self._watchers: list[tuple[Stream[Any, Any], dict[int, tuple[bytes, bytes]]]] = []
        self.endpoint = Endpoint("127.0.0.1", free_ports(1)[0])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = self._call(self._start())

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self) -> Server:
        directory = self._cluster.directory
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(directory / "etcd/node1.crt", directory / "etcd/node1.key")
        context.set_alpn_protocols(["h2"])
        server = Server([self], codec=RawCodec())
        await server.start(*self.endpoint, ssl=context)
        return server

    def __mapping__(self) -> dict[str, Handler]:
        """The methods, as grpclib asks for them."""
        return {
            "/etcdserverpb.KV/Range": Handler(
                self._range, Cardinality.UNARY_UNARY, m.RangeRequest, m.RangeResponse
            ),
            "/etcdserverpb.KV/Txn": Handler(
                self._txn, Cardinality.UNARY_UNARY, m.TxnRequest, m.TxnResponse
            ),
            "/etcdserverpb.Watch/Watch": Handler(
                self._watch, Cardinality.STREAM_STREAM, m.WatchRequest, m.WatchResponse
            ),
        }

    def _header(self, reply: Any) -> Any:
        reply.header.cluster_id, reply.header.revision = 7, self._revision
        return reply

    async def _range(self, stream: Stream[Any, Any]) -> None:
        request = await stream.recv_message()
        self.asked.append(request.key)
        reply = self._header(m.RangeResponse())
        for key, value in sorted(self.values.items()):
            if key == request.key or (request.range_end and request.key <= key < request.range_end):
                reply.kvs.add(key=key, value=value, mod_revision=1)
        await stream.send_message(reply if self.damage is None else self.damage)

    async def _txn(self, stream: Stream[Any, Any]) -> None:
        await stream.recv_message()
        reply = self._header(m.TxnResponse(succeeded=True))
        await stream.send_message(reply if self.damage is None else self.damage)

    async def _watch(self, stream: Stream[Any, Any]) -> None:
        ranges: dict[int, tuple[bytes, bytes]] = {}
        self._watchers.append((stream, ranges))
        async for request in stream:
            reply = self._header(m.WatchResponse())
            if request.HasField("create"):
                create = request.create
                ranges[create.watch_id] = (create.key, create.range_end)
                reply.watch_id, reply.created = create.watch_id, True
            await stream.send_message(reply if self.damage is None else self.damage)

    def let_through(self) -> None:
        """Take over what etcd has now, silently."""

        async def read() -> dict[bytes, bytes]:
            etcd = self._cluster.etcd()
            try:
                found = await etcd.range(b"/", b"0")
                return {each.key: each.value for each in found.kvs}
            finally:
                etcd.close()

        self.values = self._call(read())

    def push(self, *changes: tuple[bytes, bytes]) -> None:
        """Send changes to all watchers, in this order, whether etcd has them or not."""

        async def send() -> None:
            self._revision += 1
            for stream, ranges in list(self._watchers):
                for number, (first, end) in ranges.items():
                    reply = self._header(m.WatchResponse(watch_id=number))
                    for key, value in changes:
                        if key == first or (end and first <= key < end):
                            event = reply.events.add(type=0)
                            event.kv.key, event.kv.value = key, value
                            event.kv.mod_revision = self._revision
                    if reply.events:
                        try:
                            await stream.send_message(reply)
                        except Exception:
                            self._watchers.remove((stream, ranges))
                            break

        self._call(send())

    def close(self) -> None:
        """End."""

        async def end() -> None:
            self._server.close()
            await self._server.wait_closed()
            # The connections of agents that have ended close in the next turns.
            transports = self._loop._transports
            while any(each._sock is not None for each in list(transports.values())):
                await asyncio.sleep(0.01)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
