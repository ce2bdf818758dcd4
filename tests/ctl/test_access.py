# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of secretctl about access: what they make, print and return."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from secretd.audit import chain
from secretd.audit.log import Audit
from secretd.ctl import identities, output, verb
from secretd.errors import UsageError
from tests.support.daemon import Daemon
from tests.support.needs import need_root
from tests.support.qmp import Client
from tests.support.secretctl import Ctl


def test_a_grant_is_made_explained_and_revoked(daemon: Daemon, run: Ctl, qmp: Client) -> None:
    """One verb each; the client sees it at once."""
    need_root()
    qmp.add("web.key", data="letmein")
    client = daemon.connect(role="client", uid=33)
    assert client.secrets() == []
    out, _ = run("explain", "web.key", "--as", "uid:33", status=1)
    assert out == (
        "uid:33 may read 'web.key': no\n"
        "  no grant names it; 'secretctl grant web.key --to uid:33' would\n"
    )
    out, err = run("grant", "web.*", "--to", "unit:nginx", "--to", "user:www-data")
    name = "grant-web._-unit_nginx.service-uid_33"
    assert (out, err) == (f"{name}\n", "")
    assert [s["id"] for s in client.secrets()] == ["web.key"]
    out, _ = run("explain", "web.key", "--as", "unit:nginx.service")
    assert out == (
        f"unit:nginx.service may read 'web.key': yes, by grant {name}\n"
        f"  grant {name} allows: '{name}.authz': rule 0 ('unit:nginx.service') says allow\n"
    )
    out, _ = run("explain", "web.nope", "--as", "gid:7", status=1)
    assert out == (
        "gid:7 may read 'web.nope': no\n  there is no secret of that id\n"
        f"  grant {name} does not: '{name}.authz': no rule matches, and its policy says deny\n"
    )
    found = json.loads(run("explain", "web.key", "--as", "uid:33", "--json")[0])
    assert (found["allowed"], found["exists"], found["grant"]) == (True, True, name)
    _, err = run("grant", "web.*", "--to", "unit:nginx", "--to", "uid:33", status=1)
    assert err == (
        f"secretctl: '{name}' exists already; revoke it first, or choose another with --id\n"
    )
    assert run("revoke", name) == ("", "")
    assert client.secrets() == []
    assert qmp.ok("qom-list", {"path": "/objects"})[1:] == [
        {"name": "web.key", "type": "child<secret>"}
    ]
    assert run("revoke", name, status=1)[1] == f"secretctl: there is no grant '{name}'\n"
    assert run("revoke", "web.key", status=1)[1] == (
        "secretctl: 'web.key' is not a grant; 'secretctl del' removes secrets\n"
    )


def test_a_grant_can_be_limited(daemon: Daemon, run: Ctl, qmp: Client) -> None:
    """In time, in reads, and to a credential's name; a bad one leaves nothing behind."""
    run(
        "grant",
        "s",
        "--to",
        "uid:1",
        "--id",
        "g",
        "--for",
        "8h",
        "--max-reads",
        "3",
        "--credential",
        "c",
    )
    for name, value in (("expires-after", 28800), ("max-reads", 3), ("credential", "c")):
        assert qmp.ok("qom-get", {"path": "g", "property": name}) == value
    _, err = run("grant", "t", "--to", "uid:1", "--id", "h", "--max-reads", "0", status=1)
    assert "Parameter 'max-reads' expects a value" in err
    assert {o["name"] for o in qmp.ok("qom-list", {"path": "/objects"})} == {"type", "g", "g.authz"}
    qmp.ok("object-add", {"qom-type": "secret-grant", "id": "i", "secret": "x", "authz": "other"})
    assert run("revoke", "i") == ("", "")
    rules = qmp.ok("qom-get", {"path": "g.authz", "property": "rules"})
    assert rules == [{"match": "uid:1", "policy": "allow", "format": "exact"}]
    run("grant", "s", "--to", "unit:web-*", "--id", "j")
    (rule,) = qmp.ok("qom-get", {"path": "j.authz", "property": "rules"})
    assert rule == {"match": "unit:web-*", "policy": "allow", "format": "glob"}


def test_a_credential_that_systemd_could_not_ask_for_is_refused(run: Ctl) -> None:
    """Its name and the unit's have to fit into an address together."""
    unit, name = "u" * 40 + ".service", "c" * 36
    for who in (f"unit:{unit}", f"user-unit:1000/{unit}"):
        _, err = run("grant", "a", "--to", "uid:1", "--to", who, "--credential", name, status=1)
        assert err == (
            f"secretctl: '{unit}' and '{name}' have 84 bytes together, and systemd can ask for 83: "
            "choose a shorter --credential\n"
        )
        run("grant", "a", "--to", who, "--credential", name[1:])


def test_a_grant_that_has_expired_is_made_anew_or_cleaned_up(run: Ctl, qmp: Client) -> None:
    """The list that belonged to it is still there; nothing else of that name is touched."""
    run("grant", "s", "--to", "uid:1", "--id", "g")
    qmp.ok("object-del", {"id": "g"})
    run("grant", "s", "--to", "uid:2", "--id", "g")
    (rule,) = qmp.ok("qom-get", {"path": "g.authz", "property": "rules"})
    assert rule["match"] == "uid:2"
    qmp.ok("object-del", {"id": "g"})
    assert run("revoke", "g") == ("", "")
    assert run("revoke", "g", status=1)[1] == "secretctl: there is no grant 'g'\n"
    qmp.add("h.authz", data="letmein")
    qmp.ok("object-add", {"qom-type": "secret-grant", "id": "h", "secret": "x", "authz": "o"})
    assert run("revoke", "h") == ("", "")
    assert qmp.read("h.authz") == b"letmein"
    qmp.ok("object-add", {"qom-type": "authz-list", "id": "i.authz"})
    qmp.ok("object-add", {"qom-type": "secret-grant", "id": "i", "secret": "x", "authz": "o"})
    assert run("revoke", "i") == ("", "")
    assert qmp.ok("qom-get", {"path": "i.authz", "property": "policy"}) == "deny"


def test_explain_includes_a_users_groups(run: Ctl, qmp: Client) -> None:
    """As their processes have them."""
    qmp.add("s", data="letmein")
    run("grant", "s", "--to", "group:root")
    assert "yes, by grant" in run("explain", "s", "--as", "user:root")[0]
    out, err = run("explain", "s", "--as", "uid:0", status=1)
    assert ": no\n" in out
    assert "on the control socket root reads every secret" in err


@pytest.mark.slow
def test_a_lifetime_is_set_and_listed(run: Ctl, qmp: Client) -> None:
    """With its unit."""
    qmp.add("s", data="letmein")
    qmp.add("t", data="letmein")
    assert "EXPIRES" not in run("list")[0]
    for time, shown in (
        ("90s", "1m 30s"),
        ("2d", "2d"),
        ("26h", "1d 2h"),
        ("15m", "15m"),
        ("1s", "1s"),
    ):
        out, err = run("expire", "t", "--after", time)
        assert out.startswith("t will be wiped at ")
        assert out.endswith(f", in {shown}\n")
        assert err == ""
        lines = run("list")[0].splitlines()
        assert lines[0].endswith("EXPIRES IN")
        assert lines[1].endswith("  -")
        assert lines[2].endswith(f"  {shown}") or time == "1s"
    qmp.ok("secret-expire", {"id": "s", "after": 5000})
    listed = json.loads(run("list", "--json")[0])
    assert listed[0]["expires-in"] == 5000
    assert output.duration(0) == "0s"
    assert run("expire", "t", "--never") == ("t will not expire\n", "")
    assert "expires-in" not in json.loads(run("list", "--json")[0])[1]
    for wrong in ([], ["--never", "--after", "8h"]):
        assert "either --after TIME or --never" in run("expire", "t", *wrong, status=2)[1]
    words = (
        "secretctl: '8': a time needs its unit, such as 90s, 15m, 8h, 30d, 18:00 or 2030-12-24\n"
    )
    assert run("expire", "t", "--after", "8", status=1) == ("", words)
    assert run("grant", "t", "--to", "uid:1", "--for", "8", status=1) == ("", words)
    out, err = run("grant", "t", "--to", "uid:1", "--for", "8h")
    assert out == "grant-t-uid_1\n"
    assert re.fullmatch(r"secretctl: it ends at [0-9]{2}:[0-9]{2}, in 8h\n", err)
    for text in ("x", "", "-1", "1y", "1.5h", "25:00"):
        assert (
            "a time is expected, such as 90s" in run("expire", "s", f"--after={text}", status=1)[1]
        )


@pytest.mark.parametrize(
    ("who", "wanted"),
    [
        ("uid:33", ["uid:33"]),
        ("gid:0033", ["gid:33"]),
        ("user:root", ["uid:0"]),
        ("group:root", ["gid:0"]),
        ("unit:nginx", ["unit:nginx.service"]),
        ("unit:tpl@a.b.service", ["unit:tpl@a.b.service"]),
        ("unit:x.scope", ["unit:x.scope"]),
        ("unit:node.js", ["unit:node.js.service"]),
        ("unit:web-*", ["unit:web-*"]),
        ("user-unit:1000/foo", ["user-unit:1000/foo.service"]),
        ("user-unit:root/foo.scope", ["user-unit:0/foo.scope"]),
    ],
)
def test_names_become_what_the_daemon_calls_them(who: str, wanted: list[str]) -> None:
    """Users and groups numbers, units whole names."""
    assert identities.identities(who) == wanted


@pytest.mark.parametrize(
    ("who", "words"),
    [
        (
            "nginx",
            "'nginx': expected a kind and a name, such as unit:nginx.service, user:alice or gid:33",
        ),
        ("uid:", "expected a kind and a name"),
        ("uid:root", "'uid:root': uid needs a number, user and group a name"),
        ("user:no-such-user", "there is no user 'no-such-user'"),
        ("group:no-such-group", "'group:no-such-group': there is no group 'no-such-group'"),
        ("user-unit:no-such/x", "there is no user 'no-such'"),
        ("user-unit:x", "'user-unit:x': expected unit:NAME"),
        ("vm:x", "'vm:x': expected unit:NAME, user:NAME, group:NAME, uid:N, gid:N, user-unit"),
    ],
)
def test_an_unknown_identity_is_an_error(who: str, words: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(UsageError) as caught:
        identities.identities(who)
    assert words in str(caught.value)


# --- audit verify


@pytest.fixture
def audited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Iterator[tuple[Daemon, Ctl]]:
    """A server with an audit under the key "k", and secretctl for it."""
    key = memoryview(bytearray(b"k" * 32))
    made = Daemon(tmp_path, make_audit=lambda: Audit(str(tmp_path / "audit"), key=lambda: key))
    monkeypatch.setattr(verb, "forbid_dumps", lambda: None)
    made.call(lambda: made.server.core.audit.start("1", 0))
    made.connect().add("k", data="k" * 32)
    yield made, Ctl(made, monkeypatch, capfd)
    made.stop()
    made.server.core.audit.stop()


def test_an_audit_file_is_verified(
    tmp_path: Path, run: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong by file and line, and where it ends."""
    path = tmp_path / "audit"
    audit = Audit(str(path))

    async def write() -> None:
        audit.start("1", 0)
        for number in range(5):
            audit.append("add", id=f"s{number}")

    asyncio.run(write())
    audit._flush()
    assert run("audit", "verify", str(path))[0] == (
        "6 records; the last is record 6 of "
        f"{json.loads(path.read_text().splitlines()[5])['time']}: add\n"
        "it has no stop record: secretd is running (--live asks it), or the file was truncated\n"
    )
    audit.stop()
    out, err = run("audit", "verify", str(path))
    assert out.startswith("7 records; the last is record 7 of 20")
    assert out.endswith(": stop\n")
    assert err == ""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"s1", b"s9"), lines[4], lines[3][:9]]))
    out, _ = run("audit", "verify", str(path), status=1)
    assert out.splitlines()[:3] == [
        f"{path}:3: record 3 was changed, or is under another key",
        f"{path}:4: record 4 is missing before record 5",
        f"{path}:5: cut after 9 bytes, in the middle of a record",
    ]
    assert out.splitlines()[3].startswith("4 records; the last is record 5 of 20")
    path.write_bytes(b"")
    assert run("audit", "verify", str(path), status=1)[1] == "no audit record was found\n"
    assert "No such file" in run("audit", "verify", "/nope", status=1)[1]


def test_a_key_comes_from_the_daemon_or_a_file(tmp_path: Path, audited: tuple[Daemon, Ctl]) -> None:
    """And a running daemon says what is missing at the end."""
    daemon, verify = audited
    path, key_file = tmp_path / "audit", tmp_path / "key"
    key_file.write_bytes(daemon.connect().read("k"))
    assert verify("audit", "verify", str(path), "--key", "k")[0].count("\n") == 2
    assert verify("audit", "verify", str(path), "--key-file", str(key_file))[0].count("\n") == 2
    key_file.write_bytes(b"x" * 32)
    out, _ = verify("audit", "verify", str(path), "--key-file", str(key_file), status=1)
    assert f"{path}:1: record 1 was changed, or is under another key" in out
    out, _ = verify("audit", "verify", str(path), status=1)
    assert out.startswith(
        f"{path}:1: the records from 1 on need a key; give it with --key or --key-file\n"
    )
    lines = path.read_bytes().splitlines(keepends=True)
    copy = tmp_path / "copy"
    copy.write_bytes(b"".join(lines[:2]))
    out, _ = verify("audit", "verify", str(copy), "--key", "k", "--live", status=1)
    assert "those after 2 are missing at the end\n" in out
    out, _ = verify("audit", "verify", str(path), "--live", "--key", "k")
    assert "missing" not in out
    last = chain.read(path.read_bytes().splitlines()[-1])
    assert last is not None
    made_up = f'"seq":{last.number + 1000},"time":"\\u001b]0;x","event":"add"'
    copy.write_text(chain.write(last.link, made_up, memoryview(bytearray(b"k" * 32)))[0])
    out, _ = verify("audit", "verify", str(copy), "--live", "--key", "k", status=1)
    assert "later ones are forged" in out
    assert "\x1b" not in out
    write = Audit(str(tmp_path / "plain"))
    write.stop()
    first = f'"seq":1,"event":"start","prev":"{"0" * 64}"'
    copy.write_text(chain.write(chain.GENESIS, first, None)[0])
    out, _ = verify("audit", "verify", str(copy), "--key", "k", status=1)
    assert "no record is under the key" in out


@pytest.mark.slow
def test_the_help_names_all_verbs() -> None:
    """As a person would ask."""
    secretctl = os.path.join(os.path.dirname(sys.executable), "secretctl")
    text = subprocess.run([secretctl, "--help"], capture_output=True, text=True, check=True).stdout
    for name in ("grant", "revoke", "explain", "expire", "audit"):
        assert f"\n  {name} " in text


def test_a_verification_is_json_for_programs(run: Ctl, tmp_path: Path) -> None:
    """What was found, and what there is; also where nothing is an audit record."""
    path = tmp_path / "a"
    Audit(str(path)).stop()
    path.write_text("nonsense\n")
    found = json.loads(run("audit", "verify", str(path), "--json", status=1)[0])
    assert found["last"] is None
    assert found["findings"] == [f"{path}:1: this is not an audit record"]
    assert (
        run("audit", "verify", str(path), status=1)[0] == f"{path}:1: this is not an audit record\n"
    )


def test_a_grant_whose_rules_are_gone_is_explained(run: Ctl, qmp: Client) -> None:
    """The list was deleted, or is another type."""
    qmp.add("s", data="letmein")
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": "one", "identity": "uid:1"})
    for name, authz in (("g", "gone"), ("h", "one")):
        qmp.ok(
            "object-add", {"qom-type": "secret-grant", "id": name, "secret": "s", "authz": authz}
        )
    out, err = run("explain", "s", "--as", "uid:1")
    assert "yes, by grant h" in out
    assert err == ""
