# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs grants, access and show: what an administrator sees."""

import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from secretd.ctl.identities import named_identity
from tests.support.daemon import Daemon
from tests.support.grants import SECRET, denied
from tests.support.needs import need_root
from tests.support.qmp import Client
from tests.support.secretctl import Ctl


def audited(*records: Mapping[str, object]) -> bytes:
    """Lines of an audit file."""
    return b"".join(json.dumps(each, separators=(",", ":")).encode() + b"\n" for each in records)


def test_grants_are_listed_for_people_and_programs(run: Ctl, qmp: Client) -> None:
    """Who may read what, by which grant, and what is left."""
    assert run("grants") == ("", "secretctl: no grant was made\n")
    qmp.add("disk0", data="letmein")
    run("grant", "disk0", "--to", "uid:0", "--id", "g1", "--max-reads", "3", "--for", "2h")
    run("grant", "web.*", "--to", "unit:nginx", "--id", "g2", "--credential", "tls")
    out, err = run("grants")
    assert [line.split() for line in out.splitlines()] == [
        ["GRANT", "SECRETS", "WHO", "AS", "READS", "LEFT", "ENDS", "IN"],
        ["g1", "disk0", "user:root", "-", "3", "2h"],
        ["g2", "web.*", "unit:nginx.service", "tls", "-", "-"],
    ]
    assert err == ""
    assert "g1" not in run("grants", "web.key")[0]
    assert [line.split()[0] for line in run("grants", "--to", "uid:0")[0].splitlines()] == [
        "GRANT", "g1",
    ]  # fmt: skip
    assert run("grants", "x")[1] == "secretctl: no grant covers 'x'\n"
    assert run("grants", "--to", "uid:7")[1] == "secretctl: no grant allows uid:7\n"
    first, second = json.loads(run("grants", "--json")[0])
    assert (first["id"], first["reads-left"], first["max-reads"]) == ("g1", 3, 3)
    assert second == {
        "id": "g2", "secret": "web.*", "authz": "g2.authz", "allows": ["unit:nginx.service"],
        "credential": "tls",
    }  # fmt: skip


def test_denials_faults_and_open_policies_are_named(run: Ctl, qmp: Client) -> None:
    """In the column of the recipients."""
    rules = [
        {"match": "uid:7777", "policy": "deny"},
        {"match": "gid:0", "policy": "allow"},
    ]
    open_list = {"qom-type": "authz-list", "id": "open", "policy": "allow", "rules": rules}
    qmp.ok("object-add", open_list)
    for name, authz in (("g1", "open"), ("g2", "none")):
        qmp.ok("object-add", {"qom-type": "secret-grant", "id": name, "secret": "s",
                              "authz": authz})  # fmt: skip
    out, _ = run("grants")
    assert "group:root, anyone, not uid:7777" in out
    assert "nobody: there is no authz object 'none'" in out


def test_a_matrix_shows_what_secretd_decides(run: Ctl, qmp: Client, tmp_path: Path) -> None:
    """For the identities that grants name, and the peers in an audit file."""
    assert run("access")[1] == "secretctl: there is no secret\n"
    qmp.add("a", data="letmein")
    qmp.add("b", data="letmein")
    assert run("access")[1] == "secretctl: no grant names a user, group or unit\n"
    run("grant", "a", "--to", "unit:x.service", "--id", "g1")
    run("grant", "*", "--to", "uid:0", "--id", "g2")
    run("grant", "b", "--to", "unit:vm-*", "--id", "g3")
    out, err = run("access")
    assert [line.split() for line in out.splitlines()] == [
        ["SECRET", "unit:x.service", "user:root"],
        ["a", "yes", "yes"],
        ["b", "-", "yes"],
    ]
    assert err == (
        "secretctl: grants name unit:vm-*, which stands for any number of clients that are not "
        "listed\n"
    )
    path = tmp_path / "audit"
    path.write_bytes(
        audited(
            {"event": "start"},
            {"event": "read", "peer": {"uid": 4242, "pid": 1, "unit": "unit:vm-1.scope"}},
        )
    )
    out, _ = run("access", "b", "--audit", str(path))
    assert [line.split() for line in out.splitlines()][1:] == [["b", "-", "yes", "yes"]]
    found = json.loads(run("access", "--json")[0])
    assert found == {"access": {"a": ["unit:x.service", "uid:0"], "b": ["uid:0"]},
                     "patterns": ["unit:vm-*"]}  # fmt: skip
    assert "no secret matches 'x*'" in run("access", "x*", status=1)[1]


def test_a_matrix_that_no_screen_holds_is_refused(
    run: Ctl, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says how to ask for less."""
    monkeypatch.setattr("secretd.ctl.access._CELLS", 1)
    for name in ("a", "b"):
        qmp.add(name, data="letmein")
    run("grant", "a", "--to", "uid:0")
    _, err = run("access", status=1)
    assert err == (
        "secretctl: 2 secrets and 1 identities are too many for a table; name some secrets\n"
    )


def test_explain_is_about_one_secret(run: Ctl) -> None:
    """A pattern goes elsewhere."""
    _, err = run("explain", "a*", "--as", "uid:0", status=2)
    assert "'secretctl access' takes patterns" in err


def test_a_grant_for_a_secret_that_comes_later_says_so(run: Ctl) -> None:
    """It may be a mistyped id."""
    out, err = run("grant", "later", "--to", "uid:0")
    assert out == "grant-later-uid_0\n"
    assert err == "secretctl: there is no secret 'later' yet\n"
    _, err = run("grant", "x y", "--to", "uid:0", status=1)
    assert err == (
        "secretctl: 'x y' can be no secret's id; an id begins with a letter and has only letters, "
        "digits, '-', '.' and '_'\n"
    )


# --- show


def test_show_has_everything_but_the_value(daemon: Daemon, run: Ctl, qmp: Client) -> None:
    """Size, protection, lifetime, owner, grants and reads."""
    need_root()
    assert run("show", "s", status=1)[1].startswith("secretctl: No secret with id 's'\n")
    qmp.add("s", data=SECRET.decode())
    out, _ = run("show", "s")
    assert out.splitlines()[0] == "s"
    for part in (
        f"secret, {len(SECRET)} bytes, in ",
        "added     by user:",
        "expires   never",
        "read      not since secretd started",
        "grants    none; 'secretctl grant s",
    ):
        assert part in out, out
    run("expire", "s", "--after", "2h")
    run("grant", "*", "--to", "uid:33", "--id", "g1", "--max-reads", "5", "--for", "1h")
    run("grant", "s", "--to", "uid:34", "--id", "g2")
    client = daemon.connect(role="client", uid=33)
    assert not denied(client, "s")
    out, _ = run("show", "s")
    assert "in 2h" in out
    assert "read      1 time since secretd started, last 2" in out
    assert ", pid " in out
    assert "grants    g1 (of '*'): user:www-data, 4 reads left, ends in 1h" in out
    assert "g2: " in out
    assert SECRET.decode() not in out
    found = json.loads(run("show", "s", "--json")[0])
    assert (found["id"], found["size"], found["releases"], found["uid"]) == (
        "s", len(SECRET), 1, os.getuid(),
    )  # fmt: skip
    assert [grant["id"] for grant in found["grants"]] == ["g1", "g2"]
    # A client knows less.
    run("grant", "s", "--to", "uid:0", "--id", "g3")
    out, _ = run("show", "s", socket=daemon.client)
    assert "grants" not in out
    assert "grants" not in json.loads(run("show", "s", "--json", socket=daemon.client)[0])


def test_show_finds_the_addition_in_the_audit(run: Ctl, qmp: Client, tmp_path: Path) -> None:
    """Also in a compressed file; what came before a deletion does not count."""
    qmp.add("s", data="letmein")
    peer = {"uid": 33, "gid": 33, "pid": 812, "unit": "unit:nginx.service"}
    lines = audited(
        {"event": "start", "time": "2026-01-01T00:00:00.000000Z"},
        {"event": "read", "id": "s", "time": "2026-01-01T00:00:01.000000Z", "peer": peer},
        {"event": "add", "id": "s", "time": "2026-01-01T12:00:02.000000Z", "peer": peer},
        {"event": "add", "id": "other", "time": "2026-01-02T00:00:02.000000Z", "peer": peer},
        {"event": "expire", "id": "s", "time": "2026-01-02T00:00:02.000000Z"},
    )
    path = tmp_path / "audit"
    path.write_bytes(lines)
    out, _ = run("show", "s", "--audit", str(path))
    assert "added     2026-01-01 " in out
    assert "by unit:nginx.service, uid:33, pid 812" in out
    assert "read      not since secretd started" in out
    read = {"event": "read", "id": "s", "time": "2026-01-03T12:00:00.000000Z", "peer": peer}
    (tmp_path / "audit.gz").write_bytes(gzip.compress(lines + audited(read)))
    out, _ = run("show", "s", "--audit", str(tmp_path / "audit.gz"))
    assert "read      last 2026-01-03 " in out
    assert json.loads(run("show", "s", "--audit", str(path), "--json")[0])["added-by"] == peer


def test_only_users_and_groups_have_names() -> None:
    """Any other identity stays as it is."""
    assert named_identity("uid:0") == "user:root"
    assert named_identity("gid:0") == "group:root"
    assert named_identity("pid:0") == "pid:0"
    assert named_identity("uid:4294967294") == "uid:4294967294"
