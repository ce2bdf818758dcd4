# SPDX-License-Identifier: LGPL-2.1-or-later
"""Access: grants and authz objects, and refusals that reveal nothing."""

import asyncio
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
from tests.support.async_qmp import AsyncClient
from tests.support.cgroups import cgroup, process_in, running_in
from tests.support.grants import DENIED, SECRET, drained
from tests.support.in_loop import Served
from tests.support.needs import need_root


@pytest.fixture(autouse=True)
def _root() -> None:
    need_root()


@pytest.fixture
async def loaded(aqmp: AsyncClient) -> AsyncClient:
    """With secrets web.key, web.cert and db.key."""
    for name in ("web.key", "web.cert", "db.key"):
        await aqmp.add(name, data=SECRET.decode())
    return aqmp


async def test_a_grant_follows_its_authz_object(in_loop: Served, loaded: AsyncClient) -> None:
    """The secrets that its pattern names, and no others."""
    client = await in_loop.connect(role="client", uid=1000)
    other = await in_loop.connect(role="client", uid=1001, groups=(33,))
    assert await client.denied("web.key")
    await loaded.allow("web", "uid:1000")
    await loaded.grant("g", "web.*", "web")
    assert not await client.denied("web.key")
    assert not await client.denied("web.cert")
    assert await client.denied("db.key")
    assert await other.denied("web.key")
    assert [s["id"] for s in await client.secrets()] == ["web.cert", "web.key"]
    assert await other.secrets() == []
    await loaded.allow("www", "gid:33")
    await loaded.grant("g2", "web.key", "www")
    assert not await other.denied("web.key")
    assert [s["id"] for s in await other.secrets()] == ["web.key"]


async def test_a_list_of_what_one_may_read_is_made_of_what_is_granted(
    in_loop: Served, loaded: AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact ids, patterns that overlap, lists in files; no other secrets are looked up."""
    client = await in_loop.connect(role="client", uid=1000)
    (tmp_path / "list").write_text('{"rules": [{"match": "uid:1000", "policy": "allow"}]}')
    await loaded.ok(
        "object-add",
        {"qom-type": "authz-listfile", "id": "f", "filename": str(tmp_path / "list")},
    )
    await loaded.allow("a", "uid:1000")
    for number in range(5):
        await loaded.add(f"z{number}", data="x")

    async def listed(after: str = "") -> list[str]:
        return [
            s["id"] for s in await client.ok("query-secrets", {"after": after} if after else {})
        ]

    await loaded.grant("g0", "z3", "a")
    await loaded.grant("g1", "nope", "a")
    looked: list[str] = []
    with monkeypatch.context() as patch:
        original = in_loop.tree.is_secret

        def seen(object_id: str) -> bool:
            looked.append(object_id)
            return original(object_id)

        patch.setattr(in_loop.tree, "is_secret", seen)
        assert await listed() == ["z3"]
    assert sorted(looked) == ["nope", "z3"]
    await loaded.grant("g2", "web.*", "a")
    await loaded.grant("g3", "we?.key", "f")
    await loaded.grant("g4", "z?", "f", **{"max-reads": 1})
    await loaded.grant("g5", "*.key", "a", **{"max-reads": 1})
    everything_ = ["db.key", "web.cert", "web.key", "z0", "z1", "z2", "z3", "z4"]
    assert await listed() == everything_
    assert await listed("web.cert") == everything_[2:]
    assert not await client.denied("db.key")
    assert await listed() == everything_[1:]
    (tmp_path / "list").write_text("{}")
    assert await listed() == ["web.cert", "web.key", "z3"]
    source, sink = os.pipe()
    assert (await client.fail("secret-read", {"id": "f.key"}, (sink,))).endswith("not permitted")
    await loaded.ok("object-add", {"qom-type": "authz-simple", "id": "web.x", "identity": "x"})
    assert await client.fail("secret-read", {"id": "web.x"}, (sink,)) == "No secret with id 'web.x'"
    os.close(source)
    os.close(sink)


async def test_what_was_not_delivered_at_all_is_no_read(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """Of a grant that counts; the audit would say `withheld`."""
    await loaded.allow("a", "uid:1000")
    await loaded.grant("g", "web.key", "a", **{"max-reads": 1})
    client = await in_loop.connect(role="client", uid=1000)
    source, sink = os.pipe()
    os.close(source)
    words = "Unable to write the secret: Broken pipe"
    for each in (client, client, loaded):
        assert await each.fail("secret-read", {"id": "web.key"}, (sink,)) == words
    os.close(sink)
    assert await loaded.ok("qom-get", {"path": "g", "property": "reads"}) == 0
    assert not await client.denied("web.key")


async def test_long_patterns_are_refused(
    in_loop: Served, loaded: AsyncClient, tmp_path: Path
) -> None:
    """Their time is everybody's."""
    words = "Parameter '%s' is longer than the limit of 4096 characters"
    long = {"match": "*" * 4097, "policy": "allow", "format": "glob"}
    base = {"qom-type": "authz-list", "id": "a"}
    assert await loaded.fail("object-add", base | {"rules": [long]}) == words % "match"
    await loaded.ok("object-add", base)
    assert (
        await loaded.fail("qom-set", {"path": "a", "property": "rules", "value": [long]})
        == words % "match"
    )
    file = tmp_path / "list"
    file.write_text(json.dumps({"rules": [long]}))
    assert (
        await loaded.fail(
            "object-add", {"qom-type": "authz-listfile", "id": "f", "filename": str(file)}
        )
        == words % "match"
    )
    assert (
        await loaded.fail(
            "object-add",
            {"qom-type": "secret-grant", "id": "g", "secret": "x" * 4097, "authz": "a"},
        )
        == words % "secret"
    )


async def test_a_former_administrator_gets_no_events(in_loop: Served, loaded: AsyncClient) -> None:
    """Of what happens."""
    await loaded.allow("admins", "uid:1000")
    admin = await (await in_loop.connect(role="admins", uid=1000)).watch()
    await loaded.add("seen", data="x")
    assert (await admin.event())["data"]["id"] == "seen"
    await loaded.ok("object-del", {"id": "admins"})
    await loaded.add("unseen", data="x")
    in_loop.server.core.broadcaster.flush()
    assert "any more" in await admin.fail("query-name")
    assert admin.events == []


async def test_the_numbers_of_descriptors_tell_nothing_of_others(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """Each connection counts for itself."""
    clients = [await in_loop.connect(role="client", uid=1000 + n) for n in range(3)]
    with open("/dev/null") as file:
        for expected in (10, 11):
            for client in clients:
                assert (await client.ok("add-fd", {"fdset-id": 1}, (file.fileno(),)))[
                    "fd"
                ] == expected
    assert (await clients[0].fail("remove-fd", {"fdset-id": 1, "fd": 12})).endswith(
        "fd:12' not found"
    )
    assert await clients[0].ok("remove-fd", {"fdset-id": 1, "fd": 11}) == {}


async def test_a_reader_learns_that_its_secret_is_missing(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """And to no other peer."""
    client = await in_loop.connect(role="client", uid=1000)
    await loaded.allow("web", "uid:1000")
    await loaded.grant("g", "web.*", "web")
    source, sink = os.pipe()
    assert await client.fail("secret-read", {"id": "web.x"}, (sink,)) == "No secret with id 'web.x'"
    assert await client.fail("secret-read", {"id": "db.x"}, (sink,)) == DENIED % "db.x"
    os.close(source)
    os.close(sink)


async def test_changes_count_from_the_next_read_on_open_connections(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """Adding, changing and deleting grants and authz objects; what is missing denies."""
    client = await in_loop.connect(role="client", uid=1000)

    async def now(expected: bool) -> None:
        assert await client.denied("web.key") is not expected
        assert [s["id"] for s in await client.secrets()] == (["web.key"] if expected else [])

    await loaded.grant("g", "web.key", "a")  # before its authz object
    await now(False)
    await loaded.allow("a", "uid:1000")
    await now(True)
    await loaded.ok("qom-set", {"path": "a", "property": "policy", "value": "allow"})
    await loaded.ok("qom-set", {"path": "a", "property": "rules", "value": []})
    await now(True)
    await loaded.ok("qom-set", {"path": "a", "property": "policy", "value": "deny"})
    await now(False)
    rules = [{"match": "uid:1000", "policy": "allow"}]
    await loaded.ok("qom-set", {"path": "a", "property": "rules", "value": rules})
    await now(True)
    await loaded.ok("object-del", {"id": "a"})  # as QEMU, which looks it up at the time of use
    await now(False)
    await loaded.ok("object-add", {"qom-type": "authz-simple", "id": "a", "identity": "uid:1000"})
    await now(True)
    await loaded.ok("qom-set", {"path": "a", "property": "identity", "value": "uid:1001"})
    await now(False)
    await loaded.ok("qom-set", {"path": "g", "property": "authz", "value": "b"})
    await loaded.ok("object-add", {"qom-type": "authz-simple", "id": "b", "identity": "uid:1000"})
    await now(True)
    await loaded.ok("qom-set", {"path": "g", "property": "secret", "value": "ab.*"})
    await now(False)
    await loaded.ok("qom-set", {"path": "g", "property": "secret", "value": "web.k*"})
    await now(True)
    await loaded.ok("object-del", {"id": "g"})
    await now(False)
    await loaded.ok("object-del", {"id": "b"})
    await loaded.grant("g", "web.key", "web.cert")  # no authz object
    await now(False)


async def test_the_first_rule_that_fits_any_identity_decides(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """Exact unless it says glob; otherwise the policy."""
    client = await in_loop.connect(role="client", uid=1000, groups=(33, 44))
    await loaded.grant("g", "web.key", "a")
    await loaded.ok("object-add", {"qom-type": "authz-list", "id": "a"})

    async def rules(*given: tuple[str, str, str], policy: str = "deny") -> bool:
        made = [{"match": m, "policy": p, "format": f} for m, p, f in given]
        await loaded.ok("qom-set", {"path": "a", "property": "rules", "value": made})
        await loaded.ok("qom-set", {"path": "a", "property": "policy", "value": policy})
        return not await client.denied("web.key")

    assert not await rules()
    assert await rules(policy="allow")
    assert await rules(("gid:44", "allow", "exact"))
    assert not await rules(("gid:4?", "allow", "exact"))
    assert await rules(("gid:4?", "allow", "glob"))
    assert not await rules(("gid:33", "deny", "exact"), ("uid:1000", "allow", "exact"))
    assert await rules(("uid:1000", "allow", "exact"), ("gid:33", "deny", "exact"))
    assert not await rules(("gid:4*", "deny", "glob"), policy="allow")
    assert await rules(("gid:5*", "deny", "glob"), policy="allow")


async def test_a_list_in_a_file_is_read_again_when_it_changes(
    in_loop: Served, loaded: AsyncClient, tmp_path: Path
) -> None:
    """At the next read. An unusable list allows nothing."""
    client = await in_loop.connect(role="client", uid=1000)
    file = tmp_path / "list"

    def write(identity: str, *, replace: bool = True) -> None:
        target = tmp_path / "new" if replace else file
        rules = [{"match": identity, "policy": "allow"}]
        target.write_text(json.dumps({"rules": rules}))
        if replace:
            target.rename(file)

    write("uid:1000")
    await loaded.ok("object-add", {"qom-type": "authz-listfile", "id": "f", "filename": str(file)})
    await loaded.grant("g", "web.key", "f")
    assert not await client.denied("web.key")
    for replace in (True, False):
        for _ in range(3):
            write("uid:1001", replace=replace)
            assert await client.denied("web.key")
            write("uid:1000", replace=replace)
            assert not await client.denied("web.key")
    old = time.time() - 1000
    os.utime(file, (old, old))
    for _ in range(2):
        assert not await client.denied("web.key")
    explain = {"id": "web.key", "peer": ["uid:1000"]}
    for content, words in (
        ("{", "JSON parse error, premature EOI"),
        ("", "Expecting a JSON value"),
        ("[" + " " * (1 << 20), "it is larger than the limit of 1048576 bytes"),
    ):
        file.write_text(content)
        assert await client.denied("web.key")
        (found,) = (await loaded.ok("secret-explain", explain))["grants"]
        assert found["reason"] == f"'f': '{file}' cannot be used: {words}"
    file.unlink()
    assert await client.denied("web.key")
    file.mkdir()
    assert await client.denied("web.key")
    (found,) = (await loaded.ok("secret-explain", explain))["grants"]
    assert found["reason"] == f"'f': '{file}' cannot be used: it is not a regular file"
    file.rmdir()
    file.symlink_to("/proc/self/fd/0")
    assert await client.denied("web.key")
    file.unlink()
    write("uid:1000")
    assert not await client.denied("web.key")
    # Set later, neither the name nor refresh makes the daemon read something else.
    await loaded.ok("qom-set", {"path": "f", "property": "filename", "value": "/nope"})
    await loaded.ok("qom-set", {"path": "f", "property": "refresh", "value": False})
    assert not await client.denied("web.key")
    await loaded.ok("object-del", {"id": "f"})
    assert await client.denied("web.key")


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


async def test_what_is_there_at_the_start_counts(in_loop: Served, loaded: AsyncClient) -> None:
    """Objects of the command line."""
    await loaded.allow("a", "uid:1000")
    await loaded.grant("g", "web.key", "a")
    access = Access(in_loop.tree, Audit("none"))
    peer = Peer(1000, 1000, 1, SocketRole.CLIENT, frozenset({"uid:1000"}))
    assert access.may_read(peer, "web.key")
    assert not access.may_read(peer, "db.key")


async def test_what_the_daemon_needs_itself_is_not_deleted(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """Such as the key of the audit, in QEMU's words; a delivery of it goes on."""
    in_loop.tree.pinned.add("db.key")
    words = "object 'db.key' is in use, can not be deleted"
    assert await loaded.fail("object-del", {"id": "db.key"}) == words
    assert await loaded.fail("secret-expire", {"id": "db.key", "after": 5}) == words
    assert await loaded.read("db.key") == SECRET


async def test_a_list_in_a_file_without_refresh_stays(
    in_loop: Served, loaded: AsyncClient, tmp_path: Path
) -> None:
    """What it was when it was added."""
    client = await in_loop.connect(role="client", uid=1000)
    file = tmp_path / "list"
    file.write_text('{"policy": "allow"}')
    await loaded.ok(
        "object-add",
        {"qom-type": "authz-listfile", "id": "f", "filename": str(file), "refresh": False},
    )
    await loaded.grant("g", "web.key", "f")
    file.unlink()
    assert not await client.denied("web.key")


async def test_a_unit_of_the_system_manager_is_not_one_of_a_user(
    in_loop: Served, loaded: AsyncClient, tmp_path: Path
) -> None:
    """Though that user gives it the same name."""
    await loaded.allow("web", "unit:web.service")
    await loaded.grant("g", "web.key", "web")
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
            # The process connects to a socket of the test's; what it is there it is to the daemon
            # too.
            with process_in(path, directory) as sock:
                peer = identify(sock, SocketRole.CLIENT)
        may_read = partial(in_loop.server.core.access.may_read, peer, "web.key")
        assert may_read() is expected


async def test_administrators_see_the_unit(in_loop: Served, loaded: AsyncClient) -> None:
    """In events and the audit."""
    with cgroup(f"/secretd-unit-{os.getpid()}.slice/web.service") as path:
        with running_in(path, in_loop.client):
            while len(in_loop.server.sessions) < 2:
                await asyncio.sleep(0)
            peers = [s.peer.info for s in in_loop.server.sessions]
    assert "unit:web.service" in [info.get("unit") for info in peers]


async def test_an_authz_object_opens_the_control_socket_to_others(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """With all rights, as long as it allows them."""
    refused = await in_loop.connect(role="admins", uid=1000, negotiate=False)
    words = "uid 1000 may not use the control socket; connect to the client socket"
    assert (await refused.reply())["error"]["desc"] == words
    assert await refused.line() == b""
    await loaded.allow("admins", "uid:1000")
    admin = await in_loop.connect(role="admins", uid=1000)
    assert await (await in_loop.connect(role="admins")).ok("query-name") == {}
    assert await admin.read("db.key") == SECRET
    assert len(await admin.secrets()) == 3
    await admin.grant("g", "*", "admins")
    assert await admin.ok("object-del", {"id": "g"}) == {}
    await loaded.ok("object-del", {"id": "admins"})
    assert await admin.fail("query-secrets") == "uid 1000 may not use the control socket any more"
    await loaded.allow("admins", "uid:1000")
    assert len(await admin.secrets()) == 3


async def test_a_grant_ends_after_so_many_reads(in_loop: Served, loaded: AsyncClient) -> None:
    """A read that could not be delivered to, or was refused, is none."""
    client = await in_loop.connect(role="client", uid=1000)
    await loaded.allow("web", "uid:1000")
    await loaded.grant("g", "web.key", "web", **{"max-reads": 2})
    with open("/dev/null") as file:
        for _ in range(3):
            assert "character device" in await client.fail(
                "secret-read", {"id": "web.key"}, (file.fileno(),)
            )
    assert await client.denied("db.key")
    assert not await client.denied("web.key")
    assert await loaded.ok("qom-get", {"path": "g", "property": "reads"}) == 1
    assert not await client.denied("web.key")
    assert await client.denied("web.key")
    assert await client.secrets() == []
    await loaded.ok("qom-set", {"path": "g", "property": "max-reads", "value": 3})
    assert not await client.denied("web.key")
    assert await client.denied("web.key")
    await loaded.grant("g2", "web.*", "web")
    assert not await client.denied("web.key")
    assert await loaded.ok("qom-get", {"path": "g", "property": "reads"}) == 3


async def test_a_grant_without_a_limit_is_used_first(in_loop: Served, loaded: AsyncClient) -> None:
    """So that reads are not used up without need."""
    client = await in_loop.connect(role="client", uid=1000)
    await loaded.allow("web", "uid:1000")
    await loaded.grant("g", "web.key", "web", **{"max-reads": 1})
    await loaded.grant("h", "*", "web")
    assert not await client.denied("web.key")
    assert await loaded.ok("qom-get", {"path": "g", "property": "reads"}) == 0
    await loaded.grant("i", "web.key", "web")
    await loaded.ok("object-del", {"id": "h"})
    assert not await client.denied("web.key")
    await loaded.ok("object-del", {"id": "g"})
    assert not await client.denied("web.key")


async def test_a_grants_properties_are_checked(in_loop: Served, loaded: AsyncClient) -> None:
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
            "Parameter 'credential' is longer than the 83 bytes that systemd has for it and the "
            "unit's name",
        ),
        ({"credential": "a/b"}, "Parameter 'credential' expects a credential's name, without '/'"),
        ({"nope": 1}, "Parameter 'nope' is unexpected"),
    ):
        assert await loaded.fail("object-add", base | more) == words
    assert await loaded.fail(
        "object-add", {"qom-type": "secret-grant", "id": "g", "secret": "x"}
    ) == ("Parameter 'authz' is missing")
    await loaded.ok(
        "object-add", base | {"max-reads": 1 << 31, "expires-after": most, "credential": "c"}
    )
    listed = await loaded.ok("qom-list", {"path": "g"})
    values = {
        p["name"]: await loaded.ok("qom-get", {"path": "g", "property": p["name"]}) for p in listed
    }
    assert values == {
        "type": "secret-grant", "secret": "x", "authz": "a", "credential": "c",
        "expires-after": most, "max-reads": 1 << 31, "reads": 0,
    }  # fmt: skip
    assert await loaded.fail("qom-set", {"path": "g", "property": "reads", "value": 0}) == (
        "Property 'secret-grant.reads' is not writable"
    )
    assert (
        await loaded.fail("qom-set", {"path": "g", "property": "expires-after", "value": 0})
        == seconds
    )
    assert await loaded.fail(
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
async def test_withdrawing_ends_a_running_delivery(
    in_loop: Served, loaded: AsyncClient, end: tuple[str, dict]
) -> None:
    """Whatever takes the permission away: nothing more is written, and the client gets an error."""
    await loaded.ok("secret-generate", {"id": "big", "size": 1 << 20})
    await loaded.ok("object-add", {"qom-type": "authz-simple", "id": "web", "identity": "uid:1000"})
    await loaded.grant("g", "big", "web", **{"max-reads": 1})
    client = await in_loop.connect(role="client", uid=1000)
    source = await client.begin_delivery("big")
    # What does not concern it leaves it going.
    await loaded.grant("h", "web.*", "web")
    await loaded.ok("object-del", {"id": "h"})
    await loaded.ok("object-del", {"id": "web.key"})
    assert await loaded.ok(*end) == {}
    assert (await client.reply())["error"]["desc"] == "Secret 'big' was withdrawn"
    assert await asyncio.to_thread(drained, source) < 1 << 20
    assert await client.ok("query-version")


@pytest.mark.tuning(write_seconds=20.0)
@pytest.mark.parametrize("how", ["delete", "expire", "revoke"])
@pytest.mark.parametrize("form", ["raw", "base64"])
async def test_what_was_taken_before_the_end_is_a_prefix_of_the_secret(
    in_loop: Served, loaded: AsyncClient, how: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the delivery is when it is withdrawn: no byte is wrong, and none comes
    afterwards.
    """
    # Nothing blocks a write here, but where all tests run at once a thread may have to wait for a
    # processor.
    await loaded.allow("web", "uid:1000")
    clients = [await in_loop.connect(role="client", uid=1000)]
    if how != "revoke":
        clients.append(await in_loop.connect())
    sizes = [0, 1, 7, 100, 4095, 4096, 4097, 10_000, 16_383, 16_384, 16_385, 20_000, 30_000]
    for client in clients:
        for taken in sizes:
            await loaded.ok("secret-generate", {"id": "big", "size": 60_000})
            await loaded.grant("g", "big", "web")
            whole = await loaded.read("big", format=form)
            source, sink = os.pipe()
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, 4096)
            arguments = {"id": "big", "format": form}
            await client.send(
                json.dumps({"execute": "secret-read", "arguments": arguments}).encode(), (sink,)
            )
            os.close(sink)
            while not len(in_loop.server.core.deliveries._running):
                await asyncio.sleep(0)
            received = b""
            while len(received) < taken:
                received += await asyncio.to_thread(os.read, source, taken - len(received))
            if how == "expire":
                in_loop.tree.deadlines.set("big", now())
            else:
                await loaded.ok("object-del", {"id": "big" if how == "delete" else "g"})
            assert (await client.reply())["error"]["desc"] == "Secret 'big' was withdrawn"
            while chunk := await asyncio.to_thread(os.read, source, 1 << 16):
                received += chunk
            os.close(source)
            assert whole.startswith(received)
            assert len(received) <= taken + 4096
            for name in ("big", "g"):
                await loaded.cmd("object-del", {"id": name})


async def test_a_delivery_to_another_uid_goes_on_to_its_end(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """In a thread, piece by piece: pipes, socket pairs, memfds; raw and base64."""
    await loaded.ok("secret-generate", {"id": "big", "size": (1 << 20) - 5})
    await loaded.allow("web", "uid:1000")
    await loaded.grant("g", "*", "web")
    content = await loaded.read("big")
    client = await in_loop.connect(role="client", uid=1000)
    source = await client.begin_delivery("big")
    assert await asyncio.to_thread(drained, source) == len(content)
    assert await client.reply() == {"return": {"size": len(content)}}
    assert await client.read("big") == content
    assert await client.read("web.key", format="base64") == base64.b64encode(SECRET)
    await loaded.ok("object-add", {"qom-type": "secret", "id": "empty", "data": ""})
    assert await client.read("empty") == b""
    fd = os.memfd_create("x")
    os.write(fd, b"y" * (2 << 20))
    assert await client.ok("secret-read", {"id": "big"}, (fd,)) == {"size": len(content)}
    assert os.pread(fd, 2 << 20, 0) == content
    os.close(fd)
    ours, theirs = socket.socketpair()
    await client.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (theirs.fileno(),))
    theirs.close()
    received = b""
    while chunk := await asyncio.to_thread(ours.recv, 1 << 16):
        received += chunk
    ours.close()
    assert received == content
    assert await client.reply() == {"return": {"size": len(content)}}
    source, sink = os.pipe()
    os.close(source)
    assert await client.fail("secret-read", {"id": "big"}, (sink,)) == (
        "Unable to write the secret: Broken pipe"
    )
    os.close(sink)


async def test_a_fifo_of_another_uid_takes_a_secret(
    in_loop: Served, loaded: AsyncClient, tmp_path: Path
) -> None:
    """It knows no RWF_NOWAIT; and a delivery that waits there is withdrawn like any other."""
    await loaded.ok("secret-generate", {"id": "big", "size": 300_000})
    await loaded.allow("web", "uid:1000")
    await loaded.grant("g", "*", "web")
    client = await in_loop.connect(role="client", uid=1000)
    os.mkfifo(tmp_path / "fifo")
    for withdraw in (False, True):
        source = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        sink = os.open(tmp_path / "fifo", os.O_WRONLY)
        os.set_blocking(source, True)
        await client.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (sink,))
        os.close(sink)
        assert await asyncio.to_thread(os.read, source, 1)
        if withdraw:
            await loaded.ok("object-del", {"id": "big"})
            assert (await client.reply())["error"]["desc"] == "Secret 'big' was withdrawn"
            assert await asyncio.to_thread(drained, source) < 300_000
        else:
            assert await asyncio.to_thread(drained, source) == 300_000
            assert await client.reply() == {"return": {"size": 300_000}}


async def test_a_delivery_that_finds_no_memory_is_an_error(
    in_loop: Served, loaded: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is withdrawn before it began ends."""
    await loaded.allow("web", "uid:1000")
    await loaded.grant("g", "*", "web")
    client = await in_loop.connect(role="client", uid=1000)
    source, sink = os.pipe()

    def none(_size: int) -> None:
        raise LockedMemoryExhausted("No locked memory left")

    with monkeypatch.context() as patch:
        patch.setattr(in_loop.server.core.deliveries._scratch, "allocate", none)
        assert (
            await client.fail("secret-read", {"id": "db.key"}, (sink,)) == "No locked memory left"
        )
        arguments = {"id": "db.key", "format": "base64"}
        assert await loaded.fail("secret-read", arguments, (sink,)) == "No locked memory left"
    deliveries = in_loop.server.core.deliveries
    release = deliveries.release

    def withdrawn(*arguments: Any, **settings: Any) -> object:
        begun = release(*arguments, **settings)
        deliveries.withdraw("db.key")
        return begun

    with monkeypatch.context() as patch:
        patch.setattr(deliveries, "release", withdrawn)
        words = await client.fail("secret-read", {"id": "db.key"}, (sink,))
    assert words == "Secret 'db.key' was withdrawn"
    os.close(sink)
    assert await asyncio.to_thread(os.read, source, 100) == b""
    os.close(source)


def client_commands() -> Iterator[str]:
    return (
        command.name
        for command in COMMANDS.by_name.values()
        if command.client and command.only != "jsonrpc"
    )


def test_the_client_sockets_commands_are_known() -> None:
    """A new one belongs into the tests below."""
    assert set(client_commands()) == {
        "qmp_capabilities", "query-version", "query-commands", "query-qmp-schema", "add-fd",
        "remove-fd",
        "query-fdsets", "getfd", "closefd", "secret-read", "query-secrets", "query-status",
        "secret-events",
        "secret-wrap", "secret-accept", "query-secret-host",
        "secret-fleet-accept", "query-secret-fleet", "query-secret-fleet-missing",
    }  # fmt: skip


async def everything(client: AsyncClient, name: str) -> list[object]:
    """All that a client can ask about a secret, with what does not depend on it taken out."""
    source, sink = os.pipe()
    learned: list[object] = []

    async def ask(command: str, arguments: dict, fds: tuple[int, ...] = ()) -> None:
        learned.append(await client.cmd(command, arguments, fds))

    for form in ("raw", "base64"):
        await ask("secret-read", {"id": name, "format": form}, (sink,))
        await ask("getfd", {"fdname": "out"}, (sink,))
        await ask("secret-read", {"id": name, "format": form, "fdname": "out"})
        await ask("secret-read", {"id": name, "format": form, "fdname": "out"})
        await ask("secret-read", {"id": name, "format": form})
        with open("/dev/null") as null:
            await ask("secret-read", {"id": name}, (null.fileno(),))
    await ask("secret-read", {"id": name, "nope": 1}, (sink,))
    await ask("query-secrets", {})
    await ask("query-secrets", {"after": name[:-1]})
    await ask("query-secrets", {"after": ""})
    await ask("query-fdsets", {})
    await ask("add-fd", {"fdset-id": 7, "opaque": name}, (sink,))
    await ask("remove-fd", {"fdset-id": 7})
    await ask("closefd", {"fdname": name})
    await ask("query-version", {})
    await ask("query-commands", {})
    await ask("query-qmp-schema", {})
    await ask("qmp_capabilities", {})
    for command in COMMANDS.by_name.values():
        if not command.client:
            for arguments in ({}, {"id": name}, {"path": name, "property": "data"}, {"path": name}):
                await ask(command.name, dict(arguments))
    os.close(sink)
    learned.append(await asyncio.to_thread(os.read, source, 100))
    os.close(source)
    text = json.dumps(learned, default=repr).replace(name, "NAME")
    learned = json.loads(text)
    for reply in learned:
        if isinstance(reply, dict) and isinstance(reply.get("return"), dict):
            reply["return"].pop("fd", None)
    return learned


async def test_a_peer_without_a_grant_learns_nothing(in_loop: Served, loaded: AsyncClient) -> None:
    """Neither content nor existence nor size: all answers are those for a secret that there is
    not.
    """
    await loaded.ok("secret-generate", {"id": "exists", "size": 5000})
    await loaded.allow("others", "uid:1001")
    await loaded.grant("g", "exists", "others")
    await loaded.grant("h", "exi*", "others")
    client = await in_loop.connect(role="client", uid=1000)
    assert await everything(client, "exists") == await everything(client, "nothin")
    # A peer with a grant for another secret learns no more.
    await loaded.allow("mine", "uid:1000")
    await loaded.grant("m", "web.*", "mine")
    assert await everything(client, "exists") == await everything(client, "nothin")
    assert client.events == []


class Watched:
    """The look-ups during a refusal."""

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


async def test_a_refusal_makes_the_same_look_ups_whatever_there_is(
    in_loop: Served, loaded: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks only what the peer is granted: time tells nothing either."""
    await loaded.allow("others", "uid:1001")
    await loaded.grant("g", "web.key", "others")
    await loaded.allow("mine", "uid:1000")
    await loaded.grant("m", "db.*", "mine")
    client = await in_loop.connect(role="client", uid=1000)
    assert await client.denied("web.key")
    sequences = []
    for name in ("web.key", "web.nop"):
        with monkeypatch.context() as patch:
            watched = Watched(patch, name)
            assert await client.denied(name)
            sequences.append(watched.seen)
    assert sequences[0] == sequences[1]
    assert not any("NAME" in seen for seen in sequences[0])


async def test_explain_says_whether_and_why(in_loop: Served, loaded: AsyncClient) -> None:
    """Each grant that names the secret, with the rule that decides."""

    async def explain(name: str, *identities: str) -> dict:
        return await loaded.ok("secret-explain", {"id": name, "peer": list(identities)})

    assert await explain("web.key", "uid:1000") == {"allowed": False, "exists": True, "grants": []}
    assert await explain("nope", "uid:1000") == {"allowed": False, "exists": False, "grants": []}
    await loaded.grant("g1", "web.*", "missing")
    await loaded.allow("web", "unit:nginx.service", policy="deny")
    await loaded.grant("g2", "web.key", "web")
    await loaded.grant("g3", "db.key", "web")
    assert await explain("web.key", "unit:nginx.service", "uid:33") == {
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
    assert (await explain("web.key", "uid:33"))["grants"][1] == {
        "grant": "g2",
        "allowed": False,
        "reason": "'web': no rule matches, and its policy says deny",
    }
    await loaded.ok("qom-set", {"path": "g2", "property": "max-reads", "value": 1})
    client = await in_loop.connect(role="client", uid=1000)
    await loaded.allow("missing", "uid:1000")
    await loaded.ok("qom-set", {"path": "g1", "property": "max-reads", "value": 1})
    assert not await client.denied("web.key")
    assert (await explain("web.key", "uid:1000"))["grants"][0][
        "reason"
    ] == "the grant has no reads left"
    assert "has not been found" in await client.fail("secret-explain", {"id": "x", "peer": []})


@pytest.mark.slow
@pytest.mark.tuning(kept_identities=5, kept_changes=3)
async def test_forgotten_peers_and_changes_are_computed_again(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """What is remembered is bounded, and never stale."""
    clients = [await in_loop.connect(role="client", uid=1000 + n) for n in range(4)]
    await loaded.allow("web", "uid:1001", "uid:1003")
    for round_ in range(6):
        await loaded.grant(f"g{round_}", "web.key" if round_ % 2 else "web.*", "web")
        assert [await c.denied("web.key") for c in clients] == [True, False, True, False]
    for round_ in range(6):
        assert [await c.denied("web.key") for c in clients] == [True, False, True, False]
        await loaded.ok("object-del", {"id": f"g{round_}"})
    assert [await c.denied("web.key") for c in clients] == [True, True, True, True]


async def test_a_name_too_long_for_a_secret_matches_no_grant(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """And costs no time."""
    await loaded.allow("web", "uid:1000")
    await loaded.grant("g", "*", "web")
    client = await in_loop.connect(role="client", uid=1000)
    assert await client.denied("w" * 5000)


@pytest.mark.tuning(kept_identities=250)
async def test_what_is_forgotten_of_one_peer_stays_for_another(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """Both are in the same groups, and the index has room for two."""
    await loaded.allow("web", "gid:5000")
    groups = tuple(range(5000, 5100))
    clients = [await in_loop.connect(role="client", uid=1000 + n, groups=groups) for n in range(3)]
    await loaded.grant("g", "web.key", "web")
    for client in (*clients, *clients):
        assert not await client.denied("web.key")
    await loaded.ok("object-del", {"id": "g"})
    for client in clients:
        assert await client.denied("web.key")
