# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's decisions against a small model, written from QEMU's documentation
(docs/system/authz.rst).

Random objects, rules, peers, and changes one after the other; after each the decision on every peer
and secret is the model's, also what query-secrets and events go by, and what secret-explain says.
"""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secretd.access.decision import Access
from secretd.access.peer import Peer, SocketRole
from secretd.audit.log import Audit
from secretd.audit.records import Subject
from secretd.descriptors.source import CommandLineSources
from secretd.errors import AccessDenied, CommandError
from secretd.journal.journal import Journal
from secretd.memory.arena import Arena
from secretd.qom.paths import Paths
from secretd.qom.patterns import is_pattern, matcher
from secretd.qom.registry import TYPES, AnyOptions
from secretd.qom.tree import ObjectTree
from secretd.wire.parser import Text
from tests.support.needs import ARENA_LEVEL

pytestmark = pytest.mark.slow  # it starts processes, or tries many cases

SECRETS = ["a", "ab", "web.key", "web.cert", "x"]
IDENTITIES = ["uid:0", "uid:33", "gid:33", "gid:44", "unit:web.service", "user-unit:33/web.service"]
PATTERNS = [*IDENTITIES, "uid:*", "gid:?3", "*", "unit:*.service", "unit:?eb*", "uid:3", ""]
IDS = [*SECRETS, "a*", "web.*", "*", "?", "a?", "w*y", "web.k?y", "*e*e*"]
PEERS = [
    frozenset(identities)
    for identities in (
        {"uid:33"}, {"uid:33", "gid:33", "unit:web.service"}, {"uid:44", "gid:44"},
        {"uid:33", "user-unit:33/web.service"}, set(),
    )
]  # fmt: skip

# --- the model


def fits(pattern: str, text: str) -> bool:
    """Shell-like: * is any text, ? one character."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return fits(pattern[1:], text) or bool(text and fits(pattern, text[1:]))
    return bool(text) and pattern[0] in ("?", text[0]) and fits(pattern[1:], text[1:])


class Model:
    """What there is, and what it means."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}

    def authz_allows(self, name: str, identities: frozenset[str]) -> bool:
        """An authorization object, which may be missing, or no such object."""
        found = self.objects.get(name, {})
        if found.get("qom-type") == "authz-simple":
            return found["identity"] in identities
        if found.get("qom-type") != "authz-list":
            return False
        for rule in found.get("rules", []):
            exact = rule.get("format", "exact") == "exact"
            for identity in sorted(identities):
                if identity == rule["match"] if exact else fits(rule["match"], identity):
                    return bool(rule["policy"] == "allow")
        return bool(found.get("policy", "deny") == "allow")

    def grants(self, identities: frozenset[str], secret: str) -> list[dict[str, Any]]:
        """The grants by which a peer may read a secret."""
        return [
            grant
            for grant in self.objects.values()
            if grant["qom-type"] == "secret-grant"
            and fits(grant["secret"], secret)
            and grant.get("reads", 0) < grant.get("max-reads", 1 << 40)
            and self.authz_allows(grant["authz"], identities)
        ]

    def read(self, identities: frozenset[str], secret: str) -> bool:
        """Read a secret; a grant that counts is used only where none does not."""
        found = self.grants(identities, secret)
        if not found or any("max-reads" not in grant for grant in found):
            return bool(found)
        return True  # which of them counts it is the daemon's affair


# --- what happens

identities = st.sampled_from(PATTERNS)
policies = st.sampled_from(["allow", "deny"])
rules = st.lists(
    st.fixed_dictionaries(
        {"match": identities, "policy": policies},
        optional={"format": st.sampled_from(["exact", "glob"])},
    ),
    max_size=4,
)
AUTHZ, GRANTS = ["a0", "a1", "l0", "l1"], ["g0", "g1", "g2"]
simple = st.fixed_dictionaries(
    {"qom-type": st.just("authz-simple"), "id": st.sampled_from(AUTHZ), "identity": identities}
)
lists = st.fixed_dictionaries(
    {"qom-type": st.just("authz-list"), "id": st.sampled_from(AUTHZ)},
    optional={"policy": policies, "rules": rules},
)
grants = st.fixed_dictionaries(
    {
        "qom-type": st.just("secret-grant"),
        "id": st.sampled_from(GRANTS),
        "secret": st.sampled_from(IDS),
        "authz": st.sampled_from([*AUTHZ, "g0", "nope"]),
    },
    optional={"max-reads": st.integers(1, 2)},
)
objects = st.one_of(simple, lists, grants)
steps = st.one_of(
    st.tuples(st.just("add"), objects),
    st.tuples(st.just("add"), objects),
    st.tuples(st.just("del"), st.sampled_from([*AUTHZ, *GRANTS])),
    st.tuples(st.just("set"), st.sampled_from(GRANTS), st.just("secret"), st.sampled_from(IDS)),
    st.tuples(st.just("set"), st.sampled_from(GRANTS), st.just("authz"), st.sampled_from(AUTHZ)),
    st.tuples(st.just("set"), st.sampled_from(AUTHZ), st.just("identity"), identities),
    st.tuples(st.just("set"), st.sampled_from(AUTHZ), st.just("policy"), policies),
    st.tuples(st.just("read"), st.sampled_from(PEERS), st.sampled_from(SECRETS)),
)


class Real:
    """The daemon's objects and decisions, without sockets."""

    def __init__(self) -> None:
        self.scratch = Arena(ARENA_LEVEL)
        self.journal = Journal(Arena(ARENA_LEVEL))
        self.tree = ObjectTree(self.journal, self.scratch, TYPES)
        self.access = Access(self.tree, Audit("none"))
        for name in SECRETS:
            self.add({"qom-type": "secret", "id": name, "data": "letmein"})

    def add(self, members: dict[str, Any]) -> None:
        options = msgspec.json.decode(msgspec.json.encode(members), type=AnyOptions)
        assert self.tree.add(options, self.tree.loading(CommandLineSources(self.scratch))) in (0, 7)

    def close(self) -> None:
        self.journal.close()
        self.journal.arena.close()
        self.scratch.close()


def attempt(action: Callable[[], object]) -> bool:
    try:
        action()
    except CommandError:
        return False
    return True


def play(real: Real, model: Model, step: tuple[Any, ...]) -> None:
    """Carry out a step in both."""
    kind, *given_ = step
    if kind == "add":
        (members,) = given_
        if attempt(lambda: real.add(members)):
            assert members["id"] not in model.objects
            model.objects[members["id"]] = dict(members)
    elif kind == "del":
        (name,) = given_
        assert attempt(lambda: real.tree.delete(name)) is (name in model.objects)
        model.objects.pop(name, None)
    elif kind == "set":
        name, member, value = given_
        data = memoryview(bytearray(f'"{value}"'.encode()))
        text = Text(data, 0, len(data))
        if attempt(lambda: Paths(real.tree).set(f"/objects/{name}", member, text)):
            model.objects[name][member] = value
    else:
        peer, secret = given_
        assert read(real, peer, secret) is model.read(peer, secret)
        for name, found in model.objects.items():
            if "max-reads" in found:
                found["reads"] = Paths(real.tree).get(f"/objects/{name}", "reads")


def read(real: Real, identities: frozenset[str], secret: str) -> bool:
    peer = Peer(1000, 1000, 1, SocketRole.CLIENT, identities)
    try:
        grant = real.access.check(peer, Subject("client", {}), secret)
    except AccessDenied:
        return False
    assert bytes(grant.plaintext) == b"letmein"
    return True


@settings(max_examples=300, deadline=None)
@given(st.lists(objects, min_size=4, max_size=10), st.lists(steps, max_size=25))
def test_every_decision_is_the_models(
    first: list[dict[str, Any]], sequence: list[tuple[Any, ...]]
) -> None:
    """After every change, for all peers and secrets, whoever was asked before."""
    real, model = Real(), Model()
    try:
        for step in (*(("add", members) for members in first), *sequence):
            total = reads(model)
            play(real, model, step)
            if step[0] == "read":
                # A read counts once at most, and never where a grant without a limit permits it.
                assert reads(model) - total in (0, 1)
            for peer in PEERS:
                known = Peer(1000, 1000, 1, SocketRole.CLIENT, peer)
                wanted = [s for s in SECRETS if model.grants(peer, s)]
                assert list(real.access.readable(known, SECRETS)) == wanted
                for secret in SECRETS:
                    explained = {c.grant for c in real.access.explain(peer, secret) if c.allowed}
                    assert explained == {g["id"] for g in model.grants(peer, secret)}
    finally:
        real.close()


def reads(model: Model) -> int:
    return sum(found.get("reads", 0) for found in model.objects.values())


texts = st.text(alphabet="ab*?.é\n", max_size=12)


@settings(max_examples=1000, deadline=None)
@given(texts, texts)
def test_patterns_are_the_models(pattern: str, text: str) -> None:
    """Any text against any pattern."""
    assert matcher(pattern)(text) is fits(pattern, text)
    assert is_pattern(pattern) is any(c in pattern for c in "*?")


def combinations() -> Iterator[tuple[str, str]]:
    for size in (10, 1000, 100_000):
        yield "*a" * 200 + "b", "a" * size
        yield "a*" * 200 + "?b", "a" * size
        yield "*" * 300 + "b", "a" * size
        yield "?" * 300 + "*?*", "a" * size


def test_no_pattern_takes_long() -> None:
    """Those that make others go back and forth for ever."""
    for pattern, text in combinations():
        expected = pattern.endswith("*") and len(text) > 300
        assert matcher(pattern)(text) is expected
