# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hosts that there are: this one and its keys, and the others; what records and arrivals
share.
"""

import base64
import binascii
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, TypedDict

from secretd.crypto.host_keys import PublicKeys
from secretd.crypto.record import Malformed
from secretd.errors import CommandError
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands

command: Final = Commands()

_REASON_CHARACTERS: Final = 200


class HostInfo(TypedDict):
    """A host's name and the public half of its keys."""

    id: str
    name: str
    public: str


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


def own(monitor: Monitor) -> tuple[str, memoryview]:
    """Return this host's name, and the secret of its keys, borrowed. Raises CommandError."""
    tree = monitor.tree
    if not tree.host:
        raise CommandError("This host has no name; object-add a secret-host first")
    return tree.host_name, tree.plaintext(tree.host_keyid)


def peer(monitor: Monitor, name: str) -> PublicKeys:
    """Return the keys of a known host. Raises CommandError."""
    keys = monitor.tree.peer_keys.get(name)
    if keys is None:
        raise CommandError(f"Host '{name}' is not known; object-add a secret-peer first")
    return keys


def decoded(text: str) -> bytes:
    """Return the bytes of a base64 text. Raises Malformed."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("it is no base64") from None


@contextmanager
def recorded(monitor: Monitor, event: str, **members: object) -> Iterator[None]:
    """Record a refusal that no grant has to do with, if a CommandError comes."""
    try:
        yield
    except CommandError as error:
        monitor.core.audit.append_refusal(
            event,
            monitor.peer.uid,
            monitor.subject,
            reason=error.desc[:_REASON_CHARACTERS],
            **members,
        )
        raise
