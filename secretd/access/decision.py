# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place that decides which peer may read which secret and use which socket.

It calls the tree, the index of grants and the audit; monitor and server call it. access.peer
identifies peers.

Theory of operation. Every request for plaintext goes through `Access.check`. It decides by the
`secret-grant` and authz objects of that moment, writes the audit record, and returns a `Grant`, or
refuses. Delivery and sealing accept nothing but a `Grant`, which carries the plaintext, so no code
can bypass the decision.

- On the control socket everything is allowed, except the daemon's own keys to untrusted peers.
- On the other sockets a secret-grant must match the id, and its authz object must allow the peer.
- An alias is resolved once. The `Grant` names the version, which is released whatever becomes of
  the alias meanwhile; permission decides by both names.
- A running delivery holds its `Grant`. When a grant or authz object changes, `holds` is asked
  again, and deliveries that are no longer permitted are withdrawn.
- A limited grant counts a read before the delivery starts. `take_back` subtracts it if no byte was
  taken, unless the grant was changed meanwhile.

What can go wrong: an answer, or its time, may reveal the existence of a secret. So a refusal looks
only at the grants of that peer, never at the secret and never at grants to others.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Final

from secretd.access.credential import CredentialMapping, NothingGranted
from secretd.access.grant_index import Granted, GrantIndex
from secretd.access.grant_list import Considered, GrantInfo, explained_grants, listed_grants
from secretd.access.peer import Peer, SocketRole
from secretd.access.permission import Permissions
from secretd.access.rule_names import Rule
from secretd.access.uses import Uses
from secretd.audit.log import Audit
from secretd.audit.records import Subject
from secretd.errors import AccessDenied, CommandError
from secretd.limits import Tuning
from secretd.qom.alias import alias_of
from secretd.qom.grant import READS
from secretd.qom.patterns import literal_prefix, matcher
from secretd.qom.rotation import forget_version, note_read
from secretd.qom.sorted_ids import in_order
from secretd.qom.tree import ObjectTree
from secretd.store.commit import Commit
from secretd.systemd.credential_address import CredentialAddress

NOT_COUNTED: Final = "Reading secret '{}' cannot be counted now; try again later"
"""The error of a counted read, if a store does not take its count."""

UNITS_WAITING: Final = 64
"""Requests of units for a credential that may wait until a store is unlocked."""


class Grant:
    """Permission to release one secret to one peer, made by `Access` only.

    ``peer``, ``subject``: the peer, and its form in the audit. ``object_id``: the secret.
    ``alias``: the alias by which the peer named it, or "". ``plaintext``: a borrowed view, valid
    until the secret is removed. ``rule``: the id of the permitting secret-grant, None on the
    control socket. ``counted``: the count of the read that a store must have before the first byte
    leaves, None without one. ``identities``: those that it permits: the peer's, or a host's.
    """

    __slots__ = (
        "alias", "counted", "identities", "object_id", "peer", "plaintext", "rule", "subject",
        "terms",
    )  # fmt: skip

    def __init__(  # noqa: PLR0917 - what a decision is about
        self,
        key: object,
        peer: Peer,
        subject: Subject,
        object_id: str,
        terms: "Rule | None",
        plaintext: memoryview,
        alias: str,
    ) -> None:
        if key is not _KEY:
            raise TypeError("only access makes a Grant")
        self.alias = alias
        self.peer = peer
        self.identities = peer.identities
        self.subject = subject
        self.object_id = object_id
        self.rule = None if terms is None else terms.id
        self.terms = terms
        self.plaintext = plaintext
        self.counted: Commit | None = None


_KEY: Final = object()


class Access:
    """The decisions for one object tree."""

    def __init__(
        self,
        tree: ObjectTree,
        audit: Audit,
        tuning: Tuning = Tuning(),  # noqa: B008 - it cannot be changed
    ) -> None:
        self._tree = tree
        self._audit = audit
        self._index = GrantIndex(tree, tuning)
        self._permissions = Permissions(tree, self._index)
        self._credentials = CredentialMapping(tree, self._index, self._permissions)
        self.uses = Uses()
        self._units_waiting = 0
        tree.subscribe(decision=self._index.changed, removal=self._removed)

    def _removed(self, object_id: str) -> None:
        self.uses.forget(object_id)
        if self._tree.aliases:
            forget_version(self._tree, object_id)

    # --- decisions

    def check(
        self, peer: Peer, subject: Subject, object_id: str, action: str = "read", host: str = ""
    ) -> Grant:
        """Return permission to release a secret.

        ``subject``: the peer as the audit names it; ``action``: "read", "seal" or "wrap". With
        ``host`` a grant must name that host, whoever the peer is. Raises AccessDenied, which does
        not reveal whether the secret exists; CommandError if a permitted peer names a missing or
        locked secret, or if the audit record cannot be written under --audit-policy=require.
        """
        rule, alias = None, ""
        version = self._tree.resolved(object_id)
        if version is not object_id:
            alias = object_id
        refused = version in self._tree.own_keys and (bool(host) or not peer.trusted)
        identities = frozenset((f"host:{host}",)) if host else peer.identities
        if not refused and (host or peer.role is not SocketRole.CONTROL):
            rule = self._permissions.permitting(identities, object_id)
            refused = rule is None
        if refused:  # by a grant, or since it is a key of the daemon's own
            members = {"host": host} if host else {}
            self._audit.append_refusal(action, peer.uid, subject, id=object_id, **members)
            words = f"No grant lets host '{host}' have secret '{object_id}'"
            raise AccessDenied(words if host else f"Reading secret '{object_id}' is not permitted")
        if rule is not None and not self._tree.is_secret(version):
            # Do not reveal objects of other types to clients.
            raise CommandError(f"No secret with id '{version}'")
        plaintext = self._tree.plaintext(version)
        self._tree.check_fresh(version)
        grant = Grant(_KEY, peer, subject, version, rule, plaintext, alias)
        grant.identities = identities
        limited = rule is not None and rule.limited
        if limited:
            grant.counted = self._count(grant, 1)
        by = "control socket" if rule is None else f"grant {rule.id}"
        try:
            self._audit.append_release(
                action, subject, by, version, len(plaintext), alias=alias, host=host
            )
        except CommandError:
            if limited:
                self._count(grant, -1)
            raise
        self.uses.note(version, subject)
        return grant

    def delivered(self, grant: Grant) -> None:
        """Note that a release has reached its reader: aliases know what each has read.

        On the control socket only consumers that an alias names count: others there rotate it.
        """
        if self._tree.aliases:
            peer = grant.peer
            reader = "" if grant.rule is None else peer.unit or f"uid:{peer.uid}"
            if grant.identities is not peer.identities:  # a host, for which the peer carries
                (reader,) = grant.identities
            alias = grant.alias or alias_of(grant.object_id)
            note_read(self._tree, alias, grant.object_id, grant.identities, reader)

    async def credential(
        self, peer: Peer, subject: Subject, claimed: CredentialAddress | None
    ) -> Grant:
        """Return permission to give a unit the secret that its LoadCredential= asks for; max-reads
        does not count it.

        ``claimed``: the unit and name in the peer's address, which any process can forge. See
        `CredentialMapping.find`. Raises AccessDenied with the reason, for the administrator, and
        CommandError as `check` does.
        """
        name = claimed.credential if claimed else ""
        try:
            object_id, rule = await self._find(peer, claimed)
        except AccessDenied as error:
            self._audit.append_refusal(
                "credential", peer.uid, subject, credential=name, reason=error.desc
            )
            raise
        version = self._tree.resolved(object_id)
        alias = "" if version is object_id else object_id
        plaintext = self._tree.plaintext(version)
        self._tree.check_fresh(version)
        by = f"grant {rule.id}"
        self._audit.append_release("credential", subject, by, version, len(plaintext), name, alias)
        self.uses.note(version, subject)
        return Grant(_KEY, peer, subject, version, rule, plaintext, alias)

    async def _find(self, peer: Peer, claimed: CredentialAddress | None) -> tuple[str, Rule]:
        """Return what a unit asks for; while a store is locked, wait for it."""
        try:
            return await self._credentials.find(peer, claimed)
        except NothingGranted:
            keeper = self._tree.keeper
            if keeper is None or self._units_waiting == UNITS_WAITING:
                raise
            self._units_waiting += 1
            try:
                opened = await keeper.settled()
            finally:
                self._units_waiting -= 1
            if not opened:
                raise
        return await self._credentials.find(peer, claimed)

    def take_back(self, grant: Grant, reason: str) -> None:
        """Undo a read that delivered nothing: record it as withheld, and subtract it from the
        count.

        ``reason`` goes into the record. The count of a grant that was changed or added again
        meanwhile stays.
        """
        self._audit.append("withheld", grant.subject, id=grant.object_id, reason=reason)
        self.uses.take_back(grant.object_id)
        rule = grant.terms
        if (
            rule is not None
            and rule.limited
            and grant.peer.role is not SocketRole.CREDENTIALS
            and self._index.rules.get(rule.id) is rule
        ):
            with contextlib.suppress(CommandError):  # a store that is locked keeps the count
                self._count(grant, -1)

    def may_read(self, peer: Peer, object_id: str) -> bool:
        """Return True if the control socket or a grant permits a read; without a record."""
        return (
            peer.role is SocketRole.CONTROL
            or self._permissions.permitting(peer.identities, object_id) is not None
        )

    def readable(self, peer: Peer, object_ids: Iterable[str]) -> Iterator[str]:
        """Yield those of some ids that this peer may read."""
        return (object_id for object_id in object_ids if self.may_read(peer, object_id))

    def readable_after(self, peer: Peer, after: str) -> Iterator[str | None]:
        """Yield, in order, the ids after ``after`` that this peer may read; None where others
        should have their turn.

        The iteration starts from the peer's grants, so that its time reveals nothing about other
        secrets.
        """
        if peer.role is SocketRole.CONTROL:
            return self._tree.secrets_after(after)
        return self._granted_after(peer, after)

    def _granted_after(self, peer: Peer, after: str) -> Iterator[str | None]:
        granted, asked = self._granted_and_asked(peer)
        prefixes = granted.prefixes.union(literal_prefix(rule.secret) for rule in asked)
        names_secret, aliases = self._tree.names_secret, self._tree.aliases
        for object_id in in_order(
            granted.exact_after(after), self._tree.ids_after(after, prefixes)
        ):
            if object_id is None:
                yield None
                # Others had their turn, and may have revoked a grant.
                granted, asked = self._granted_and_asked(peer)
            elif (asked or granted.names(object_id)) and names_secret(object_id):
                rules = (rule for rule in asked if matcher(rule.secret)(object_id))
                usable = map(
                    self._permissions.is_usable, itertools.chain(granted.naming(object_id), rules)
                )
                if any(usable) and (object_id not in aliases or self.may_read(peer, object_id)):
                    yield object_id

    def _granted_and_asked(self, peer: Peer) -> tuple[Granted, list[Rule]]:
        """Return what a peer is granted, and the uncacheable grants whose authz object allows it
        now.
        """
        granted = self._index.granted_to(peer.identities)
        rules = granted.uncacheable.values()
        return granted, [rule for rule in rules if self._index.allows(rule.authz, peer.identities)]

    def holds(self, grant: Grant) -> bool:
        """Return True if the secret-grant of a release still permits it."""
        if grant.rule is None:
            return self.admits(grant.peer)
        return self._permissions.still_permits(
            grant.identities, grant.rule, grant.object_id, grant.alias
        )

    def may_carry(self, peer: Peer) -> bool:
        """Return True if this peer may bring what was signed for the fleet."""
        carrier = self._tree.fleet.carrier
        return peer.trusted or (bool(carrier) and self._index.allows(carrier, peer.identities))

    def admits(self, peer: Peer) -> bool:
        """Return True if this peer may use its socket: the control socket admits uid 0, the
        daemon's own uid, and those whom the socket's authz object allows.
        """
        return (
            peer.role is not SocketRole.CONTROL
            or peer.trusted
            or (peer.authz is not None and self._index.allows(peer.authz, peer.identities))
        )

    def _count(self, grant: Grant, reads: int) -> Commit | None:
        """Count a read of a limited grant; return what waits for the disk, if a store has the
        grant. Raises CommandError.
        """
        grant_id = grant.rule
        assert grant_id is not None
        record = self._tree.journal.get(grant_id)
        assert record is not None
        before = record.properties.get(READS, 0)
        assert isinstance(before, int)
        counted = record.properties | {READS: before + reads}
        # Not undone if the store fails: the delivery takes its read back itself.
        try:
            return self._tree.replace_properties(grant_id, counted, undo=False)
        except CommandError:
            # The reason is the administrator's, not the client's.
            raise CommandError(NOT_COUNTED.format(grant.object_id)) from None

    # --- what is granted, and why

    def grants_after(
        self, after: str, secret: str | None, identities: frozenset[str] | None
    ) -> Iterator[GrantInfo | None]:
        """See grant_list."""
        return listed_grants(self._tree, self._index, after, secret, identities)

    def is_denied(self, identities: frozenset[str], alias: str, version: str) -> bool:
        """See Permissions.is_denied."""
        return self._permissions.is_denied(identities, alias, version)

    def explain(self, identities: frozenset[str], object_id: str) -> list[Considered]:
        """See grant_list.explained_grants."""
        return explained_grants(self._tree, self._index, identities, object_id)
