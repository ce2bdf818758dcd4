# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client with the requests that take or give a record, or what a fleet has signed, of any size.

secretctl and secretd-fleet use it.
"""

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

    def wrap(self, object_id: str, offer: str | None = None, receiver: str | None = None) -> bytes:
        """Return a record with a secret for the host that made an offer. Raises ExecuteError.

        ``receiver``: refuse an offer of another host; without an offer, a host of the fleet.
        """
        given = {"offer": offer, "to": receiver}
        more = {name: value for name, value in given.items() if value is not None}

        def once(channel: Channel) -> bytes:
            def deliver(sink: int, pump: Pump) -> dict[str, Any]:
                arguments = {
                    "id": object_id,
                    "fdname": self._connection.pass_descriptor(channel, sink),
                    **more,
                }
                reply = returned(channel.exchange("secret-wrap", arguments, (), pump))
                return cast("dict[str, Any]", reply)

            data, _ = self._collect(deliver, lambda reply: int(reply["size"]))
            with data:
                return bytes(data.view)

        return self._connection.again(once, twice=False)

    def accept(self, record: bytes) -> None:
        """Add the secret in a record. Raises ExecuteError."""
        self._pass("secret-accept", "record", record)

    def accept_signed(self, data: bytes) -> dict[str, Any]:
        """Bring a roster or manifest; return what secret-fleet-accept does. Raises ExecuteError."""
        return cast("dict[str, Any]", self._pass("secret-fleet-accept", "data", data))

    def _pass(self, command: str, member: str, data: bytes) -> object:
        if len(data) <= INLINE_RECORD_BYTES:
            return self.execute(command, {member: base64.b64encode(data).decode()})

        def once(channel: Channel) -> object:
            fd = os.memfd_create("record", os.MFD_CLOEXEC)
            try:
                with open(fd, "wb", closefd=False) as file:
                    file.write(data)
                added = cast(dict[str, int], returned(channel.exchange("add-fd", None, [fd])))
                try:
                    file_ = f"/dev/fdset/{added['fdset-id']}"
                    return returned(channel.exchange(command, {"file": file_}))
                finally:
                    channel.exchange("remove-fd", {"fdset-id": added["fdset-id"]})
            finally:
                os.close(fd)

        return self._connection.again(once, twice=False)
