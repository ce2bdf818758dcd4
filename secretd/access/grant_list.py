# SPDX-License-Identifier: LGPL-2.1-or-later
"""The grants as query-secret-grants lists them: which secrets, to whom, and what is left.

It only reads the tree and the index of grants, and decides nothing. decision calls it.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple, NotRequired, TypedDict

from secretd.access.grant_index import GrantIndex
from secretd.access.rule_names import Rule
from secretd.qom.grant import READS, used_up
from secretd.qom.patterns import matcher
from secretd.qom.sorted_ids import IDS_PER_LOOK
from secretd.qom.tree import ObjectTree
from secretd.qom.verdict import Verdict
from secretd.wire import encoder

IDENTITIES_BYTES: Final = 8 << 10
"""Bytes of the JSON text of identities that are listed for one grant; ``more`` counts the others.
"""

GrantInfo = TypedDict(
    "GrantInfo",
    {
        "id": str,
        "secret": str,
        "authz": str,
        "allows": list[str],
        "denies": NotRequired[list[str]],
        "more": NotRequired[int],
        "fault": NotRequired[str],
        "credential": NotRequired[str],
        "max-reads": NotRequired[int],
        "reads-left": NotRequired[int],
        "expires-in": NotRequired[int],
    },
)
"""An entry of query-secret-grants.

``allows``, ``denies``: the identities and patterns that the authz object names; ``more``:
the number of those that are left out; ``fault``: why the authz object allows nobody now.
"""


def listed_grants(
    tree: ObjectTree,
    index: GrantIndex,
    after: str,
    secret: str | None,
    identities: frozenset[str] | None,
) -> Iterator[GrantInfo | None]:
    """Yield the grants after the id ``after``, in order; None where others should have their turn.

    ``secret``: only grants for this secret; ``identities``: only those that allow such a client.
    """
    while found := index.sorted.after(after, IDS_PER_LOOK):
        for grant_id in found:
            rule = index.rules.get(grant_id)
            if (
                rule is None
                or tree.deadlines.expired(grant_id)
                or (secret is not None and not matcher(rule.secret)(secret))
                or (identities is not None and not index.allows(rule.authz, identities))
            ):
                continue
            yield _info(tree, index, rule)
        after = found[-1]
        yield None


def _info(tree: ObjectTree, index: GrantIndex, rule: Rule) -> GrantInfo:
    # 1. To whom.
    info: GrantInfo = {"id": rule.id, "secret": rule.secret, "authz": rule.authz, "allows": []}
    judge = index.judge(rule.authz)
    if judge is None:
        info["fault"] = f"there is no authz object '{rule.authz}'"
    else:
        allows, denies, fault = judge.named()
        info["allows"], more = _cut(allows)
        if denies:
            info["denies"], more_denied = _cut(denies)
            more += more_denied
        if more:
            info["more"] = more
        if fault:
            info["fault"] = fault
    # 2. What is left.
    if rule.credential:
        info["credential"] = rule.credential
    record = tree.journal.get(rule.id)
    assert record is not None
    limit, reads = record.properties.get("max-reads"), record.properties.get(READS, 0)
    if isinstance(limit, int) and isinstance(reads, int):
        info["max-reads"] = limit
        info["reads-left"] = max(0, limit - reads)
    left = tree.deadlines.remaining(rule.id)
    if left is not None:
        info["expires-in"] = left
    return info


def _cut(names: list[str]) -> tuple[list[str], int]:
    """Return the names that have room, and the number of the others."""
    room = IDENTITIES_BYTES // 2
    for kept, name in enumerate(names):
        room -= len(encoder.string(name)) + 2
        if room < 0:
            return names[:kept], len(names) - kept
    return names, 0


class Considered(NamedTuple):
    """The verdict of one secret-grant about a peer, with its reason."""

    grant: str
    allowed: bool
    reason: str


def explained_grants(
    tree: ObjectTree, index: GrantIndex, identities: frozenset[str], object_id: str
) -> list[Considered]:
    """Return the verdict of each secret-grant for this id, and for the current version of an alias,
    about a client with some identities.
    """
    names = {object_id, tree.resolved(object_id)}
    return [
        Considered(rule.id, *_verdict(tree, index, rule, identities)[:2])
        for rule in sorted(index.rules.values())
        if any(map(matcher(rule.secret), names))
    ]


def _verdict(
    tree: ObjectTree, index: GrantIndex, rule: Rule, identities: frozenset[str]
) -> Verdict:
    if tree.deadlines.expired(rule.id):
        return Verdict(False, "the grant has expired")
    record = tree.journal.get(rule.id)
    if rule.limited and (record is None or used_up(record)):
        return Verdict(False, "the grant has no reads left")
    judge = index.judge(rule.authz)
    if judge is None:
        return Verdict(False, f"there is no authz object '{rule.authz}'")
    verdict = judge.judge(identities)
    return verdict._replace(why=f"'{rule.authz}': {verdict.why}")
