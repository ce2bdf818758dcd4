# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules by the ids and patterns that they name, so that a question costs only those that fit.

grant_index keeps one for the grants that allow a peer, and one for those that deny it.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from secretd.qom.identifiers import ID_BYTES
from secretd.qom.patterns import is_pattern, literal_prefix, matcher
from secretd.qom.sorted_ids import IDS_PER_LOOK, SortedIds


class Rule(NamedTuple):
    """A secret-grant as the tree has it.

    ``secret``: an id or a pattern; ``authz``: the id of the authz object. ``limited``: it counts
    reads. ``credential``: the name by which units know the secret, "" for its id only.
    """

    id: str
    secret: str
    authz: str
    limited: bool
    credential: str


class RuleNames:
    """Rules by name."""

    def __init__(self) -> None:
        self._exact: dict[str, dict[str, Rule]] = {}  # by the secret's id
        self._patterns: dict[str, dict[str, Rule]] = {}  # by the pattern's literal prefix
        self._lengths: Counter[int] = Counter()  # of these prefixes
        self._sorted = SortedIds(())  # the keys of _exact

    def remove(self, rule: Rule) -> None:
        """Remove a rule that is there."""
        key, place = self._place(rule)
        place[key].pop(rule.id)
        if not place[key]:
            del place[key]
            if place is self._exact:
                self._sorted.remove(key)
            else:
                self._lengths[len(key)] -= 1
                self._lengths += Counter()  # without zeros

    def add(self, rule: Rule) -> None:
        """Add a rule."""
        key, place = self._place(rule)
        if key not in place:
            place[key] = {}
            if place is self._exact:
                self._sorted.add(key)
            else:
                self._lengths[len(key)] += 1
        place[key][rule.id] = rule

    def _place(self, rule: Rule) -> tuple[str, dict[str, dict[str, Rule]]]:
        if is_pattern(rule.secret):
            return literal_prefix(rule.secret), self._patterns
        return rule.secret, self._exact

    @property
    def prefixes(self) -> set[str]:
        """The literal prefixes of the patterns."""
        return set(self._patterns)

    def exact_after(self, object_id: str) -> Iterator[str | None]:
        """Yield, in order, the ids after ``object_id`` that rules name without a pattern; None
        after each IDS_PER_LOOK.
        """
        while found := self._sorted.after(object_id, IDS_PER_LOOK):
            yield from found
            yield None
            object_id = found[-1]

    def names(self, object_id: str) -> bool:
        """Return True if a rule covers this secret."""
        if object_id in self._exact:
            return True
        for length in self._lengths:
            rules = self._patterns.get(object_id[:length])
            if rules is not None and any(matcher(r.secret)(object_id) for r in rules.values()):
                return True
        return False

    def naming(self, object_id: str) -> Iterator[Rule]:
        """Yield the rules that cover a secret."""
        yield from self._exact.get(object_id, {}).values()
        if len(object_id) > ID_BYTES:
            return  # no object has such an id, and matching it would take long
        for length in self._lengths:
            for rule in self._patterns.get(object_id[:length], {}).values():
                if matcher(rule.secret)(object_id):
                    yield rule
