# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own commands about other hosts: offer, wrap and accept a secret.

The receiving host offers to take one secret, once. The sending host wraps it for that offer, if a
grant names the receiving host. A carrier takes offers and records from one to the other over the
client sockets: it needs no right, and learns names and sizes only. docs/design.md, "Other hosts".
"""

import base64
import os
import time
from collections.abc import Awaitable, Coroutine
from typing import Any, Final, NotRequired, TypedDict

from msgspec import UNSET, Struct, UnsetType

from secretd.access.decision import NOT_COUNTED, Grant
from secretd.access.peer import SocketRole
from secretd.crypto import record as records
from secretd.crypto.host_keys import PublicKeys
from secretd.crypto.record import NONCE_BYTES, Head, Malformed
from secretd.errors import AccessDenied, CommandError, LimitReached
from secretd.monitor.commands.fleet_signing import publisher_of
from secretd.monitor.commands.known_hosts import decoded, own, peer, recorded
from secretd.monitor.commands.objects import once_written
from secretd.monitor.monitor import Monitor
from secretd.net.loop import turn
from secretd.qapi.command import Commands
from secretd.qom import fleet_rules
from secretd.qom.deadlines import DEADLINE, now
from secretd.qom.hosts import NONCE, OFFER_SECONDS, SKEW_SECONDS, SUBJECT_CHARACTERS
from secretd.qom.identifiers import check_identifier
from secretd.qom.loading import then
from secretd.qom.origin import check_place
from secretd.qom.patterns import matcher
from secretd.store.commit import Commit

command: Final = Commands()

OFFERS_PER_UID: Final = 1024
"""Offers of one untrusted uid that wait for their record."""

INLINE_BYTES: Final = 45_000
"""Bytes of a record in a reply; larger ones go to a descriptor."""

USED_OFFERS: Final = 1 << 16
"""Offers of other hosts that this one remembers to have used, until they expire."""


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


@command(waits=True)
def secret_offer(monitor: Monitor, arguments: OfferArguments) -> Offered | Awaitable[Offered]:
    """Offer to take the secret ``id`` from another host, once, within ten minutes.

    ``for``: what it is for, such as a guest; the record names the same.
    """
    tree, id, host, subject = monitor.tree, arguments.id, arguments.host, arguments.subject  # noqa: A001
    name, seed = own(monitor)
    peer(monitor, host)
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
    offer: str | UnsetType = UNSET,
    fdname: str | UnsetType = UNSET,
    to: str | UnsetType = UNSET,
) -> Wrapped | Coroutine[Any, Any, Wrapped]:
    """Return a record with a secret for the host that made an offer, if a grant names that host.

    An offer is used once. With ``fdname`` the record goes to the descriptor that getfd called so,
    and the reply has its size in bytes: a reply has room for secrets of some 45,000 bytes only.
    ``to``: refuse an offer of another host than this one; without an offer, the host of the fleet
    for which this publisher wraps.
    """
    fd = None if fdname is UNSET else monitor.named.take(fdname)
    try:
        with recorded(monitor, "wrap", id=id):
            if offer is UNSET:
                head, keys = _for_fleet(monitor, id, to)
            else:
                head, keys = _checked(monitor, id, offer, to)
    except BaseException:
        if fd is not None:
            fd.close()
        raise
    if fd is None:
        if monitor.is_alone():
            return _wrap_inline(monitor, head, keys)
        return _wrap_in_turn(monitor, head, keys)
    delivery = monitor.core.deliveries.release(
        fd,
        lambda: monitor.check(id, "wrap", head.receiver),
        seal=lambda grant: records.make_record(
            head, grant.plaintext, keys, own(monitor)[1], monitor.scratch
        ),
    )
    reply: Wrapped = {"size": delivery.size}

    def done(_: None = None) -> Wrapped:
        _use(monitor, head)
        monitor.core.access.delivered(delivery.grant)
        return reply

    return done() if delivery.rest is None else then(delivery.rest, done)


async def _wrap_in_turn(monitor: Monitor, head: Head, keys: PublicKeys) -> Wrapped:
    """Wrap into the reply when others have had their turn: the offer's signature took some
    arithmetic.
    """
    await turn(None if monitor.trusted else monitor.peer.uid)
    wrapped = _wrap_inline(monitor, head, keys)
    return await wrapped if isinstance(wrapped, Coroutine) else wrapped


def _wrap_inline(
    monitor: Monitor, head: Head, keys: PublicKeys
) -> Wrapped | Coroutine[Any, Any, Wrapped]:
    """Wrap into the reply."""
    grant = monitor.check(head.object_id, "wrap", head.receiver)
    if len(grant.plaintext) > INLINE_BYTES:
        words = (
            f"The record has more than the limit of {INLINE_BYTES} bytes of a reply; pass a "
            "descriptor and name it with 'fdname'"
        )
        monitor.core.access.take_back(grant, words)
        raise LimitReached("reply-bytes", words)
    if grant.counted is not None:
        return _wrap_counted(monitor, grant, head, keys)
    data = records.wrapped(head, grant.plaintext, keys, monitor.scratch)
    if monitor.is_alone():
        return _signed(monitor, grant, head, data)
    return _sign_in_turn(monitor, grant, head, data)


async def _wrap_counted(monitor: Monitor, grant: Grant, head: Head, keys: PublicKeys) -> Wrapped:
    """Wrap into the reply, once a store has the count of the read."""
    assert grant.counted is not None
    try:
        await grant.counted
        if not monitor.core.access.holds(grant):
            raise CommandError(f"Secret '{grant.object_id}' was withdrawn")
        monitor.tree.plaintext(grant.object_id)
    except CommandError as error:
        monitor.core.access.take_back(grant, error.desc)
        raise CommandError(NOT_COUNTED.format(grant.object_id)) from None
    data = records.wrapped(head, grant.plaintext, keys, monitor.scratch)
    return await _sign_in_turn(monitor, grant, head, data)


async def _sign_in_turn(monitor: Monitor, grant: Grant, head: Head, data: bytes) -> Wrapped:
    """Sign when others have had their turn: each half costs some arithmetic."""
    try:
        await turn(None if monitor.trusted else monitor.peer.uid)
    except BaseException:
        monitor.core.access.take_back(grant, "The client went away")
        raise
    return _signed(monitor, grant, head, data)


def _signed(monitor: Monitor, grant: Grant, head: Head, data: bytes) -> Wrapped:
    _, seed = own(monitor)
    record = records.signed(data, seed, monitor.scratch)
    _use(monitor, head)
    monitor.core.access.delivered(grant)
    return {"record": base64.b64encode(record).decode()}


def _use(monitor: Monitor, head: Head) -> None:
    """Remember that an offer was used."""
    if not head.is_of_fleet:
        monitor.core.used_offers[head.nonce] = head.until


def _for_fleet(monitor: Monitor, object_id: str, to: str | UnsetType) -> tuple[Head, PublicKeys]:
    """Return the head of a record of the fleet, and its receiver's keys. Raises CommandError."""
    if to is UNSET:
        raise CommandError("Either 'offer' or 'to' must be provided")
    own(monitor)
    fleet = fleet_rules.fleet_of(monitor.tree)
    if monitor.peer.role is SocketRole.CLIENT:
        # An offer is signed by its receiver; this is asked by nobody else.
        raise AccessDenied("Wrapping for the fleet needs a control socket")
    name, publisher = publisher_of(monitor, fleet)
    if not matcher(publisher.pattern)(object_id):
        raise CommandError(
            f"'{object_id}' is outside of the pattern '{publisher.pattern}' of publisher '{name}'"
        )
    keys = fleet_rules.roster_of(fleet).hosts.get(to)
    if keys is None:
        raise CommandError(f"Host '{to}' is not in the roster of fleet '{fleet.name}'")
    summary = monitor.tree.journal.summary(object_id)
    if summary is not None and summary[1] > fleet_rules.FLEET_SECRET_BYTES:
        raise LimitReached(
            "fleet-secret-bytes",
            f"Secret '{object_id}' has {summary[1]} bytes, and the limit in a fleet is "
            f"{fleet_rules.FLEET_SECRET_BYTES} (fleet-secret-bytes)",
        )
    return Head(name, to, object_id, fleet.name, os.urandom(NONCE_BYTES), 0), keys


def _check_unused(monitor: Monitor, head: Head) -> None:
    """Raise Malformed for an offer that was used, and LimitReached for too many."""
    used = monitor.core.used_offers
    if head.nonce in used:
        raise Malformed("it was used already; make another one")
    if len(used) >= USED_OFFERS:
        now_ = time.time()
        for nonce in [each for each, until in used.items() if until < now_]:
            del used[nonce]
        if len(used) >= USED_OFFERS:
            raise LimitReached(
                "used-offers",
                f"{USED_OFFERS} offers were used within minutes, and that is the limit",
            )


def _checked(
    monitor: Monitor, object_id: str, offer: str, to: str | UnsetType
) -> tuple[Head, PublicKeys]:
    """Return an offer's head, and the keys of the host that made it. Raises CommandError."""
    name, _ = own(monitor)
    try:
        data = decoded(offer)
        head = records.read_offer(data)
        if head.sender != name:
            raise Malformed(f"it asks host '{head.sender}', and this is '{name}'")
        if head.object_id != object_id:
            raise Malformed(f"it asks for '{head.object_id}'")
        if to is not UNSET and head.receiver != to:
            raise Malformed(f"it is from host '{head.receiver}', and not from '{to}'")
        keys = peer(monitor, head.receiver)
        records.verify(data, keys.signing)
        left = head.until - time.time()
        if left < 0:
            raise Malformed(f"it has expired {int(-left)} s ago; the hosts' clocks may differ")
        if left > OFFER_SECONDS + SKEW_SECONDS:
            raise Malformed(f"it ends in {int(left)} s, which is too late; do the clocks differ?")
        _check_unused(monitor, head)
    except Malformed as error:
        raise CommandError(f"The offer cannot be used: {error}") from None
    return head, keys
