# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rotations against a small model that was written from docs/design.md alone.

Random stages, commits, rollbacks, retirements, deletions, expiries, grants, denials, reads and
restarts, of two aliases with several versions and consumers. After each step: what each reader gets
by each name is what the model says, a release that has begun keeps its version until that is
deleted, the version that readers were promised is there, and those are missing that have not read.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secretd.access.decision import Access, Grant
from secretd.access.peer import Peer, SocketRole
from secretd.audit.log import Audit
from secretd.audit.records import Subject
from secretd.descriptors.source import CommandLineSources
from secretd.errors import AccessDenied, CommandError
from secretd.journal.journal import Journal
from secretd.memory.arena import Arena
from secretd.qom import rotation
from secretd.qom.registry import TYPES, AnyOptions
from secretd.qom.tree import ObjectTree
from tests.journal.test_restore import WINDOW, left, restored
from tests.support.needs import ARENA_LEVEL

pytestmark = pytest.mark.slow  # it tries many cases

ALIASES = ["a", "b"]
VERSIONS = [f"{alias}.v{number}" for alias in ALIASES for number in (1, 2, 3)]
NAMES = [*ALIASES, *VERSIONS, "x"]
READERS = {
    "uid:33": frozenset({"uid:33", "gid:33"}),
    "uid:44": frozenset({"uid:44"}),
    "unit:u.service": frozenset({"uid:0", "unit:u.service"}),
}
PATTERNS = [*NAMES, "a*", "a.v*", "b.v?", "*"]


class Model:
    """What there is. ``secrets``: contents by id; ``aliases``: their versions; ``grants``: names,
    and what each rule says about each reader; ``seen``: what each reader has read last.
    """

    def __init__(self) -> None:
        self.secrets: dict[str, bytes] = {"x": b"x"}
        self.aliases: dict[str, dict[str, str]] = {}
        self.consumers: dict[str, list[str]] = {}
        self.grants: dict[str, tuple[str, dict[str, str]]] = {}
        self.seen: dict[str, dict[str, str]] = {}

    def _covers(self, pattern: str, name: str) -> bool:
        if pattern.endswith("*"):
            return name.startswith(pattern[:-1])
        if pattern.endswith("?"):
            return len(name) == len(pattern) and name.startswith(pattern[:-1])
        return name == pattern

    def _verdicts(self, reader: str, name: str) -> set[str]:
        return {
            verdicts.get(reader, "silent")
            for pattern, verdicts in self.grants.values()
            if self._covers(pattern, name)
        }

    def may(self, reader: str, name: str) -> bool:
        """By its name or its version's, unless one of the two is denied and not allowed."""
        names = [name]
        if name in self.aliases:
            names.append(self.aliases[name]["current"])
        verdicts = [self._verdicts(reader, each) for each in names]
        if len(names) == 2 and any("deny" in v and "allow" not in v for v in verdicts):
            return False
        return any("allow" in v for v in verdicts)

    def got(self, name: str) -> str:
        """What a permitted reader of a name gets."""
        return self.aliases[name]["current"] if name in self.aliases else name

    def read(self, reader: str, name: str) -> None:
        """A permitted reader has got it."""
        version = self.got(name)
        alias = version[0]
        state = self.aliases.get(alias)
        if state and version in (state["current"], state["previous"]):
            self.seen.setdefault(alias, {})[reader] = version

    def remove(self, name: str) -> None:
        """A secret goes. Another one of that id, later, is one that nobody has read."""
        del self.secrets[name]
        for alias, seen in self.seen.items():
            self.seen[alias] = {reader: each for reader, each in seen.items() if each != name}

    def set(self, alias: str, new: Mapping[str, str]) -> bool:
        """Compare and set, with the right expectation."""
        after = {**self.aliases[alias], **new}
        given = [version for version in after.values() if version]
        moves = after["current"] != self.aliases[alias]["current"]
        if len(given) != len(set(given)) or (moves and after["current"] not in self.secrets):
            return False
        self.aliases[alias] = after
        kept = (after["current"], after["previous"])
        self.seen[alias] = {r: v for r, v in self.seen.get(alias, {}).items() if v in kept}
        return True

    def missing(self, alias: str) -> list[str]:
        """The awaited readers that have not read the current version."""
        seen, current = self.seen.get(alias, {}), self.aliases[alias]["current"]
        awaited = self.consumers.get(alias) or sorted(seen)
        return [reader for reader in awaited if seen.get(reader) != current]

    def is_current(self, name: str) -> bool:
        """An alias has it as its current version."""
        return any(state["current"] == name for state in self.aliases.values())


verdicts = st.dictionaries(st.sampled_from(list(READERS)), st.sampled_from(["allow", "deny"]))
names, versions, aliases = map(st.sampled_from, (NAMES, VERSIONS, ALIASES))
consumers = st.lists(st.sampled_from(list(READERS)), max_size=2, unique=True)
roles = st.sampled_from(["current", "staged", "previous"])
steps = st.one_of(
    st.tuples(st.just("add"), versions),
    st.tuples(st.just("alias"), aliases, st.integers(1, 3), consumers),
    st.tuples(st.just("stage"), aliases, st.integers(1, 3)),
    st.tuples(st.just("commit"), aliases),
    st.tuples(st.just("rollback"), aliases),
    st.tuples(st.just("retire"), aliases),
    st.tuples(st.just("set"), aliases, roles, st.one_of(st.just(""), versions)),
    st.tuples(st.just("del"), st.sampled_from([*NAMES, "g0", "g1", "g2"])),
    st.tuples(st.just("expire"), versions),
    st.tuples(st.just("grant"), st.integers(0, 2), st.sampled_from(PATTERNS), verdicts),
    st.tuples(st.just("grant"), st.integers(0, 2), st.sampled_from(PATTERNS), verdicts),
    st.tuples(st.just("read"), st.sampled_from(list(READERS)), names),
    st.tuples(st.just("read"), st.sampled_from(list(READERS)), aliases),
    st.tuples(st.just("restart")),
)


class Real:
    """The daemon's objects and decisions, without sockets."""

    def __init__(self) -> None:
        self.scratch = Arena(ARENA_LEVEL)
        self.running: list[Grant] = []
        self.withdrawn: set[str] = set()
        self.take(Journal(Arena("none", window=WINDOW)))  # one that can be copied
        self.add({"qom-type": "secret", "id": "x", "data": "x"})

    def take(self, journal: Journal) -> None:
        """Begin with a journal."""
        self.journal = journal
        self.tree = ObjectTree(journal, self.scratch, TYPES)
        self.access = Access(self.tree, Audit("none"))
        self.tree.subscribe(removal=self.withdrawn.add)

    def restart(self) -> None:
        """What a new process does; releases end with the old one."""
        self.running.clear()
        new = restored(left(self.journal))
        self.close(scratch=False)
        self.take(new)

    def add(self, members: dict[str, Any]) -> None:
        """object-add."""
        options = msgspec.json.decode(msgspec.json.encode(members), type=AnyOptions)
        self.tree.add(options, self.tree.loading(CommandLineSources(self.scratch)))

    def delete(self, name: str) -> None:
        """object-del."""
        self.tree.check_deletable(name)
        self.tree.delete(name)

    def set(self, alias: str, new: Mapping[str, str]) -> None:
        """secret-alias-set, with what is there as the expectation."""
        found = self.tree.aliases[alias]
        expect = {n: getattr(found, n) for n in ("current", "staged", "previous")}
        rotation.set_alias(self.tree, alias, expect, new, None)

    def close(self, *, scratch: bool = True) -> None:
        """Close everything."""
        self.journal.close()
        self.journal.arena.close()
        if scratch:
            self.scratch.close()


def attempt(action: Callable[[], object]) -> bool:
    """False if it was refused."""
    try:
        action()
    except CommandError:
        return False
    return True


def peer_of(reader: str) -> Peer:
    """A reader as the kernel describes it."""
    unit = reader if reader.startswith("unit:") else None
    uid = 0 if unit else int(reader.removeprefix("uid:"))
    return Peer(uid, uid, 1, SocketRole.CLIENT, READERS[reader], unit)


def released(real: Real, reader: str, name: str) -> Grant | None:
    """What a reader gets by a name; None if it is refused, or there is no such secret."""
    try:
        return real.access.check(peer_of(reader), Subject("client", {}), name)
    except AccessDenied:
        return None


def next_versions(kind: str, name: str, state: dict[str, str], more: list[Any]) -> dict[str, str]:
    """What an administrator's step sets."""
    if kind == "stage":
        return {"staged": f"{name}.v{more[0]}"}
    if kind == "commit" and state["staged"]:
        return {"current": state["staged"], "staged": "", "previous": state["current"]}
    if kind == "rollback" and state["previous"]:
        return {"current": state["previous"], "previous": state["current"]}
    if kind == "set":
        return {more[0]: more[1]}
    return {"previous": ""}


def play(real: Real, model: Model, step: tuple[Any, ...]) -> None:
    """Carry out a step in both."""
    kind, *of = step
    if kind == "add":
        name = of[0]
        content = os.urandom(6).hex().encode()
        members = {"qom-type": "secret", "id": name, "data": content.decode()}
        if attempt(lambda: real.add(members)):
            assert name not in model.secrets
            model.secrets[name] = content
    elif kind == "alias":
        name, number, awaited = of
        members = {"qom-type": "secret-alias", "id": name, "current": f"{name}.v{number}"}
        if attempt(lambda: real.add({**members, "consumers": awaited})):
            assert name not in model.aliases
            model.aliases[name] = {"current": f"{name}.v{number}", "staged": "", "previous": ""}
            model.consumers[name] = awaited
            model.seen[name] = {}
    elif kind in ("stage", "commit", "rollback", "retire", "set"):
        name, *more = of
        if name not in model.aliases:
            assert name not in real.tree.aliases
            return
        state = model.aliases[name]
        new = next_versions(kind, name, state, more)
        # Another alias' version is never accepted, and neither is none as the current one.
        foreign = any(v and not v.startswith(f"{name}.") for v in new.values())
        accepted = not foreign and new.get("current", "x") != "" and model.set(name, new)
        assert attempt(lambda: real.set(name, new)) is accepted
    elif kind == "del":
        name = of[0]
        known = name in model.secrets or name in model.aliases or name in model.grants
        assert attempt(lambda: real.delete(name)) is (known and not model.is_current(name))
        if not model.is_current(name):
            if name in model.secrets:
                model.remove(name)
            for place in (model.aliases, model.grants):
                place.pop(name, None)
    elif kind == "expire":
        if of[0] in model.secrets:
            real.tree.delete(of[0])  # as monitor.core.expire does
            model.remove(of[0])
    elif kind == "grant":
        number, pattern, says = of
        rules = [{"match": r, "policy": p} for r, p in says.items()]
        for name, members in (
            (f"l{number}", {"qom-type": "authz-list", "rules": rules}),
            (f"g{number}", {"qom-type": "secret-grant", "secret": pattern, "authz": f"l{number}"}),
        ):
            if name in real.journal:
                real.tree.delete(name)
            real.add({**members, "id": name})
        model.grants[f"g{number}"] = (pattern, says)
    elif kind == "read":
        reader, name = of
        if model.may(reader, name) and model.got(name) in model.secrets:
            grant = released(real, reader, name)
            assert grant is not None
            assert grant.object_id == model.got(name)
            assert grant.alias == (name if name in model.aliases else "")
            real.withdrawn.discard(grant.object_id)
            real.running.append(grant)
            real.access.delivered(grant)
            model.read(reader, name)
    else:
        real.restart()


def check(real: Real, model: Model) -> None:
    """Compare everything."""
    assert set(real.tree.aliases) == set(model.aliases)
    # 1. Every reader gets what it may have, by every name, and nothing else.
    for reader in READERS:
        for name in NAMES:
            if not model.may(reader, name):
                assert released(real, reader, name) is None
                assert not real.access.may_read(peer_of(reader), name)
                continue
            assert real.access.may_read(peer_of(reader), name)
            if model.got(name) in model.secrets:
                grant = released(real, reader, name)
                assert grant is not None
                assert bytes(grant.plaintext) == model.secrets[model.got(name)]
            else:
                assert not attempt(lambda r=reader, n=name: released(real, r, n))  # type: ignore[misc]
    # 2. A release that has begun keeps its version, whatever the alias names now.
    for grant in real.running:
        if grant.object_id not in real.withdrawn:
            assert bytes(grant.plaintext) == model.secrets[grant.object_id]
            reader = grant.peer.unit or f"uid:{grant.peer.uid}"
            if grant.alias and grant.alias in model.aliases:
                # Grants may have changed since; the alias that was read by has moved on or not.
                names_ = [grant.alias, grant.object_id]
                seen = [model._verdicts(reader, each) for each in names_]
                denied = any("deny" in v and "allow" not in v for v in seen)
                terms = model.grants.get(grant.rule or "")
                by_rule = terms is not None and any(model._covers(terms[0], n) for n in names_)
                allowed = by_rule and terms is not None and terms[1].get(reader) == "allow"
                assert real.access.holds(grant) is (allowed and not denied)
    # 3. The missing.
    for alias in model.aliases:
        assert sorted(real.tree.aliases[alias].missing) == sorted(model.missing(alias))


@settings(max_examples=400, deadline=None)
@given(st.lists(steps, min_size=10, max_size=45))
def test_readers_get_what_the_model_says(sequence: list[tuple[Any, ...]]) -> None:
    """After every step; nothing that was promised is lost, and no grant is lent."""
    real, model = Real(), Model()
    try:
        for step in (("add", "a.v1"), ("alias", "a", 1, []), *sequence):
            play(real, model, step)
            check(real, model)
    finally:
        real.close()
