# SPDX-License-Identifier: LGPL-2.1-or-later
"""Secrets between two hosts: offers, records, and a carrier that tries everything."""

import base64
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from secretd.audit.log import Audit
from secretd.limits import Tuning
from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served, served
from tests.support.needs import need_root

SECRET = "letmein-" * 8


class Pair(NamedTuple):
    """The hosts alpha, which has the secret disk0, and beta; each knows the other."""

    alpha: AsyncClient
    beta: AsyncClient
    alpha_served: Served
    beta_served: Served

    async def offer(self, **more: str) -> str:
        """Beta offers to take disk0."""
        arguments = {"from": "alpha", "id": "disk0", **more}
        return (await self.beta.ok("secret-offer", arguments))["offer"]

    async def wrap(self, offer: str, object_id: str = "disk0") -> str:
        """Alpha wraps it."""
        return (await self.alpha.ok("secret-wrap", {"id": object_id, "offer": offer}))["record"]

    async def record(self) -> str:
        """A record that beta would accept."""
        return await self.wrap(await self.offer())


async def host(client: AsyncClient, name: str) -> str:
    """Give a host a name; return its public half."""
    await client.ok("secret-generate", {"id": "host.key", "size": 32})
    options = {"qom-type": "secret-host", "id": "host", "name": name, "keyid": "host.key"}
    await client.ok("object-add", options)
    (found,) = await client.ok("query-secret-host")
    return found["public"]


async def knows(client: AsyncClient, name: str, public: str) -> None:
    """Pin another host."""
    options = {"qom-type": "secret-peer", "id": f"peer-{name}", "name": name, "public": public}
    await client.ok("object-add", options)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """Two hosts in one loop."""
    async with AsyncExitStack() as stack:
        made = []
        for name in ("alpha", "beta"):
            (tmp_path / name).mkdir()
            made.append(await stack.enter_async_context(served(tmp_path / name, Tuning())))
        alpha, beta = [await each.connect() for each in made]
        await knows(beta, "alpha", await host(alpha, "alpha"))
        await knows(alpha, "beta", await host(beta, "beta"))
        await alpha.add("disk0", data=SECRET)
        rules = [{"match": "host:beta", "policy": "allow"}]
        await alpha.ok("object-add", {"qom-type": "authz-list", "id": "hosts", "rules": rules})
        await alpha.grant("g", "disk*", "hosts")
        yield Pair(alpha, beta, *made)


async def test_a_secret_goes_to_another_host(pair: Pair) -> None:
    """Once; it has an origin there, and the offer is gone."""
    record = await pair.record()
    accepted = await pair.beta.ok("secret-accept", {"record": record})
    assert accepted == {"id": "disk0", "size": 64, "from": "alpha"}
    assert await pair.beta.read("disk0") == SECRET.encode()
    listed = {each["id"]: each for each in await pair.beta.secrets()}
    assert listed["disk0"]["origin"] == "host:alpha"
    assert "origin" not in listed["host.key"]
    words = await pair.beta.fail("secret-accept", {"record": record})
    assert "it answers no offer that can be used; an offer is used once" in words
    assert pair.beta_served.tree.offers == {}


async def test_a_large_secret_goes_through_descriptors(pair: Pair) -> None:
    """To the record and from it."""
    await pair.alpha.ok("object-del", {"id": "disk0"})
    await pair.alpha.add("disk0", data="x" * 500_000)
    offer = await pair.offer()
    assert "more than the limit" in await pair.alpha.fail(
        "secret-wrap", {"id": "disk0", "offer": offer}
    )
    fd = os.memfd_create("record")
    try:
        await pair.alpha.ok("getfd", {"fdname": "r"}, (fd,))
        wrapped = await pair.alpha.ok("secret-wrap", {"id": "disk0", "offer": offer, "fdname": "r"})
        assert wrapped["size"] == os.fstat(fd).st_size
        added = await pair.beta.ok("add-fd", None, (fd,))
        file = f"/dev/fdset/{added['fdset-id']}"
        assert (await pair.beta.ok("secret-accept", {"file": file}))["size"] == 500_000
    finally:
        os.close(fd)
    words = await pair.beta.fail("secret-accept", {"file": file, "record": "x"})
    assert words == "Either 'record' or 'file' must be provided"


async def test_carriers_need_only_the_client_sockets(pair: Pair) -> None:
    """Any process may carry; it can neither read nor offer."""
    need_root()
    offer = await pair.offer()
    at_alpha = await pair.alpha_served.connect(role="client", uid=1001)
    at_beta = await pair.beta_served.connect(role="client", uid=1002)
    assert "has not been found" in await at_beta.fail("secret-offer", {"from": "alpha", "id": "x"})
    assert await at_alpha.ok("query-secrets") == []
    record = (await at_alpha.ok("secret-wrap", {"id": "disk0", "offer": offer}))["record"]
    accepted = await at_beta.ok("secret-accept", {"record": record})
    assert accepted["id"] == "disk0"
    usage = await pair.beta.ok("query-secret-usage", {"id": "disk0"})
    assert usage["uid"] == os.getuid()  # of whoever made the offer
    assert await at_beta.ok("query-secrets") == []


@pytest.mark.parametrize(
    ("rules", "policy", "allowed"),
    [
        ([{"match": "host:beta", "policy": "allow"}], "deny", True),
        ([{"match": "host:b*", "policy": "allow", "format": "glob"}], "deny", True),
        ([{"match": "host:*", "policy": "allow", "format": "glob"}], "deny", True),
        ([{"match": "*", "policy": "allow", "format": "glob"}], "deny", False),
        ([{"match": "*beta", "policy": "allow", "format": "glob"}], "deny", False),
        ([{"match": "?ost:beta", "policy": "allow", "format": "glob"}], "deny", False),
        ([{"match": "uid:0", "policy": "allow"}], "deny", False),
        ([], "allow", False),
        ([{"match": "*", "policy": "deny", "format": "glob"},
          {"match": "host:beta", "policy": "allow"}], "allow", False),
    ],
)  # fmt: skip
async def test_only_a_literal_rule_admits_a_host(
    pair: Pair, rules: list[dict], policy: str, allowed: bool
) -> None:
    """No pattern that begins otherwise, and no policy; not for root either."""
    await pair.alpha.ok("object-del", {"id": "hosts"})
    options = {"qom-type": "authz-list", "id": "hosts", "rules": rules, "policy": policy}
    await pair.alpha.ok("object-add", options)
    reply = await pair.alpha.cmd("secret-wrap", {"id": "disk0", "offer": await pair.offer()})
    assert ("return" in reply) is allowed
    if not allowed:
        words = "No grant lets host 'beta' have secret 'disk0'"
        assert reply["error"]["desc"] == words
    explained = await pair.alpha.ok("secret-explain", {"id": "disk0", "peer": ["host:beta"]})
    assert explained["allowed"] is allowed


async def test_the_keys_of_a_host_never_leave(pair: Pair) -> None:
    """Whatever is granted; they cannot be deleted while the host has its name."""
    await pair.alpha.grant("all", "*", "hosts")
    offer = await pair.beta.fail("secret-offer", {"from": "alpha", "id": "host.key"})
    assert "duplicate property" in offer
    await pair.beta.ok("object-del", {"id": "host"})
    await pair.beta.ok("object-del", {"id": "host.key"})
    public = await host(pair.beta, "beta2")
    await knows(pair.alpha, "beta2", public)
    assert "is in use" in await pair.beta.fail("object-del", {"id": "host.key"})
    rules = [{"match": "host:beta2", "policy": "allow"}]
    await pair.alpha.ok("object-add", {"qom-type": "authz-list", "id": "h2", "rules": rules})
    await pair.alpha.grant("all2", "*", "h2")
    await pair.beta.ok("object-del", {"id": "host"})
    await pair.beta.ok("secret-generate", {"id": "other", "size": 32})
    options = {"qom-type": "secret-host", "id": "host", "name": "beta2", "keyid": "other"}
    await pair.beta.ok("object-add", options)
    await pair.alpha.ok("object-del", {"id": "peer-beta2"})
    (found,) = await pair.beta.ok("query-secret-host")
    await knows(pair.alpha, "beta2", found["public"])
    await pair.beta.ok("object-del", {"id": "host.key"})
    asked = await pair.beta.ok("secret-offer", {"from": "alpha", "id": "host.key"})
    words = await pair.alpha.fail("secret-wrap", {"id": "host.key", "offer": asked["offer"]})
    assert words == "No grant lets host 'beta2' have secret 'host.key'"


Change = Callable[[Pair], "object"]


async def test_a_wrong_offer_is_refused(pair: Pair) -> None:
    """Of another host, for another host, for another secret, forged, and expired; in words."""
    offer = await pair.offer()
    data = base64.b64decode(offer)

    async def refused(text: str, object_id: str = "disk0") -> str:
        return await pair.alpha.fail("secret-wrap", {"id": object_id, "offer": text})

    assert await refused("!") == "The offer cannot be used: it is no base64"
    assert await refused("AAAA") == "The offer cannot be used: this is no offer"
    assert "this is no whole offer" in await refused(base64.b64encode(data[:-1]).decode())
    await pair.alpha.add("disk1", data="x")
    assert "it asks for 'disk0'" in await refused(offer, "disk1")
    for at in range(len(data) * 8):
        if at % 7 and at // 8 < len(data) - 64:
            continue  # every bit of the signature, and one in seven before it
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        words = await refused(base64.b64encode(changed).decode())
        assert words.startswith(("The offer cannot be used: ", "Host '")), words
    await pair.alpha.ok("object-del", {"id": "peer-beta"})
    assert await refused(offer) == "Host 'beta' is not known; object-add a secret-peer first"
    (beta,) = await pair.beta.ok("query-secret-host")
    (alpha,) = await pair.alpha.ok("query-secret-host")
    await knows(pair.alpha, "beta", alpha["public"])
    assert "its signature does not fit" in await refused(offer)
    await pair.alpha.ok("object-del", {"id": "peer-beta"})
    await knows(pair.alpha, "beta", beta["public"])
    await pair.alpha.ok("object-del", {"id": "host"})
    assert await refused(offer) == "This host has no name; object-add a secret-host first"
    options = {"qom-type": "secret-host", "id": "host", "name": "gamma", "keyid": "host.key"}
    await pair.alpha.ok("object-add", options)
    assert "it asks host 'alpha', and this is 'gamma'" in await refused(offer)


async def test_an_expired_offer_is_of_no_use(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the sender by its clock, and to the receiver when its time is over."""
    record = await pair.record()
    offer = await pair.offer()
    later = time.time() + 601
    with monkeypatch.context() as patch:
        patch.setattr("time.time", lambda: later)
        words = await pair.alpha.fail("secret-wrap", {"id": "disk0", "offer": offer})
        assert "it has expired" in words
    tree = pair.beta_served.tree
    for object_id in list(tree.offers.values()):
        tree.deadlines.set(object_id, 1)
    words = await pair.beta.fail("secret-accept", {"record": record})
    assert "it answers no offer that can be used" in words
    assert "disk0" not in tree.journal


async def test_each_bit_of_a_record_counts(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed anywhere it is refused, and changes nothing; then the whole one is taken."""
    monkeypatch.setattr("secretd.monitor.commands.arrivals.TRIES", 1 << 20)
    record = await pair.record()
    data = base64.b64decode(record)
    held = sorted(pair.beta_served.tree.journal)
    for at in range(len(data) * 8):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        words = await pair.beta.fail(
            "secret-accept", {"record": base64.b64encode(changed).decode()}
        )
        assert words.startswith(("The record cannot be accepted: ", "Host '")), words
    for size in range(0, len(data), 5):
        await pair.beta.fail("secret-accept", {"record": base64.b64encode(data[:size]).decode()})
    assert await pair.beta.fail("secret-accept", {"record": "!"}) == (
        "The record cannot be accepted: it is no base64"
    )
    assert sorted(pair.beta_served.tree.journal) == held
    assert (await pair.beta.ok("secret-accept", {"record": record}))["id"] == "disk0"


async def test_a_record_answers_its_own_offer_only(pair: Pair) -> None:
    """Not another host's, subject's or id's; swapped, repeated and kept it is of no use."""
    await pair.alpha.add("disk1", data="another")
    for_vm = await pair.wrap(await pair.offer(**{"for": "vm1"}))
    plain = await pair.record()
    other = await pair.beta.ok("secret-offer", {"from": "alpha", "id": "disk1"})
    disk1 = await pair.wrap(other["offer"], "disk1")
    # 1. Each is accepted by itself, in any order, once.
    assert (await pair.beta.ok("secret-accept", {"record": disk1}))["id"] == "disk1"
    assert (await pair.beta.ok("secret-accept", {"record": for_vm}))["id"] == "disk0"
    assert (await pair.beta.ok("secret-accept", {"record": plain}))["id"] == "disk0"
    for again in (disk1, for_vm, plain):
        assert "an offer is used once" in await pair.beta.fail("secret-accept", {"record": again})
    # 2. The offers' own host is the only one that takes them.
    back = await pair.alpha.fail("secret-accept", {"record": plain})
    assert "it is for host 'beta', and this is 'alpha'" in back
    # 3. Deleted at the receiver, a kept record does not bring it back.
    await pair.beta.ok("object-del", {"id": "disk0"})
    await pair.beta.fail("secret-accept", {"record": plain})
    assert "disk0" not in pair.beta_served.tree.journal


async def test_a_record_replaces_only_what_came_from_the_same_host(pair: Pair) -> None:
    """Nothing of this host, and nothing of another."""
    await pair.beta.ok("secret-accept", {"record": await pair.record()})
    await pair.alpha.ok("object-del", {"id": "disk0"})
    await pair.alpha.add("disk0", data="new")
    await pair.beta.ok("secret-accept", {"record": await pair.record()})
    assert await pair.beta.read("disk0") == b"new"
    record = await pair.record()
    await pair.beta.ok("object-del", {"id": "disk0"})
    await pair.beta.add("disk0", data="its own")
    words = "attempt to add duplicate property 'disk0' to object (type 'container')"
    assert await pair.beta.fail("secret-accept", {"record": record}) == words
    assert await pair.beta.read("disk0") == b"its own"
    assert await pair.beta.fail("secret-offer", {"from": "alpha", "id": "disk0"}) == words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"qom-type": "secret-host", "name": "a b", "keyid": "host.key"},
         "Parameter 'name' expects a host's name: letters, digits, '-', '.' and '_', 64 at most"),
        ({"qom-type": "secret-host", "name": "a", "keyid": "nope"}, "No secret with id 'nope'"),
        ({"qom-type": "secret-host", "name": "a", "keyid": "disk0"},
         "Secret 'disk0' has 64 bytes, and a host's has 32"),
        ({"qom-type": "secret-host", "name": "a", "keyid": "host.key"},
         "There is a secret-host already: 'host'"),
        ({"qom-type": "secret-peer", "name": "beta", "public": "AAAA"},
         "Parameter 'public' expects 64 bytes in base64, as 'secretctl host show' prints them"),
        ({"qom-type": "secret-peer", "name": "beta", "public": "CQ" + "A" * 84 + "=="},
         "There is a secret-peer of that name already: 'peer-beta'"),
        ({"qom-type": "secret-offer"}, "Parameter 'qom-type' does not accept value 'secret-offer'"),
    ],
)  # fmt: skip
async def test_what_is_no_host_is_refused(pair: Pair, options: dict, words: str) -> None:
    """In words; properties are fixed."""
    assert await pair.alpha.fail("object-add", {"id": "x", **options}) == words
    change = {"path": "/objects/host", "property": "name", "value": "x"}
    assert await pair.alpha.fail("qom-set", change) == "Property 'secret-host.name' is not writable"
    assert [each["name"] for each in await pair.alpha.ok("query-secret-peers")] == ["beta"]


async def test_admitted_administrators_decide_about_no_hosts(pair: Pair) -> None:
    """Neither which there are; they may offer, within their limit."""
    need_root()
    await pair.beta.allow("admins", "uid:1001")
    admin = await pair.beta_served.connect(role="admins", uid=1001)
    options = {"qom-type": "secret-peer", "id": "p", "name": "x", "public": "CQ" + "A" * 84 + "=="}
    words = "Only uid 0 and the daemon's own uid may decide about hosts"
    assert await admin.fail("object-add", options) == words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secretd.monitor.commands.records.OFFERS_PER_UID", 2)
        for number in range(2):
            await admin.ok("secret-offer", {"from": "alpha", "id": f"s{number}"})
        words = await admin.fail("secret-offer", {"from": "alpha", "id": "s3"})
    assert words == "uid 1001 has 2 offers, and the limit is 2 (offers-per-uid)"
    long = {"from": "alpha", "id": "s4", "for": "x" * 257}
    words = "Parameter 'for' is longer than the limit of 256 characters"
    assert await pair.beta.fail("secret-offer", long) == words
    assert "is not known" in await pair.beta.fail("secret-offer", {"from": "nope", "id": "s4"})


async def test_an_offer_is_used_once_on_both_sides(pair: Pair) -> None:
    """So no carrier exhausts a grant with one; and too many records end it."""
    offer = await pair.offer()
    record = await pair.wrap(offer)
    words = await pair.alpha.fail("secret-wrap", {"id": "disk0", "offer": offer})
    assert "it was used already; make another one" in words
    changed = bytearray(base64.b64decode(record))
    changed[-1] ^= 1
    for _ in range(8):
        words = await pair.beta.fail(
            "secret-accept", {"record": base64.b64encode(changed).decode()}
        )
        assert "its signature does not fit" in words
    assert "it answers no offer" in await pair.beta.fail("secret-accept", {"record": record})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secretd.monitor.commands.records.USED_OFFERS", 1)
        fresh = await pair.offer()
        words = await pair.alpha.fail("secret-wrap", {"id": "disk0", "offer": fresh})
        assert "1 offers were used within minutes" in words
        later = time.time() + 500
        patch.setattr("secretd.monitor.commands.records.OFFER_SECONDS", 1)
        words = await pair.alpha.fail("secret-wrap", {"id": "disk0", "offer": fresh})
        assert "which is too late; do the clocks differ?" in words
        assert later > time.time()
    wrong = {"id": "disk0", "offer": fresh, "to": "gamma"}
    words = await pair.alpha.fail("secret-wrap", wrong)
    assert "it is from host 'beta', and not from 'gamma'" in words


async def test_counted_grants_count_what_was_wrapped(pair: Pair) -> None:
    """Once for each record, and not for one that has no room in a reply."""
    await pair.alpha.ok("object-del", {"id": "g"})
    await pair.alpha.grant("g", "disk*", "hosts", **{"max-reads": 1})
    await pair.alpha.add("disk9", data="x" * 50_000)
    asked = await pair.beta.ok("secret-offer", {"from": "alpha", "id": "disk9"})
    words = await pair.alpha.fail("secret-wrap", {"id": "disk9", "offer": asked["offer"]})
    assert "more than the limit of 45000 bytes of a reply" in words
    await pair.wrap(await pair.offer())
    words = await pair.alpha.fail("secret-wrap", {"id": "disk0", "offer": await pair.offer()})
    assert words == "No grant lets host 'beta' have secret 'disk0'"


async def test_an_administrator_does_not_get_the_hosts_key(pair: Pair) -> None:
    """Neither the host nor a peer is deleted by one that was only admitted."""
    need_root()
    await pair.alpha.allow("admins", "uid:1001")
    admin = await pair.alpha_served.connect(role="admins", uid=1001)
    for name in ("host", "host.key", "peer-beta"):
        words = f"Only uid 0 and the daemon's own uid may add, change or delete '{name}'"
        assert await admin.fail("object-del", {"id": name}) == words
    await pair.alpha.ok("object-del", {"id": "host"})
    assert await admin.denied("host.key")
    options = {"qom-type": "secret-host", "id": "host", "name": "alpha", "keyid": "host.key"}
    await pair.alpha.ok("object-add", options)


async def test_a_hosts_key_is_its_own_and_stays(pair: Pair) -> None:
    """It has no lifetime, and is no other key of secretd's."""
    await pair.alpha.ok("object-del", {"id": "host"})
    options = {"qom-type": "secret-host", "id": "host", "name": "alpha", "keyid": "k"}
    await pair.alpha.ok("secret-generate", {"id": "k", "size": 32})
    await pair.alpha.ok("secret-expire", {"id": "k", "after": 1000})
    assert "Secret 'k' has a lifetime" in await pair.alpha.fail("object-add", options)
    await pair.alpha.ok("secret-expire", {"id": "k"})
    pair.alpha_served.tree.pin("k")
    words = "Secret 'k' is another key of secretd itself"
    assert await pair.alpha.fail("object-add", options) == words
    public = {"qom-type": "secret-peer", "id": "p", "name": "zero", "public": "A" * 86 + "=="}
    words = "Parameter 'public' expects the keys of a host, and these are of none"
    assert await pair.alpha.fail("object-add", public) == words


async def test_a_record_follows_the_rules_of_aliases(pair: Pair) -> None:
    """A version that an alias has as its current one is written once."""
    await pair.alpha.add("disk7.v1", data="first")
    asked = {"from": "alpha", "id": "disk7.v1"}
    for content in ("first", "second"):
        offer = (await pair.beta.ok("secret-offer", asked))["offer"]
        record = await pair.wrap(offer, "disk7.v1")
        if content == "second":
            options = {"qom-type": "secret-alias", "id": "disk7", "current": "disk7.v1"}
            await pair.beta.ok("object-add", options)
            words = await pair.beta.fail("secret-accept", {"record": record})
            assert "is written once" in words
        else:
            await pair.beta.ok("secret-accept", {"record": record})
    assert await pair.beta.read("disk7") == b"first"


async def test_an_alias_knows_the_host_as_its_reader(pair: Pair) -> None:
    """And not the carrier."""
    await pair.alpha.ok("secret-alias-convert", {"id": "disk0"})
    await pair.wrap(await pair.offer())
    (found,) = await pair.alpha.ok("query-secret-alias", {"id": "disk0"})
    assert found["readers"] == [{"identity": "host:beta", "read": "current", "awaited": True}]


async def test_both_sides_record_what_goes(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Offer, wrap and accept with the other host's name; refusals with their reason; no value."""
    audits = {}
    for name, each in (("alpha", pair.alpha_served), ("beta", pair.beta_served)):
        audits[name] = tmp_path / f"{name}.audit"
        audit = Audit(str(audits[name]))
        each.server.core.audit = each.server.core.access._audit = audit
    record = await pair.record()
    await pair.beta.ok("secret-accept", {"record": record})
    await pair.beta.fail("secret-accept", {"record": record})
    await pair.alpha.ok("object-del", {"id": "g"})
    await pair.alpha.fail("secret-wrap", {"id": "disk0", "offer": await pair.offer()})
    for each in (pair.alpha_served, pair.beta_served):
        each.server.core.audit.end_turn()
    found = {
        name: [json.loads(line) for line in path.read_text().splitlines()]
        for name, path in audits.items()
    }
    told = [
        (name, r["event"], r.get("decision"), r.get("id"), r.get("host"))
        for name, records in found.items() for r in records
    ]  # fmt: skip
    assert told == [
        ("alpha", "wrap", "allow", "disk0", "beta"),
        ("alpha", "revoke", None, "g", None),
        ("alpha", "wrap", "deny", "disk0", "beta"),
        ("beta", "offer", None, "disk0", "alpha"),
        ("beta", "accept", None, "disk0", "alpha"),
        ("beta", "accept", "deny", None, None),
        ("beta", "offer", None, "disk0", "alpha"),
    ]
    assert "an offer is used once" in found["beta"][2]["reason"]
    for text in (*(path.read_text() for path in audits.values()), caplog.text):
        assert SECRET not in text
        assert base64.b64encode(SECRET.encode()).decode()[:16] not in text
    for each in (pair.alpha_served, pair.beta_served):
        each.server.core.audit.stop()
