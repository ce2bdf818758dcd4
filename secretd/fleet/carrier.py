# SPDX-License-Identifier: LGPL-2.1-or-later
"""Brings what etcd has to secretd, over the client socket: rosters, then manifests, then records.

secretd decides what is accepted. This module brings only what it has not got, only from publishers
of the roster, and only records that a manifest lists, so that an etcd that is not honest costs it
little.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast

from qemu.qmp import ExecuteError

from secretd.client.record_client import RecordClient
from secretd.crypto.record import Malformed
from secretd.crypto.roster import ROSTER_BYTES, is_roster, read_roster
from secretd.fleet.etcd import Refused, Unreachable
from secretd.fleet.keyspace import Keyspace

log: Final = logging.getLogger("secretd-fleet")

RECORDS_AT_ONCE: Final = 16
"""Records that are fetched from etcd together."""

_MANIFEST: Final = "manifest of publisher '{}'"
_RECORD: Final = "record {} of publisher '{}'"

REFUSALS: Final = 100
"""Refusals that are remembered."""

Fetch = Callable[[Sequence[str]], Sequence[bytes | None]]
"""Returns the records with some digests, None for what etcd has not. Raises Refused and
Unreachable.
"""


class Carrier:
    """What was brought to secretd.

    ``accepted``, ``refused``: how many records, manifests and rosters were. ``refusals``: why the
    last roster, manifest or record was, by what it is. ``is_new_roster``: manifests that were
    refused before may be accepted by now.
    """

    def __init__(self, client: RecordClient, keyspace: Keyspace, host: str) -> None:
        self._client, self._keyspace, self._host = client, keyspace, host
        self._was_connected = False
        self._roster = b""
        self._publishers: frozenset[str] = frozenset()
        self._known: dict[str, str] = {}  # by publisher, the digest of secretd's manifest
        self.accepted = self.refused = 0
        self.refusals: dict[str, str] = {}
        self.is_new_roster = False

    def bring(
        self, values: Mapping[bytes, bytes | None], fetch: Fetch, *, is_change: bool = False
    ) -> dict[str, Any]:
        """Bring what etcd has, and what is missing; return what query-secret-fleet says.

        ``is_change``: only this has changed since the last time, so secretd need not be asked.
        Raises qemu.qmp's ConnectError if secretd is not there.
        """
        self._connect()
        roster = values.get(self._keyspace.host_roster(self._host))
        if roster is not None:
            self._bring_roster(roster)
        if not is_change:
            self._known = {each["name"]: each["digest"] for each in self.state()["publishers"]}
        records = {self._keyspace.digest_of(self._host, key): values[key] for key in values}
        lacking = set() if is_change else set(self._known)
        for key, value in values.items():
            name = self._keyspace.publisher_of(self._host, key)
            if value is None or (name not in self._publishers and name not in self._known):
                continue
            digest = hashlib.sha256(value).hexdigest()
            if self._known.get(name) == digest:
                self.refusals.pop(_MANIFEST.format(name), None)
            if self._known.get(name) != digest and self._sign(_MANIFEST.format(name), value):
                self._known[name] = digest
                lacking.add(name)
        for name in sorted(lacking):
            self._bring_missing(name, records, fetch)
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

    def _bring_roster(self, data: bytes) -> None:
        """Bring a roster; one that secretd knows already costs it a comparison."""
        if not is_roster(data):
            self._note("roster", "what etcd has is no roster")
            return
        if not self._sign("roster", data) or data == self._roster:
            return
        try:
            roster = read_roster(data)
        except Malformed:  # secretd has accepted it
            return
        self.is_new_roster = True
        self._roster, self._publishers = data, frozenset(roster.publishers)

    def _bring_missing(
        self, publisher: str, records: Mapping[str, bytes | None], fetch: Fetch
    ) -> None:
        """Bring records until none is missing, or none that etcd has."""
        arguments = {"publisher": publisher}
        about = f"of publisher '{publisher}'"
        for what in [each for each in self.refusals if each.startswith("record ")]:
            if what.endswith(about):  # what still fails is noted again
                del self.refusals[what]
        while True:
            missing = cast(
                "list[str]", self._client.execute("query-secret-fleet-missing", arguments)
            )
            if not missing:
                return
            arguments["after"] = missing[-1]
            for first in range(0, len(missing), RECORDS_AT_ONCE):
                some = missing[first : first + RECORDS_AT_ONCE]
                lacking = [each for each in some if not records.get(each)]
                try:
                    fetched = dict(zip(lacking, fetch(lacking), strict=True)) if lacking else {}
                except (Refused, Unreachable) as error:
                    self._note("records", f"etcd did not give them: {error}")
                    return
                self.refusals.pop("records", None)
                for digest in some:
                    self._bring_record(publisher, digest, records.get(digest) or fetched[digest])

    def _bring_record(self, publisher: str, digest: str, data: bytes | None) -> None:
        what = _RECORD.format(digest[:16], publisher)
        if data is None:
            self._note(what, "etcd does not have it")
        elif hashlib.sha256(data).hexdigest() != digest:
            self._note(what, "what etcd has under its digest is something else")
        else:
            self._attempt(what, partial(self._client.accept, data))

    def _sign(self, what: str, data: bytes) -> bool:
        if len(data) > ROSTER_BYTES:
            self._note(what, f"it has {len(data)} bytes, and the limit is {ROSTER_BYTES}")
            return False
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
        if self.refusals.get(what) != reason and len(self.refusals) < REFUSALS:
            log.warning("%s was not accepted: %s", what, reason)
            self.refusals[what] = reason
