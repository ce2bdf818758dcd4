# SPDX-License-Identifier: LGPL-2.1-or-later
"""The types of objects, in the order in which QEMU lists them.

Each type's behaviour is defined in its own module. daemon and monitor.commands use this list.
"""

from typing import Final, TypeAlias

from secretd.qom.alias import SecretAlias, SecretAliasOptions
from secretd.qom.authz import (
    AUTHZ,
    AuthZList,
    AuthZListFile,
    AuthZListFileOptions,
    AuthZListOptions,
    AuthZSimple,
    AuthZSimpleOptions,
)
from secretd.qom.fleet import SecretFleet, SecretFleetOptions, SecretManifest, SecretRoster
from secretd.qom.grant import SecretGrant, SecretGrantOptions
from secretd.qom.hosts import (
    SecretHost,
    SecretHostOptions,
    SecretOffer,
    SecretPeer,
    SecretPeerOptions,
)
from secretd.qom.object_type import ObjectType, TypeInfo, Types
from secretd.qom.secret import (
    SECRET_COMMON,
    Secret,
    SecretKeyring,
    SecretKeyringOptions,
    SecretOptions,
)
from secretd.qom.secret_store import SecretStore, SecretStoreOptions

_CREATABLE: Final[tuple[ObjectType, ...]] = (
    Secret(),
    SecretKeyring(),
    AuthZSimple(),
    AuthZList(),
    AuthZListFile(),
    SecretGrant(),
    SecretStore(),
    SecretAlias(),
    SecretHost(),
    SecretPeer(),
    SecretOffer(),
    SecretFleet(),
    SecretRoster(),
    SecretManifest(),
)

AnyOptions: TypeAlias = (
    AuthZListOptions
    | AuthZListFileOptions
    | AuthZSimpleOptions
    | SecretOptions
    | SecretKeyringOptions
    | SecretGrantOptions
    | SecretStoreOptions
    | SecretAliasOptions
    | SecretHostOptions
    | SecretPeerOptions
    | SecretFleetOptions
)
"""The arguments of object-add: ObjectOptions of qapi/qom.json, with the types in its order."""

_INFOS: Final = (
    SECRET_COMMON,
    TypeInfo("user-creatable", "interface", True, ("user-creatable", "interface"), ()),
    TypeInfo("container", "object", False, ("container", "object")),
    TypeInfo("interface", None, True, ("interface",), ()),
    Secret.info,
    SecretKeyring.info,
    AuthZListFile.info,
    SecretGrant.info,
    SecretStore.info,
    SecretAlias.info,
    SecretHost.info,
    SecretPeer.info,
    SecretOffer.info,
    SecretFleet.info,
    SecretRoster.info,
    SecretManifest.info,
    AuthZSimple.info,
    TypeInfo("object", None, True, ("object",)),
    AuthZList.info,
    AUTHZ,
)

TYPES: Final = Types(_CREATABLE, _INFOS)
"""All types of objects."""
