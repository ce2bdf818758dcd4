# SPDX-License-Identifier: LGPL-2.1-or-later
"""Brings what etcd has to secretd, over the client socket: rosters, then manifests, then records.

secretd decides what is accepted. This module brings only what it has not got, and only records
that a manifest lists, so that an etcd that is not honest costs it little.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, cast

from qemu.qmp import ExecuteError

from secretd.client.record_client import RecordClient
from secretd.fleet.keyspace import Keyspace, digest_of, publisher_of

log: Final = logging.getLogger("secretd-fleet")

Fetch = Callable[[str], bytes | None]
"""Returns the record with a digest, None if etcd has none."""


class Carrier:
    """What was brought to secretd.

    ``accepted``, ``refused``: how many records, manifests and rosters were. ``refusals``: why the
    last roster, manifest or record was, by what it is.
    """

    def __init__(self, client: RecordClient, keyspace: Keyspace) -> None:
        self._client, self._keyspace = client, keyspace
        self._roster = b""
        self._was_connected = False
        self.accepted = self.refused = 0
        self.refusals: dict[str, str] = {}

    def forget(self) -> None:
        """Bring everything anew, as to another secretd."""
        self._roster = b""
        self.refusals.clear()

    def bring(self, values: Mapping[bytes, bytes | None], fetch: Fetch) -> dict[str, Any]:
        """Bring what has changed in etcd, and what is missing; return what query-secret-fleet says.

        Raises qemu.qmp's ConnectError if secretd is not there.
        """
        self._connect()
        roster = values.get(self._keyspace.roster)
        if roster is not None and roster != self._roster and self._sign("roster", roster):
            self._roster = roster
        known = {each["name"]: each["digest"] for each in self.state()["publishers"]}
        for key, value in values.items():
            name = publisher_of(key)
            if name and value is not None and known.get(name) != hashlib.sha256(value).hexdigest():
                self._sign(f"manifest of publisher '{name}'", value)
        records = {digest_of(key): value for key, value in values.items() if value is not None}
        for each in self.state()["publishers"]:
            if each["missing"]:
                self._bring_missing(each["name"], lambda d: records.get(d) or fetch(d))
        return self.state()

    def state(self) -> dict[str, Any]:
        """Return what query-secret-fleet says of this host's fleet. Raises ConnectError."""
        self._connect()
        found = cast("list[dict[str, Any]]", self._client.execute("query-secret-fleet"))
        return found[0] if found else {"state": "none", "publishers": []}

    def _connect(self) -> None:
        if not self._was_connected:  # from then on the client connects by itself
            self._was_connected = True
            self._client.connect()

    def _bring_missing(self, publisher: str, fetch: Fetch) -> None:
        arguments = {"publisher": publisher}
        tried: set[str] = set()
        while True:
            missing = cast(
                "list[str]", self._client.execute("query-secret-fleet-missing", arguments)
            )
            fresh = [each for each in missing if each not in tried]
            if not fresh:
                return
            for digest in fresh:
                tried.add(digest)
                what = f"record {digest[:16]} of publisher '{publisher}'"
                data = fetch(digest)
                if data is None:
                    self._note(what, "etcd does not have it")
                elif hashlib.sha256(data).hexdigest() != digest:
                    self._note(what, "what etcd has under its digest is something else")
                else:
                    self._attempt(what, partial(self._client.accept, data))

    def _sign(self, what: str, data: bytes) -> bool:
        return self._attempt(what, lambda: self._client.accept_signed(data))

    def _attempt(self, what: str, bring: Callable[[], object]) -> bool:
        try:
            bring()
        except ExecuteError as error:
            self._note(what, str(error))
            return False
        self.accepted += 1
        self.refusals.pop(what, None)
        return True

    def _note(self, what: str, reason: str) -> None:
        self.refused += 1
        if self.refusals.get(what) != reason:
            log.warning("%s was not accepted: %s", what, reason)
        self.refusals[what] = reason
