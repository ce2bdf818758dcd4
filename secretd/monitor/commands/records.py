# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own commands about other hosts: offer, wrap and accept a secret.

The receiving host offers to take one secret, once. The sending host wraps it for that offer, if a
grant names the receiving host. A carrier takes offers and records from one to the other over the
client sockets: it needs no right, and learns names and sizes only. docs/design.md, "Other hosts".
"""

import base64
import binascii
import os
import time
from collections.abc import Awaitable, Coroutine
from typing import Any, Final, NotRequired, TypedDict

from msgspec import UNSET, Struct, UnsetType

from secretd.access.decision import Grant
from secretd.crypto import record as records
from secretd.crypto.host_keys import PublicKeys
from secretd.crypto.record import NONCE_BYTES, Head, Malformed
from secretd.errors import AccessDenied, CommandError, LimitReached
from secretd.memory.arena import LockedBuffer
from secretd.monitor.commands.objects import once_written
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands
from secretd.qom import hosts
from secretd.qom.deadlines import DEADLINE, now
from secretd.qom.hosts import NONCE, OFFER_SECONDS, SUBJECT_CHARACTERS
from secretd.qom.identifiers import check_identifier
from secretd.qom.loading import then, use_content
from secretd.qom.origin import check_place, place
from secretd.store.commit import Commit

command: Final = Commands()

OFFERS_PER_UID: Final = 1024
"""Offers of one untrusted uid that wait for their record."""


class HostInfo(TypedDict):
    """A host's name and the public half of its keys."""

    id: str
    name: str
    public: str


class OfferArguments(
    Struct, forbid_unknown_fields=True, rename={"host": "from", "subject": "for"}, kw_only=True
):
    """The arguments of secret-offer."""

    host: str
    id: str
    subject: str | UnsetType = UNSET


class Offered(TypedDict):
    """The result of secret-offer: the offer in base64, and the seconds for which it can be used."""

    offer: str
    seconds: int


class Wrapped(TypedDict):
    """The result of secret-wrap: the record in base64, or the bytes that went to a descriptor."""

    record: NotRequired[str]
    size: NotRequired[int]


Accepted = TypedDict("Accepted", {"id": str, "size": int, "from": str})
"""The result of secret-accept: the secret, its size in bytes, and the host that it came from."""


@command(client=True)
def query_secret_host(monitor: Monitor) -> list[HostInfo]:
    """Return this host, if it has a name."""
    host = monitor.tree.host
    return [_info(monitor, host)] if host else []


@command()
def query_secret_peers(monitor: Monitor) -> list[HostInfo]:
    """List the hosts whose keys are pinned."""
    return [_info(monitor, object_id) for _, object_id in sorted(monitor.tree.peers.items())]


def _info(monitor: Monitor, object_id: str) -> HostInfo:
    found = monitor.tree.journal.get(object_id)
    assert found is not None
    properties = found.properties
    return {
        "id": object_id, "name": str(properties["name"]), "public": str(properties["public"]),
    }  # fmt: skip


def _own(monitor: Monitor) -> tuple[str, memoryview]:
    """Return this host's name, and the secret of its keys, borrowed. Raises CommandError."""
    tree = monitor.tree
    if not tree.host:
        raise CommandError("This host has no name; object-add a secret-host first")
    found = tree.journal.get(tree.host)
    assert found is not None
    return str(found.properties["name"]), tree.plaintext(str(found.properties["keyid"]))


def _peer(monitor: Monitor, name: str) -> PublicKeys:
    """Return the keys of a known host. Raises CommandError."""
    object_id = monitor.tree.peers.get(name)
    if object_id is None:
        raise CommandError(f"Host '{name}' is not known; object-add a secret-peer first")
    found = monitor.tree.journal.get(object_id)
    assert found is not None
    return hosts.decoded(str(found.properties["public"]))


@command(waits=True)
def secret_offer(monitor: Monitor, arguments: OfferArguments) -> Offered | Awaitable[Offered]:
    """Offer to take the secret ``id`` from another host, once, within ten minutes.

    ``for``: what it is for, such as a guest; the record names the same.
    """
    tree, id, host, subject = monitor.tree, arguments.id, arguments.host, arguments.subject  # noqa: A001
    name, seed = _own(monitor)
    _peer(monitor, host)
    check_identifier(id)
    about = "" if subject is UNSET else subject
    if len(about) > SUBJECT_CHARACTERS:
        raise CommandError(
            f"Parameter 'for' is longer than the limit of {SUBJECT_CHARACTERS} characters"
        )
    monitor.check_own(id)
    check_place(tree, id, host)
    uid = monitor.peer.uid
    if not monitor.trusted:
        owned = sum(tree.journal.owner(each)[0] == uid for each in tree.offers.values())
        if owned >= OFFERS_PER_UID:
            raise LimitReached(
                "offers-per-uid",
                f"uid {uid} has {owned} offers, and the limit is {OFFERS_PER_UID} (offers-per-uid)",
            )
    nonce = os.urandom(NONCE_BYTES)
    head = Head(host, name, id, about, nonce, int(time.time()) + OFFER_SECONDS)
    offer = base64.b64encode(records.make_offer(head, seed, monitor.scratch)).decode()
    (kind,) = (k for k in tree.types.numbered.values() if k.by_command == "secret-offer")
    properties: dict[str, object] = {
        "from": host, "secret": id, "for": about, NONCE: nonce.hex(),
        DEADLINE: now() + OFFER_SECONDS * 1_000_000_000,
    }  # fmt: skip
    object_id = f"offer-{nonce[:8].hex()}"
    tree.check_new(object_id)
    stored = tree.store_content(object_id, kind, properties, None, uid)
    reply: Offered = {"offer": offer, "seconds": OFFER_SECONDS}

    def noted() -> None:
        monitor.core.audit.append("offer", monitor.subject, id=id, host=host)

    if isinstance(stored, Commit):
        return then(once_written(stored, noted), lambda _: reply)
    noted()
    return reply


@command(client=True, waits=True)
def secret_wrap(
    monitor: Monitor,
    id: str,  # noqa: A002
    offer: str,
    fdname: str | UnsetType = UNSET,
) -> Wrapped | Coroutine[Any, Any, Wrapped]:
    """Return a record with a secret for the host that made an offer, if a grant names that host.

    With ``fdname`` it goes to the descriptor that getfd called so, and the reply has its size in
    bytes: a reply has room for secrets of some 48,000 bytes only.
    """
    fd = None if fdname is UNSET else monitor.named.take(fdname)
    try:
        head, wrap = _wrapping(monitor, id, offer)
    except BaseException as error:
        if fd is not None:
            fd.close()
        _refused(monitor, "wrap", error, id=id)
        raise
    if fd is None:
        grant = monitor.check(id, "wrap", head.receiver)
        wrapped = wrap(grant)
        monitor.core.access.delivered(grant)
        return {"record": base64.b64encode(wrapped).decode()}
    delivery = monitor.core.deliveries.release(
        fd, lambda: monitor.check(id, "wrap", head.receiver), seal=wrap
    )
    reply: Wrapped = {"size": delivery.size}
    return reply if delivery.rest is None else then(delivery.rest, lambda _: reply)


def _wrapping(monitor: Monitor, object_id: str, offer: str) -> Any:
    """Return an offer's head, and what wraps a permitted secret for it. Raises CommandError."""
    name, seed = _own(monitor)
    try:
        data = _decoded(offer)
        head = records.read_offer(data)
        if head.sender != name:
            raise Malformed(f"it asks host '{head.sender}', and this is '{name}'")
        if head.object_id != object_id:
            raise Malformed(f"it asks for '{head.object_id}'")
        keys = _peer(monitor, head.receiver)
        records.verify(data, keys)
        if head.until < time.time():
            raise Malformed(f"it has expired {int(time.time() - head.until)} s ago")
    except Malformed as error:
        raise CommandError(f"The offer cannot be used: {error}") from None

    def wrap(grant: Grant) -> bytes:
        return records.make_record(head, grant.plaintext, keys, seed, monitor.scratch)

    return head, wrap


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("it is no base64") from None


def _refused(monitor: Monitor, event: str, error: BaseException, **members: object) -> None:
    """Record a refusal that no grant has to do with."""
    if isinstance(error, CommandError):
        monitor.core.audit.append_refusal(
            event, monitor.peer.uid, monitor.subject, reason=error.desc, **members
        )


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
        data = _decoded(record)
    except Malformed as error:
        raise CommandError(f"The record cannot be accepted: {error}") from None
    return _accept(monitor, data)


async def _accept_later(monitor: Monitor, outcome: Awaitable[bytes]) -> Accepted:
    accepted = _accept(monitor, await outcome)
    return await accepted if isinstance(accepted, Awaitable) else accepted


def _accept(monitor: Monitor, data: bytes) -> Accepted | Awaitable[Accepted]:
    tree = monitor.tree
    try:
        head, offer_id, plaintext = _opened(monitor, data)
    except CommandError as error:
        _refused(monitor, "accept", error)
        raise
    size = plaintext.size
    uid, _ = tree.journal.owner(offer_id)
    reply: Accepted = {"id": head.object_id, "size": size, "from": head.sender}
    # The offer ends first: whatever happens then, the record is never accepted a second time.
    tree.delete(offer_id)
    try:
        stored = place(tree, head.object_id, head.sender, plaintext, uid)
    except CommandError as error:
        _refused(monitor, "accept", error, id=head.object_id, host=head.sender)
        raise

    def noted() -> None:
        monitor.core.audit.append(
            "accept", monitor.subject, id=head.object_id, type="secret", size=size,
            host=head.sender,
        )  # fmt: skip
        monitor.announce("SECRET_ADDED", head.object_id)

    if isinstance(stored, Commit):
        return then(once_written(stored, noted), lambda _: reply)
    noted()
    return reply


def _opened(monitor: Monitor, data: bytes) -> tuple[Head, str, LockedBuffer]:
    """Return a record's head, the offer that it answers, and its secret. Raises CommandError.

    Cheap checks come first: without a valid offer a record costs no arithmetic.
    """
    tree = monitor.tree
    name, seed = _own(monitor)
    try:
        head = records.read_record(data)
        if head.receiver != name:
            raise Malformed(f"it is for host '{head.receiver}', and this is '{name}'")
        offer_id = tree.offers.get(head.nonce.hex())
        if offer_id is None or tree.deadlines.expired(offer_id):
            raise Malformed("it answers no offer that can be used; an offer is used once")
        offer = tree.journal.get(offer_id)
        assert offer is not None
        asked = [offer.properties[each] for each in ("from", "secret", "for")]
        if asked != [head.sender, head.object_id, head.subject]:
            raise Malformed(
                "the offer that it answers is for "
                f"'{asked[1]}' from '{asked[0]}'{f' for {asked[2]!r}' if asked[2] else ''}"
            )
        records.verify(data, _peer(monitor, head.sender))
        check_place(tree, head.object_id, head.sender)
        plaintext = records.open_record(data, seed, monitor.scratch, tree.journal.arena)
    except Malformed as error:
        raise CommandError(f"The record cannot be accepted: {error}") from None
    except AccessDenied as error:
        raise CommandError(error.desc) from None
    return head, offer_id, plaintext
