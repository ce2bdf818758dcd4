# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object types `secret-host`, `secret-peer` and `secret-offer`: this host, others, and what is
expected from them.

secretd's own. A secret-host names the secret from which this host's keys are derived; a secret-peer
pins the public half of another host's keys. An offer asks another host for one secret, once; only
the command secret-offer makes it. monitor.commands.records uses them.
"""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from secretd.crypto.host_keys import (
    PUBLIC_BYTES,
    SEED_BYTES,
    PublicKeys,
    is_usable,
    public_keys,
)
from secretd.errors import AccessDenied, CommandError
from secretd.journal.files import ObjectRecord
from secretd.qom.loading import Loading
from secretd.qom.object_type import Content, ObjectOptions, ObjectType, TypeInfo
from secretd.wire.parser import JSON

if TYPE_CHECKING:
    from secretd.qom.tree import ObjectTree

_ANCESTORS: Final = ("object", "user-creatable", "interface")
NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")

SUBJECT_CHARACTERS: Final = 256
"""Characters of what an offer is for."""

OFFER_SECONDS: Final = 600
"""Seconds for which an offer can be used."""

SKEW_SECONDS: Final = 300
"""Seconds by which the clocks of two hosts may differ."""

NONCE: Final = "nonce"
"""The journal's name for an offer's nonce, in hexadecimal."""


class SecretHostOptions(ObjectOptions, tag="secret-host", kw_only=True):
    """``name``: this host's; ``keyid``: the id of a secret of 32 bytes, from which its keys are
    derived.
    """

    name: str
    keyid: str


class SecretPeerOptions(ObjectOptions, tag="secret-peer", kw_only=True):
    """``name``: another host's; ``public``: the public half of its keys in base64."""

    name: str
    public: str


class SecretOfferOptions(ObjectOptions, tag="secret-offer", kw_only=True):
    """An offer has no options: secret-offer makes it."""


def check_name(name: str) -> None:
    """Raise CommandError for what is no name of a host."""
    if not NAME.fullmatch(name):
        raise CommandError(
            "Parameter 'name' expects a host's name: letters, digits, '-', '.' and '_', 64 at most"
        )


def key_bytes(name: str, text: str, size: int, source: str) -> bytes:
    """Return the bytes of a parameter in base64; ``source``: who has it. Raises CommandError."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != size:
        raise CommandError(f"Parameter '{name}' expects {size} bytes in base64, as {source}")
    return data


def decoded(public: str) -> PublicKeys:
    """Return the public keys in their base64 text. Raises CommandError."""
    data = key_bytes("public", public, PUBLIC_BYTES, "'secretctl host show' prints them")
    return PublicKeys(data[: PUBLIC_BYTES // 2], data[PUBLIC_BYTES // 2 :])


def check_usable(keys: PublicKeys) -> None:
    """Raise CommandError for public keys that no host can have."""
    if not is_usable(keys):
        raise CommandError("Parameter 'public' expects the keys of a host, and these are of none")


def encoded(keys: PublicKeys) -> str:
    """Return public keys as base64."""
    return base64.b64encode(keys.receiving + keys.signing).decode()


class FixedType(ObjectType):
    """A type whose objects are changed by nothing but adding and deleting them."""

    registers = True

    def create(self, _options: Any, loading: Loading) -> Content:
        """Let uid 0 and the daemon's own uid decide which hosts there are."""
        if loading.sources.uid not in (0, os.getuid()):
            raise AccessDenied("Only uid 0 and the daemon's own uid may decide about hosts")
        return None

    def set(self, name: str, _value: JSON) -> dict[str, object]:
        """Refuse."""
        raise CommandError(f"Property '{self.info.name}.{name}' is not writable")


class SecretHost(FixedType):
    """The host on which secretd runs."""

    trusted_only = True

    info = TypeInfo(
        "secret-host",
        "object",
        False,
        ("secret-host", *_ANCESTORS),
        (("type", "string"), ("name", "string"), ("keyid", "string"), ("public", "string")),
    )
    number = 9
    options = SecretHostOptions
    defaults: Mapping[str, object] = {}

    def create(self, options: Any, loading: Loading) -> Content:
        """Derive the keys once, for the public half."""
        super().create(options, loading)
        assert isinstance(options, SecretHostOptions)
        check_name(options.name)
        seed = loading.key(options.keyid, loading.sources.uid, options.id)
        if len(seed) != SEED_BYTES:
            raise CommandError(
                f"Secret '{options.keyid}' has {len(seed)} bytes, and a host's has {SEED_BYTES}"
            )
        return {"public": encoded(public_keys(seed, loading.scratch))}

    def check(self, tree: "ObjectTree", _object_id: str, properties: Mapping[str, object]) -> None:
        """Accept one host only, and a key of its own that stays."""
        if tree.host:
            raise CommandError(f"There is a secret-host already: '{tree.host}'")
        keyid = str(properties["keyid"])
        if keyid in tree.own_keys and keyid not in tree.host_keys:
            raise CommandError(f"Secret '{keyid}' is another key of secretd itself")
        if tree.deadlines.remaining(keyid) is not None:
            raise CommandError(
                f"Secret '{keyid}' has a lifetime; secret-expire without 'after' removes it"
            )

    def joined(self, tree: "ObjectTree", object_id: str, properties: Mapping[str, object]) -> None:
        """Protect the secret that the keys come from, and those by which that was encrypted."""
        keyid = str(properties["keyid"])
        tree.host, tree.host_name, tree.host_keyid = object_id, str(properties["name"]), keyid
        tree.pinned.add(keyid)
        while keyid not in tree.host_keys:
            tree.host_keys.add(keyid)
            tree.own_keys.add(keyid)
            record = tree.journal.get(keyid)
            keyid = "" if record is None else str(record.properties.get("keyid", ""))
            if not keyid:
                break

    def left(self, tree: "ObjectTree", _object_id: str, record: ObjectRecord) -> None:
        """Let it be deleted; read by others it is never, as it may have signed."""
        tree.host = ""
        tree.pinned.discard(str(record.properties["keyid"]))


class SecretPeer(FixedType):
    """Another host."""

    trusted_only = True

    info = TypeInfo(
        "secret-peer",
        "object",
        False,
        ("secret-peer", *_ANCESTORS),
        (("type", "string"), ("name", "string"), ("public", "string")),
    )
    number = 10
    options = SecretPeerOptions
    defaults: Mapping[str, object] = {}

    def create(self, options: Any, loading: Loading) -> Content:
        """Check the values."""
        super().create(options, loading)
        assert isinstance(options, SecretPeerOptions)
        check_name(options.name)
        check_usable(decoded(options.public))
        return None

    def check(self, tree: "ObjectTree", _object_id: str, properties: Mapping[str, object]) -> None:
        """Accept each name once."""
        known = tree.peers.get(str(properties["name"]))
        if known is not None:
            raise CommandError(f"There is a secret-peer of that name already: '{known}'")

    def joined(self, tree: "ObjectTree", object_id: str, properties: Mapping[str, object]) -> None:
        """Know the peer by its name."""
        name = str(properties["name"])
        tree.peers[name] = object_id
        tree.peer_keys[name] = decoded(str(properties["public"]))

    def left(self, tree: "ObjectTree", _object_id: str, record: ObjectRecord) -> None:
        """Forget the name."""
        name = str(record.properties["name"])
        tree.peers.pop(name, None)
        tree.peer_keys.pop(name, None)


class SecretOffer(FixedType):
    """A secret that is expected from another host."""

    info = TypeInfo(
        "secret-offer",
        "object",
        False,
        ("secret-offer", *_ANCESTORS),
        (("type", "string"), ("from", "string"), ("secret", "string"), ("for", "string")),
    )
    number = 11
    options = SecretOfferOptions
    defaults: Mapping[str, object] = {"for": ""}
    by_command = "secret-offer"

    def create(self, _options: Any, _loading: Loading) -> Content:
        """Refuse: an offer needs a nonce, and a time."""
        raise CommandError("An offer is made by the command secret-offer")

    def joined(self, tree: "ObjectTree", object_id: str, properties: Mapping[str, object]) -> None:
        """Know the offer by its nonce."""
        tree.offers[str(properties[NONCE])] = object_id
        sender, asked, subject = (str(properties[each]) for each in ("from", "secret", "for"))
        tree.asked[object_id] = (sender, asked, subject)

    def left(self, tree: "ObjectTree", object_id: str, record: ObjectRecord) -> None:
        """Forget it."""
        tree.offers.pop(str(record.properties[NONCE]), None)
        tree.asked.pop(object_id, None)
