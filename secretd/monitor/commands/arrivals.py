# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own command secret-accept: records that arrive from other hosts."""

from collections.abc import Awaitable, Coroutine
from typing import Any, Final, TypedDict

from msgspec import UNSET, UnsetType

from secretd.crypto import record as records
from secretd.crypto.record import Head, Malformed
from secretd.errors import CommandError
from secretd.memory.arena import LockedBuffer
from secretd.monitor.commands.known_hosts import decoded, own, peer, recorded
from secretd.monitor.commands.objects import once_written
from secretd.monitor.monitor import Monitor
from secretd.net.loop import turn
from secretd.qapi.command import Commands
from secretd.qom.loading import then, use_content
from secretd.qom.origin import check_place, place
from secretd.store.commit import Commit

command: Final = Commands()

TRIES: Final = 8
"""Records that may be tried against one offer; then it ends."""

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
    the same host.
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
    with recorded(monitor, "accept"):
        head, offer_id = _verified(monitor, data)
    if not monitor.is_alone():
        return _accept_in_turn(monitor, data, head, offer_id)
    with recorded(monitor, "accept"):
        plaintext = _opened(monitor, data, head, offer_id)
    return _placed(monitor, head, offer_id, plaintext)


async def _accept_in_turn(monitor: Monitor, data: bytes, head: Head, offer_id: str) -> Accepted:
    """Do the second half, and place the secret, each when others have had their turn."""
    uid = None if monitor.trusted else monitor.peer.uid
    await turn(uid)
    with recorded(monitor, "accept"):
        plaintext = _opened(monitor, data, head, offer_id)
    if not monitor.is_alone():
        try:
            await turn(uid)
            with recorded(monitor, "accept"):
                _check_offer(monitor, head, offer_id)
        except BaseException:
            plaintext.free()
            raise
    placed = _placed(monitor, head, offer_id, plaintext)
    return await placed if isinstance(placed, Awaitable) else placed


def _placed(
    monitor: Monitor, head: Head, offer_id: str, plaintext: LockedBuffer
) -> Accepted | Awaitable[Accepted]:
    """Add an opened secret, and end its offer."""
    tree, size = monitor.tree, plaintext.size
    uid, _ = tree.journal.owner(offer_id)
    # The offer ends first: whatever happens then, the record is never accepted a second time.
    tree.delete(offer_id)
    with recorded(monitor, "accept", id=head.object_id, host=head.sender):
        stored = place(tree, head.object_id, head.sender, plaintext, uid)

    def noted() -> None:
        monitor.core.audit.append(
            "accept", monitor.subject, id=head.object_id, type="secret", size=size,
            host=head.sender,
        )  # fmt: skip
        monitor.announce("SECRET_ADDED", head.object_id)

    reply: Accepted = {"id": head.object_id, "size": size, "from": head.sender}
    if isinstance(stored, Commit):
        return then(once_written(stored, noted), lambda _: reply)
    noted()
    return reply


def _offer(monitor: Monitor, head: Head) -> str:
    """Return the id of the offer that a record answers. Raises Malformed and CommandError."""
    tree = monitor.tree
    offer_id = tree.offers.get(head.nonce.hex())
    if offer_id is None or tree.deadlines.expired(offer_id):
        raise Malformed("it answers no offer that can be used; an offer is used once")
    asked = tree.asked[offer_id]
    if asked != (head.sender, head.object_id, head.subject):
        raise Malformed(
            "the offer that it answers is for "
            f"'{asked[1]}' from '{asked[0]}'{f' for {asked[2]!r}' if asked[2] else ''}"
        )
    uid, _ = tree.journal.owner(offer_id)
    if head.object_id in tree.own_keys and uid not in tree.limits.trusted:
        raise CommandError(
            f"Only uid 0 and the daemon's own uid may add, change or delete '{head.object_id}'"
        )
    check_place(tree, head.object_id, head.sender)
    return offer_id


def _check_offer(monitor: Monitor, head: Head, offer_id: str) -> None:
    """Raise CommandError unless an offer is still there: others had their turn."""
    try:
        if _offer(monitor, head) != offer_id:
            raise Malformed("it answers no offer that can be used; an offer is used once")
    except Malformed as error:
        raise CommandError(f"The record cannot be accepted: {error}") from None


def _verified(monitor: Monitor, data: bytes) -> tuple[Head, str]:
    """Return a record's head and the offer that it answers, once its signature fits. Raises
    CommandError.

    Cheap checks come first: without a valid offer a record costs no arithmetic.
    """
    name, _ = own(monitor)
    try:
        head = records.read_record(data)
        if head.receiver != name:
            raise Malformed(f"it is for host '{head.receiver}', and this is '{name}'")
        offer_id = _offer(monitor, head)
        keys = peer(monitor, head.sender)
        try:
            records.verify(data, keys)
        except Malformed:
            _count_try(monitor, offer_id)
            raise
    except Malformed as error:
        raise CommandError(f"The record cannot be accepted: {error}") from None
    return head, offer_id


def _opened(monitor: Monitor, data: bytes, head: Head, offer_id: str) -> LockedBuffer:
    """Return the secret in a verified record. Raises CommandError."""
    _check_offer(monitor, head, offer_id)
    _, seed = own(monitor)
    try:
        return records.open_record(data, seed, monitor.scratch, monitor.tree.journal.arena)
    except Malformed as error:
        _count_try(monitor, offer_id)
        raise CommandError(f"The record cannot be accepted: {error}") from None


def _count_try(monitor: Monitor, offer_id: str) -> None:
    """End an offer for which too many records were tried: each costs some arithmetic."""
    tries = monitor.core.offer_tries
    tries[offer_id] += 1
    if tries[offer_id] >= TRIES and offer_id in monitor.tree.journal:
        del tries[offer_id]
        monitor.tree.delete(offer_id)
