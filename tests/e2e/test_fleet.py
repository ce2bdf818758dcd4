# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole fleet: etcd, several secretd with stores, their agents, and the operator's commands."""

import asyncio
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from secretd.fleet import certificates, enrolment
from secretd.fleet.etcd import Endpoint
from secretd.fleet.keyspace import Keyspace
from tests.e2e.conftest import SECRETCTL
from tests.e2e.fleet_hosts import Fleet, fleet, run, wait_for
from tests.support.etcd import closed

__all__ = ["fleet"]

pytestmark = [pytest.mark.xdist_group("etcd"), pytest.mark.slow]


def test_a_secret_is_published_replaced_and_withdrawn(fleet: Fleet) -> None:
    """On those hosts that were named."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    beta = fleet.host("beta")
    for name in ("a", "b"):
        pub.client.add(f"web.{name}", data=f"value {name}")
    said = pub.publish("web.a", "web.b", "--to", "alpha")
    assert said == "published 2 secrets to 1 host\n"
    alpha.wait_until_it_has(web_a=b"value a", web_b=b"value b")
    pub.publish("web.b", "--to", "*eta")
    beta.wait_until_it_has(web_b=b"value b")
    pub.process.ctl("add", "web.a", "--replace", "--stdin", input=b"value 2")
    assert pub.publish("web.a", "--to", "alpha", "--to", "beta") == (
        "published 1 secret to 2 hosts\n"
    )
    alpha.wait_until_it_has(web_a=b"value 2", web_b=b"value b")
    beta.wait_until_it_has(web_a=b"value 2", web_b=b"value b")
    said = pub.publish("web.b", "--to", "alpha", verb="withdraw")
    assert said == "withdrew 1 secret from 1 host\n"
    alpha.wait_until_it_has(web_a=b"value 2")
    beta.wait_until_it_has(web_a=b"value 2", web_b=b"value b")
    kinds = [each["event"] for each in alpha.audit()]
    assert {"roster", "manifest", "withdraw"} <= set(kinds)
    # etcd has what hosts need, and nothing else.
    records = fleet.cluster.ctl("get", "--prefix", "/secretd/v1/trial/to/", "--keys-only").split()
    assert sum("/record/" in each for each in records) == 3


def test_status_shows_what_each_host_has(fleet: Fleet) -> None:
    """Current, behind with the reason, or silent."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    fleet.hosts["quiet"] = quiet = type(alpha)(fleet.cluster, pub.directory.parent, "quiet")
    quiet.enrol()
    pub.client.add("web.a", data="value")
    pub.publish("web.a", "--to", "*")
    found = wait_for(lambda: (s := fleet.status(pub))["alpha"]["state"] == "current" and s)
    assert found["alpha"]["secrets"] == 1
    assert found["quiet"]["state"] == "silent"
    assert found["quiet"]["heard"] is None
    alpha.kill_agent()
    pub.publish("web.a", "--to", "alpha")
    assert fleet.status(pub)["alpha"]["state"] == "behind"
    assert fleet.status(pub)["alpha"]["reason"] == "in publisher 'pub'"
    said = run("status", "--config", str(pub.config))
    assert said.splitlines()[0].split() == ["HOST", "STATE", "HEARD", "SECRETS"]
    assert "etcd refuses: etcdserver: permission denied" in run(
        "status", "--config", str(alpha.config), status=1
    )


def test_an_alias_travels_and_rotates(fleet: Fleet) -> None:
    """Readers on the hosts use its id; the version before goes when it is withdrawn."""
    pub, alpha = fleet.host("pub", "db*"), fleet.host("alpha")
    pub.process.ctl("add", "db", "--stdin", input=b"first")
    pub.process.ctl("rotate", "db", "--no-wait", "--file", "/dev/stdin", input=b"second")
    (alias,) = pub.client.ok("query-secret-alias", {"id": "db"})
    pub.publish("db", "--to", "alpha")
    wait_for(lambda: alpha.has().get("db") == b"second", alpha.said)
    pub.process.ctl("rotate", "db")  # alpha has the second: the first is retired
    pub.publish("db", "--to", "alpha")
    wait_for(lambda: set(alpha.has()) == {"db", "db.v2"}, alpha.said)
    pub.process.ctl("rotate", "db", "--no-wait", "--file", "/dev/stdin", input=b"third")
    pub.publish("db", "--to", "alpha")
    wait_for(lambda: alpha.has().get("db") == b"third", alpha.said)
    (alias,) = pub.client.ok("query-secret-alias", {"id": "db"})
    (there,) = alpha.client.ok("query-secret-alias", {"id": "db"})
    assert there["current"] == alias["current"]
    pub.publish("db", "--to", "alpha", verb="withdraw")
    wait_for(lambda: not alpha.has(), alpha.said)


def test_a_host_starts_from_its_store_while_etcd_is_down(fleet: Fleet) -> None:
    """Its agent says so, and goes on when etcd is back."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    pub.client.add("web.a", data="value")
    pub.publish("web.a", "--to", "alpha")
    alpha.wait_until_it_has(web_a=b"value")
    alpha.kill_agent()
    alpha.kill()
    fleet.cluster.stop()
    alpha.start()
    alpha.start_agent()
    alpha.wait_until_it_has(web_a=b"value")
    assert alpha.state()["state"] == "live"
    alpha.wait_for_words("Connect call failed")
    assert "etcd cannot be reached" in pub.publish("web.a", "--to", "alpha", status=1)
    fleet.cluster.start()
    pub.client.add("web.b", data="later")
    wait_for(lambda: "value" in str(alpha.has()))
    pub.publish("web.b", "--to", "alpha")
    alpha.wait_until_it_has(web_a=b"value", web_b=b"later")
    assert 'secretd_fleet_state{state="live"} 1' in (alpha.directory / "metrics.prom").read_text()


def test_the_agent_waits_for_secretd(fleet: Fleet) -> None:
    """And brings what has changed meanwhile."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    pub.client.add("web.a", data="value")
    pub.publish("web.a", "--to", "alpha")
    alpha.wait_until_it_has(web_a=b"value")
    alpha.kill()
    pub.client.add("web.b", data="later")
    pub.publish("web.b", "--to", "alpha")
    alpha.wait_for_words("secretd: ")
    alpha.start()
    alpha.wait_until_it_has(web_a=b"value", web_b=b"later")
    alpha.wait_for_words("secretd is there again")


def test_a_revoked_host_gets_nothing_more(fleet: Fleet) -> None:
    """The operator is shown what it knows; a revoked publisher's manifests count no more."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    second = fleet.host("second", "db.*")
    pub.client.add("web.a", data="value")
    pub.publish("web.a", "--to", "alpha")
    second.client.add("db.a", data="from the second")
    second.publish("db.a", "--to", "pub")
    wait_for(lambda: pub.has().get("db.a") == b"from the second")
    alpha.wait_until_it_has(web_a=b"value")
    said = run("revoke", str(fleet.cluster.directory), "alpha")
    assert said.splitlines() == [
        "alpha is out of the fleet", "it knows these secrets, so rotate them:", "  web.a",
    ]  # fmt: skip
    assert "no host of fleet 'trial' is 'alpha'" in pub.publish("web.a", "--to", "alpha", status=1)
    assert "alpha" not in fleet.cluster.ctl("get", "--prefix", "/secretd", "--keys-only")
    alpha.kill_agent()
    alpha.start_agent()
    alpha.wait_for_words("etcd at ")  # its user is gone
    assert "is not in the roster" in run("revoke", str(fleet.cluster.directory), "alpha", status=1)
    run("revoke", str(fleet.cluster.directory), "second")
    wait_for(lambda: pub.state()["roster"]["publishers"] == 1)
    assert not pub.state()["publishers"]


def test_a_publisher_stays_inside_of_its_pattern(fleet: Fleet) -> None:
    """Its own secretd refuses, and the words say why."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    pub.client.add("db.a", data="value")
    said = pub.publish("db.a", "--to", "alpha", status=1)
    assert "'db.a' is outside of the pattern 'web.*' of publisher 'pub'" in said
    assert "object 'web.none' not found" in pub.publish("web.none", "--to", "alpha", status=1)
    alpha.client.add("db.a", data="value")
    assert "is 'alpha' a publisher of fleet 'trial'?" in alpha.publish(
        "db.a", "--to", "alpha", status=1
    )
    alpha.client.ok("object-del", {"id": "db.a"})
    # What is there by another hand is not replaced, and the others arrive.
    alpha.client.add("web.own", data="by hand")
    for name in ("own", "other"):
        pub.client.add(f"web.{name}", data="published")
    pub.publish("web.own", "web.other", "--to", "alpha")
    alpha.wait_until_it_has(web_own=b"by hand", web_other=b"published")
    alpha.wait_for_words("was not accepted", "web.own")
    status = wait_for(lambda: (s := fleet.status(pub)["alpha"])["reason"] and s)
    assert "web.own" in status["reason"]


def test_eight_publishing_programs_lose_nothing(fleet: Fleet) -> None:
    """Each begins again on top of the one that was first."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    for number in range(8):
        pub.client.add(f"web.{number}", data=f"value {number}")
    with ThreadPoolExecutor(8) as threads:
        said = list(threads.map(lambda n: pub.publish(f"web.{n}", "--to", "alpha"), range(8)))
    assert said == ["published 1 secret to 1 host\n"] * 8
    alpha.wait_until_it_has(**{f"web_{n}": f"value {n}".encode() for n in range(8)})


def test_a_large_fleet_secret_and_many_small_ones_arrive(fleet: Fleet) -> None:
    """More than one transaction takes."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    large = os.urandom(256 * 1024).hex().encode()
    for number in range(4):
        pub.process.ctl("add", f"web.l{number}", "--stdin", input=large)
    for number in range(150):
        pub.client.add(f"web.{number:03}", data=f"{number}")
    ids = [f"web.{n:03}" for n in range(150)] + [f"web.l{n}" for n in range(4)]
    pub.publish(*ids, "--to", "alpha")
    wait_for(lambda: len(alpha.client.secrets()) == 2 + len(ids), alpha.said)
    assert alpha.client.read("web.l3") == large
    pub.process.ctl("add", "web.huge", "--stdin", input=large + b"x")
    said = pub.publish("web.huge", "--to", "alpha", status=1)
    assert "the limit in a fleet is 524288" in said


def test_the_certificate_is_renewed_by_enrolling_again(fleet: Fleet) -> None:
    """The agent reads it for its next connection, and with SIGHUP at once."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    alpha.kill_agent()
    alpha.enrol(days="0.00001")
    ends_at = certificates.ends_at(str(alpha.config.with_name("host.crt")))
    wait_for(lambda: time.time() > ends_at)
    alpha.start_agent()
    alpha.wait_for_words("the certificate", "has ended", "etcd at ")
    alpha.enrol()
    assert alpha.agent is not None
    alpha.agent.send_signal(signal.SIGHUP)
    pub.client.add("web.a", data="value")
    pub.publish("web.a", "--to", "alpha")
    alpha.wait_until_it_has(web_a=b"value")


def test_max_age_locks_until_a_manifest_is_renewed(fleet: Fleet) -> None:
    """FLEET_STATE says so; values are there again after a renewal."""
    pub = fleet.host("pub", "web.*")
    alpha = fleet.hosts["alpha"] = type(pub)(fleet.cluster, pub.directory.parent, "alpha")
    alpha.enrol(join=False)
    control = alpha.process.control
    run("join", "--config", str(alpha.config), "--control", control, "--max-age", "4")
    events = alpha.process.connect().watch("FLEET_STATE")
    alpha.start_agent()
    pub.client.add("web.a", data="value")
    pub.publish("web.a", "--to", "alpha")
    wait_for(lambda: any(each["id"] == "web.a" for each in alpha.client.secrets()), alpha.said)
    states: list[str] = []
    while "live" not in states or states[-1] != "stale":
        states.append(events.event()["data"]["state"])
    source, sink = os.pipe()
    said = alpha.client.fail("secret-read", {"id": "web.a"}, (sink,))
    os.close(source)
    os.close(sink)
    assert "Secret 'web.a' is locked: fleet 'fleet' has no manifest of publisher:pub" in said
    assert pub.publish("--to", "alpha", verb="renew") == "renewed 1 manifest\n"
    while states[-1] != "live":
        states.append(events.event()["data"]["state"])
    wait_for(lambda: alpha.client.read("web.a") == b"value", alpha.said)


def test_a_wrong_root_is_refused_by_name(fleet: Fleet, tmp_path: Path) -> None:
    """Of another fleet with the same name."""
    alpha = fleet.host("alpha")
    wait_for(lambda: alpha.state().get("roster"))
    enrolment.init(str(tmp_path / "other"), "trial", {"node1": Endpoint("127.0.0.1", 1)}, 0)

    other = (tmp_path / "other" / "roster").read_bytes()

    async def put() -> None:
        etcd = fleet.cluster.etcd()
        await etcd.write({Keyspace("trial").host_roster("alpha"): other})
        await closed(etcd)

    asyncio.run(put())
    alpha.wait_for_words("roster was not accepted", "it is not signed by the root of the fleet")
    assert alpha.state()["state"] == "refused"
    done = subprocess.run(
        [SECRETCTL, "--socket", alpha.process.control, "doctor"], capture_output=True, check=False
    )
    assert b"trial is refused: The roster cannot be accepted" in done.stdout


def test_errors_are_said_in_one_line(tmp_path: Path) -> None:
    """Without a traceback."""
    missing = str(tmp_path / "none")
    for words, text in (
        (("enrol", missing, "a", "b"), "is no fleet's directory"),
        (("agent", "--config", missing), f"{missing}: No such file or directory"),
        (("publish", "a", "--to", "b", "--config", missing), "No such file or directory"),
        (("init", missing, "--name", "x", "--node", "http://x"), "is no endpoint such as"),
        (("init", missing, "--name", "-x", "--node", "https://x"), "expects a host's name"),
    ):
        said = run(*words, status=1)
        assert text in said
        assert said.startswith("secretd-fleet: ")
        assert said.count("\n") == 1
    assert "enrol takes a host, or --again" in run("enrol", missing, status=2)
    run("init", missing, "--name", "x", "--node", "https://127.0.0.1:1")
    assert "exists already" in run("init", missing, "--name", "x", "--node", "https://x", status=1)
    assert oct(os.stat(f"{missing}/root.key").st_mode)[-3:] == "600"
    assert "etcd cannot be reached" in run("enrol", missing, "--again", status=1)
    (tmp_path / "bad.toml").write_text('fleet = "x"\n')
    assert "missing required field" in run(
        "agent", "--config", str(tmp_path / "bad.toml"), status=1
    )


def test_hosts_get_their_own_only(fleet: Fleet) -> None:
    """Also one whose name sorts before others: an empty end of a range would be that of all."""
    pub, later = fleet.host("pub", "web.*"), fleet.host("zeta")
    pub.client.add("web.z", data="for zeta")
    pub.publish("web.z", "--to", "zeta")
    later.wait_until_it_has(web_z=b"for zeta")
    first = fleet.host("aab")
    pub.client.add("web.a", data="for aab")
    pub.publish("web.a", "--to", "aab")
    first.wait_until_it_has(web_a=b"for aab")
    assert first.state()["state"] == "live"
    assert "not accepted" not in first.said()


def test_a_revoked_publisher_leaves_no_host_behind(fleet: Fleet) -> None:
    """What it has published is deleted in etcd and listed; hosts keep it."""
    pub, second, alpha = (
        fleet.host("pub", "web.*"),
        fleet.host("second", "db.*"),
        fleet.host("alpha"),
    )
    second.client.add("db.a", data="value")
    second.publish("db.a", "--to", "alpha")
    alpha.wait_until_it_has(db_a=b"value")
    said = run("revoke", str(fleet.cluster.directory), "second")
    assert "hosts keep these secrets of it, so delete them there:\n  db.a\n" in said
    wait_for(lambda: fleet.status(pub)["alpha"]["state"] == "current", alpha.said)
    assert alpha.has() == {"db.a": b"value"}
    assert alpha.state()["publishers"] == []
    alpha.client.ok("object-del", {"id": "db.a"})


def test_a_publisher_from_a_backup_goes_on(fleet: Fleet) -> None:
    """With the numbers and ids of its manifests in etcd, which it has signed itself."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    pub.client.add("web.a", data="a")
    pub.publish("web.a", "--to", "alpha")
    pub.kill_agent()
    pub.kill()
    shutil.copytree(pub.directory / "store", pub.directory / "backup")
    pub.start()
    pub.client.add("web.b", data="b")
    for _ in range(3):
        pub.publish("web.b", "--to", "alpha")
    alpha.wait_until_it_has(web_a=b"a", web_b=b"b")
    pub.kill()
    shutil.rmtree(pub.directory / "store")
    (pub.directory / "backup").rename(pub.directory / "store")
    pub.start()
    pub.client.add("web.c", data="c")
    said = pub.publish("web.c", "--to", "alpha")
    assert "secretd has signed 1 only: was its store restored?" in said
    alpha.wait_until_it_has(web_a=b"a", web_b=b"b", web_c=b"c")


def test_a_copy_of_the_operators_directory_goes_on(fleet: Fleet) -> None:
    """It takes over the roster in etcd, which has the same root's signature."""
    alpha = fleet.host("alpha")
    copy = fleet.cluster.directory.parent / "copy"
    shutil.copytree(fleet.cluster.directory, copy)
    fleet.host("beta")
    fleet.host("gamma")
    public = alpha.client.ok("query-secret-host")[0]["public"]
    said = run("enrol", str(copy), "alpha", public, "--publisher", "web.*")
    assert "alpha is in roster 5" in said
    wait_for(lambda: alpha.state()["roster"]["hosts"] == 3, alpha.said)


def test_what_was_not_published_is_not_withdrawn(fleet: Fleet) -> None:
    """A misspelt id is an error, and so is a version that an alias needs."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    pub.process.ctl("add", "web.a", "--stdin", input=b"1")
    pub.process.ctl("rotate", "web.a", "--no-wait", "--file", "/dev/stdin", input=b"2")
    pub.publish("web.a", "--to", "alpha")
    said = pub.publish("web.typo", "--to", "alpha", verb="withdraw", status=1)
    assert "'web.typo' was not published to these hosts" in said
    said = pub.publish("web.a.v2", "--to", "alpha", verb="withdraw", status=1)
    assert "'web.a.v2' is a version of alias 'web.a', which needs it" in said
    wait_for(lambda: alpha.has().get("web.a") == b"2", alpha.said)


def test_a_version_may_be_brought_again(fleet: Fleet) -> None:
    """As after a loss of etcd's data; and an id that has another value by now."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    pub.process.ctl("add", "web.a", "--stdin", input=b"1")
    pub.process.ctl("rotate", "web.a", "--no-wait", "--file", "/dev/stdin", input=b"2")
    pub.publish("web.a", "--to", "alpha", "--wait", "20")
    fleet.cluster.ctl("del", "--prefix", "/secretd/v1/trial/to/")
    run("enrol", str(fleet.cluster.directory), "--again")
    pub.publish("--to", "alpha", verb="renew")
    assert "1 host has it" in pub.publish("web.a", "--to", "alpha", "--wait", "20")
    for each in ("web.a", "web.a.v2", "web.a.v1"):
        pub.client.ok("object-del", {"id": each})
    pub.process.ctl("add", "web.a", "--stdin", input=b"3")
    pub.process.ctl("rotate", "web.a", "--no-wait", "--file", "/dev/stdin", input=b"4")
    pub.publish("web.a", "--to", "alpha", "--wait", "20")
    assert alpha.has() == {"web.a": b"4", "web.a.v1": b"3", "web.a.v2": b"4"}
    assert fleet.status(pub)["alpha"]["state"] == "current"


def test_a_host_with_new_keys_gets_everything_again(fleet: Fleet) -> None:
    """What was wrapped for the other keys is of no use to it."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    pub.client.add("web.a", data="value")
    pub.publish("web.a", "--to", "alpha", "--wait", "20")
    alpha.kill_agent()
    for each in ("fleet", "host", "host.key", "web.a"):
        alpha.client.ok("object-del", {"id": each})
    assert "with other keys; --replace exchanges them" in alpha.enrol(join=False, status=1)
    alpha.enrol(replace="")
    alpha.start_agent()
    pub.publish("--to", "alpha", verb="renew")
    alpha.wait_until_it_has(web_a=b"value")


def test_a_publisher_with_new_keys_deletes_nothing_unasked(fleet: Fleet) -> None:
    """Its numbers begin anew, and what it does not publish again would go."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    for each in ("a", "b"):
        pub.client.add(f"web.{each}", data=each)
    pub.publish("web.a", "web.b", "--to", "alpha", "--wait", "20")
    for each in ("fleet", "fleet.sent.alpha", "host", "host.key"):
        pub.client.ok("object-del", {"id": each})
    pub.enrol(replace="")
    said = pub.publish("web.a", "--to", "alpha", status=1)
    assert "alpha: with other keys this publisher has published web.b to it" in said
    pub.publish("web.a", "web.b", "--to", "alpha")
    alpha.wait_until_it_has(web_a=b"a", web_b=b"b")
    assert wait_for(lambda: alpha.state()["publishers"][0]["number"] == 1, alpha.said)


def test_an_error_of_one_host_stops_no_other(fleet: Fleet) -> None:
    """It is named, and the exit status says that something is wrong."""
    pub, alpha, beta = fleet.host("pub", "web.*"), fleet.host("alpha"), fleet.host("beta")
    pub.process.ctl("revoke", "grant-_-host_")
    pub.process.ctl("grant", "web.*", "--to", "host:alpha")
    pub.client.add("web.a", data="value")
    said = pub.publish("web.a", "--to", "*", status=1)
    assert "published 1 secret to 1 host\n" in said
    assert "secretd-fleet: beta: No grant lets host 'beta' have secret 'web.a'" in said
    alpha.wait_until_it_has(web_a=b"value")
    assert beta.has() == {}


def test_a_narrower_pattern_withdraws_what_is_outside(fleet: Fleet) -> None:
    """With the next manifest, and with a word for each id."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    for each in ("web.a", "web.b"):
        pub.client.add(each, data="value")
    pub.publish("web.a", "web.b", "--to", "alpha", "--wait", "20")
    pub.enrol("web.a*")
    said = pub.publish("--to", "alpha", verb="renew")
    assert "'web.b' is outside of the pattern 'web.a*' by now, and withdrawn" in said
    alpha.wait_until_it_has(web_a=b"value")


def test_an_alias_that_was_in_the_way_is_made_later(fleet: Fleet) -> None:
    """Until then the host is behind, and says why."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    alpha.client.add("web.a", data="local")
    pub.process.ctl("add", "web.a", "--stdin", input=b"1")
    pub.process.ctl("rotate", "web.a", "--no-wait", "--file", "/dev/stdin", input=b"2")
    said = pub.publish("web.a", "--to", "alpha", "--wait", "3", status=1)
    assert "1 host did not confirm within 3 s: alpha" in said
    assert fleet.status(pub)["alpha"]["state"] in ("refused", "behind")
    alpha.client.ok("object-del", {"id": "web.a"})
    wait_for(lambda: fleet.status(pub)["alpha"]["state"] == "current", alpha.said)


def test_joining_again_changes_max_age(fleet: Fleet) -> None:
    """And forgets nothing."""
    pub, alpha = fleet.host("pub", "web.*"), fleet.host("alpha")
    pub.client.add("web.a", data="value")
    pub.publish("web.a", "--to", "alpha", "--wait", "20")
    alpha.join("--max-age", "86400")
    path = {"path": "/objects/fleet", "property": "max-age"}
    assert alpha.client.ok("qom-get", path) == 86400
    assert alpha.has() == {"web.a": b"value"}
    assert alpha.state()["publishers"][0]["number"] == 1
