# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-License-Identifier: LGPL-2.1-or-later
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may read what: grants and authz objects, and that who may not learns nothing."""

import base64
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from secretd.access.decision import Access
from secretd.access.peer import Peer, SocketRole, identify
from secretd.audit.log import Audit
from secretd.errors import LockedMemoryExhausted
from secretd.journal.journal import Journal
from secretd.monitor.commands import COMMANDS
from secretd.qom import authz
from secretd.qom.deadlines import LIFETIME_SECONDS, now
from secretd.qom.paths import Paths
from secretd.qom.tree import ObjectTree
from tests.support.cgroups import cgroup, process_in, running_in
from tests.support.daemon import Daemon
from tests.support.grants import DENIED, SECRET, allow, begin_delivery, denied, drained, grant
from tests.support.needs import need_root
from tests.support.qmp import Client


@pytest.fixture(autouse=True)
def _root() -> None:
    need_root()


@pytest.fixture
def loaded(qmp: Client) -> Client:
    """With secrets web.key, web.cert and db.key."""
    for name in ("web.key", "web.cert", "db.key"):
        qmp.add(name, data=SECRET.decode())
    return qmp


def test_a_grant_lets_those_read_whom_its_authz_object_allows(
    daemon: Daemon, loaded: Client
) -> None:
    """The secrets that its pattern names, and no others."""
    client = daemon.connect(role="client", uid=1000)
    other = daemon.connect(role="client", uid=1001, groups=(33,))
    assert denied(client, "web.key")
    allow(loaded, "web", "uid:1000")
    grant(loaded, "g", "web.*", "web")
    assert not denied(client, "web.key")
    assert not denied(client, "web.cert")
    assert denied(client, "db.key")
    assert denied(other, "web.key")
    assert [s["id"] for s in client.secrets()] == ["web.cert", "web.key"]
    assert other.secrets() == []
    allow(loaded, "www", "gid:33")
    grant(loaded, "g2", "web.key", "www")
    assert not denied(other, "web.key")
    assert [s["id"] for s in other.secrets()] == ["web.key"]


def test_a_list_of_what_one_may_read_is_made_of_what_is_granted(
    daemon: Daemon, loaded: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact ids, patterns that overlap, lists in files; nobody else's secrets are looked at."""
    client = daemon.connect(role="client", uid=1000)
    (tmp_path / "list").write_text('{"rules": [{"match": "uid:1000", "policy": "allow"}]}')
    loaded.ok(
        "object-add",
        {"qom-type": "authz-listfile", "id": "f", "filename": str(tmp_path / "list")},
    )
    allow(loaded, "a", "uid:1000")
    for number in range(5):
        loaded.add(f"z{number}", data="x")

    def listed(after: str = "") -> list[str]:
        return [s["id"] for s in client.ok("query-secrets", {"after": after} if after else {})]

    grant(loaded, "g0", "z3", "a")
    grant(loaded, "g1", "nope", "a")
    looked: list[str] = []
    with monkeypatch.context() as patch:
        original = daemon.tree.is_secret

        def seen(object_id: str) -> bool:
            looked.append(object_id)
            return original(object_id)

        patch.setattr(daemon.tree, "is_secret", seen)
        assert listed() == ["z3"]
    assert sorted(looked) == ["nope", "z3"]
    grant(loaded, "g2", "web.*", "a")
    grant(loaded, "g3", "we?.key", "f")
    grant(loaded, "g4", "z?", "f", **{"max-reads": 1})
    grant(loaded, "g5", "*.key", "a", **{"max-reads": 1})
    everything_ = ["db.key", "web.cert", "web.key", "z0", "z1", "z2", "z3", "z4"]
    assert listed() == everything_
    assert listed("web.cert") == everything_[2:]
    assert not denied(client, "db.key")
    assert listed() == everything_[1:]
    (tmp_path / "list").write_text("{}")
    assert listed() == ["web.cert", "web.key", "z3"]
    source, sink = os.pipe()
    assert client.fail("secret-read", {"id": "f.key"}, (sink,)).endswith("not permitted")
    loaded.ok("object-add", {"qom-type": "authz-simple", "id": "web.x", "identity": "x"})
    assert client.fail("secret-read", {"id": "web.x"}, (sink,)) == "No secret with id 'web.x'"
    os.close(source)
    os.close(sink)


def test_what_was_not_delivered_at_all_is_no_read(daemon: Daemon, loaded: Client) -> None:
    """Of a grant that counts; the audit would say `withheld`."""
    allow(loaded, "a", "uid:1000")
    grant(loaded, "g", "web.key", "a", **{"max-reads": 1})
    client = daemon.connect(role="client", uid=1000)
    source, sink = os.pipe()
    os.close(source)
    words = "Unable to write the secret: Broken pipe"
    for each in (client, client, loaded):
        assert each.fail("secret-read", {"id": "web.key"}, (sink,)) == words
    os.close(sink)
    assert loaded.ok("qom-get", {"path": "g", "property": "reads"}) == 0
    assert not denied(client, "web.key")


def test_long_patterns_are_refused(daemon: Daemon, loaded: Client, tmp_path: Path) -> None:
    """Their time is everybody's."""
    words = "Parameter '%s' is longer than the limit of 4096 characters"
    long = {"match": "*" * 4097, "policy": "allow", "format": "glob"}
    base = {"qom-type": "authz-list", "id": "a"}
    assert loaded.fail("object-add", base | {"rules": [long]}) == words % "match"
    loaded.ok("object-add", base)
    assert (
        loaded.fail("qom-set", {"path": "a", "property": "rules", "value": [long]})
        == words % "match"
    )
    file = tmp_path / "list"
    file.write_text(json.dumps({"rules": [long]}))
    assert (
        loaded.fail("object-add", {"qom-type": "authz-listfile", "id": "f", "filename": str(file)})
        == words % "match"
    )
    assert (
        loaded.fail(
            "object-add",
            {"qom-type": "secret-grant", "id": "g", "secret": "x" * 4097, "authz": "a"},
        )
        == words % "secret"
    )


def test_an_administrator_who_is_not_one_any_more_hears_nothing(
    daemon: Daemon, loaded: Client
) -> None:
    """Of what happens."""
    allow(loaded, "admins", "uid:1000")
    admin = daemon.connect(role="admins", uid=1000).watch()
    loaded.add("seen", data="x")
    assert admin.event()["data"]["id"] == "seen"
    loaded.ok("object-del", {"id": "admins"})
    loaded.add("unseen", data="x")
    daemon.call(daemon.server.core.broadcaster.flush)
    assert "any more" in admin.fail("query-name")
    assert admin.events == []


def test_the_numbers_of_descriptors_tell_nothing_of_others(daemon: Daemon, loaded: Client) -> None:
    """Each connection counts for itself."""
    clients = [daemon.connect(role="client", uid=1000 + n) for n in range(3)]
    with open("/dev/null") as file:
        for expected in (10, 11):
            for client in clients:
                assert client.ok("add-fd", {"fdset-id": 1}, (file.fileno(),))["fd"] == expected
    assert clients[0].fail("remove-fd", {"fdset-id": 1, "fd": 12}).endswith("fd:12' not found")
    assert clients[0].ok("remove-fd", {"fdset-id": 1, "fd": 11}) == {}


def test_a_missing_secret_is_said_to_who_may_read_it(daemon: Daemon, loaded: Client) -> None:
    """And to nobody else."""
    client = daemon.connect(role="client", uid=1000)
    allow(loaded, "web", "uid:1000")
    grant(loaded, "g", "web.*", "web")
    source, sink = os.pipe()
    assert client.fail("secret-read", {"id": "web.x"}, (sink,)) == "No secret with id 'web.x'"
    assert client.fail("secret-read", {"id": "db.x"}, (sink,)) == DENIED % "db.x"
    os.close(source)
    os.close(sink)


def test_every_change_counts_from_the_next_read_on_open_connections(
    daemon: Daemon, loaded: Client
) -> None:
    """Adding, changing and deleting grants and authz objects; what is missing denies."""
    client = daemon.connect(role="client", uid=1000)

    def now(expected: bool) -> None:
        assert denied(client, "web.key") is not expected
        assert [s["id"] for s in client.secrets()] == (["web.key"] if expected else [])

    grant(loaded, "g", "web.key", "a")  # before its authz object
    now(False)
    allow(loaded, "a", "uid:1000")
    now(True)
    loaded.ok("qom-set", {"path": "a", "property": "policy", "value": "allow"})
    loaded.ok("qom-set", {"path": "a", "property": "rules", "value": []})
    now(True)
    loaded.ok("qom-set", {"path": "a", "property": "policy", "value": "deny"})
    now(False)
    rules = [{"match": "uid:1000", "policy": "allow"}]
    loaded.ok("qom-set", {"path": "a", "property": "rules", "value": rules})
    now(True)
    loaded.ok("object-del", {"id": "a"})  # as QEMU, which looks it up at the time of use
    now(False)
    loaded.ok("object-add", {"qom-type": "authz-simple", "id": "a", "identity": "uid:1000"})
    now(True)
    loaded.ok("qom-set", {"path": "a", "property": "identity", "value": "uid:1001"})
    now(False)
    loaded.ok("qom-set", {"path": "g", "property": "authz", "value": "b"})
    loaded.ok("object-add", {"qom-type": "authz-simple", "id": "b", "identity": "uid:1000"})
    now(True)
    loaded.ok("qom-set", {"path": "g", "property": "secret", "value": "ab.*"})
    now(False)
    loaded.ok("qom-set", {"path": "g", "property": "secret", "value": "web.k*"})
    now(True)
    loaded.ok("object-del", {"id": "g"})
    now(False)
    loaded.ok("object-del", {"id": "b"})
    grant(loaded, "g", "web.key", "web.cert")  # no authz object
    now(False)


def test_the_first_rule_that_fits_any_identity_decides(daemon: Daemon, loaded: Client) -> None:
    """Exact unless it says glob; otherwise the policy."""
    client = daemon.connect(role="client", uid=1000, groups=(33, 44))
    grant(loaded, "g", "web.key", "a")
    loaded.ok("object-add", {"qom-type": "authz-list", "id": "a"})

    def rules(*given: tuple[str, str, str], policy: str = "deny") -> bool:
        made = [{"match": m, "policy": p, "format": f} for m, p, f in given]
        loaded.ok("qom-set", {"path": "a", "property": "rules", "value": made})
        loaded.ok("qom-set", {"path": "a", "property": "policy", "value": policy})
        return not denied(client, "web.key")

    assert not rules()
    assert rules(policy="allow")
    assert rules(("gid:44", "allow", "exact"))
    assert not rules(("gid:4?", "allow", "exact"))
    assert rules(("gid:4?", "allow", "glob"))
    assert not rules(("gid:33", "deny", "exact"), ("uid:1000", "allow", "exact"))
    assert rules(("uid:1000", "allow", "exact"), ("gid:33", "deny", "exact"))
    assert not rules(("gid:4*", "deny", "glob"), policy="allow")
    assert rules(("gid:5*", "deny", "glob"), policy="allow")


def test_a_list_in_a_file_is_read_again_when_it_changes(
    daemon: Daemon, loaded: Client, tmp_path: Path
) -> None:
    """At the next read. What cannot be used allows nobody anything."""
    client = daemon.connect(role="client", uid=1000)
    file = tmp_path / "list"

    def write(identity: str, *, replace: bool = True) -> None:
        target = tmp_path / "new" if replace else file
        rules = [{"match": identity, "policy": "allow"}]
        target.write_text(json.dumps({"rules": rules}))
        if replace:
            target.rename(file)

    write("uid:1000")
    loaded.ok("object-add", {"qom-type": "authz-listfile", "id": "f", "filename": str(file)})
    grant(loaded, "g", "web.key", "f")
    assert not denied(client, "web.key")
    for replace in (True, False):
        for _ in range(3):
            write("uid:1001", replace=replace)
            assert denied(client, "web.key")
            write("uid:1000", replace=replace)
            assert not denied(client, "web.key")
    old = time.time() - 1000
    os.utime(file, (old, old))
    for _ in range(2):
        assert not denied(client, "web.key")
    explain = {"id": "web.key", "peer": ["uid:1000"]}
    for content, words in (
        ("{", "JSON parse error, premature EOI"),
        ("", "Expecting a JSON value"),
        ("[" + " " * (1 << 20), "it is larger than the limit of 1048576 bytes"),
    ):
        file.write_text(content)
        assert denied(client, "web.key")
        (found,) = loaded.ok("secret-explain", explain)["grants"]
        assert found["reason"] == f"'f': '{file}' cannot be used: {words}"
    file.unlink()
    assert denied(client, "web.key")
    file.mkdir()
    assert denied(client, "web.key")
    (found,) = loaded.ok("secret-explain", explain)["grants"]
    assert found["reason"] == f"'f': '{file}' cannot be used: it is not a regular file"
    file.rmdir()
    file.symlink_to("/proc/self/fd/0")
    assert denied(client, "web.key")
    file.unlink()
    write("uid:1000")
    assert not denied(client, "web.key")
    # Set later, neither the name nor refresh makes the daemon read something else.
    loaded.ok("qom-set", {"path": "f", "property": "filename", "value": "/nope"})
    loaded.ok("qom-set", {"path": "f", "property": "refresh", "value": False})
    assert not denied(client, "web.key")
    loaded.ok("object-del", {"id": "f"})
    assert denied(client, "web.key")


def test_a_list_in_a_file_that_is_old_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only looked at."""
    file = tmp_path / "list"
    file.write_text('{"policy": "allow"}')
    rules = authz.FileRules(str(file))
    while rules._seen is None:  # until its last change is long enough ago
        assert rules.judge(frozenset()).allowed
    monkeypatch.setattr(rules, "_read", None)
    assert rules.judge(frozenset()).allowed


def test_what_is_there_at_the_start_counts(daemon: Daemon, loaded: Client) -> None:
    """Objects of the command line."""
    allow(loaded, "a", "uid:1000")
    grant(loaded, "g", "web.key", "a")
    access = daemon.call(lambda: Access(daemon.tree, Audit("none")))
    peer = Peer(1000, 1000, 1, SocketRole.CLIENT, frozenset({"uid:1000"}))
    assert access.may_read(peer, "web.key")
    assert not access.may_read(peer, "db.key")


def test_what_the_daemon_needs_itself_is_not_deleted(daemon: Daemon, loaded: Client) -> None:
    """Such as the key of the audit, in QEMU's words; a delivery of it goes on."""
    daemon.tree.pinned.add("db.key")
    words = "object 'db.key' is in use, can not be deleted"
    assert loaded.fail("object-del", {"id": "db.key"}) == words
    assert loaded.fail("secret-expire", {"id": "db.key", "after": 5}) == words
    assert loaded.read("db.key") == SECRET


def test_a_list_in_a_file_without_refresh_stays(
    daemon: Daemon, loaded: Client, tmp_path: Path
) -> None:
    """What it was when it was added."""
    client = daemon.connect(role="client", uid=1000)
    file = tmp_path / "list"
    file.write_text('{"policy": "allow"}')
    loaded.ok(
        "object-add",
        {"qom-type": "authz-listfile", "id": "f", "filename": str(file), "refresh": False},
    )
    grant(loaded, "g", "web.key", "f")
    file.unlink()
    assert not denied(client, "web.key")


def test_a_unit_of_the_system_manager_is_not_one_of_a_user(
    daemon: Daemon, loaded: Client, tmp_path: Path
) -> None:
    """Though that user gives it the same name."""
    allow(loaded, "web", "unit:web.service")
    grant(loaded, "g", "web.key", "web")
    slice_name = f"/secretd-access-{os.getpid()}.slice"
    for number, (name, expected) in enumerate(
        (
            (f"{slice_name}/web.service", True),
            (f"{slice_name}/user@1000.service/web.service", False),
        )
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        with cgroup(name) as path:
            # The process connects to a socket of the test's; what it is there it is to the daemon too.
            with process_in(path, directory) as sock:
                peer = identify(sock, SocketRole.CLIENT)
        may_read = partial(daemon.server.core.access.may_read, peer, "web.key")
        assert daemon.call(may_read) is expected


def test_the_unit_is_told_to_administrators(daemon: Daemon, loaded: Client) -> None:
    """In events and the audit."""
    with cgroup(f"/secretd-told-{os.getpid()}.slice/web.service") as path:
        with running_in(path, daemon.client):
            while daemon.call(lambda: len(daemon.server.sessions)) < 2:
                pass
            peers = daemon.call(lambda: [s.peer.info for s in daemon.server.sessions])
    assert "unit:web.service" in [info.get("unit") for info in peers]


def test_an_authz_object_opens_the_control_socket_to_others(daemon: Daemon, loaded: Client) -> None:
    """With all rights, as long as it allows them."""
    refused = daemon.connect(role="admins", uid=1000, negotiate=False)
    words = "uid 1000 may not use the control socket; connect to the client socket"
    assert refused.reply()["error"]["desc"] == words
    assert refused.line() == b""
    allow(loaded, "admins", "uid:1000")
    admin = daemon.connect(role="admins", uid=1000)
    assert daemon.connect(role="admins").ok("query-name") == {}
    assert admin.read("db.key") == SECRET
    assert len(admin.secrets()) == 3
    grant(admin, "g", "*", "admins")
    assert admin.ok("object-del", {"id": "g"}) == {}
    loaded.ok("object-del", {"id": "admins"})
    assert admin.fail("query-secrets") == "uid 1000 may not use the control socket any more"
    allow(loaded, "admins", "uid:1000")
    assert len(admin.secrets()) == 3


def test_a_grant_ends_after_so_many_reads(daemon: Daemon, loaded: Client) -> None:
    """A read that could not be delivered to, or was refused, is none."""
    client = daemon.connect(role="client", uid=1000)
    allow(loaded, "web", "uid:1000")
    grant(loaded, "g", "web.key", "web", **{"max-reads": 2})
    with open("/dev/null") as file:
        for _ in range(3):
            assert "character device" in client.fail(
                "secret-read", {"id": "web.key"}, (file.fileno(),)
            )
    assert denied(client, "db.key")
    assert not denied(client, "web.key")
    assert loaded.ok("qom-get", {"path": "g", "property": "reads"}) == 1
    assert not denied(client, "web.key")
    assert denied(client, "web.key")
    assert client.secrets() == []
    loaded.ok("qom-set", {"path": "g", "property": "max-reads", "value": 3})
    assert not denied(client, "web.key")
    assert denied(client, "web.key")
    grant(loaded, "g2", "web.*", "web")
    assert not denied(client, "web.key")
    assert loaded.ok("qom-get", {"path": "g", "property": "reads"}) == 3


def test_a_grant_without_a_limit_is_used_first(daemon: Daemon, loaded: Client) -> None:
    """So that reads are not used up without need."""
    client = daemon.connect(role="client", uid=1000)
    allow(loaded, "web", "uid:1000")
    grant(loaded, "g", "web.key", "web", **{"max-reads": 1})
    grant(loaded, "h", "*", "web")
    assert not denied(client, "web.key")
    assert loaded.ok("qom-get", {"path": "g", "property": "reads"}) == 0
    grant(loaded, "i", "web.key", "web")
    loaded.ok("object-del", {"id": "h"})
    assert not denied(client, "web.key")
    loaded.ok("object-del", {"id": "g"})
    assert not denied(client, "web.key")


def test_a_grants_properties_are_checked(daemon: Daemon, loaded: Client) -> None:
    """In QEMU's manner; what is given is listed."""
    most = LIFETIME_SECONDS
    seconds = f"Parameter 'expires-after' expects a number of seconds between 1 and {most}"
    reads = "Parameter 'max-reads' expects a value between 1 and 2147483648"
    base = {"qom-type": "secret-grant", "id": "g", "secret": "x", "authz": "a"}
    for more, words in (
        ({"expires-after": 0}, seconds),
        ({"expires-after": -1}, seconds),
        ({"expires-after": most + 1}, seconds),
        ({"max-reads": 0}, reads),
        ({"max-reads": (1 << 31) + 1}, reads),
        ({"max-reads": "x"}, "Invalid parameter type for 'max-reads', expected: integer"),
        ({"secret": ""}, "Parameter 'secret' expects an id, or a pattern of ids with '*' and '?'"),
        (
            {"credential": "c" * 84},
            "Parameter 'credential' is longer than the 83 bytes that systemd has for it and the unit's name",
        ),
        ({"credential": "a/b"}, "Parameter 'credential' expects a credential's name, without '/'"),
        ({"nope": 1}, "Parameter 'nope' is unexpected"),
    ):
        assert loaded.fail("object-add", base | more) == words
    assert loaded.fail("object-add", {"qom-type": "secret-grant", "id": "g", "secret": "x"}) == (
        "Parameter 'authz' is missing"
    )
    loaded.ok("object-add", base | {"max-reads": 1 << 31, "expires-after": most, "credential": "c"})
    listed = loaded.ok("qom-list", {"path": "g"})
    values = {p["name"]: loaded.ok("qom-get", {"path": "g", "property": p["name"]}) for p in listed}
    assert values == {
        "type": "secret-grant", "secret": "x", "authz": "a", "credential": "c",
        "expires-after": most, "max-reads": 1 << 31, "reads": 0,
    }  # fmt: skip
    assert loaded.fail("qom-set", {"path": "g", "property": "reads", "value": 0}) == (
        "Property 'secret-grant.reads' is not writable"
    )
    assert loaded.fail("qom-set", {"path": "g", "property": "expires-after", "value": 0}) == seconds
    assert loaded.fail(
        "object-add", {"qom-type": "secret", "id": "s", "data": "x", "keyid": "g"}
    ) == ("Object with id 'g' is not a secret")


@pytest.mark.parametrize(
    "end",
    [
        ("object-del", {"id": "big"}),
        ("object-del", {"id": "g"}),
        ("object-del", {"id": "web"}),
        ("qom-set", {"path": "g", "property": "secret", "value": "x"}),
        ("qom-set", {"path": "g", "property": "authz", "value": "x"}),
        ("qom-set", {"path": "web", "property": "identity", "value": "uid:1"}),
    ],
    ids=str,
)
def test_withdrawing_ends_a_running_delivery(
    daemon: Daemon, loaded: Client, end: tuple[str, dict]
) -> None:
    """Whatever takes the permission away: nothing more is written, and the client is told."""
    loaded.ok("secret-generate", {"id": "big", "size": 1 << 20})
    loaded.ok("object-add", {"qom-type": "authz-simple", "id": "web", "identity": "uid:1000"})
    grant(loaded, "g", "big", "web", **{"max-reads": 1})
    client = daemon.connect(role="client", uid=1000)
    source = begin_delivery(client, "big")
    # What does not concern it leaves it going.
    grant(loaded, "h", "web.*", "web")
    loaded.ok("object-del", {"id": "h"})
    loaded.ok("object-del", {"id": "web.key"})
    assert loaded.ok(*end) == {}
    assert client.reply()["error"]["desc"] == "Secret 'big' was withdrawn"
    assert drained(source) < 1 << 20
    assert client.ok("query-version")


@pytest.mark.tuning(write_seconds=20.0)
@pytest.mark.parametrize("how", ["delete", "expire", "revoke"])
@pytest.mark.parametrize("form", ["raw", "base64"])
def test_what_was_taken_before_the_end_is_a_prefix_of_the_secret(
    daemon: Daemon, loaded: Client, how: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the delivery is when it is withdrawn: no byte is wrong, and none comes
    afterwards.
    """
    # Nobody holds a write up here, but where all tests run at once a thread may have to wait for a processor.
    allow(loaded, "web", "uid:1000")
    clients = [daemon.connect(role="client", uid=1000)]
    if how != "revoke":
        clients.append(daemon.connect())
    sizes = [0, 1, 7, 100, 4095, 4096, 4097, 10_000, 16_383, 16_384, 16_385, 20_000, 30_000]
    for client in clients:
        for taken in sizes:
            loaded.ok("secret-generate", {"id": "big", "size": 60_000})
            grant(loaded, "g", "big", "web")
            whole = loaded.read("big", format=form)
            source, sink = os.pipe()
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, 4096)
            arguments = {"id": "big", "format": form}
            client.send(
                json.dumps({"execute": "secret-read", "arguments": arguments}).encode(), (sink,)
            )
            os.close(sink)
            while not daemon.call(lambda: len(daemon.server.core.deliveries._running)):
                pass
            received = b""
            while len(received) < taken:
                received += os.read(source, taken - len(received))
            if how == "expire":
                daemon.call(lambda: daemon.tree.deadlines.set("big", now()))
            else:
                loaded.ok("object-del", {"id": "big" if how == "delete" else "g"})
            assert client.reply()["error"]["desc"] == "Secret 'big' was withdrawn"
            while chunk := os.read(source, 1 << 16):
                received += chunk
            os.close(source)
            assert whole.startswith(received)
            assert len(received) <= taken + 4096
            for name in ("big", "g"):
                loaded.cmd("object-del", {"id": name})


def test_a_delivery_to_another_uid_goes_on_to_its_end(daemon: Daemon, loaded: Client) -> None:
    """In a thread, piece by piece: pipes, socket pairs, memfds; raw and base64."""
    loaded.ok("secret-generate", {"id": "big", "size": (1 << 20) - 5})
    allow(loaded, "web", "uid:1000")
    grant(loaded, "g", "*", "web")
    content = loaded.read("big")
    client = daemon.connect(role="client", uid=1000)
    source = begin_delivery(client, "big")
    assert drained(source) == len(content)
    assert client.reply() == {"return": {"size": len(content)}}
    assert client.read("big") == content
    assert client.read("web.key", format="base64") == base64.b64encode(SECRET)
    loaded.ok("object-add", {"qom-type": "secret", "id": "empty", "data": ""})
    assert client.read("empty") == b""
    fd = os.memfd_create("x")
    os.write(fd, b"y" * (2 << 20))
    assert client.ok("secret-read", {"id": "big"}, (fd,)) == {"size": len(content)}
    assert os.pread(fd, 2 << 20, 0) == content
    os.close(fd)
    ours, theirs = socket.socketpair()
    client.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (theirs.fileno(),))
    theirs.close()
    received = b""
    while chunk := ours.recv(1 << 16):
        received += chunk
    ours.close()
    assert received == content
    assert client.reply() == {"return": {"size": len(content)}}
    source, sink = os.pipe()
    os.close(source)
    assert client.fail("secret-read", {"id": "big"}, (sink,)) == (
        "Unable to write the secret: Broken pipe"
    )
    os.close(sink)


def test_a_fifo_of_another_uid_takes_a_secret(
    daemon: Daemon, loaded: Client, tmp_path: Path
) -> None:
    """It knows no RWF_NOWAIT; and a delivery that waits there is withdrawn like any other."""
    loaded.ok("secret-generate", {"id": "big", "size": 300_000})
    allow(loaded, "web", "uid:1000")
    grant(loaded, "g", "*", "web")
    client = daemon.connect(role="client", uid=1000)
    os.mkfifo(tmp_path / "fifo")
    for withdraw in (False, True):
        source = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        sink = os.open(tmp_path / "fifo", os.O_WRONLY)
        os.set_blocking(source, True)
        client.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (sink,))
        os.close(sink)
        assert os.read(source, 1)
        if withdraw:
            loaded.ok("object-del", {"id": "big"})
            assert client.reply()["error"]["desc"] == "Secret 'big' was withdrawn"
            assert drained(source) < 300_000
        else:
            assert drained(source) == 300_000
            assert client.reply() == {"return": {"size": 300_000}}


def test_a_delivery_that_finds_no_memory_is_an_error(
    daemon: Daemon, loaded: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is withdrawn before it began ends."""
    allow(loaded, "web", "uid:1000")
    grant(loaded, "g", "*", "web")
    client = daemon.connect(role="client", uid=1000)
    source, sink = os.pipe()

    def none(_size: int) -> None:
        raise LockedMemoryExhausted("No locked memory left")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.server.core.deliveries._scratch, "allocate", none)
        assert client.fail("secret-read", {"id": "db.key"}, (sink,)) == "No locked memory left"
        arguments = {"id": "db.key", "format": "base64"}
        assert loaded.fail("secret-read", arguments, (sink,)) == "No locked memory left"
    deliveries = daemon.server.core.deliveries
    release = deliveries.release

    def withdrawn(*arguments: Any, **settings: Any) -> object:
        begun = release(*arguments, **settings)
        deliveries.withdraw("db.key")
        return begun

    with monkeypatch.context() as patch:
        patch.setattr(deliveries, "release", withdrawn)
        words = client.fail("secret-read", {"id": "db.key"}, (sink,))
    assert words == "Secret 'db.key' was withdrawn"
    os.close(sink)
    assert os.read(source, 100) == b""
    os.close(source)


def client_commands() -> Iterator[str]:
    return (command.name for command in COMMANDS.by_name.values() if command.client)


def test_the_client_sockets_commands_are_known() -> None:
    """A new one belongs into the tests below."""
    assert set(client_commands()) == {
        "qmp_capabilities", "query-version", "query-commands", "query-qmp-schema", "add-fd", "remove-fd",
        "query-fdsets", "getfd", "closefd", "secret-read", "query-secrets", "query-status", "secret-events",
    }  # fmt: skip


def everything(client: Client, name: str) -> list[object]:
    """All that a client can ask about a secret, with what does not depend on it taken out."""
    source, sink = os.pipe()
    learned: list[object] = []

    def ask(command: str, arguments: dict, fds: tuple[int, ...] = ()) -> None:
        learned.append(client.cmd(command, arguments, fds))

    for form in ("raw", "base64"):
        ask("secret-read", {"id": name, "format": form}, (sink,))
        ask("getfd", {"fdname": "out"}, (sink,))
        ask("secret-read", {"id": name, "format": form, "fdname": "out"})
        ask("secret-read", {"id": name, "format": form, "fdname": "out"})
        ask("secret-read", {"id": name, "format": form})
        with open("/dev/null") as null:
            ask("secret-read", {"id": name}, (null.fileno(),))
    ask("secret-read", {"id": name, "nope": 1}, (sink,))
    ask("query-secrets", {})
    ask("query-secrets", {"after": name[:-1]})
    ask("query-secrets", {"after": ""})
    ask("query-fdsets", {})
    ask("add-fd", {"fdset-id": 7, "opaque": name}, (sink,))
    ask("remove-fd", {"fdset-id": 7})
    ask("closefd", {"fdname": name})
    ask("query-version", {})
    ask("query-commands", {})
    ask("query-qmp-schema", {})
    ask("qmp_capabilities", {})
    for command in COMMANDS.by_name.values():
        if not command.client:
            for arguments in ({}, {"id": name}, {"path": name, "property": "data"}, {"path": name}):
                ask(command.name, dict(arguments))
    os.close(sink)
    learned.append(os.read(source, 100))
    os.close(source)
    text = json.dumps(learned, default=repr).replace(name, "NAME")
    learned = json.loads(text)
    for reply in learned:
        if isinstance(reply, dict) and isinstance(reply.get("return"), dict):
            reply["return"].pop("fd", None)
    return learned


def test_who_has_no_grant_learns_nothing(daemon: Daemon, loaded: Client) -> None:
    """Neither content nor existence nor size: all answers are those for a secret that there is
    not.
    """
    loaded.ok("secret-generate", {"id": "exists", "size": 5000})
    allow(loaded, "others", "uid:1001")
    grant(loaded, "g", "exists", "others")
    grant(loaded, "h", "exi*", "others")
    client = daemon.connect(role="client", uid=1000)
    assert everything(client, "exists") == everything(client, "nothin")
    # Somebody with a grant for something else learns no more.
    allow(loaded, "mine", "uid:1000")
    grant(loaded, "m", "web.*", "mine")
    assert everything(client, "exists") == everything(client, "nothin")
    assert client.events == []


class Watched:
    """What is looked up while somebody is refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.seen: list[str] = []
        self._name = name
        self._thread = threading.get_ident()
        for owner, methods in (
            (Journal, ("get", "summary", "owner", "content", "plaintext", "__contains__")),
            (ObjectTree, ("type_of", "is_secret", "secret")),
            (Paths, ("resolve",)),
        ):
            for method in methods:
                self._watch(monkeypatch, owner, method)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> None:
        original = getattr(owner, method)

        def watched(this: object, object_id: str) -> object:
            self.seen.append(f"{owner.__name__}.{method} {object_id}".replace(self._name, "NAME"))
            return original(this, object_id)

        monkeypatch.setattr(owner, method, watched)


def test_a_refusal_makes_the_same_look_ups_whatever_there_is(
    daemon: Daemon, loaded: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks only what the peer is granted: time tells nothing either."""
    allow(loaded, "others", "uid:1001")
    grant(loaded, "g", "web.key", "others")
    allow(loaded, "mine", "uid:1000")
    grant(loaded, "m", "db.*", "mine")
    client = daemon.connect(role="client", uid=1000)
    assert denied(client, "web.key")
    sequences = []
    for name in ("web.key", "web.nop"):
        with monkeypatch.context() as patch:
            watched = Watched(patch, name)
            assert denied(client, name)
            sequences.append(watched.seen)
    assert sequences[0] == sequences[1]
    assert not any("NAME" in seen for seen in sequences[0])


def test_explain_says_whether_and_why(daemon: Daemon, loaded: Client) -> None:
    """Each grant that names the secret, with the rule that decides."""

    def explain(name: str, *identities: str) -> dict:
        return loaded.ok("secret-explain", {"id": name, "peer": list(identities)})

    assert explain("web.key", "uid:1000") == {"allowed": False, "exists": True, "grants": []}
    assert explain("nope", "uid:1000") == {"allowed": False, "exists": False, "grants": []}
    grant(loaded, "g1", "web.*", "missing")
    allow(loaded, "web", "unit:nginx.service", policy="deny")
    grant(loaded, "g2", "web.key", "web")
    grant(loaded, "g3", "db.key", "web")
    assert explain("web.key", "unit:nginx.service", "uid:33") == {
        "allowed": True,
        "exists": True,
        "grant": "g2",
        "grants": [
            {"grant": "g1", "allowed": False, "reason": "there is no authz object 'missing'"},
            {
                "grant": "g2",
                "allowed": True,
                "reason": "'web': rule 0 ('unit:nginx.service') says allow",
            },
        ],
    }
    assert explain("web.key", "uid:33")["grants"][1] == {
        "grant": "g2",
        "allowed": False,
        "reason": "'web': no rule fits, and its policy says deny",
    }
    loaded.ok("qom-set", {"path": "g2", "property": "max-reads", "value": 1})
    client = daemon.connect(role="client", uid=1000)
    allow(loaded, "missing", "uid:1000")
    loaded.ok("qom-set", {"path": "g1", "property": "max-reads", "value": 1})
    assert not denied(client, "web.key")
    assert explain("web.key", "uid:1000")["grants"][0]["reason"] == "the grant has no reads left"
    assert "has not been found" in client.fail("secret-explain", {"id": "x", "peer": []})


@pytest.mark.slow
@pytest.mark.tuning(kept_identities=5, kept_changes=3)
def test_peers_and_changes_that_are_forgotten_are_worked_out_anew(
    daemon: Daemon, loaded: Client
) -> None:
    """What is remembered is bounded, and never stale."""
    clients = [daemon.connect(role="client", uid=1000 + n) for n in range(4)]
    allow(loaded, "web", "uid:1001", "uid:1003")
    for round_ in range(6):
        grant(loaded, f"g{round_}", "web.key" if round_ % 2 else "web.*", "web")
        assert [denied(c, "web.key") for c in clients] == [True, False, True, False]
    for round_ in range(6):
        assert [denied(c, "web.key") for c in clients] == [True, False, True, False]
        loaded.ok("object-del", {"id": f"g{round_}"})
    assert [denied(c, "web.key") for c in clients] == [True, True, True, True]
