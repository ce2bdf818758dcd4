# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own commands: release, seal, generate, expire and explain secrets."""

from collections.abc import Awaitable, Coroutine
from typing import Any, Final, Literal, NotRequired, TypedDict

from msgspec import UNSET, UnsetType

from secretd.access.decision import Grant
from secretd.crypto import cipher
from secretd.descriptors.delivery import Delivery
from secretd.descriptors.target import open_target, open_trusted_target
from secretd.errors import CommandError
from secretd.monitor.commands.listing import Page, SecretInfo, fill_later
from secretd.monitor.commands.objects import added, once_loaded, once_written
from secretd.monitor.events import EventName
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands
from secretd.qom.grant import check_seconds
from secretd.qom.loading import then
from secretd.qom.renewal import exchange
from secretd.qom.secret import SecretOptions, check_size, random_plaintext
from secretd.store.commit import Commit
from secretd.wire.encoder import JSONText

command: Final = Commands()


class Delivered(TypedDict):
    """The result of secret-read: the number of bytes written."""

    size: int


class Sealed(TypedDict):
    """The result of secret-seal, in base64; ``size``: bytes that were written to a descriptor
    instead.
    """

    data: NotRequired[str]
    iv: str
    size: NotRequired[int]


@command(client=True, waits=True)
def secret_read(
    monitor: Monitor,
    id: str,  # noqa: A002
    fdname: str | UnsetType = UNSET,
    format: Literal["raw", "base64"] | UnsetType = UNSET,  # noqa: A002
) -> JSONText[Delivered] | Coroutine[Any, Any, JSONText[Delivered]]:
    """Write a secret to a descriptor: the one that getfd called ``fdname``, or the one that was
    passed with this command.

    The descriptor is closed; the reply comes after the last byte was accepted.
    """
    fd = monitor.pending_descriptor() if fdname is UNSET else monitor.named.take(fdname)
    delivery = monitor.core.deliveries.release(
        fd,
        lambda: monitor.check(id, "read"),
        opened=open_trusted_target if monitor.trusted else open_target,
        base64=format == "base64",
    )
    if delivery.rest is None:
        return _delivered(monitor, delivery)
    return then(delivery.rest, lambda _: _delivered(monitor, delivery))


def _delivered(monitor: Monitor, delivery: Delivery) -> JSONText[Delivered]:
    monitor.core.delivered(delivery.grant, monitor)
    return JSONText(f'{{"size": {delivery.size}}}')


@command(client=True)
def secret_events(
    monitor: Monitor,
    enable: bool,
    events: list[EventName] | UnsetType = UNSET,
) -> None:
    """Turn events about secrets on or off for this connection.

    ``events``: only events of these names.
    """
    assert monitor.on_events is not None
    if not enable:
        monitor.on_events(())
    else:
        monitor.on_events(None if events is UNSET else frozenset(events))


@command()
def secret_seal(
    monitor: Monitor,
    id: str,  # noqa: A002
    keyid: str,
    fdname: str | UnsetType = UNSET,
) -> Sealed | Coroutine[Any, Any, Sealed]:
    """Return a secret encrypted under another, as QEMU's object-add takes it with keyid, iv and
    format=base64.

    Data and IV are base64; the IV is fresh each time. With ``fdname`` the data goes to the
    descriptor that getfd called so, and the reply has the size of the base64 text in bytes. A reply
    has room for secrets of up to some 48,000 bytes only.
    """
    fd = None if fdname is UNSET else monitor.named.take(fdname)
    try:
        key = monitor.tree.key(keyid, monitor.peer.uid)
        cipher.check_key(key)
    except BaseException:
        if fd is not None:
            fd.close()
        raise
    if fd is None:
        grant = monitor.check(id, "seal")
        data, iv = cipher.seal(grant.plaintext, key, monitor.scratch)
        monitor.core.access.delivered(grant)
        return {"data": data, "iv": iv}
    reply: Sealed = {"iv": ""}

    def seal(grant: Grant) -> bytes:
        data, reply["iv"] = cipher.seal(grant.plaintext, key, monitor.scratch)
        return data.encode()

    delivery = monitor.core.deliveries.release(fd, lambda: monitor.check(id, "seal"), seal=seal)
    reply["size"] = delivery.size

    def sealed(_done: None = None) -> Sealed:
        monitor.core.access.delivered(delivery.grant)
        return reply

    return sealed() if delivery.rest is None else then(delivery.rest, sealed)


@command(waits=True)
def secret_generate(monitor: Monitor, id: str, size: int) -> Awaitable[None] | None:  # noqa: A002
    """Add a secret of ``size`` random bytes, generated inside secretd."""
    check_size(size)
    monitor.check_own(id)
    tree = monitor.tree
    tree.check_new(id)
    options = SecretOptions(id=id)
    plaintext = random_plaintext(tree.journal.arena, size)
    stored = tree.store(options, plaintext, monitor.peer.uid)
    if isinstance(stored, Commit):
        return once_written(stored, lambda: added(monitor, options, size))
    added(monitor, options, size)
    return None


@command(waits=True)
def secret_replace(monitor: Monitor, arguments: SecretOptions) -> Awaitable[None] | None:
    """Replace the content of an existing secret in one step, as object-del and object-add would.

    The arguments are those of object-add. Until the reply clients read the old content, and if the
    command fails, afterwards too. The secret has no lifetime then.
    """
    monitor.check_own(arguments.id)
    size = exchange(monitor.tree, arguments, monitor.loading)
    if isinstance(size, int):
        _replaced(monitor, arguments, size)
        return None
    if isinstance(size, Commit):
        return once_written(size, lambda: _replaced(monitor, arguments, size.size))
    return once_loaded(size, lambda loaded: _replaced(monitor, arguments, loaded))


def _replaced(monitor: Monitor, options: SecretOptions, size: int) -> None:
    monitor.note("delete", options.id, "secret")
    monitor.announce("SECRET_DELETED", options.id)
    added(monitor, options, size)


@command(client=True, oob=True, waits=True)
def query_secrets(
    monitor: Monitor, after: str | UnsetType = UNSET
) -> list[SecretInfo] | Coroutine[Any, Any, list[SecretInfo]]:
    """List the secrets by id: type, size in bytes, and protection of their memory.

    On the client socket the list has only secrets that the caller may read. A reply holds
    SECRETS_PER_REPLY at most; ``after`` continues after that id, until the list is empty.
    """
    found = monitor.core.access.readable_after(monitor.peer, "" if after is UNSET else after)
    page = Page(monitor)
    return page.listed if page.fill(found) else fill_later(page, found)


@command(waits=True)
def secret_expire(
    monitor: Monitor,
    id: str,  # noqa: A002
    after: int | UnsetType = UNSET,
) -> Awaitable[None] | None:
    """Wipe a secret ``after`` seconds from now, replacing an earlier lifetime; without ``after`` it
    never expires.
    """
    monitor.tree.plaintext(id)
    monitor.check_own(id)
    if after is UNSET:
        commit = monitor.tree.keep(id)
        monitor.core.audit.append("lifetime", monitor.subject, id=id)
        return commit
    check_seconds("after", after)
    if id in monitor.tree.pinned:
        raise CommandError(f"object '{id}' is in use, can not be deleted")
    commit = monitor.tree.expire_after(id, after)
    monitor.core.audit.append("lifetime", monitor.subject, id=id, count=after)
    return commit
