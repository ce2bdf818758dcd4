# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own command secret-accept: records that arrive from other hosts."""

from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypedDict

from msgspec import UNSET, UnsetType

from secretd.crypto import record as records
from secretd.crypto.host_keys import PublicKeys
from secretd.crypto.record import Head, Malformed
from secretd.crypto.roster import digest_of
from secretd.errors import CommandError
from secretd.memory.arena import LockedBuffer
from secretd.monitor.commands.fleet import check_carrier, when_kept
from secretd.monitor.commands.known_hosts import decoded, own, peer, recorded
from secretd.monitor.monitor import Monitor
from secretd.net.loop import turn
from secretd.qapi.command import Commands
from secretd.qom import fleet_rules
from secretd.qom.loading import use_content
from secretd.qom.origin import check_place, place
from secretd.store.commit import Commit

command: Final = Commands()

TRIES: Final = 8
"""Records that may be tried against one offer; then it ends."""

OWN_KEY: Final = "Only uid 0 and the daemon's own uid may add, change or delete '{}'"

Accepted = TypedDict("Accepted", {"id": str, "size": int, "from": str})
"""The result of secret-accept: the secret, its size in bytes, and the host that it came from."""


@command(client=True, waits=True)
def secret_accept(
    monitor: Monitor,
    record: str | UnsetType = UNSET,
    file: str | UnsetType = UNSET,
) -> Accepted | Coroutine[Any, Any, Accepted] | Awaitable[Accepted]:
    """Add the secret in a record that answers an offer of this host.

    ``record``: in base64; or ``file``: /dev/fdset/N of a descriptor with its bytes. The offer ends.
    The secret belongs to the uid that made the offer. One that exists is replaced, if it came from
    the same host. A record of the fleet answers no offer: the manifest of its publisher has its
    digest.
    """
    if (record is UNSET) is (file is UNSET):
        raise CommandError("Either 'record' or 'file' must be provided")
    if file is not UNSET:
        sources = monitor.loading.sources
        outcome = use_content(
            lambda: sources.file(file), lambda content: bytes(content.view[1:-1]), file
        )
        assert isinstance(outcome, Awaitable)  # a connection's sources are read in threads
        return _accept_later(monitor, outcome)
    assert record is not UNSET
    try:
        data = decoded(record)
    except Malformed as error:
        raise CommandError(f"The record cannot be accepted: {error}") from None
    return _accept(monitor, data)


async def _accept_later(monitor: Monitor, outcome: Awaitable[bytes]) -> Accepted:
    accepted = _accept(monitor, await outcome)
    return await accepted if isinstance(accepted, Awaitable) else accepted


def _accept(
    monitor: Monitor, data: bytes
) -> Accepted | Coroutine[Any, Any, Accepted] | Awaitable[Accepted]:
    """Add the secret in a record, in two halves of some arithmetic."""
    if records.is_of_fleet(data) and monitor.tree.fleet.id:
        with recorded(monitor, "accept"):
            check_carrier(monitor)
    with _recorded(monitor, data):
        arrival = _expected(monitor, data)
        if arrival.is_held(monitor):
            size = monitor.tree.secret(arrival.head.object_id)[1]
            return {"id": arrival.head.object_id, "size": size, "from": arrival.head.sender}
        _verify(monitor, arrival)
    if not monitor.is_alone():
        return _accept_in_turn(monitor, arrival)
    with _recorded(monitor, data):
        plaintext = _opened(monitor, arrival)
    return _placed(monitor, arrival, plaintext)


async def _accept_in_turn(monitor: Monitor, arrival: "Arrival") -> Accepted:
    """Do the second half, and place the secret, each when others have had their turn."""
    uid = None if monitor.trusted else monitor.peer.uid
    await turn(uid)
    with _recorded(monitor, arrival.data):
        plaintext = _opened(monitor, arrival)
    if not monitor.is_alone():
        try:
            await turn(uid)
            with _recorded(monitor, arrival.data):
                arrival.keys(monitor)
        except BaseException:
            plaintext.free()
            raise
    placed = _placed(monitor, arrival, plaintext)
    return await placed if isinstance(placed, Awaitable) else placed


@contextmanager
def _recorded(monitor: Monitor, data: bytes) -> Iterator[None]:
    """Put what is wrong with a record into words, and record it."""
    with recorded(monitor, "accept"):
        try:
            try:
                yield
            except Malformed as error:
                raise CommandError(f"The record cannot be accepted: {error}") from None
        except CommandError as error:
            if monitor.tree.fleet.id and records.is_of_fleet(data):
                monitor.core.fleet.refused("record", error.desc)
            raise


class Arrival:
    """A record that arrives. Why it may be accepted is looked at again whenever others had their
    turn.
    """

    def __init__(self, head: Head, data: bytes) -> None:
        self.head, self.data = head, data

    def keys(self, monitor: Monitor) -> PublicKeys:
        """Return the keys of its signer, if it may be accepted. Raises Malformed and
        CommandError.
        """
        raise NotImplementedError

    def is_held(self, _monitor: Monitor) -> bool:
        """Return True if the secret came from this record, and is still there."""
        return False

    def failed(self, monitor: Monitor) -> None:
        """It could not be opened, or its signature does not fit."""

    def place(self, monitor: Monitor, plaintext: LockedBuffer) -> int | Commit:
        """Add the secret; see qom.origin.place."""
        raise NotImplementedError

    def placed(self, _monitor: Monitor) -> Sequence[Commit]:
        """The secret is there; return what waits for the disk by what follows."""
        return ()


class Answer(Arrival):
    """The answer to an offer."""

    offer_id = ""

    def keys(self, monitor: Monitor) -> PublicKeys:
        """See Arrival."""
        head, tree = self.head, monitor.tree
        offer_id = tree.offers.get(head.nonce.hex())
        if (
            offer_id is None
            or tree.deadlines.expired(offer_id)
            or self.offer_id not in ("", offer_id)
        ):
            raise Malformed("it answers no offer that can be used; an offer is used once")
        self.offer_id = offer_id
        asked = tree.asked[offer_id]
        if asked != (head.sender, head.object_id, head.subject):
            raise Malformed(
                "the offer that it answers is for "
                f"'{asked[1]}' from '{asked[0]}'{f' for {asked[2]!r}' if asked[2] else ''}"
            )
        uid, _ = tree.journal.owner(offer_id)
        if head.object_id in tree.own_keys and uid not in tree.limits.trusted:
            raise CommandError(OWN_KEY.format(head.object_id))
        check_place(tree, head.object_id, head.sender)
        return peer(monitor, head.sender)

    def failed(self, monitor: Monitor) -> None:
        """End an offer for which too many records were tried: each costs some arithmetic."""
        tries, offer_id = monitor.core.offer_tries, self.offer_id
        tries[offer_id] += 1
        if tries[offer_id] >= TRIES and offer_id in monitor.tree.journal:
            del tries[offer_id]
            monitor.tree.delete(offer_id)

    def place(self, monitor: Monitor, plaintext: LockedBuffer) -> int | Commit:
        """See Arrival."""
        tree = monitor.tree
        uid, _ = tree.journal.owner(self.offer_id)
        # The offer ends first: whatever happens then, the record is never accepted a second time.
        tree.delete(self.offer_id)
        return place(tree, self.head.object_id, self.head.sender, plaintext, uid)


class Published(Arrival):
    """What a publisher of the fleet has for this host."""

    def keys(self, monitor: Monitor) -> PublicKeys:
        """See Arrival."""
        tree, head = monitor.tree, self.head
        keys = fleet_rules.listed(tree, head, self.data)
        if head.object_id in tree.own_keys or head.object_id.startswith(f"{tree.fleet.id}."):
            raise CommandError(OWN_KEY.format(head.object_id))
        if not self.is_held(monitor):
            origin = fleet_rules.origin(head.sender)
            if head.object_id in tree.journal and tree.origins.get(head.object_id) != origin:
                raise Malformed(f"'{head.object_id}' is there, and did not come from it")
            check_place(tree, head.object_id, origin, is_version=True)
            fleet_rules.check_version(tree, head.object_id, head.sender)
        return keys

    def is_held(self, monitor: Monitor) -> bool:
        """See Arrival."""
        return fleet_rules.is_held(monitor.tree, self.head, self.data)

    def place(self, monitor: Monitor, plaintext: LockedBuffer) -> int | Commit:
        """See Arrival."""
        tree, head = monitor.tree, self.head
        origin, digest = fleet_rules.origin(head.sender), digest_of(self.data).hex()
        uid = tree.journal.owner(tree.fleet.id)[0]
        return place(tree, head.object_id, origin, plaintext, uid, digest)

    def placed(self, monitor: Monitor) -> Sequence[Commit]:
        """See Arrival."""
        monitor.core.fleet.accepted("record")
        return monitor.core.fleet.settle(self.head.sender)


def _placed(
    monitor: Monitor, arrival: Arrival, plaintext: LockedBuffer
) -> Accepted | Awaitable[Accepted]:
    """Add an opened secret."""
    head, size = arrival.head, plaintext.size
    with recorded(monitor, "accept", id=head.object_id, host=head.sender):
        stored = arrival.place(monitor, plaintext)

    def noted() -> Sequence[Commit]:
        monitor.core.audit.append(
            "accept", monitor.subject, id=head.object_id, type="secret", size=size,
            host=head.sender,
        )  # fmt: skip
        monitor.announce("SECRET_ADDED", head.object_id)
        return arrival.placed(monitor)

    reply: Accepted = {"id": head.object_id, "size": size, "from": head.sender}
    return when_kept(stored if isinstance(stored, Commit) else None, noted, reply)


def _expected(monitor: Monitor, data: bytes) -> Arrival:
    """Return a record that may be accepted if its signature fits. Raises Malformed and
    CommandError.

    Cheap checks come first: without a valid offer or manifest a record costs no arithmetic.
    """
    name, _ = own(monitor)
    head = records.read_record(data)
    if head.receiver != name:
        raise Malformed(f"it is for host {head.receiver[:64]!a}, and this is '{name}'")
    arrival = Published(head, data) if head.is_of_fleet else Answer(head, data)
    arrival.keys(monitor)
    return arrival


def _verify(monitor: Monitor, arrival: Arrival) -> None:
    """Raise Malformed unless a record's signature fits."""
    try:
        records.verify(arrival.data, arrival.keys(monitor).signing)
    except Malformed:
        arrival.failed(monitor)
        raise


def _opened(monitor: Monitor, arrival: Arrival) -> LockedBuffer:
    """Return the secret in a verified record. Raises Malformed and CommandError."""
    arrival.keys(monitor)  # again: others had their turn
    _, seed = own(monitor)
    tree = monitor.tree
    try:
        return records.open_record(arrival.data, seed, monitor.scratch, tree.journal.arena)
    except Malformed:
        arrival.failed(monitor)
        raise
