# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which peer may read what and connect where. The one place where that is decided.

`Access.check` decides, writes the audit record and returns the `Grant` that deliver demands, or
refuses; nothing else makes one, and nothing else gives out plaintext. It goes by the `secret-grant`
and authz objects in the tree, as they are at that moment. commands and server ask; who a peer is
says peer.

On the control socket everything is allowed. On the other sockets reading needs a secret-grant whose
pattern matches the id and whose authz object allows the peer. A refusal looks only at what that
peer is granted: never at whether the secret exists, nor at what is granted to others.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from secretd.access.credential import CredentialMapping
from secretd.access.grant_index import Granted, GrantIndex, Rule
from secretd.access.peer import Peer, SocketRole
from secretd.audit.log import Audit
from secretd.audit.records import Subject
from secretd.errors import AccessDenied, CommandError
from secretd.limits import Tuning
from secretd.qom.authz import Verdict
from secretd.qom.grant import READS, used_up
from secretd.qom.identifiers import ID_BYTES
from secretd.qom.patterns import literal_prefix, matcher
from secretd.qom.tree import ObjectTree
from secretd.systemd.credential_address import CredentialAddress


class Grant:
    """Permission to release one secret to one peer, as `Access.check` gave it, and what it is.

    ``subject`` is the peer as the audit names it. ``plaintext`` is borrowed: good until the secret
    is removed. ``rule``: the id of the secret-grant that permits it, None on the control socket.
    """

    __slots__ = ("object_id", "peer", "plaintext", "rule", "subject", "terms")

    def __init__(  # noqa: PLR0917 - what a decision is about
        self,
        key: object,
        peer: Peer,
        subject: Subject,
        object_id: str,
        terms: "Rule | None",
        plaintext: memoryview,
    ) -> None:
        if key is not _KEY:
            raise TypeError("only access makes a Grant")
        self.peer = peer
        self.subject = subject
        self.object_id = object_id
        self.rule = None if terms is None else terms.id
        self.terms = terms
        self.plaintext = plaintext


_KEY: Final = object()


class Considered(NamedTuple):
    """What one secret-grant says of a peer, and why."""

    grant: str
    allowed: bool
    reason: str


def _in_order(first: Iterator[str | None], second: Iterator[str | None]) -> Iterator[str | None]:
    """Return what two sorted iterators have, in order and each once; None wherever one of them has
    it.
    """
    streams, heads = [first, second], ["", ""]
    while streams:
        for index in reversed(range(len(streams))):
            while not heads[index]:
                head = next(streams[index], "")
                if head == "":
                    del streams[index], heads[index]
                    break
                if head is None:
                    yield None
                else:
                    heads[index] = head
        if len(streams) == 1:
            yield heads[0]
            yield from streams[0]
            return
        if heads:
            least = min(heads)
            yield least
            heads = ["" if head == least else head for head in heads]


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
        self._credentials = CredentialMapping(tree, self._index)
        tree.subscribe(decision=self._index.changed)

    # --- decisions

    def check(self, peer: Peer, subject: Subject, object_id: str, action: str = "read") -> Grant:
        """Return leave to release a secret. ``subject``: the peer, as the audit tells of it.

        Raises AccessDenied, which tells nothing of whether the secret exists; CommandError if there
        is none of that id, to who might have read it, or if the audit demands it. ``action``: read
        or seal.
        """
        rule = None
        if object_id in self._tree.pinned and not peer.trusted:
            # The audit's key: whoever has it can make up records.
            self._audit.append_refusal(action, peer.uid, subject, id=object_id)
            raise AccessDenied(f"Reading secret '{object_id}' is not permitted")
        if peer.role is not SocketRole.CONTROL:
            rule = self._permitting(peer.identities, object_id)
            if rule is None:
                self._audit.append_refusal(action, peer.uid, subject, id=object_id)
                raise AccessDenied(f"Reading secret '{object_id}' is not permitted")
        if rule is not None and not self._tree.is_secret(object_id):
            # What there is beside secrets is no client's affair.
            raise CommandError(f"No secret with id '{object_id}'")
        plaintext = self._tree.plaintext(object_id)
        by = "control socket" if rule is None else f"grant {rule.id}"
        self._audit.append_release(action, subject, by, object_id, len(plaintext))
        if rule is not None and rule.limited:
            self._count(rule.id, 1)
        return Grant(_KEY, peer, subject, object_id, rule, plaintext)

    async def credential(
        self, peer: Peer, subject: Subject, claimed: CredentialAddress | None
    ) -> Grant:
        """Return leave to give a unit the secret that its LoadCredential= asks for.

        ``claimed``: what the address says. Anybody can say that, so the peer must be a service
        manager that is in that very unit, by what the kernel says. The secret is the one whose id
        is the credential's name, or that a grant maps it to. Raises AccessDenied with the reason,
        which is for the administrator.
        """
        name = claimed.credential if claimed else ""
        try:
            object_id, rule = await self._credentials.find(peer, claimed)
        except AccessDenied as error:
            self._audit.append_refusal(
                "credential", peer.uid, subject, credential=name, reason=error.desc
            )
            raise
        plaintext = self._tree.plaintext(object_id)
        by = f"grant {rule.id}"
        self._audit.append_release("credential", subject, by, object_id, len(plaintext), name)
        return Grant(_KEY, peer, subject, object_id, rule, plaintext)

    def take_back(self, grant: Grant, reason: str) -> None:
        """Undo a read of which no byte was taken: record it as withheld, and give the count back.

        A grant that was changed or made anew meanwhile keeps its count, which is another one's.
        """
        self._audit.append("withheld", grant.subject, id=grant.object_id, reason=reason)
        rule = grant.terms
        if (
            rule is not None
            and rule.limited
            and grant.peer.role is SocketRole.CLIENT
            and self._index.rules.get(rule.id) is rule
        ):
            self._count(rule.id, -1)

    def may_read(self, peer: Peer, object_id: str) -> bool:
        """True if `check` would not refuse. Writes no record: it is for what peers are told without
        asking.
        """
        return (
            peer.role is SocketRole.CONTROL
            or self._permitting(peer.identities, object_id) is not None
        )

    def readable(self, peer: Peer, object_ids: Iterable[str]) -> Iterator[str]:
        """Return those that this peer may know of: the ones that it may read."""
        return (object_id for object_id in object_ids if self.may_read(peer, object_id))

    def readable_after(self, peer: Peer, after: str) -> Iterator[str | None]:
        """Return the ids of the secrets that this peer may read and that come after one, in order;
        None wherever others should have their turn.

        It starts from what the peer is granted, so that its time tells nothing of other secrets.
        """
        if peer.role is SocketRole.CONTROL:
            return self._tree.secrets_after(after)
        return self._granted_after(peer, after)

    def _granted_after(self, peer: Peer, after: str) -> Iterator[str | None]:
        granted, asked = self._granted_and_asked(peer)
        prefixes = granted.prefixes.union(literal_prefix(rule.secret) for rule in asked)
        is_secret = self._tree.is_secret
        for object_id in _in_order(
            granted.exact_after(after), self._tree.ids_after(after, prefixes)
        ):
            if object_id is None:
                yield None
                # Others had their turn, and may have taken a grant back.
                granted, asked = self._granted_and_asked(peer)
            elif (asked or granted.names(object_id)) and is_secret(object_id):
                rules = (rule for rule in asked if matcher(rule.secret)(object_id))
                if any(map(self._is_usable, itertools.chain(granted.naming(object_id), rules))):
                    yield object_id

    def _granted_and_asked(self, peer: Peer) -> tuple[Granted, list[Rule]]:
        """Return what a peer is granted, and the grants whose authz object was asked, and allows
        it, now.
        """
        granted = self._index.granted_to(peer.identities)
        rules = granted.uncacheable.values()
        return granted, [rule for rule in rules if self._index.allows(rule.authz, peer.identities)]

    def _is_usable(self, rule: Rule) -> bool:
        return not self._tree.deadlines.expired(rule.id) and not (
            rule.limited and self._used_up(rule.id)
        )

    def holds(self, grant: Grant) -> bool:
        """True if the secret-grant by which a release was permitted still permits it."""
        if grant.rule is None:
            return self.admits(grant.peer)
        rule = self._index.rules.get(grant.rule)
        return (
            rule is not None
            and matcher(rule.secret)(grant.object_id)
            and not self._tree.deadlines.expired(rule.id)
            and self._index.allows(rule.authz, grant.peer.identities)
        )

    def admits(self, peer: Peer) -> bool:
        """May this peer use its socket? The control socket is for uid 0, the daemon's own uid, and
        whom the socket's authz object allows.
        """
        return (
            peer.role is not SocketRole.CONTROL
            or peer.trusted
            or (peer.authz is not None and self._index.allows(peer.authz, peer.identities))
        )

    def _permitting(self, identities: frozenset[str], object_id: str) -> Rule | None:
        """Return the grant that permits; one without a limited number of reads if there is any."""
        granted = self._index.granted_to(identities)
        asked: Iterable[Rule] = ()
        if granted.uncacheable:
            asked = [
                rule
                for rule in granted.uncacheable.values()
                if self._index.allows(rule.authz, identities)
                and len(object_id) <= ID_BYTES
                and matcher(rule.secret)(object_id)
            ]
        found = None
        for rule in (*granted.naming(object_id), *asked):
            if self._tree.deadlines.expired(rule.id):
                continue
            if not rule.limited:
                return rule
            if found is None and not self._used_up(rule.id):
                found = rule
        return found

    def _used_up(self, grant_id: str) -> bool:
        record = self._tree.journal.get(grant_id)
        return record is None or used_up(record)

    def _count(self, grant_id: str, reads: int) -> None:
        record = self._tree.journal.get(grant_id)
        assert record is not None
        before = record.properties.get(READS, 0)
        assert isinstance(before, int)
        self._tree.replace_properties(grant_id, record.properties | {READS: before + reads})

    # --- why

    def explain(self, identities: frozenset[str], object_id: str) -> list[Considered]:
        """Return what each secret-grant for this id says of a client with these identities."""
        return [
            Considered(rule.id, *self._explain(rule, identities))
            for rule in sorted(self._index.rules.values())
            if matcher(rule.secret)(object_id)
        ]

    def _explain(self, rule: Rule, identities: frozenset[str]) -> Verdict:
        if self._tree.deadlines.expired(rule.id):
            return Verdict(False, "the grant has expired")
        if rule.limited and self._used_up(rule.id):
            return Verdict(False, "the grant has no reads left")
        judge = self._index.judge(rule.authz)
        if judge is None:
            return Verdict(False, f"there is no authz object '{rule.authz}'")
        verdict = judge.judge(identities)
        return Verdict(verdict.allowed, f"'{rule.authz}': {verdict.why}")
