# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which grant lets a peer read a secret, by its own name or by its alias.

A grant names a secret, or one of its names if it is a version of an alias. Each name is judged as
that of any secret: one grant that allows is enough. Of an alias and its version one that is allowed
is enough, too; but if rules of an authz object deny the peer one of them by name, and no grant
allows it that one, the denial wins. Only decision and credential call this module.

The time of a refusal must not reveal which aliases exist. So a second name is looked up even for
what is no alias.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from secretd.access.grant_index import Granted, GrantIndex
from secretd.access.rule_names import Rule
from secretd.qom.grant import used_up
from secretd.qom.identifiers import ID_BYTES
from secretd.qom.patterns import matcher
from secretd.qom.tree import ObjectTree

_NO_VERSION: Final = ".v0"
"""The end of an id that no version has."""


class Permissions:
    """The permissions that the grants of a tree give."""

    def __init__(self, tree: ObjectTree, index: GrantIndex) -> None:
        self._tree = tree
        self._index = index

    def permitting(self, identities: frozenset[str], object_id: str) -> Rule | None:
        """Return a grant that permits reading a secret or an alias, preferably one without a
        limited number of reads; None if there is none.
        """
        granted = self._index.granted_to(identities)
        alias = self._tree.aliases.get(object_id)
        found = self._usable(granted, object_id)
        if alias is None:
            if found is None:
                self._usable(granted, object_id + _NO_VERSION)
            return found
        by_version = self._usable(granted, alias.current)
        if found is None and by_version is None:
            return None
        # A name that a grant allows is not denied; one whose grants are used up is.
        for rule, name in ((found, object_id), (by_version, alias.current)):
            if rule is None and self._denied(granted, name):
                return None
        if found is None or (found.limited and by_version is not None and not by_version.limited):
            return by_version
        return found

    def still_permits(
        self, identities: frozenset[str], grant_id: str, object_id: str, alias: str
    ) -> bool:
        """Return True if a grant still permits what it permitted, by the secret's own name or by
        ``alias``; reads that are left do not count.
        """
        rule = self._index.rules.get(grant_id)
        names = [object_id] if not alias else [object_id, alias]
        if (
            rule is None
            or not any(map(matcher(rule.secret), names))
            or self._tree.deadlines.expired(rule.id)
            or not self._index.allows(rule.authz, identities)
        ):
            return False
        return not alias or not self.is_denied(identities, alias, object_id)

    def is_denied(self, identities: frozenset[str], alias: str, version: str) -> bool:
        """Return True if a denial of an alias or of its version wins; reads that are left do not
        count.
        """
        granted = self._index.granted_to(identities)
        return any(
            self._denied(granted, name) and next(self._living(granted, name), None) is None
            for name in (alias, version)
        )

    def is_usable(self, rule: Rule) -> bool:
        """Return True if a grant has neither expired nor been used up."""
        return not self._tree.deadlines.expired(rule.id) and not (
            rule.limited and self._used_up(rule.id)
        )

    def _usable(self, granted: Granted, object_id: str) -> Rule | None:
        found = None
        for rule in self._living(granted, object_id):
            if not rule.limited:
                return rule
            if found is None and not self._used_up(rule.id):
                found = rule
        return found

    def _living(self, granted: Granted, object_id: str) -> Iterator[Rule]:
        """Yield the unexpired grants that name a secret and allow the peer."""
        asked: Iterable[Rule] = ()
        if granted.uncacheable:
            asked = [
                rule
                for rule in granted.uncacheable.values()
                if self._index.allows(rule.authz, granted.identities)
                and len(object_id) <= ID_BYTES
                and matcher(rule.secret)(object_id)
            ]
        expired = self._tree.deadlines.expired
        for rule in (*granted.naming(object_id), *asked):
            if not expired(rule.id):
                yield rule

    def _denied(self, granted: Granted, object_id: str) -> bool:
        """Return True if a grant names a secret and rules of its authz object deny the peer."""
        asked = (
            rule
            for rule in granted.uncacheable.values()
            if matcher(rule.secret)(object_id)
            and self._index.denies(rule.authz, granted.identities)
        )
        expired = self._tree.deadlines.expired
        return any(not expired(r.id) for r in (*granted.denied.naming(object_id), *asked))

    def _used_up(self, grant_id: str) -> bool:
        record = self._tree.journal.get(grant_id)
        return record is None or used_up(record)
