# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object types `secret-fleet`, `secret-roster` and `secret-manifest`.

secretd's own. A secret-fleet pins the root of a fleet. What the root and publishers have signed
becomes objects, too, so that a restart or a reboot does not forget which numbers were seen: only
the commands of monitor.commands.fleet make them. fleet_rules decides what is accepted.
"""

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from msgspec import UNSET, UnsetType

from secretd.crypto.roster import DIGEST_BYTES, digest_of, read_manifest, read_roster
from secretd.errors import CommandError
from secretd.journal.files import ObjectRecord
from secretd.qom.fleet_state import Fleet
from secretd.qom.hosts import FixedType, check_name, key_bytes
from secretd.qom.loading import Loading
from secretd.qom.object_type import Content, ObjectOptions, TypeInfo

if TYPE_CHECKING:
    from secretd.qom.tree import ObjectTree

MAX_AGE_SECONDS: Final = 1 << 31

SIGNED_BYTES: Final = "signed"
"""The journal's name for the bytes of a roster or manifest in base64."""

SIGNER: Final = "by"
"""The journal's name for the key that has signed, in hexadecimal; "" for this host."""

_ANCESTORS: Final = ("object", "user-creatable", "interface")


class SecretFleetOptions(ObjectOptions, tag="secret-fleet", rename="kebab", kw_only=True):
    """``name``: the fleet's. ``root``: the public half of the key that signs rosters, in base64.
    ``carrier``: the id of an authz object that allows those who bring what was signed. ``max-age``:
    seconds after which the secrets of a publisher cannot be read without another manifest.
    """

    name: str
    root: str
    carrier: str | UnsetType = UNSET
    max_age: int | UnsetType = UNSET


class SecretRosterOptions(ObjectOptions, tag="secret-roster", kw_only=True):
    """A roster has no options: secret-fleet-accept makes it."""


class SecretManifestOptions(ObjectOptions, tag="secret-manifest", kw_only=True):
    """A manifest has no options: secret-fleet-accept and secret-fleet-sign make it."""


def roster_id(fleet: Fleet) -> str:
    """Return the id of the object with the roster."""
    return f"{fleet.id}.roster"


def manifest_id(fleet: Fleet, publisher: str) -> str:
    """Return the id of the object with the accepted manifest of a publisher."""
    return f"{fleet.id}.manifest.{publisher}"


def sent_id(fleet: Fleet, host: str) -> str:
    """Return the id of the object with the manifest that was signed here for a host."""
    return f"{fleet.id}.sent.{host}"


class SecretFleet(FixedType):
    """The fleet that the host belongs to."""

    trusted_only = True

    info = TypeInfo(
        "secret-fleet",
        "object",
        False,
        ("secret-fleet", *_ANCESTORS),
        (
            ("type", "string"),
            ("name", "string"),
            ("root", "string"),
            ("carrier", "string"),
            ("max-age", "int"),
        ),
    )
    number = 12
    options = SecretFleetOptions
    defaults: Mapping[str, object] = {"carrier": "", "max-age": 0}

    def create(self, options: Any, loading: Loading) -> Content:
        """Check the values."""
        super().create(options, loading)
        assert isinstance(options, SecretFleetOptions)
        check_name(options.name)
        _root(options.root)
        age = options.max_age
        if age is not UNSET and not 0 <= age <= MAX_AGE_SECONDS:
            raise CommandError(
                f"Parameter 'max-age' expects a number of seconds up to {MAX_AGE_SECONDS}"
            )
        return None

    def check(self, tree: "ObjectTree", object_id: str, _properties: Mapping[str, object]) -> None:
        """Accept one fleet, on a host with a name, and only where nothing that was seen is
        forgotten.
        """
        if tree.fleet.id:
            raise CommandError(f"There is a secret-fleet already: '{tree.fleet.id}'")
        if not tree.host:
            raise CommandError("This host has no name; object-add a secret-host first")
        keeper = tree.keeper
        if keeper is None:
            raise CommandError("A secret-fleet needs a secret-store, and there is none")
        for each in (object_id, f"{object_id}.roster", f"{object_id}.manifest.x"):
            if not keeper.covers(each) and each not in tree.fixed and each != object_id:
                raise CommandError(
                    f"Store '{keeper.id}' does not keep '{each}', and a secret-fleet needs that"
                )

    def joined(self, tree: "ObjectTree", object_id: str, properties: Mapping[str, object]) -> None:
        """Know the fleet."""
        fleet = tree.fleet
        fleet.id, fleet.name = object_id, str(properties["name"])
        fleet.root = _root(str(properties["root"]))
        fleet.carrier = str(properties.get("carrier", ""))
        age = properties.get("max-age", 0)
        assert isinstance(age, int)
        fleet.max_age = age

    def left(self, tree: "ObjectTree", _object_id: str, _record: ObjectRecord) -> None:
        """Forget the fleet; what it had accepted stays, for the same root."""
        fleet = tree.fleet
        fleet.id = fleet.name = fleet.carrier = ""
        fleet.root, fleet.max_age = b"", 0


class SecretRoster(FixedType):
    """The roster that was accepted last."""

    trusted_only = True

    info = TypeInfo(
        "secret-roster", "object", False, ("secret-roster", *_ANCESTORS), (("type", "string"),)
    )
    number = 13
    options = SecretRosterOptions
    defaults: Mapping[str, object] = {}
    by_command = "secret-fleet-accept"

    def create(self, _options: Any, _loading: Loading) -> Content:
        """Refuse: a roster is signed."""
        raise CommandError("A roster is accepted by the command secret-fleet-accept")

    def joined(self, tree: "ObjectTree", _object_id: str, properties: Mapping[str, object]) -> None:
        """Know what it says."""
        tree.fleet.known_roster = read_roster(base64.b64decode(str(properties[SIGNED_BYTES])))
        tree.fleet.roster_root = bytes.fromhex(str(properties[SIGNER]))

    def left(self, tree: "ObjectTree", _object_id: str, _record: ObjectRecord) -> None:
        """Forget it."""
        tree.fleet.known_roster = None


class SecretManifest(FixedType):
    """A manifest that was accepted, or signed here, last."""

    trusted_only = True

    info = TypeInfo(
        "secret-manifest", "object", False, ("secret-manifest", *_ANCESTORS), (("type", "string"),)
    )
    number = 14
    options = SecretManifestOptions
    defaults: Mapping[str, object] = {}
    by_command = "secret-fleet-accept"

    def create(self, _options: Any, _loading: Loading) -> Content:
        """Refuse: a manifest is signed."""
        raise CommandError(
            "A manifest is made by the commands secret-fleet-accept and secret-fleet-sign"
        )

    def joined(self, tree: "ObjectTree", _object_id: str, properties: Mapping[str, object]) -> None:
        """Know what it says."""
        data = base64.b64decode(str(properties[SIGNED_BYTES]))
        manifest, fleet = read_manifest(data), tree.fleet
        signer = str(properties[SIGNER])
        if not signer:
            fleet.sent[manifest.host] = manifest
            return
        publisher = manifest.publisher
        fleet.manifests[publisher] = manifest
        fleet.keys[publisher] = bytes.fromhex(signer)
        fleet.digests[publisher] = digest_of(data).hex()

    def left(self, tree: "ObjectTree", _object_id: str, record: ObjectRecord) -> None:
        """Forget it."""
        manifest = read_manifest(base64.b64decode(str(record.properties[SIGNED_BYTES])))
        fleet = tree.fleet
        if record.properties[SIGNER]:
            for known in (fleet.manifests, fleet.keys, fleet.digests, fleet.withdrawn):
                known.pop(manifest.publisher, None)
        else:
            fleet.sent.pop(manifest.host, None)


def _root(text: str) -> bytes:
    return key_bytes("root", text, DIGEST_BYTES, "fleet.toml has them")
