# SPDX-License-Identifier: LGPL-2.1-or-later
"""The mapping from a unit's LoadCredential= to a secret and its grant.

Any process can claim a unit's address, so the peer must be a service manager in that very unit, as
the kernel reports it. The secret is the one whose id is the credential's name, or the one to which
a grant's ``credential`` maps the name. Where more than one secret matches, the request is refused.
Only decision calls this module.
"""

import asyncio
from collections.abc import Iterator

from secretd.access.grant_index import GrantIndex
from secretd.access.peer import Peer
from secretd.access.permission import Permissions
from secretd.access.rule_names import Rule
from secretd.errors import AccessDenied
from secretd.qom.alias import alias_of
from secretd.qom.patterns import is_pattern, literal_prefix, matcher
from secretd.qom.tree import ObjectTree
from secretd.systemd.credential_address import CREDENTIAL_BYTES, CredentialAddress


class NothingGranted(AccessDenied):
    """The claim is true, and no grant or no secret answers it: a store may have them."""


class CredentialMapping:
    """Maps units and names of credentials to secrets."""

    def __init__(self, tree: ObjectTree, index: GrantIndex, permissions: Permissions) -> None:
        self._tree = tree
        self._index = index
        self._permissions = permissions

    async def find(self, peer: Peer, claimed: CredentialAddress | None) -> tuple[str, Rule]:
        """Return the id of the secret or alias that a unit asks for, and the grant that permits it.

        ``peer``: the process that connected; ``claimed``: the unit and name in its address, None if
        the address has another form (systemd.exec(5), LoadCredential=). Raises AccessDenied with
        the reason.
        """
        if claimed is None:
            raise AccessDenied("the address it came from is not one of LoadCredential=")
        unit, name = claimed
        # 1. The claim: the kernel must report the same unit, and uid 0 (the system's or root's
        # manager) or the daemon's own uid in a user unit (the manager of that user).
        if peer.unit not in (f"unit:{unit}", f"user-unit:{peer.uid}/{unit}"):
            raise AccessDenied(f"it claims to be {unit}, and is in {peer.unit or 'no unit'}")
        if peer.uid != 0 and not (peer.trusted and peer.unit.startswith("user-unit:")):
            raise AccessDenied(f"uid {peer.uid} is not that of the service manager")
        # 2. The candidates: by id, or by a grant's credential. More than one is ambiguous.
        found: dict[str, Rule] = {}
        missing = ""
        for rule in self._living(peer.identities):
            if any(map(matcher(rule.secret), {name, self._tree.resolved(name)})):
                missing = missing or name
                if self._tree.names_secret(name):
                    found[name] = rule
            if rule.credential == name:
                missing = rule.secret
                for object_id in self._secrets(rule):
                    if object_id is None:
                        await asyncio.sleep(0)  # others have their turn
                    else:
                        found[object_id] = rule
                    if len(found) > 1:
                        break
        if len(found) > 1:
            names = ", ".join(f"'{object_id}'" for object_id in sorted(found))
            raise AccessDenied(f"it could be more than one secret: {names}")
        if not found and missing:
            raise NothingGranted(f"there is no secret '{missing}'")
        if not found:
            raise NothingGranted(f"no grant lets {peer.unit} have it")
        # 3. The one candidate, which may have changed while other connections had their turn.
        ((object_id, rule),) = found.items()
        version = self._tree.resolved(object_id)
        if version in self._tree.own_keys:
            raise AccessDenied(f"secret '{version}' is a key of secretd itself")
        if self._index.rules.get(rule.id) is not rule or not self._tree.is_secret(version):
            raise AccessDenied(f"no grant lets {peer.unit} have it")  # any more
        if version is not object_id and self._permissions.is_denied(
            peer.identities, object_id, version
        ):
            raise AccessDenied(f"a rule denies {peer.unit} '{object_id}' or '{version}'")
        size = self._tree.secret(object_id)[1]
        if len(name.encode()) + size > CREDENTIAL_BYTES:
            raise AccessDenied(
                f"secret '{object_id}' has {size} bytes, which with the credential's name is more "
                "than the "
                f"{CREDENTIAL_BYTES} that systemd takes"
            )
        return object_id, rule

    def _secrets(self, rule: Rule) -> Iterator[str | None]:
        """Yield the secrets that a grant covers; None after each block of examined ids."""
        if not is_pattern(rule.secret):
            return iter([rule.secret] if self._tree.names_secret(rule.secret) else [])
        fits, aliases = matcher(rule.secret), self._tree.aliases
        found = self._tree.secrets_after("", [literal_prefix(rule.secret)])
        # The versions of an alias that the pattern covers, too, are the same secret.
        return (
            each
            for each in found
            if each is None
            or (fits(each) and not ((alias := alias_of(each)) in aliases and fits(alias)))
        )

    def _living(self, identities: frozenset[str]) -> list[Rule]:
        """Return the grants that have not expired, with or without reads left."""
        granted = self._index.granted_to(identities)
        return [
            rule
            for rule in granted.all.values()
            if (rule.id not in granted.uncacheable or self._index.allows(rule.authz, identities))
            and not self._tree.deadlines.expired(rule.id)
        ]
