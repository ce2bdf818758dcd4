# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fleet in a daemon: what is accepted from the root and from publishers, and what follows."""

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from secretd.crypto.host_keys import PublicKeys
from secretd.crypto.roster import AliasVersions, Manifest, Publisher
from secretd.limits import Tuning
from tests.support.async_qmp import AsyncClient
from tests.support.fleet import FLEET, Root, b64, make_host
from tests.support.in_loop import Served, served
from tests.support.needs import need_root


class Trial:
    """A publisher with its secretd, and the host alpha; both know roster 1."""

    def __init__(self, pub: AsyncClient, alpha: AsyncClient, made: list[Served]) -> None:
        self.pub, self.alpha = pub, alpha
        self.pub_served, self.alpha_served = made
        self.root = Root()
        self.keys: dict[str, PublicKeys] = {}
        self.numbers: dict[str, int] = {}
        self.pattern = "web.*"

    def roster(self, number: int = 1) -> str:
        """A roster with both."""
        publishers = {"pub": Publisher(self.keys["pub"], self.pattern)}
        hosts = {"alpha": self.keys["alpha"], "beta": self.keys["pub"], "pub": self.keys["pub"]}
        return self.root.roster(number, hosts, publishers)

    async def start(self, directory: Path, **more: object) -> None:
        """Both get a store, a name, the fleet and its roster."""
        for name, client in (("pub", self.pub), ("alpha", self.alpha)):
            store = str(directory / name / "store")
            self.keys[name] = await make_host(client, name, self.root.public, store, **more)
        for client in (self.pub, self.alpha):
            await client.ok("secret-fleet-accept", {"data": self.roster()})
        rules = [{"match": "host:alpha", "policy": "allow"}]
        await self.pub.ok("object-add", {"qom-type": "authz-list", "id": "hosts", "rules": rules})
        await self.pub.grant("g", "*", "hosts")

    async def wrap(self, object_id: str) -> str:
        """A record for alpha."""
        return (await self.pub.ok("secret-wrap", {"id": object_id, "to": "alpha"}))["record"]

    async def manifest(
        self, records: dict[str, str], aliases: dict[str, tuple[str, str]] | None = None
    ) -> str:
        """A manifest for alpha with the digests of some records."""
        digests = {i: hashlib.sha256(base64.b64decode(r)) for i, r in records.items()}
        versions = {i: AliasVersions(*v) for i, v in (aliases or {}).items()}
        number = self.numbers.get("alpha", 0)
        arguments = {
            "host": "alpha", "expect": number,
            "ids": [{"id": i, "digest": d.hexdigest()} for i, d in digests.items()],
            "aliases": [{"id": i, "current": v.current, **({"previous": v.previous} if v.previous
                        else {})} for i, v in versions.items()],
        }  # fmt: skip
        signed = await self.pub.ok("secret-fleet-sign", arguments)
        self.numbers["alpha"] = signed["number"]
        made = Manifest(
            FLEET, "alpha", "pub", signed["number"], signed["signed-at"],
            {i: d.digest() for i, d in digests.items()}, versions,
        )  # fmt: skip
        return b64(made.encoded() + base64.b64decode(signed["signature"]))

    async def publish(
        self, records: dict[str, str], aliases: dict[str, tuple[str, str]] | None = None
    ) -> None:
        """Bring a manifest and records to alpha."""
        manifest = await self.manifest(records, aliases)
        await self.alpha.ok("secret-fleet-accept", {"data": manifest})
        for record in records.values():
            await self.alpha.ok("secret-accept", {"record": record})

    async def secrets(self) -> set[str]:
        """What alpha has of the fleet."""
        return {s["id"] for s in await self.alpha.ok("query-secrets")} - {"key", "host.key"}

    async def state(self) -> dict:
        """What alpha says about its fleet."""
        (found,) = await self.alpha.ok("query-secret-fleet")
        return found


@pytest.fixture
async def trial(tmp_path: Path) -> AsyncIterator[Trial]:
    """A fleet of two daemons in one loop."""
    async with AsyncExitStack() as stack:
        made = []
        for name in ("pub", "alpha"):
            (tmp_path / name).mkdir()
            made.append(await stack.enter_async_context(served(tmp_path / name, Tuning())))
        pub, alpha = [await each.connect() for each in made]
        trial = Trial(pub, alpha, made)
        await trial.start(tmp_path)
        yield trial


async def test_what_is_published_arrives(trial: Trial) -> None:
    """By manifest and records; the host says what is missing, and by whom it was published."""
    await trial.pub.add("web.a", data="value of a")
    await trial.pub.add("web.b", data="x" * 100)
    records = {each: await trial.wrap(each) for each in ("web.a", "web.b")}
    reply = await trial.alpha.ok("secret-fleet-accept", {"data": await trial.manifest(records)})
    assert reply == {"kind": "manifest", "number": 1, "publisher": "pub", "changed": True}
    missing = await trial.alpha.ok("query-secret-fleet-missing", {"publisher": "pub"})
    assert len(missing) == 2
    for record in records.values():
        reply = await trial.alpha.ok("secret-accept", {"record": record})
        assert reply["from"] == "pub"
    assert await trial.alpha.ok("query-secret-fleet-missing", {"publisher": "pub"}) == []
    assert await trial.alpha.read("web.a") == b"value of a"
    state = await trial.state()
    assert (state["state"], state["host"], state["publishers"][0]["missing"]) == (
        "live",
        "alpha",
        0,
    )
    # A later record of the same id replaces it, and what is absent goes.
    await trial.pub.ok("secret-replace", {"qom-type": "secret", "id": "web.a", "data": "another"})
    await trial.publish({"web.a": await trial.wrap("web.a")})
    assert await trial.alpha.read("web.a") == b"another"
    assert await trial.secrets() == {"web.a"}


async def test_aliases_travel_and_flip_when_their_version_is_there(trial: Trial) -> None:
    """An alias points at what the host has; the version before goes when it is withdrawn."""
    await trial.pub.add("web.tls.v1", data="one")
    one = {"web.tls.v1": await trial.wrap("web.tls.v1")}
    await trial.publish(one, {"web.tls": ("web.tls.v1", "")})
    assert await trial.alpha.read("web.tls") == b"one"
    await trial.pub.add("web.tls.v2", data="two")
    both = one | {"web.tls.v2": await trial.wrap("web.tls.v2")}
    manifest = await trial.manifest(both, {"web.tls": ("web.tls.v2", "web.tls.v1")})
    await trial.alpha.ok("secret-fleet-accept", {"data": manifest})
    assert await trial.alpha.read("web.tls") == b"one"
    await trial.alpha.ok("secret-accept", {"record": both["web.tls.v2"]})
    assert await trial.alpha.read("web.tls") == b"two"
    assert await trial.alpha.read("web.tls.v1") == b"one"
    del both["web.tls.v1"]
    await trial.publish(both, {"web.tls": ("web.tls.v2", "")})
    assert await trial.secrets() == {"web.tls", "web.tls.v2"}
    await trial.publish({})
    assert await trial.secrets() == set()


async def refused(trial: Trial, data: str, words: str) -> None:
    """It is refused in these words, and the state says so."""
    error = await trial.alpha.fail("secret-fleet-accept", {"data": data})
    assert words in error
    state = await trial.state()
    assert (state["state"], words in state["reason"]) == ("refused", True)


async def test_nothing_goes_back(trial: Trial) -> None:
    """Rollback: of manifests, records and rosters."""
    await trial.pub.add("web.a", data="one")
    old_record = {"web.a": await trial.wrap("web.a")}
    old = await trial.manifest(old_record)
    await trial.alpha.ok("secret-fleet-accept", {"data": old})
    await trial.alpha.ok("secret-accept", {"record": old_record["web.a"]})
    await trial.pub.ok("secret-replace", {"qom-type": "secret", "id": "web.a", "data": "two"})
    await trial.publish({"web.a": await trial.wrap("web.a")})
    await refused(trial, old, "it is an older one: its number is 1, and 2 is known")
    error = await trial.alpha.fail("secret-accept", {"record": old_record["web.a"]})
    assert "the manifest of 'pub' does not have it" in error
    assert await trial.alpha.read("web.a") == b"two"
    first = trial.roster(1)
    await trial.alpha.ok("secret-fleet-accept", {"data": trial.roster(3)})
    assert (await trial.state())["state"] == "live"
    await refused(trial, first, "it is an older one: its number is 1, and 3 is known")
    trial.pattern = "*"
    await refused(trial, trial.roster(3), "it is another one of number 3")


async def test_each_wrong_thing_is_refused(trial: Trial) -> None:
    """Wrong root, another fleet, another host, a publisher that is none, and outside of the
    pattern; an expired roster (freeze).
    """
    other = Root()
    both = {"alpha": trial.keys["alpha"]}
    await refused(trial, other.roster(9, both, {}), "it is not signed by the root")
    await refused(trial, trial.root.roster(9, both, {}, fleet="x"), "it is of fleet 'x'")
    past = int(time.time()) - 10
    await refused(trial, trial.root.roster(9, both, {}, until=past), "it has expired")
    await trial.pub.add("web.a", data="one")
    record = await trial.wrap("web.a")
    good = base64.b64decode(await trial.manifest({"web.a": record}))
    for at in (30, len(good) // 2, len(good) - 1):
        changed = bytearray(good)
        changed[at] ^= 1
        await trial.alpha.fail("secret-fleet-accept", {"data": b64(bytes(changed))})
    for host, words in (("beta", "it is for host 'beta'"),):
        made = Manifest(FLEET, host, "pub", 5, int(time.time()), {}, {}).encoded()
        await refused(trial, b64(trial.root.signed(made)), words)
    made = Manifest(FLEET, "alpha", "x", 5, int(time.time()), {}, {}).encoded()
    await refused(trial, b64(trial.root.signed(made)), "publisher 'x' is not in the roster")
    made = Manifest(FLEET, "alpha", "pub", 5, int(time.time()), {}, {}).encoded()
    await refused(trial, b64(trial.root.signed(made)), "its signature does not fit")
    assert await trial.secrets() == set()
    assert (await trial.state())["publishers"] == []


async def test_a_publisher_keeps_to_its_pattern(trial: Trial) -> None:
    """On both sides; and it replaces nothing that did not come from it."""
    await trial.pub.add("db.a", data="one")
    assert "outside of the pattern 'web.*'" in await trial.pub.fail(
        "secret-wrap", {"id": "db.a", "to": "alpha"}
    )
    arguments = {"host": "alpha", "expect": 0, "ids": [{"id": "db.a", "digest": "00" * 32}]}
    assert "outside of the pattern" in await trial.pub.fail("secret-fleet-sign", arguments)
    # The publisher's roster is newer than the host's: it may more than the host has agreed to.
    trial.pattern = "*"
    await trial.pub.ok("secret-fleet-accept", {"data": trial.roster(2)})
    record = await trial.wrap("db.a")
    manifest = await trial.manifest({"db.a": record})
    await refused(trial, manifest, "'db.a' is outside of the pattern 'web.*' of publisher 'pub'")
    await trial.alpha.add("web.own", data="mine")
    await trial.pub.add("web.own", data="theirs")
    records = {"web.own": await trial.wrap("web.own")}
    await trial.alpha.ok("secret-fleet-accept", {"data": await trial.manifest(records)})
    error = await trial.alpha.fail("secret-accept", {"record": records["web.own"]})
    assert "'web.own' is there, and did not come from it" in error
    assert await trial.alpha.read("web.own") == b"mine"
    await trial.alpha.ok("secret-fleet-accept", {"data": trial.roster(2)})
    keys = {"fleet.roster2": "x", "host.key": "y"}
    for object_id, data in keys.items():
        if object_id != "host.key":
            await trial.pub.add(object_id, data=data)
            records[object_id] = await trial.wrap(object_id)
    await trial.alpha.ok("secret-fleet-accept", {"data": await trial.manifest(records)})
    error = await trial.alpha.fail("secret-accept", {"record": records["fleet.roster2"]})
    assert error.startswith("Only uid 0")


async def test_a_new_key_starts_its_numbers_anew(trial: Trial) -> None:
    """Fast-forward: whoever had the old key has used up the numbers; the root gives a new one."""
    last = (1 << 64) - 1
    stolen = Root()
    half = stolen.key.public_key().public_bytes_raw()
    good = trial.keys["pub"]
    trial.keys["pub"] = PublicKeys(good.receiving, half)
    await trial.alpha.ok("secret-fleet-accept", {"data": trial.roster(2)})
    made = Manifest(FLEET, "alpha", "pub", last, int(time.time()), {}, {}).encoded()
    await trial.alpha.ok("secret-fleet-accept", {"data": b64(stolen.signed(made))})
    trial.keys["pub"] = good
    await trial.alpha.ok("secret-fleet-accept", {"data": trial.roster(3)})
    await trial.pub.add("web.a", data="one")
    await trial.publish({"web.a": await trial.wrap("web.a")})
    assert await trial.alpha.read("web.a") == b"one"
    await refused(trial, b64(stolen.signed(made)), "its signature does not fit")


async def test_old_secrets_are_locked(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """max-age: without another manifest they cannot be read, and with one again."""
    await trial.pub.add("web.a", data="one")
    await trial.publish({"web.a": await trial.wrap("web.a")})
    await trial.alpha.ok("object-del", {"id": "fleet"})
    options = {"qom-type": "secret-fleet", "id": "fleet", "name": FLEET, "max-age": 60}
    await trial.alpha.ok("object-add", {**options, "root": trial.root.public})
    assert await trial.alpha.read("web.a") == b"one"
    assert (await trial.state())["state"] == "live"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100)
    assert (await trial.state())["state"] == "stale"
    error = await trial.alpha.fail("secret-read", {"id": "web.a", "fdname": "x"})
    del error
    with pytest.raises(AssertionError, match="max-age is 60 s"):
        await trial.alpha.read("web.a")
    await trial.publish({"web.a": await trial.wrap("web.a")})
    assert await trial.alpha.read("web.a") == b"one"
    assert await trial.alpha.read("host.key") is not None


async def test_only_carriers_bring_what_was_signed(trial: Trial) -> None:
    """The arithmetic is for those whom the fleet's authz object allows."""
    need_root()
    agent = await trial.alpha_served.connect(role="client", uid=4711)
    words = "Only uid 0, the daemon's own uid, and those whom the 'carrier' of fleet 'fleet'"
    assert words in await agent.fail("secret-fleet-accept", {"data": trial.roster(2)})
    await trial.alpha.ok("object-del", {"id": "fleet"})
    simple = {"qom-type": "authz-simple", "id": "agents", "identity": "uid:4711"}
    await trial.alpha.ok("object-add", simple)
    options = {"qom-type": "secret-fleet", "id": "fleet", "name": FLEET, "carrier": "agents"}
    await trial.alpha.ok("object-add", {**options, "root": trial.root.public})
    assert (await agent.ok("secret-fleet-accept", {"data": trial.roster(2)}))["number"] == 2
    stranger = await trial.alpha_served.connect(role="client", uid=4712)
    assert words in await stranger.fail("secret-fleet-accept", {"data": trial.roster(3)})
    await trial.pub.add("web.a", data="one")
    record = await trial.wrap("web.a")
    await agent.ok("secret-fleet-accept", {"data": await trial.manifest({"web.a": record})})
    assert words in await stranger.fail("secret-accept", {"record": record})
    assert (await agent.ok("secret-accept", {"record": record}))["id"] == "web.a"


async def test_a_fleet_needs_a_store_and_a_host(trial: Trial, tmp_path: Path) -> None:
    """Without a store a reboot would forget the numbers."""
    root = trial.root.public
    (tmp_path / "c").mkdir()
    async with served(tmp_path / "c", Tuning()) as other:
        client = await other.connect()
        options = {"qom-type": "secret-fleet", "id": "fleet", "name": FLEET, "root": root}
        assert "This host has no name" in await client.fail("object-add", options)
        await client.ok("secret-generate", {"id": "host.key", "size": 32})
        host = {"qom-type": "secret-host", "id": "host", "name": "c", "keyid": "host.key"}
        await client.ok("object-add", host)
        assert await client.fail("object-add", options) == (
            "A secret-fleet needs a secret-store, and there is none"
        )
        assert "Parameter 'root' expects 32 bytes" in await client.fail(
            "object-add", {**options, "root": "eA=="}
        )
    assert "There is a secret-fleet already" in await trial.alpha.fail(
        "object-add", {**options, "id": "second"}
    )


async def test_the_state_is_announced(trial: Trial) -> None:
    """To control connections that asked."""
    watching = await trial.alpha_served.connect()
    await watching.watch("FLEET_STATE")
    await trial.alpha.fail("secret-fleet-accept", {"data": trial.roster(0)})
    event = await watching.event()
    assert event["event"] == "FLEET_STATE"
    assert event["data"]["id"] == "fleet"
    assert event["data"]["state"] == "refused"
    assert "older one" in event["data"]["reason"]
    await trial.alpha.ok("secret-fleet-accept", {"data": trial.roster(2)})
    assert (await watching.event())["data"]["state"] == "live"
    await asyncio.sleep(0)


async def test_a_published_secret_becomes_an_alias_for_its_readers(trial: Trial) -> None:
    """In one step, once the current version has arrived; and a secret again later."""
    await trial.pub.add("web.a", data="plain")
    await trial.publish({"web.a": await trial.wrap("web.a")})
    await trial.pub.add("web.a.v2", data="second")
    record = await trial.wrap("web.a.v2")
    manifest = await trial.manifest({"web.a.v2": record}, {"web.a": ("web.a.v2", "")})
    await trial.alpha.ok("secret-fleet-accept", {"data": manifest})
    assert await trial.alpha.read("web.a") == b"plain"
    await trial.alpha.ok("secret-accept", {"record": record})
    assert await trial.alpha.read("web.a") == b"second"
    (alias,) = await trial.alpha.ok("query-secret-alias")
    assert alias["current"] == "web.a.v2"
    record = await trial.wrap("web.a")
    await trial.publish({"web.a": record})
    assert await trial.secrets() == {"web.a"}
    assert await trial.alpha.read("web.a") == b"plain"


async def test_a_bystander_cannot_set_the_state(trial: Trial) -> None:
    """A record of the fleet is looked at only if a carrier brings it; names are printed safely."""
    need_root()
    await trial.pub.add("web.a", data="value")
    record = await trial.wrap("web.a")
    await trial.publish({"web.a": record})
    data = bytearray(base64.b64decode(record))
    at = data.index(b"alpha")
    data[at : at + 5] = b"\n\x1bxyz"
    client = await trial.alpha_served.connect(role="client", uid=4711)
    words = await client.fail("secret-accept", {"record": b64(bytes(data))})
    assert words.startswith("Only uid 0, the daemon's own uid, and those whom")
    assert (await trial.state())["state"] == "live"
    words = await trial.alpha.fail("secret-accept", {"record": b64(bytes(data))})
    assert "it is for host '\\n\\x1bxyz', and this is 'alpha'" in words
    assert (await trial.state())["reason"] == words


async def test_wrapping_for_the_fleet_needs_a_control_socket(trial: Trial) -> None:
    """Or anyone could use up a grant's reads: no offer of the receiver is needed."""
    need_root()
    await trial.pub.add("web.a", data="value")
    client = await trial.pub_served.connect(role="client", uid=4711)
    words = await client.fail("secret-wrap", {"id": "web.a", "to": "alpha"})
    assert words == "Wrapping for the fleet needs a control socket"


async def test_a_publisher_gives_no_version_to_what_is_not_its_own(trial: Trial) -> None:
    """A rotation would take it for the next one; and an alias that is blocked is named."""
    await trial.alpha.add("web.a.v1", data="local")
    versions = {"qom-type": "secret-alias", "id": "web.a", "current": "web.a.v1"}
    await trial.alpha.ok("object-add", versions)
    await trial.pub.add("web.a.v2", data="evil")
    record = await trial.wrap("web.a.v2")
    manifest = await trial.manifest({"web.a.v2": record})
    await trial.alpha.ok("secret-fleet-accept", {"data": manifest})
    words = await trial.alpha.fail("secret-accept", {"record": record})
    assert "'web.a.v2' would be a version of 'web.a', which did not come from it" in words
    await trial.alpha.ok("object-del", {"id": "web.a"})
    await trial.alpha.ok("secret-accept", {"record": record})
    await trial.alpha.ok("object-add", versions)
    change = {"id": "web.a", "expect": {"current": "web.a.v1"}, "staged": "web.a.v2"}
    words = await trial.alpha.fail("secret-alias-set", change)
    assert words == "'web.a.v2' came from publisher:pub, and 'web.a' did not"
    await trial.publish({"web.a.v2": record}, {"web.a": ("web.a.v2", "")})
    state = await trial.state()
    assert state["state"] == "refused"
    assert state["reason"].startswith("Alias 'web.a' of publisher:pub cannot be made")
    assert await trial.alpha.read("web.a") == b"local"


async def test_a_later_roster_counts_for_records_too(trial: Trial) -> None:
    """A narrower pattern, and a secret that is larger than a fleet allows."""
    await trial.pub.add("web.a", data="value")
    record = await trial.wrap("web.a")
    manifest = await trial.manifest({"web.a": record})
    await trial.alpha.ok("secret-fleet-accept", {"data": manifest})
    trial.pattern = "db.*"
    await trial.alpha.ok("secret-fleet-accept", {"data": trial.roster(2)})
    words = await trial.alpha.fail("secret-accept", {"record": record})
    assert "'web.a' is outside of the pattern 'db.*' of publisher 'pub'" in words
    roster = trial.root.roster(3, {"beta": trial.keys["pub"]}, {})
    words = await trial.alpha.fail("secret-fleet-accept", {"data": roster})
    assert words == "The roster cannot be accepted: it does not have host 'alpha'"


async def test_what_is_in_use_goes_later(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """A withdrawn secret that a local alias needs; until then it is pending."""
    monkeypatch.setattr("secretd.monitor.fleet_watch.SETTLE_SECONDS", 0.01)
    await trial.pub.add("web.k.v1", data="value")
    await trial.publish({"web.k.v1": await trial.wrap("web.k.v1")})
    alias = {"qom-type": "secret-alias", "id": "web.k", "current": "web.k.v1"}
    await trial.alpha.ok("object-add", alias)
    await trial.publish({})
    assert (await trial.state())["publishers"][0]["pending"] == 1
    await trial.alpha.ok("object-del", {"id": "web.k"})
    while await trial.secrets():
        await asyncio.sleep(0.01)
    assert (await trial.state())["publishers"][0]["pending"] == 0


async def test_many_are_withdrawn_in_turns(trial: Trial) -> None:
    """More than one turn of the loop removes."""
    ids = [f"web.{number:03}" for number in range(100)]
    for each in ids:
        await trial.pub.add(each, data="v")
    await trial.publish({each: await trial.wrap(each) for each in ids})
    assert len(await trial.secrets()) == 100
    await trial.publish({})
    while await trial.secrets():
        await asyncio.sleep(0.01)


async def test_what_was_signed_is_shown_in_pages(trial: Trial) -> None:
    """Of long ids, and of aliases, which are too many for one reply."""
    ids = [f"web.{'x' * 100}.{number}" for number in range(300)]
    aliases = {f"web.{'y' * 100}.{n}": (f"web.{'y' * 100}.{n}.v1", "") for n in range(300)}
    digest = hashlib.sha256(b"").hexdigest()
    everything = [*ids, *(current for current, _ in aliases.values())]
    await trial.pub.ok("secret-fleet-sign", {
        "host": "alpha", "expect": 0, "ids": [{"id": i, "digest": digest} for i in everything],
        "aliases": [{"id": i, "current": current} for i, (current, _) in aliases.items()],
    })  # fmt: skip
    seen: list[str] = []
    pages = 0
    while True:
        after = {"after": max(seen)} if seen else {}
        page = await trial.pub.ok("query-secret-fleet-sent", {"host": "alpha", **after})
        found = [each["id"] for each in (*page["ids"], *page["aliases"])]
        if not found:
            break
        seen += found
        pages += 1
    assert sorted(seen) == sorted([*everything, *aliases])
    assert pages > 2
