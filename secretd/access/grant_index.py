# SPDX-License-Identifier: LGPL-2.1-or-later
"""The index of secret-grant objects by the identities that they can allow.

With it a question costs only a peer's own grants. `GrantIndex` knows each grant, and for each authz
object the identities that it can allow: exact ones, prefixes, or any. It makes a peer's `Granted`
from the candidates of its identities, and keeps it. A change of a grant or authz object touches
only the kept entries with one of its identities. Where a pattern or a list file may allow any
identity, entries catch up from a list of changes at their next question. The index decides nothing:
decision asks it, and it asks the authz objects.
"""

from collections import Counter
from collections.abc import Iterable

from secretd.access.rule_names import Rule, RuleNames
from secretd.limits import Tuning
from secretd.qom.authz import AuthZ, FileRules, Rules
from secretd.qom.grant import SecretGrant
from secretd.qom.sorted_ids import SortedIds
from secretd.qom.tree import ObjectTree
from secretd.qom.verdict import Reach


class Granted(RuleNames):
    """The grants of all peers with certain identities.

    ``all``: by the grant's id. ``uncacheable``: those whose authz object must be asked each time.
    ``denied``: those whose authz object has a rule that denies the peer; they matter for aliases.
    """

    def __init__(self, identities: frozenset[str], position: int) -> None:
        super().__init__()
        self.identities = identities
        self.position = position  # in the list of changes
        self.doubtful: set[str] = set()  # ids of grants that have changed
        self.all: dict[str, Rule] = {}
        self.uncacheable: dict[str, Rule] = {}
        self.denied = RuleNames()
        self._denied: dict[str, Rule] = {}

    def forget(self, grant_id: str) -> None:
        """Remove a grant, if it is there."""
        denied = self._denied.pop(grant_id, None)
        if denied is not None:
            self.denied.remove(denied)
        rule = self.all.pop(grant_id, None)
        if rule is not None and self.uncacheable.pop(grant_id, None) is None:
            self.remove(rule)

    def grant(self, rule: Rule, *, cacheable: bool) -> None:
        """Add a grant that allows, or may allow."""
        self.all[rule.id] = rule
        if cacheable:
            self.add(rule)
        else:
            self.uncacheable[rule.id] = rule

    def deny(self, rule: Rule) -> None:
        """Add a grant that denies."""
        self._denied[rule.id] = rule
        self.denied.add(rule)


class _Keys(dict[str, set[str]]):
    """Ids of authz objects by a key."""

    def note(self, key: str, authz: str) -> None:
        self.setdefault(key, set()).add(authz)

    def drop(self, key: str, authz: str) -> None:
        found = self[key]
        found.discard(authz)
        if not found:
            del self[key]


class GrantIndex:
    """The grants of a tree."""

    def __init__(self, tree: ObjectTree, tuning: Tuning) -> None:
        self._tuning = tuning
        self._tree = tree
        self.rules: dict[str, Rule] = {}
        self.sorted = SortedIds(())  # their ids
        self._by_authz: dict[str, set[str]] = {}
        self._judges: dict[str, Rules | FileRules] = {}
        # Authz objects that a grant names, by the identities that they can allow or deny.
        self._reach: dict[str, Reach] = {}
        self._exact = _Keys()
        self._prefixes = _Keys()
        self._lengths: Counter[int] = Counter()  # of the prefixes
        # The kept entries of peers.
        self._granted: dict[frozenset[str], Granted] = {}
        self._interested: dict[str, dict[Granted, None]] = {}
        self._kept = 0
        self._changes: list[str] = []
        for object_id in tree.deciding:
            self.changed(object_id)

    # --- changes

    def changed(self, object_id: str) -> None:
        """Note that a grant or authz object was added, removed or changed."""
        # 1. What it was, and what it is now. Any other object may be an authz object.
        self._judges.pop(object_id, None)
        old = self.rules.pop(object_id, None)
        record = self._tree.journal.get(object_id)
        new = None
        if record is not None and record.type == SecretGrant.number:
            properties = record.properties
            new = self.rules[object_id] = Rule(
                object_id,
                str(properties["secret"]),
                str(properties["authz"]),
                "max-reads" in properties,
                str(properties.get("credential", "")),
            )
        if old is None and new is None:
            self._authz_changed(object_id)
            return
        if old is None:
            self.sorted.add(object_id)
        elif new is None:
            self.sorted.remove(object_id)
        # 2. Kept entries of the peers that it concerns.
        for rule in filter(None, (old, new)):
            self._notify(self._reach.get(rule.authz), (object_id,))
        # 3. The grants by authz object, and the reach of those that grants name.
        if old is not None:
            grants = self._by_authz[old.authz]
            grants.discard(object_id)
            if not grants:
                del self._by_authz[old.authz]
                self._set_reach(old.authz, None)
        if new is not None:
            self._by_authz.setdefault(new.authz, set()).add(object_id)
            if new.authz not in self._reach:
                self._set_reach(new.authz, self._reach_of(new.authz))
                self._notify(self._reach.get(new.authz), (object_id,))

    def _authz_changed(self, authz: str) -> None:
        grants = self._by_authz.get(authz)
        if grants is None:
            return
        self._notify(self._reach.get(authz), grants)
        self._set_reach(authz, self._reach_of(authz))
        self._notify(self._reach.get(authz), grants)

    def _reach_of(self, authz: str) -> Reach | None:
        judge = self.judge(authz)
        return None if judge is None else judge.reach()

    def _set_reach(self, authz: str, reach: Reach | None) -> None:
        """Replace the identities that an authz object can allow."""
        old = self._reach.pop(authz, None)
        if old is not None:
            for identity in old.exact:
                self._exact.drop(identity, authz)
            for prefix in old.prefixes:
                self._prefixes.drop(prefix, authz)
                self._lengths[len(prefix)] -= 1
                if not self._lengths[len(prefix)]:
                    del self._lengths[len(prefix)]
        if reach is not None:
            self._reach[authz] = reach
            for identity in reach.exact:
                self._exact.note(identity, authz)
            for prefix in reach.prefixes:
                self._prefixes.note(prefix, authz)
                self._lengths[len(prefix)] += 1

    def _notify(self, reach: Reach | None, grants: Iterable[str]) -> None:
        """Mark grants as doubtful for the peers that an authz object can allow."""
        if reach is None:
            return
        if reach.prefixes:
            self._changes += grants
            if len(self._changes) > self._tuning.kept_changes:
                self._forget()
            return
        for identity in reach.exact:
            for granted in self._interested.get(identity, ()):
                granted.doubtful.update(grants)

    def _forget(self) -> None:
        self._granted.clear()
        self._interested.clear()
        self._changes.clear()
        self._kept = 0

    # --- questions

    def granted_to(self, identities: frozenset[str]) -> Granted:
        """Return what peers with these identities are granted now."""
        granted = self._granted.get(identities)
        if granted is None:
            return self._add(identities)
        position = len(self._changes)
        if granted.doubtful or granted.position < position:
            doubtful = granted.doubtful.union(self._changes[granted.position :])
            granted.doubtful.clear()
            granted.position = position
            for grant_id in doubtful:
                granted.forget(grant_id)
                self._consider(granted, grant_id)
        return granted

    def _add(self, identities: frozenset[str]) -> Granted:
        while self._kept and self._kept + len(identities) > self._tuning.kept_identities:
            self._drop(next(iter(self._granted)))
        granted = self._granted[identities] = Granted(identities, len(self._changes))
        self._kept += len(identities)
        for identity in identities:
            self._interested.setdefault(identity, {})[granted] = None
        for authz in self._candidates(identities):
            for grant_id in self._by_authz[authz]:
                self._consider(granted, grant_id)
        return granted

    def _drop(self, identities: frozenset[str]) -> None:
        granted = self._granted.pop(identities)
        self._kept -= len(identities)
        for identity in identities:
            entries = self._interested[identity]
            del entries[granted]
            if not entries:
                del self._interested[identity]

    def _candidates(self, identities: frozenset[str]) -> set[str]:
        """Return the authz objects that can allow or deny a peer with these identities."""
        found: set[str] = set()
        for identity in identities:
            found |= self._exact.get(identity, set())
            for length in self._lengths:
                found |= self._prefixes.get(identity[:length], set())
        return found

    def _consider(self, granted: Granted, grant_id: str) -> None:
        rule = self.rules.get(grant_id)
        judge = None if rule is None else self.judge(rule.authz)
        if rule is None or judge is None:
            return
        verdict = judge.judge(granted.identities) if judge.steady else None
        if verdict is None or verdict.allowed:
            granted.grant(rule, cacheable=judge.steady)
        elif verdict.denied:
            granted.deny(rule)

    def judge(self, authz: str) -> Rules | FileRules | None:
        """Return the rules of an authz object, None if there is none of that id."""
        judge = self._judges.get(authz)
        if judge is None:
            record = self._tree.journal.get(authz)
            kind = self._tree.type_of(authz)
            if record is None or not isinstance(kind, AuthZ):
                return None
            judge = self._judges[authz] = kind.rules(record.properties)
        return judge

    def allows(self, authz: str, identities: frozenset[str]) -> bool:
        """Return True if the authz object of that id exists and allows a peer with these
        identities.
        """
        judge = self.judge(authz)
        return judge is not None and judge.judge(identities).allowed

    def denies(self, authz: str, identities: frozenset[str]) -> bool:
        """Return True if a rule of the authz object of that id denies a peer with these
        identities.
        """
        judge = self.judge(authz)
        return judge is not None and judge.judge(identities).denied
