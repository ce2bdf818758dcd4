# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client of secretctl with the two requests that take or give a record of any size."""

import base64
import os
from typing import Any, Final, cast

from secretd.client import SyncClient
from secretd.client.channel import Channel, Pump
from secretd.client.sync_connection import returned

INLINE_RECORD_BYTES: Final = 4000
"""Bytes of a record that a request on the client socket has room for."""


class RecordClient(SyncClient):
    """A client that wraps and accepts."""

    def wrap(self, object_id: str, offer: str, receiver: str | None = None) -> bytes:
        """Return a record with a secret for the host that made an offer. Raises ExecuteError.

        ``receiver``: refuse an offer of another host.
        """
        to = {} if receiver is None else {"to": receiver}

        def once(channel: Channel) -> bytes:
            def deliver(sink: int, pump: Pump) -> dict[str, Any]:
                arguments = {
                    "id": object_id,
                    "offer": offer,
                    "fdname": self._connection.pass_descriptor(channel, sink),
                    **to,
                }
                reply = returned(channel.exchange("secret-wrap", arguments, (), pump))
                return cast("dict[str, Any]", reply)

            data, _ = self._collect(deliver, lambda reply: int(reply["size"]))
            with data:
                return bytes(data.view)

        return self._connection.again(once, twice=False)

    def accept(self, record: bytes) -> None:
        """Add the secret in a record. Raises ExecuteError."""
        if len(record) <= INLINE_RECORD_BYTES:
            self.execute("secret-accept", {"record": base64.b64encode(record).decode()})
            return

        def once(channel: Channel) -> None:
            fd = os.memfd_create("record", os.MFD_CLOEXEC)
            try:
                with open(fd, "wb", closefd=False) as file:
                    file.write(record)
                added = cast(dict[str, int], returned(channel.exchange("add-fd", None, [fd])))
                try:
                    file_ = f"/dev/fdset/{added['fdset-id']}"
                    returned(channel.exchange("secret-accept", {"file": file_}))
                finally:
                    channel.exchange("remove-fd", {"fdset-id": added["fdset-id"]})
            finally:
                os.close(fd)

        self._connection.again(once, twice=False)
