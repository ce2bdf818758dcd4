# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may read what, and who may connect where. The one place where that is decided.

`Access.check` decides, writes the audit record and returns the `Grant` that deliver demands, or
refuses; nothing else makes one, and nothing else gives out plaintext. It goes by the `secret-grant`
and authz objects in the tree, as they are at that moment. commands and server ask; who a peer is
says peer.

On the control door everything is allowed. On the other doors reading needs a secret-grant whose
pattern matches the id and whose authz object allows the peer. A refusal looks only at what that
peer is granted: never at whether the secret exists, nor at what is granted to others.
"""

import heapq
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from secretd.audit import Audit, Who
from secretd.errors import AccessDenied, CommandError
from secretd.patterns import is_pattern, matcher
from secretd.peer import Door, Peer
from secretd.qom.authz import AuthZ, FileRules, Rules, Verdict
from secretd.qom.grant import READS, SecretGrant, used_up
from secretd.qom.object import ObjectTree
from secretd.qom.secret import secret_plaintext
from secretd.systemd import CREDENTIAL_BYTES, CredentialAddress

PEERS_KEPT: Final = 1024
"""Sets of identities for which it is remembered what they are granted."""

CHANGES_KEPT: Final = 4096
"""Changes of grants after which what is remembered is worked out anew."""


class Grant:
    """Permission to release one secret to one peer, as `Access.check` gave it, and what it is.

    ``plaintext`` is borrowed: good until the secret is removed. ``rule``: the id of the secret-grant
    that permits it, None on the control door.
    """

    __slots__ = ("object_id", "peer", "plaintext", "rule", "terms")

    def __init__(
        self, key: object, peer: Peer, object_id: str, terms: "_Rule | None", plaintext: memoryview
    ) -> None:
        if key is not _KEY:
            raise TypeError("only access makes a Grant")
        self.peer = peer
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


class _Rule(NamedTuple):
    """A secret-grant as the tree has it: which secrets, for whom; ``limited``: it counts reads;
    ``credential``: the name that units know the secret by, "" for its id only.
    """

    id: str
    secret: str
    authz: str
    limited: bool
    credential: str


class _Granted:
    """What peers with certain identities are granted, as of a position in the list of changes."""

    def __init__(self) -> None:
        self.position = 0
        self.placed: dict[str, _Rule] = {}
        self.exact: dict[str, dict[str, _Rule]] = {}  # by the id of the secret, then of the grant
        self.globs: dict[str, _Rule] = {}
        self.unsteady: dict[str, _Rule] = {}  # whose authz object has to be asked each time

    def remove(self, grant_id: str) -> None:
        rule = self.placed.pop(grant_id, None)
        if rule is None:
            return
        self.globs.pop(grant_id, None)
        self.unsteady.pop(grant_id, None)
        exact = self.exact.get(rule.secret, {})
        exact.pop(grant_id, None)
        if not exact:
            self.exact.pop(rule.secret, None)

    def place(self, rule: _Rule, *, steady: bool) -> None:
        self.placed[rule.id] = rule
        if not steady:
            self.unsteady[rule.id] = rule
        elif is_pattern(rule.secret):
            self.globs[rule.id] = rule
        else:
            self.exact.setdefault(rule.secret, {})[rule.id] = rule


class Access:
    """The decisions for one object tree."""

    def __init__(self, tree: ObjectTree, audit: Audit) -> None:
        self._tree = tree
        self._audit = audit
        self._rules: dict[str, _Rule] = {}
        self._by_authz: dict[str, set[str]] = {}
        self._judges: dict[str, Rules | FileRules] = {}
        self._granted: dict[frozenset[str], _Granted] = {}
        self._changes: list[str] = []  # ids of grants that have to be looked at again
        tree.on_decision = self._changed
        for object_id in tree.deciding:
            self._changed(object_id)

    def _changed(self, object_id: str) -> None:
        """A grant or authz object came, went or changed."""
        self._judges.pop(object_id, None)
        self._changes += self._by_authz.get(object_id, ())
        old = self._rules.pop(object_id, None)
        if old is not None:
            self._changes.append(object_id)
            self._by_authz[old.authz].discard(object_id)
            if not self._by_authz[old.authz]:
                del self._by_authz[old.authz]
        record = self._tree.journal.get(object_id)
        if record is not None and record.type == SecretGrant.number:
            properties = record.properties
            secret, authz = str(properties["secret"]), str(properties["authz"])
            self._rules[object_id] = _Rule(
                object_id,
                secret,
                authz,
                "max-reads" in properties,
                str(properties.get("credential", "")),
            )
            self._by_authz.setdefault(authz, set()).add(object_id)
            self._changes.append(object_id)
        if len(self._changes) > CHANGES_KEPT:
            self._granted.clear()
            self._changes.clear()

    # --- decisions

    def check(self, peer: Peer, who: Who, object_id: str, action: str = "read") -> Grant:
        """Return leave to release a secret. ``who``: the peer, as the audit tells of it.

        Raises AccessDenied, which tells nothing of whether the secret exists; CommandError if there
        is none of that id, to who might have read it, or if the audit demands it. ``action``: read
        or seal.
        """
        rule = None
        if peer.door is not Door.CONTROL:
            rule = self._permitting(peer.identities, object_id)
            if rule is None:
                self._audit.refuse(action, peer.uid, who, id=object_id)
                raise AccessDenied(f"Reading secret '{object_id}' is not permitted")
        if rule is not None and not self._tree.is_secret(object_id):
            # What there is beside secrets is no client's affair.
            raise CommandError(f"No secret with id '{object_id}'")
        plaintext = secret_plaintext(self._tree, object_id)
        by = "control socket" if rule is None else f"grant {rule.id}"
        self._audit.release(action, who, by, object_id, len(plaintext))
        if rule is not None and rule.limited:
            self._count(rule.id, 1)
        return Grant(_KEY, peer, object_id, rule, plaintext)

    def credential(self, peer: Peer, who: Who, claimed: CredentialAddress | None) -> Grant:
        """Return leave to give a unit the secret that its LoadCredential= asks for.

        ``claimed``: what the address says. Anybody can say that, so the peer must be a service manager
        that is in that very unit, by what the kernel says. The secret is the one whose id is the
        credential's name, or that a grant maps it to. Raises AccessDenied with the reason, which is for
        the administrator.
        """
        name = claimed.credential if claimed else ""
        try:
            object_id, rule = self._mapped(peer, claimed)
        except AccessDenied as error:
            self._audit.refuse("credential", peer.uid, who, credential=name, reason=error.desc)
            raise
        plaintext = secret_plaintext(self._tree, object_id)
        by = f"grant {rule.id}"
        self._audit.release("credential", who, by, object_id, len(plaintext), name)
        return Grant(_KEY, peer, object_id, rule, plaintext)

    def _mapped(self, peer: Peer, claimed: CredentialAddress | None) -> tuple[str, _Rule]:
        """Return the id of the secret that a unit asks for, and the grant that permits it."""
        if claimed is None:
            raise AccessDenied("the address it came from is not one of LoadCredential=")
        unit, name = claimed
        # A user's own manager has that user's uid, and so has root's.
        if peer.unit not in (f"unit:{unit}", f"user-unit:{peer.uid}/{unit}"):
            raise AccessDenied(f"it says that it is {unit}, and is in {peer.unit or 'no unit'}")
        if peer.uid != 0 and not (peer.trusted and peer.unit.startswith("user-unit:")):
            raise AccessDenied(f"uid {peer.uid} is not that of the service manager")
        found: dict[str, _Rule] = {}
        missing = ""
        for rule in self._living(peer.identities, counted=False):
            if matcher(rule.secret)(name):
                missing = missing or name
                if self._tree.is_secret(name):
                    found[name] = rule
            if rule.credential == name:
                missing = rule.secret
                for object_id in itertools.islice(self._secrets(rule), 2):
                    found[object_id] = rule
        if len(found) > 1:
            names = ", ".join(f"'{object_id}'" for object_id in sorted(found))
            raise AccessDenied(f"it could be more than one secret: {names}")
        if not found and missing:
            raise AccessDenied(f"there is no secret '{missing}'")
        if not found:
            raise AccessDenied(f"no grant lets {peer.unit} have it")
        ((object_id, rule),) = found.items()
        size = self._tree.secret(object_id)[1]
        if len(name.encode()) + size > CREDENTIAL_BYTES:
            raise AccessDenied(
                f"secret '{object_id}' has {size} bytes, which with the credential's name is more than "
                f"the {CREDENTIAL_BYTES} that systemd takes"
            )
        return object_id, rule

    def _secrets(self, rule: _Rule) -> Iterator[str]:
        """Return the secrets that a grant is for."""
        if not is_pattern(rule.secret):
            return iter([rule.secret] if self._tree.is_secret(rule.secret) else [])
        prefix = re.split("[*?]", rule.secret, maxsplit=1)[0]
        return filter(matcher(rule.secret), self._tree.secrets_after("", [prefix]))

    def _living(self, identities: frozenset[str], *, counted: bool = True) -> list[_Rule]:
        """Return the grants that permit something now. ``counted``: not those without a read left."""
        granted = self._granted_to(identities)
        return [
            rule
            for rule in granted.placed.values()
            if (rule.id not in granted.unsteady or self._allows(rule.authz, identities))
            and not self._tree.lifetimes.ended(rule.id)
            and not (counted and rule.limited and self._used_up(rule.id))
        ]

    def take_back(self, grant: Grant, who: Who, reason: str) -> None:
        """Undo a read of which no byte was taken: record it as withheld, and give the count back.

        A grant that was changed or made anew meanwhile keeps its count, which is another one's.
        """
        self._audit.note("withheld", who, id=grant.object_id, reason=reason)
        rule = grant.terms
        if (
            rule is not None
            and rule.limited
            and grant.peer.door is Door.CLIENT
            and self._rules.get(rule.id) is rule
        ):
            self._count(rule.id, -1)

    def may_read(self, peer: Peer, object_id: str) -> bool:
        """True if `check` would not refuse. Writes no record: it is for what peers are told without
        asking.
        """
        return peer.door is Door.CONTROL or self._permitting(peer.identities, object_id) is not None

    def readable(self, peer: Peer, object_ids: Iterable[str]) -> Iterator[str]:
        """Return those that this peer may know of: the ones that it may read."""
        return (object_id for object_id in object_ids if self.may_read(peer, object_id))

    def readable_after(self, peer: Peer, after: str) -> Iterator[str]:
        """Return the ids of the secrets that this peer may read and that come after one, in order.

        It starts from what the peer is granted, so that its time tells nothing of other secrets.
        """
        if peer.door is Door.CONTROL:
            return self._tree.secrets_after(after)
        living = self._living(peer.identities)
        globs = [r.secret for r in living if is_pattern(r.secret)]
        exact = {r.secret for r in living} - set(globs)
        found = [i for i in exact if i > after and self._tree.is_secret(i)]
        if not globs:
            return iter(sorted(found))
        prefixes = {re.split("[*?]", pattern, maxsplit=1)[0] for pattern in globs}
        fits = [matcher(pattern) for pattern in globs]

        def fitting(object_id: str) -> bool:
            return any(fit(object_id) for fit in fits)

        return heapq.merge(
            sorted(i for i in found if not fitting(i)),
            filter(fitting, self._tree.secrets_after(after, prefixes)),
        )

    def holds(self, grant: Grant) -> bool:
        """True if the secret-grant by which a release was permitted still permits it."""
        if grant.rule is None:
            return self.admits(grant.peer)
        rule = self._rules.get(grant.rule)
        return (
            rule is not None
            and matcher(rule.secret)(grant.object_id)
            and not self._tree.lifetimes.ended(rule.id)
            and self._allows(rule.authz, grant.peer.identities)
        )

    def admits(self, peer: Peer) -> bool:
        """May this peer use its door? The control door is for uid 0, the daemon's own uid, and whom the
        door's authz object allows.
        """
        return (
            peer.door is not Door.CONTROL
            or peer.trusted
            or (peer.authz is not None and self._allows(peer.authz, peer.identities))
        )

    def _permitting(self, identities: frozenset[str], object_id: str) -> _Rule | None:
        """Return the grant that permits; one without a limited number of reads if there is any."""
        granted = self._granted_to(identities)
        asked = [r for r in granted.unsteady.values() if self._allows(r.authz, identities)]
        found = None
        for rule in (
            *granted.exact.get(object_id, {}).values(),
            *(r for r in (*granted.globs.values(), *asked) if matcher(r.secret)(object_id)),
        ):
            if self._tree.lifetimes.ended(rule.id):
                continue
            if not rule.limited:
                return rule
            if found is None and not self._used_up(rule.id):
                found = rule
        return found

    def _granted_to(self, identities: frozenset[str]) -> _Granted:
        granted = self._granted.get(identities)
        if granted is None:
            if len(self._granted) >= PEERS_KEPT:
                self._granted.clear()
            granted = self._granted[identities] = _Granted()
            doubtful = list(self._rules)
        else:
            doubtful = self._changes[granted.position :]
        for grant_id in doubtful:
            granted.remove(grant_id)
            rule = self._rules.get(grant_id)
            judge = None if rule is None else self._judge(rule.authz)
            if rule is None or judge is None:
                continue
            if not judge.steady or judge.judge(identities).allowed:
                granted.place(rule, steady=judge.steady)
        granted.position = len(self._changes)
        return granted

    def _used_up(self, grant_id: str) -> bool:
        record = self._tree.journal.get(grant_id)
        return record is None or used_up(record)

    def _count(self, grant_id: str, reads: int) -> None:
        record = self._tree.journal.get(grant_id)
        assert record is not None
        before = record.properties.get(READS, 0)
        assert isinstance(before, int)
        self._tree.replace_properties(grant_id, record.properties | {READS: before + reads})

    def _allows(self, authz: str, identities: frozenset[str]) -> bool:
        judge = self._judge(authz)
        return judge is not None and judge.judge(identities).allowed

    def _judge(self, authz: str) -> Rules | FileRules | None:
        judge = self._judges.get(authz)
        if judge is None:
            record = self._tree.journal.get(authz)
            kind = self._tree.type_of(authz)
            if record is None or not isinstance(kind, AuthZ):
                return None
            judge = self._judges[authz] = kind.rules(record.properties)
        return judge

    # --- why

    def explain(self, identities: frozenset[str], object_id: str) -> list[Considered]:
        """Return what each secret-grant for this id says of a client with these identities."""
        return [
            Considered(rule.id, *self._explain(rule, identities))
            for rule in sorted(self._rules.values())
            if matcher(rule.secret)(object_id)
        ]

    def _explain(self, rule: _Rule, identities: frozenset[str]) -> Verdict:
        if self._tree.lifetimes.ended(rule.id):
            return Verdict(False, "the grant has expired")
        if rule.limited and self._used_up(rule.id):
            return Verdict(False, "the grant has no reads left")
        judge = self._judge(rule.authz)
        if judge is None:
            return Verdict(False, f"there is no authz object '{rule.authz}'")
        verdict = judge.judge(identities)
        return Verdict(verdict.allowed, f"'{rule.authz}': {verdict.why}")
