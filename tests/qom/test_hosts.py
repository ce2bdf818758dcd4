# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts, peers, offers and origins over restarts and reboots, and in a store that fails."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from secretd.descriptors.source import CommandLineSources
from secretd.errors import CommandError
from secretd.memory.arena import Arena
from secretd.qom.hosts import NONCE, SecretHostOptions, SecretPeerOptions
from secretd.qom.object_type import ObjectOptions
from secretd.qom.origin import place
from secretd.qom.registry import TYPES
from secretd.qom.renewal import renew
from secretd.qom.tree import ObjectTree
from tests.journal.test_restore import WINDOW, left, restored
from tests.qom.test_store import KEY, Kept

PUBLIC = "CQ" + "A" * 84 + "=="


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    """An open store for all ids, and a host with a peer, an offer and a secret from there."""
    made = Kept(tmp_path)
    await made.add("key", KEY)
    await made.declare()
    await named(made)
    yield made
    await made.end()


async def add(kept: Kept, options: ObjectOptions) -> None:
    """object-add."""
    loading = kept.tree.loading(CommandLineSources(kept.scratch))
    await kept.done(kept.tree.add(options, loading))


async def named(kept: Kept) -> None:
    """Give the host its name, and what comes with it."""
    await kept.add("host.key", "s" * 32)
    await add(kept, SecretHostOptions(id="host", name="alpha", keyid="host.key"))
    await add(kept, SecretPeerOptions(id="peer", name="beta", public=PUBLIC))
    tree = kept.tree
    offer: dict[str, object] = {"from": "beta", "secret": "s", "for": "", NONCE: "ab"}
    await kept.done(tree.store_content("offer-1", TYPES.numbered[11], offer, None, os.getuid()))
    buffer = tree.journal.arena.allocate(3)
    buffer.view[:] = b"abc"
    await kept.done(place(tree, "from-beta", "beta", buffer, os.getuid()))


def check(tree: ObjectTree) -> None:
    """All of it is known."""
    assert (tree.host, tree.peers, tree.offers) == ("host", {"beta": "peer"}, {"ab": "offer-1"})
    assert tree.origins == {"from-beta": "beta"}
    assert "host.key" in tree.pinned
    assert "host.key" in tree.own_keys


async def test_hosts_survive_a_reboot(kept: Kept) -> None:
    """By the store; the public half is the same."""
    check(kept.tree)
    record = kept.tree.journal.get("host")
    assert record is not None
    public = record.properties["public"]
    await kept.reboot()
    check(kept.tree)
    record = kept.tree.journal.get("host")
    assert record is not None
    assert record.properties["public"] == public
    with pytest.raises(CommandError, match="is in use"):
        kept.tree.delete("host.key")


async def test_hosts_survive_a_restart(tmp_path: Path) -> None:
    """By the journal; and the command line finds them equal."""
    kept = Kept(tmp_path, Arena("none", window=WINDOW))  # one that can be copied
    try:
        await named(kept)
        again = restored(left(kept.journal))
        tree = ObjectTree(again, kept.scratch, TYPES)
        check(tree)
        loading = tree.loading(CommandLineSources(kept.scratch))
        options = SecretHostOptions(id="host", name="alpha", keyid="host.key")
        assert not renew(tree, options, loading, {})
        renamed = SecretHostOptions(id="host", name="gamma", keyid="host.key")
        assert renew(tree, renamed, loading, {})
        check(tree)
        again.close()
        again.arena.close()
    finally:
        await kept.end()


async def test_a_failed_opening_leaves_no_host(kept: Kept, tmp_path: Path) -> None:
    """Nor does a store that is destroyed; what pins others goes first."""
    await kept.end()
    kept.__init__(tmp_path)  # type: ignore[misc]
    await kept.add("zz", "in the way")
    await kept.add("key", KEY)
    await kept.declare(create=False)
    assert kept.keeper.state == "open"
    await kept.add("other", "x")
    await kept.end()
    kept.__init__(tmp_path)  # type: ignore[misc]
    await kept.add("other", "another one")
    await kept.add("key", KEY)
    await kept.declare(create=False)
    assert (kept.keeper.state, "exists, and the store has another one" in kept.keeper.reason) == (
        "failed", True,
    )  # fmt: skip
    assert (kept.tree.host, kept.tree.peers) == ("", {})
    assert "host.key" not in kept.journal
    with pytest.raises(CommandError, match="its row in .* remains until the store is open"):
        await kept.delete("other")
    await kept.keeper.unlock()
    check(kept.tree)
    await kept.keeper.destroy()
    assert (kept.tree.host, kept.secrets()) == ("", {})
