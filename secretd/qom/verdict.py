# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an authz object says: about a peer, about whom it can say something, and whom it names.

qom.authz makes these values, and access uses them.
"""

from typing import Final, NamedTuple


class Reach(NamedTuple):
    """The identities that an authz object can allow, or deny by a rule: ``exact`` ones, and those
    with one of ``prefixes``; the prefix "" stands for any.
    """

    exact: frozenset[str]
    prefixes: frozenset[str]


ANY: Final = Reach(frozenset(), frozenset(("",)))


class Verdict(NamedTuple):
    """A decision about a peer, and its reason; ``denied``: a rule denies, not policy or fault."""

    allowed: bool
    why: str
    denied: bool = False


class Named(NamedTuple):
    """The identities and patterns that rules name. ``fault``: why they cannot be used, or ""."""

    allows: list[str]
    denies: list[str]
    fault: str


SIGNED: Final = ("host:", "publisher:")
"""The kinds of identities that signatures prove, and not the kernel. Only a rule that begins with
the kind allows them: never `*`, and no policy.
"""
