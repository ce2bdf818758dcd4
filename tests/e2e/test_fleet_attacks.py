# SPDX-License-Identifier: LGPL-2.1-or-later
"""The attacks of TUF by name, by what stands between an agent and etcd: it can withhold, and
nothing else; each is named in the agent's log, and by secretd.
"""

import hashlib
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secretd.crypto.host_keys import signing_key
from secretd.crypto.roster import read_manifest, read_roster, signed_part
from secretd.fleet.keyspace import Keyspace
from secretd.memory.arena import Arena
from tests.e2e.fleet_hosts import FLEET, Fleet, FleetHost, fleet, wait_for
from tests.support.hostile_etcd import HostileEtcd
from tests.support.needs import ARENA_LEVEL

__all__ = ["fleet"]

pytestmark = [pytest.mark.xdist_group("etcd"), pytest.mark.slow]

KEYS = Keyspace(FLEET)
MANIFEST = KEYS.manifest("alpha", "pub")
ROSTER = KEYS.host_roster("alpha")


class Trial:
    """A publisher that uses etcd, and a host whose agent is behind the attacker."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.pub = fleet.host("pub", "web.*")
        self.alpha = fleet.host("alpha")
        self.alpha.kill_agent()
        self.etcd = HostileEtcd(fleet.cluster)
        self.events = self.alpha.process.connect().watch("FLEET_STATE")

    def start(self) -> None:
        """Publish a value, let it through, and start the agent."""
        self.pub.client.add("web.a", data="first")
        self.pub.publish("web.a", "--to", "alpha")
        self.etcd.let_through()
        self.alpha.start_agent(self.etcd.endpoint)
        self.alpha.wait_until_it_has(web_a=b"first")
        self.alpha.wait_for_words("watching etcd")

    def replace(self, value: str) -> None:
        """Publish another value."""
        self.pub.process.ctl("add", "web.a", "--replace", "--stdin", input=value.encode())
        self.pub.publish("web.a", "--to", "alpha")

    def pass_on(self) -> None:
        """Let through what etcd has, with an event for it."""
        self.etcd.let_through()
        self.etcd.push((MANIFEST, self.etcd.values[MANIFEST]))

    def named(self, *words: str) -> None:
        """Wait until the log and secretd name an attack; nothing has changed by it."""
        self.alpha.wait_for_words(*words)
        states: list[dict] = []
        while not states or states[-1]["state"] != "refused" or words[-1] not in str(states[-1]):
            states.append(self.events.event()["data"])


@pytest.fixture
def trial(fleet: Fleet) -> Iterator[Trial]:
    """Both, started."""
    made = Trial(fleet)
    try:
        made.start()
        yield made
    finally:
        made.alpha.close()
        made.etcd.close()


def test_rollback_is_refused_by_event_and_by_list(trial: Trial) -> None:
    """An earlier manifest, with its record, and an earlier roster."""
    alpha, etcd = trial.alpha, trial.etcd
    before = dict(etcd.values)
    trial.replace("second")
    trial.pass_on()
    alpha.wait_until_it_has(web_a=b"second")
    after = dict(etcd.values)
    etcd.values = before
    etcd.push((MANIFEST, before[MANIFEST]))
    trial.named("manifest of publisher 'pub' was not accepted", "it is an older one")
    alpha.kill_agent()
    alpha.start_agent(etcd.endpoint)  # now it comes as a list
    wait_for(lambda: alpha.said().count("it is an older one") == 2, alpha.said)
    assert alpha.has() == {"web.a": b"second"}
    trial.fleet.host("beta", "db.*")
    etcd.let_through()
    etcd.push((ROSTER, etcd.values[ROSTER]))
    wait_for(lambda: alpha.state()["roster"]["publishers"] == 2, alpha.said)
    etcd.values[ROSTER] = after[ROSTER]
    etcd.push((ROSTER, after[ROSTER]))
    trial.named("roster was not accepted", "it is an older one")
    assert alpha.state()["roster"]["publishers"] == 2


def test_mix_and_match_is_refused(trial: Trial) -> None:
    """What is for another host, under this one's keys; and one record under another's digest."""
    alpha, etcd = trial.alpha, trial.etcd
    beta = trial.fleet.host("beta")
    trial.pub.client.add("web.b", data="for beta")
    trial.pub.publish("web.b", "--to", "beta")
    beta.wait_until_it_has(web_b=b"for beta")
    before = dict(etcd.values)
    etcd.let_through()
    etcd.push((ROSTER, etcd.values[ROSTER]))
    etcd.push((MANIFEST, etcd.values[KEYS.manifest("beta", "pub")]))
    trial.named("manifest of publisher 'pub' was not accepted", "it is for host 'beta'")
    etcd.push((ROSTER, etcd.values[KEYS.host_roster("beta")]))
    trial.named("roster was not accepted", "it does not have host 'alpha'")
    trial.replace("second")
    etcd.let_through()
    new = read_manifest(etcd.values[MANIFEST]).ids["web.a"].hex()
    old = read_manifest(before[MANIFEST]).ids["web.a"].hex()
    etcd.values[KEYS.record("alpha", new)] = before[KEYS.record("alpha", old)]
    etcd.push((MANIFEST, etcd.values[MANIFEST]))
    alpha.wait_for_words(f"record {new[:16]}", "under its digest is something else")
    assert alpha.has() == {"web.a": b"first"}
    assert alpha.state()["publishers"][0]["missing"] == 1
    etcd.let_through()  # the true one comes by the next comparison, and no event
    alpha.wait_until_it_has(web_a=b"second")


def test_a_forged_roster_manifest_or_record_is_refused(trial: Trial) -> None:
    """By another root and another publisher's key, and with single bits flipped."""
    alpha, etcd = trial.alpha, trial.etcd
    forger = Ed25519PrivateKey.generate()
    true = read_roster(etcd.values[ROSTER])
    data = true._replace(number=true.number + 1).encoded()
    etcd.push((ROSTER, data + forger.sign(signed_part(data))))
    trial.named("roster was not accepted", "it is not signed by the root of the fleet")
    manifest = read_manifest(etcd.values[MANIFEST])
    data = manifest._replace(number=9).encoded()
    etcd.push((MANIFEST, data + forger.sign(signed_part(data))))
    trial.named("manifest of publisher 'pub' was not accepted", "its signature does not fit")
    whole = etcd.values[MANIFEST]
    for position in range(0, len(whole), max(1, len(whole) // 40)):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        etcd.push((MANIFEST, bytes(flipped)))
    refused = alpha.state()
    assert refused["publishers"][0]["number"] == manifest.number
    assert alpha.has() == {"web.a": b"first"}
    trial.replace("second")
    etcd.let_through()
    new = read_manifest(etcd.values[MANIFEST]).ids["web.a"].hex()
    flipped = bytearray(etcd.values[KEYS.record("alpha", new)])
    flipped[-100] ^= 1
    etcd.values[KEYS.record("alpha", new)] = bytes(flipped)
    etcd.push((MANIFEST, etcd.values[MANIFEST]))
    alpha.wait_for_words(f"record {new[:16]}", "under its digest is something else")
    assert alpha.has() == {"web.a": b"first"}


def test_repeats_and_other_orders_change_nothing(trial: Trial) -> None:
    """A manifest of a publisher that comes before the roster with that publisher waits for it."""
    alpha, etcd = trial.alpha, trial.etcd
    lines = len(alpha.audit())
    for _ in range(50):
        etcd.push((ROSTER, etcd.values[ROSTER]))
        etcd.push((MANIFEST, etcd.values[MANIFEST]), (MANIFEST, etcd.values[MANIFEST]))
    second = trial.fleet.host("second", "db.*")
    second.client.add("db.a", data="value")
    second.publish("db.a", "--to", "alpha")
    roster = etcd.values[ROSTER]
    etcd.let_through()
    new = etcd.values.pop(ROSTER)
    etcd.values[ROSTER] = roster
    etcd.push((KEYS.manifest("alpha", "second"), etcd.values[KEYS.manifest("alpha", "second")]))
    etcd.values[ROSTER] = new
    etcd.push((ROSTER, new))
    alpha.wait_until_it_has(web_a=b"first", db_a=b"value")
    kinds = [each["event"] for each in alpha.audit()[lines:]]
    assert kinds.count("manifest") == 1
    assert kinds.count("accept") == 1


def test_withholding_is_seen_and_ends_with_it(trial: Trial) -> None:
    """A record that is kept back, and answers that are no messages: the agent goes on."""
    alpha, etcd = trial.alpha, trial.etcd
    trial.replace("second")
    etcd.let_through()
    new = read_manifest(etcd.values[MANIFEST]).ids["web.a"].hex()
    kept = etcd.values.pop(KEYS.record("alpha", new))
    etcd.push((MANIFEST, etcd.values[MANIFEST]))
    alpha.wait_for_words(f"record {new[:16]}", "etcd does not have it")
    etcd.damage = b"\xff\xff\xff\xff\x01"
    alpha.kill_agent()
    alpha.start_agent(etcd.endpoint)
    alpha.wait_for_words("its answer is no message of etcd")
    etcd.damage = None
    etcd.values[KEYS.record("alpha", new)] = kept
    alpha.wait_until_it_has(web_a=b"second")
    assert "Traceback" not in alpha.said()


def test_a_freeze_shows_by_time(fleet: Fleet) -> None:
    """With max-age the secrets are locked when nothing fresh comes."""
    pub = fleet.host("pub", "web.*")
    alpha = fleet.hosts["alpha"] = FleetHost(fleet.cluster, pub.directory.parent, "alpha")
    etcd = HostileEtcd(fleet.cluster)
    try:
        alpha.enrol(join=False)
        alpha.join("--max-age", "5")
        pub.client.add("web.a", data="first")
        pub.publish("web.a", "--to", "alpha")
        etcd.let_through()
        alpha.start_agent(etcd.endpoint)
        alpha.wait_until_it_has(web_a=b"first")
        pub.publish("--to", "alpha", verb="renew")  # and this is kept back
        wait_for(lambda: alpha.state()["state"] == "stale")
        assert "that of publisher 'pub' is" in alpha.state()["reason"]
        alpha.wait_for_words("the fleet is stale: No manifest is fresh")
    finally:
        alpha.close()
        etcd.close()


def test_the_numbers_of_a_stolen_key_end_with_the_key(trial: Trial) -> None:
    """Fast-forward: the thief uses up the numbers; the root gives the publisher other keys."""
    alpha, etcd, pub = trial.alpha, trial.etcd, trial.pub
    arena = Arena(ARENA_LEVEL)
    stolen = pub.client.read("host.key")
    key = signing_key(memoryview(stolen), arena)
    manifest = read_manifest(etcd.values[MANIFEST])._replace(number=(1 << 64) - 1)
    data = manifest.encoded()
    etcd.values[MANIFEST] = data + key.sign(signed_part(data))
    etcd.push((MANIFEST, etcd.values[MANIFEST]))
    wait_for(lambda: alpha.state()["publishers"][0]["number"] == (1 << 64) - 1, alpha.said)
    trial.replace("second")
    trial.pass_on()
    trial.named("manifest of publisher 'pub' was not accepted", "it is an older one")
    pub.client.ok("object-del", {"id": "fleet"})
    pub.client.ok("object-del", {"id": "host"})
    pub.client.ok("object-del", {"id": "host.key"})
    pub.process.ctl("host", "init", "pub")
    pub.enrol(replace="")
    pub.publish("web.a", "--to", "alpha")
    trial.etcd.let_through()
    etcd.push((ROSTER, etcd.values[ROSTER]))
    etcd.push((MANIFEST, etcd.values[MANIFEST]))
    alpha.wait_until_it_has(web_a=b"second")
    digest = hashlib.sha256(etcd.values[MANIFEST]).hexdigest()
    assert alpha.state()["publishers"][0]["digest"] == digest
    arena.close()
