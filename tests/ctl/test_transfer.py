# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretctl host, peer, offer, wrap, accept and handover, between two daemons."""

import base64
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.qmp import Client
from tests.support.scan import parts, scan, secret
from tests.support.secretctl import SECRETCTL, Ctl


@pytest.fixture
def beta(tmp_path: Path) -> Iterator[Daemon]:
    """Another host's daemon."""
    (tmp_path / "beta").mkdir()
    made = Daemon(tmp_path / "beta")
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def hosts(run: Ctl, beta: Daemon) -> str:
    """Alpha and beta know each other; beta's control socket."""
    at = beta.control
    alpha_line = run("host", "init", "alpha")[0].split()
    beta_line = run("host", "init", "beta", socket=at)[0].split()
    assert run("host", "show", socket=at)[0].split() == beta_line
    run("peer", "add", *beta_line)
    run("peer", "add", *alpha_line, socket=at)
    return at


def over(at: str) -> str:
    """What stands for ssh: it runs the command with beta's socket."""
    return shlex.join(["env", f"SECRETD_SOCKET={at}", f"PATH={os.path.dirname(SECRETCTL)}:/bin"])


def test_secrets_are_handed_over(run: Ctl, qmp: Client, hosts: str, beta: Daemon) -> None:
    """By pattern; they stay here, and are there with their origin."""
    for name in ("vm1.disk", "vm1.vnc", "vm2.disk"):
        qmp.add(name, data=f"value of {name}")
    qmp.add("vm1.large", data="x" * 300_000)
    run("grant", "vm1.*", "--to", "host:beta")
    out, err = run("handover", "vm1.*", "--to", "beta", "--for", "vm1", "--ssh", over(hosts))
    assert (out, err) == ("3 secrets handed over to beta\n", "")
    client = beta.connect()
    assert client.read("vm1.disk") == b"value of vm1.disk"
    assert len(client.read("vm1.large")) == 300_000
    assert {s["id"] for s in client.secrets()} == {"vm1.disk", "vm1.vnc", "vm1.large", "host.key"}
    assert qmp.read("vm1.disk") == b"value of vm1.disk"
    out, _ = run("handover", "vm1.disk", "--to", "beta", "--ssh", over(hosts), "--json")
    assert json.loads(out) == {"to": "beta", "secrets": 1}


def test_what_is_not_granted_is_named(run: Ctl, qmp: Client, hosts: str, beta: Daemon) -> None:
    """The others go; the exit status says so."""
    for name in ("a", "b"):
        qmp.add(name, data="x")
    run("grant", "a", "--to", "host:beta")
    out, err = run("handover", "a", "b", "--to", "beta", "--ssh", over(hosts), status=1)
    assert out == "1 secret handed over to beta\n"
    assert "b: No grant lets host 'beta' have secret 'b'" in err
    beta_client = beta.connect()
    beta_client.add("c", data="its own")
    qmp.add("c", data="x")
    run("grant", "c", "--to", "host:beta")
    out, _ = run("handover", "c", "--to", "beta", "--ssh", over(hosts), status=1)
    assert out == "0 secrets handed over to beta\n"
    assert beta_client.read("c") == b"its own"


def test_a_program_carries_lines(
    run: Ctl, qmp: Client, hosts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offers one way, records the other; what is no line of that kind is named."""
    qmp.add("a", data="x")
    run("grant", "a", "--to", "host:beta")
    offers, _ = run("offer", "a", "--from", "alpha", socket=hosts)
    (tmp_path / "offers").write_text(offers)
    with open(tmp_path / "offers") as file:
        monkeypatch.setattr(sys, "stdin", file)
        records, _ = run("wrap")
    (tmp_path / "records").write_text(records)
    for again, (out, status) in enumerate((("1 accepted\n", 0), ("0 accepted\n", 1))):
        with open(tmp_path / "records") as file:
            monkeypatch.setattr(sys, "stdin", file)
            found, err = run("accept", socket=hosts, status=status)
        assert (found, "an offer is used once" in err) == (out, bool(again))
    for verb in ("wrap", "accept"):
        with open("/etc/hostname") as file:
            monkeypatch.setattr(sys, "stdin", file)
            _, err = run(verb, status=1)
        assert "line 1: this is no " in err
    with open(os.devnull) as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert json.loads(run("accept", "--json")[0]) == {"accepted": 0}
    (tmp_path / "ids").write_text("b\nhost.key\n")
    with open(tmp_path / "ids") as file:
        monkeypatch.setattr(sys, "stdin", file)
        out, err = run("offer", "--from", "alpha", "--for", "vm1", socket=hosts, status=1)
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["b"]
    assert "host.key: attempt to add duplicate property" in err
    assert base64.b64decode(json.loads(out)["offer"]).startswith(b"secretd offer 1\0")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["host", "init"], 2, "init takes the host's name"),
        (["host", "show", "x"], 2, "show takes no name"),
        (["host", "show"], 1, "this host has no name yet; 'secretctl host init NAME' gives it one"),
        (["peer", "add", "x"], 2, "add takes NAME and PUBLIC"),
        (["peer", "remove", "x"], 1, "no host 'x' is known"),
        (["handover", "a", "--to", "b", "--for", "a b"], 1, "--for takes letters, digits and"),
        (["handover", "a", "--to", "b"], 1, "this host has no name yet"),
    ],
)
def test_what_does_not_fit_is_said(run: Ctl, words: list[str], status: int, said: str) -> None:
    """With the next step."""
    assert said in run(*words, status=status)[1]


def test_hosts_are_listed_and_removed(run: Ctl, hosts: str) -> None:
    """In a table, in JSON, and none."""
    assert run("peer", "list")[0].splitlines()[1].split()[0] == "beta"
    assert [each["name"] for each in json.loads(run("peer", "list", "--json")[0])] == ["beta"]
    assert json.loads(run("host", "show", "--json")[0])["name"] == "alpha"
    run("peer", "remove", "beta")
    assert "no other host is known" in run("peer", "list")[1]
    assert "beta" not in run("peer", "list", "--json")[0]
    assert run("host", "show", socket=hosts)[0].startswith("beta ")


@pytest.mark.usefixtures("hosts")
def test_a_carrier_that_fails_is_named(run: Ctl, qmp: Client) -> None:
    """One that is not there, and one that ends too early."""
    qmp.add("a", data="x")
    run("grant", "a", "--to", "host:beta")
    _, err = run("handover", "a", "--to", "beta", "--ssh", "/no/such/ssh", status=1)
    assert "/no/such/ssh: No such file or directory" in err
    _, err = run("handover", "a", "--to", "beta", "--ssh", "false", status=1)
    assert "the other host has not accepted all of them" in err


def test_a_hostile_carrier_achieves_nothing(
    run: Ctl, qmp: Client, daemon: Daemon, hosts: str, beta: Daemon, tmp_path: Path
) -> None:
    """It keeps, repeats, swaps, cuts and holds back; its memory and all files have ciphertext."""
    count = 6
    ids = [f"vm1.s{number}" for number in range(count)]
    for number, object_id in enumerate(ids):
        qmp.add(object_id, data=secret(number))
    run("grant", "vm1.*", "--to", "host:beta")
    client = beta.connect()
    offers = [client.ok("secret-offer", {"from": "alpha", "id": each})["offer"] for each in ids]
    words = [sys.executable, str(Path(__file__).with_name("carrier.py")), daemon.client,
             beta.client, str(count)]  # fmt: skip
    log = tmp_path / "log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as carrier,
    ):
        assert carrier.stdin is not None
        assert carrier.stdout is not None
        for object_id, text in zip(ids, offers, strict=True):
            carrier.stdin.write(f"{object_id} {text}\n")
        carrier.stdin.flush()
        said = json.loads(carrier.stdout.readline())
        found = scan(carrier.pid)
        assert found.scanned > 1 << 20
        assert found.outside == []
        assert found.inside == []
    assert said == {"wrong": [], "right": ids[::-1]}
    assert [client.read(each) for each in ids] == [secret(n).encode() for n in range(count)]
    assert [qmp.read(each) for each in ids] == [secret(n).encode() for n in range(count)]
    files = [each for each in tmp_path.rglob("*") if each.is_file()]
    assert files
    for each in files:
        assert parts(each.read_bytes()) == []
