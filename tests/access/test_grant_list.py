# SPDX-License-Identifier: LGPL-2.1-or-later
"""query-secret-grants and query-secret-usage: what an administrator can see."""

import json
import os
from pathlib import Path

import pytest

from secretd.access.uses import Uses
from secretd.audit.records import Subject
from tests.support.async_qmp import AsyncClient
from tests.support.grants import SECRET
from tests.support.in_loop import Served
from tests.support.needs import need_root

PEER = Subject("client", {"uid": 1, "gid": 1, "pid": 1})


@pytest.fixture(autouse=True)
def _root() -> None:
    need_root()


async def test_grants_are_listed_with_rules_and_limits(aqmp: AsyncClient) -> None:
    """By id; by secret; by the identities of a client."""
    await aqmp.allow("web", "unit:nginx.service")
    rules = [
        {"match": "uid:7", "policy": "deny"},
        {"match": "uid:*", "policy": "allow", "format": "glob"},
    ]
    await aqmp.ok("object-add", {"qom-type": "authz-list", "id": "users", "rules": rules})
    await aqmp.grant("g2", "web.*", "web")
    limits = {"max-reads": 3, "expires-after": 3600, "credential": "key"}
    options = {"qom-type": "secret-grant", "id": "g1", "secret": "db", "authz": "users"}
    await aqmp.ok("object-add", {**options, **limits})
    await aqmp.grant("g3", "db", "missing")
    listed = await aqmp.ok("query-secret-grants")
    assert listed == [
        {
            "id": "g1", "secret": "db", "authz": "users", "allows": ["uid:*"],
            "denies": ["uid:7"], "credential": "key", "max-reads": 3, "reads-left": 3,
            "expires-in": 3600,
        },
        {"id": "g2", "secret": "web.*", "authz": "web", "allows": ["unit:nginx.service"]},
        {
            "id": "g3", "secret": "db", "authz": "missing", "allows": [],
            "fault": "there is no authz object 'missing'",
        },
    ]  # fmt: skip

    async def ids(**arguments: object) -> list[str]:
        return [each["id"] for each in await aqmp.ok("query-secret-grants", arguments)]

    assert await ids(secret="web.key") == ["g2"]
    assert await ids(secret="db") == ["g1", "g3"]
    assert await ids(peer=["uid:8", "gid:9"]) == ["g1"]
    assert await ids(peer=["uid:7"]) == []
    assert await ids(after="g1") == ["g2", "g3"]
    assert await ids(after="g3") == []
    await aqmp.ok("object-del", {"id": "g2"})
    assert await ids() == ["g1", "g3"]
    await aqmp.ok("qom-set", {"path": "users", "property": "policy", "value": "allow"})
    (first, _) = await aqmp.ok("query-secret-grants")
    assert first["allows"] == ["uid:*", "*"]


async def test_reads_that_are_left_are_counted_down(in_loop: Served, aqmp: AsyncClient) -> None:
    """Each read; and nothing about grants reaches the client socket."""
    await aqmp.add("s", data=SECRET.decode())
    await aqmp.allow("a", "uid:1000")
    options = {"qom-type": "secret-grant", "id": "g", "secret": "s", "authz": "a", "max-reads": 2}
    await aqmp.ok("object-add", options)
    client = await in_loop.connect(role="client", uid=1000)
    assert not await client.denied("s")
    (grant,) = await aqmp.ok("query-secret-grants")
    assert (grant["max-reads"], grant["reads-left"]) == (2, 1)
    for command in ("query-secret-grants", "query-secret-usage"):
        assert "has not been found" in await client.fail(command, {"id": "s"})


async def test_a_list_file_is_listed_as_it_is_now(aqmp: AsyncClient, tmp_path: Path) -> None:
    """With its fault once it cannot be read."""
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"rules": [{"match": "uid:1", "policy": "allow"}]}))
    options = {"qom-type": "authz-listfile", "id": "f", "filename": str(path)}
    await aqmp.ok("object-add", options)
    await aqmp.grant("g", "s", "f")
    (grant,) = await aqmp.ok("query-secret-grants")
    assert grant["allows"] == ["uid:1"]
    path.unlink()
    (grant,) = await aqmp.ok("query-secret-grants")
    assert grant["allows"] == []
    assert grant["fault"] == f"'{path}' cannot be used: No such file or directory"


async def test_many_grants_come_in_pages(aqmp: AsyncClient) -> None:
    """Each within the limit of a reply, and together all of them."""
    rules = [{"match": f"uid:{number}{'é' * 300}", "policy": "allow"} for number in range(50)]
    rules += [{"match": "gid:1", "policy": "deny"}]
    await aqmp.ok("object-add", {"qom-type": "authz-list", "id": "a", "rules": rules})
    names = [f"g{number:04}" for number in range(700)]
    for name in names:
        await aqmp.grant(name, "s", "a")
    found: list[dict] = []
    pages = 0
    while page := await aqmp.ok("query-secret-grants", {"after": found[-1]["id"] if found else ""}):
        found += page
        pages += 1
    assert [grant["id"] for grant in found] == names
    assert pages > 50
    assert len(found[0]["allows"]) + found[0]["more"] == 50
    assert found[0]["denies"] == ["gid:1"]
    none = {"secret": "another", "after": ""}
    assert await aqmp.ok("query-secret-grants", none) == []


async def test_usage_tells_owner_and_releases(in_loop: Served, aqmp: AsyncClient) -> None:
    """Since the daemon started, and for a secret only."""
    await aqmp.add("s", data=SECRET.decode())
    assert await aqmp.ok("query-secret-usage", {"id": "s"}) == {
        "id": "s", "uid": os.getuid(), "releases": 0, "audit": "none",
    }  # fmt: skip
    await aqmp.allow("a", "uid:1000")
    await aqmp.grant("g", "s", "a")
    client = await in_loop.connect(role="client", uid=1000)
    for _ in range(2):
        assert not await client.denied("s")
    usage = await aqmp.ok("query-secret-usage", {"id": "s"})
    assert usage["releases"] == 2
    assert usage["last-release"]["peer"]["uid"] == 1000
    assert usage["last-release"]["time"] > 1_700_000_000
    await aqmp.ok("object-del", {"id": "s"})
    await aqmp.add("s", data=SECRET.decode())
    assert (await aqmp.ok("query-secret-usage", {"id": "s"}))["releases"] == 0
    assert "No secret" in await aqmp.fail("query-secret-usage", {"id": "nope"})
    assert "not a secret" in await aqmp.fail("query-secret-usage", {"id": "a"})


def test_only_so_many_secrets_are_counted() -> None:
    """Those that were not released for longest are forgotten."""
    uses = Uses(2)
    for name in ("a", "b", "a", "c"):
        uses.note(name, PEER)
    assert [uses.of(name).releases for name in ("a", "b", "c")] == [2, 0, 1]
    uses.take_back("a")
    uses.take_back("b")
    assert [uses.of(name).releases for name in ("a", "b")] == [1, 0]
    uses.forget("a")
    assert uses.of("a").subject is None


async def test_each_process_has_its_own_instance(aqmp: AsyncClient) -> None:
    """A manager tells a restarted daemon by it."""
    found = {s["name"]: s["value"] for s in (await aqmp.ok("query-secret-stats"))[2]["stats"]}
    assert found["objects"] == 0
    assert 0 <= found["instance"] < 1 << 53
    assert found["start-time"] > 1_700_000_000
