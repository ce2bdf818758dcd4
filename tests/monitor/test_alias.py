# SPDX-License-Identifier: LGPL-2.1-or-later
"""Aliases over QMP: words, readers, events, and deliveries that outlast a rotation."""

import asyncio
import os
from pathlib import Path

import pytest

from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served
from tests.support.needs import need_root

V1, V2, V3 = "ceph.v1", "ceph.v2", "ceph.v3"


@pytest.fixture
async def ceph(aqmp: AsyncClient) -> AsyncClient:
    """With versions 1 and 2, of which 1 is current."""
    await aqmp.add(V1, data="first")
    await aqmp.add(V2, data="second")
    await alias(aqmp, current=V1)
    return aqmp


async def alias(qmp: AsyncClient, **more: object) -> None:
    """Add the alias."""
    await qmp.ok("object-add", {"qom-type": "secret-alias", "id": "ceph", **more})


async def set_(qmp: AsyncClient, expect: dict[str, str], **new: object) -> dict:
    """secret-alias-set."""
    return await qmp.cmd("secret-alias-set", {"id": "ceph", "expect": expect, **new})


async def info(qmp: AsyncClient) -> dict:
    """query-secret-alias."""
    (found,) = await qmp.ok("query-secret-alias", {"id": "ceph"})
    return found


async def missing(qmp: AsyncClient) -> list[str]:
    """Those that are to read the current version, and have not."""
    readers = (await info(qmp))["readers"]
    return [each["identity"] for each in readers if each["awaited"] and each["read"] != "current"]


async def test_an_alias_reads_as_its_current_version(ceph: AsyncClient) -> None:
    """Before and after a commit, by secret-read and secret-seal; it is listed beside them."""
    assert await ceph.read("ceph") == b"first"
    assert await set_(ceph, {"current": V1}, staged=V2) == {"return": {}}
    assert await ceph.read("ceph") == b"first"
    expect = {"current": V1, "staged": V2}
    assert await set_(ceph, expect, current=V2, staged="", previous=V1) == {"return": {}}
    assert await ceph.read("ceph") == b"second"
    assert await ceph.read(V1) == b"first"
    await ceph.add("key", data="k" * 32)
    assert (await ceph.ok("secret-seal", {"id": "ceph", "keyid": "key"}))["iv"]
    listed = {each.pop("id"): each for each in await ceph.secrets()}
    assert (listed["ceph"]["qom-type"], listed["ceph"]["size"]) == ("secret-alias", 6)
    assert listed["ceph"]["version"] == V2
    assert "version" not in listed[V2]
    assert await info(ceph) == {
        "id": "ceph", "current": V2, "next": V3, "readers": [], "previous": V1,
    }  # fmt: skip


def expects(name: str) -> str:
    """The error of a version that is none of the alias."""
    return f"Parameter '{name}' expects a version of 'ceph', such as 'ceph.v1'"


DIFFERENT = "Parameters 'current', 'staged' and 'previous' expect different ids"
IDENTITIES = (
    "Parameter 'consumers' expects identities, such as 'unit:nginx.service', and no patterns"
)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"current": "other.v1"}, expects("current")),
        ({"current": ""}, expects("current")),
        ({"current": "ceph"}, expects("current")),
        ({"current": "ceph.v0"}, expects("current")),
        ({"current": "ceph.v01"}, expects("current")),
        ({"current": "ceph.v1.v1"}, expects("current")),
        ({"current": V1, "staged": "x.v2"}, expects("staged")),
        ({"current": V1, "staged": V1}, DIFFERENT),
        ({"current": V1, "consumers": ["uid:*"]}, IDENTITIES),
        (
            {"current": V1, "consumers": ["uid:1"] * 257},
            "Parameter 'consumers' expects at most 256 identities",
        ),
        (
            {"current": V1, "consumers": ["é" * 2000]},
            "Parameter 'consumers' expects at most 8192 bytes of identities",
        ),
        ({}, "Parameter 'current' is missing"),
    ],
)
async def test_an_alias_names_only_its_own_versions(
    aqmp: AsyncClient, given: dict, words: str
) -> None:
    """Whatever else is given; nothing is added."""
    options = {"qom-type": "secret-alias", "id": "ceph", **given}
    assert await aqmp.fail("object-add", options) == words
    assert await aqmp.ok("query-secret-alias") == []


@pytest.mark.parametrize(
    ("expect", "new", "words"),
    [
        ({"current": V2}, {"staged": V2},
         "Alias 'ceph' is not as expected: its current 'ceph.v1', staged '', previous ''; expected "
         "were current 'ceph.v2', staged '', previous ''"),
        ({"current": V1, "previous": V2}, {"staged": V2},
         "Alias 'ceph' is not as expected: its current 'ceph.v1', staged '', previous ''; expected "
         "were current 'ceph.v1', staged '', previous 'ceph.v2'"),
        ({"current": V1}, {"current": "db.v1"}, expects("current")),
        ({"current": V1}, {"previous": V1}, DIFFERENT),
        ({"current": V1}, {"current": V3}, "No secret with id 'ceph.v3'"),
        ({"current": V1}, {"consumers": ["?"]}, IDENTITIES),
        ({}, {}, "Parameter 'expect.current' is missing"),
    ],
)  # fmt: skip
async def test_a_refused_change_changes_nothing(
    ceph: AsyncClient, expect: dict, new: dict, words: str
) -> None:
    """The alias is as it was."""
    before = await info(ceph)
    assert (await set_(ceph, expect, **new))["error"] == {"class": "GenericError", "desc": words}
    assert await info(ceph) == before


async def test_only_aliases_are_set(ceph: AsyncClient) -> None:
    """Neither other objects nor none; qom-set does not compare, so it sets nothing."""
    arguments = {"id": "nope", "expect": {"current": "nope.v1"}}
    assert await ceph.fail("secret-alias-set", arguments) == "No alias with id 'nope'"
    arguments = {"id": V1, "expect": {"current": V1}}
    words = "Object with id 'ceph.v1' is not a secret-alias"
    assert await ceph.fail("secret-alias-set", arguments) == words
    change = {"path": "/objects/ceph", "property": "current", "value": V2}
    assert await ceph.fail("qom-set", change) == "Property 'secret-alias.current' is not writable"
    got = {name: await ceph.ok("qom-get", {"path": "ceph", "property": name})
           for name in ("type", "current", "staged", "consumers")}  # fmt: skip
    assert got == {"type": "secret-alias", "current": V1, "staged": "", "consumers": []}
    words = "Object with id 'ceph' is not a secret"
    assert await ceph.fail("secret-alias-convert", {"id": "ceph"}) == words
    keyed = {"qom-type": "secret", "id": "x", "data": "x", "keyid": "ceph"}
    assert await ceph.fail("object-add", keyed) == words


async def test_the_current_version_stays(ceph: AsyncClient) -> None:
    """It cannot be deleted or replaced, but expire; others can be deleted, and so can the alias."""
    in_use = "object 'ceph.v1' is in use, can not be deleted"
    assert await ceph.fail("object-del", {"id": V1}) == in_use
    replaced = {"qom-type": "secret", "id": V1, "data": "x"}
    words = (
        "'ceph.v1' is a version of alias 'ceph', and is written once; add another version instead"
    )
    assert await ceph.fail("secret-replace", replaced) == words
    assert await ceph.ok("secret-replace", {**replaced, "id": V2}) == {}
    assert await ceph.ok("object-del", {"id": V2}) == {}
    assert await ceph.ok("object-del", {"id": "ceph"}) == {}
    assert await ceph.ok("object-del", {"id": V1}) == {}
    await alias(ceph, current=V1)
    assert (await info(ceph))["fault"] == "there is no secret 'ceph.v1'"
    assert await ceph.fail("object-del", {"id": V1}) == "object 'ceph.v1' not found"
    fd = os.memfd_create("x")
    failed = await ceph.fail("secret-read", {"id": "ceph"}, (fd,))
    os.close(fd)
    assert failed == "No secret with id 'ceph.v1'"
    assert await ceph.secrets() == []


async def test_readers_are_remembered(in_loop: Served, ceph: AsyncClient) -> None:
    """By unit or uid, once a grant let them read the current or previous version; a reader of the
    staged one only tries it.
    """
    need_root()
    await ceph.allow("all", "uid:*")
    await ceph.grant("g", "ceph*", "all")
    one = await in_loop.connect(role="client", uid=1001)
    two = await in_loop.connect(role="client", uid=1002)
    assert await one.read("ceph") == b"first"
    assert await two.read(V1) == b"first"
    await ceph.read("ceph")  # the control socket is for rotation
    await set_(ceph, {"current": V1}, staged=V2)
    assert await one.read(V2) == b"second"
    found = await info(ceph)
    assert [each["read"] for each in found["readers"]] == ["current", "current"]
    assert await missing(ceph) == []
    expect = {"current": V1, "staged": V2}
    await set_(ceph, expect, current=V2, staged="", previous=V1)
    names = [each["identity"] for each in found["readers"]]
    assert await missing(ceph) == names
    assert await one.read("ceph") == b"second"
    assert len(await missing(ceph)) == 1
    assert await one.read(V1) == b"first"  # it holds the previous one again
    assert await missing(ceph) == names
    for reader in (one, two):
        assert await reader.read("ceph") == b"second"
    assert await missing(ceph) == []
    # Whoever has read none of the two is forgotten.
    await ceph.add(V3, data="third")
    await set_(ceph, {"current": V2, "previous": V1}, current=V3, previous="")
    assert (await info(ceph))["readers"] == []


async def test_named_consumers_are_awaited(in_loop: Served, aqmp: AsyncClient) -> None:
    """Only they, also before their first read and on the control socket."""
    need_root()
    await aqmp.add(V1, data="first")
    await alias(aqmp, current=V1, consumers=["uid:1001", f"uid:{os.getuid()}"])
    await aqmp.allow("all", "uid:*")
    await aqmp.grant("g", "ceph", "all")
    found = await info(aqmp)
    assert found["consumers"] == ["uid:1001", f"uid:{os.getuid()}"]
    assert sorted(await missing(aqmp)) == sorted(found["consumers"])
    assert {each["read"] for each in found["readers"]} == {"nothing"}
    await aqmp.read("ceph")
    for uid in (1001, 1002):
        client = await in_loop.connect(role="client", uid=uid)
        assert await client.read("ceph") == b"first"
    found = await info(aqmp)
    assert await missing(aqmp) == []
    assert len(found["readers"]) == 3
    assert [each["awaited"] for each in found["readers"]].count(True) == 2
    assert await set_(aqmp, {"current": V1}, consumers=[]) == {"return": {}}
    assert "consumers" not in await info(aqmp)


@pytest.mark.parametrize("where", ["alias", "version"])
async def test_a_denial_of_either_name_wins(in_loop: Served, ceph: AsyncClient, where: str) -> None:
    """For a new reader and for a delivery that is running; explain says so."""
    need_root()
    await ceph.ok("object-del", {"id": "ceph"})
    await ceph.ok("object-del", {"id": V1})
    await ceph.add(V1, data="x" * 300_000)
    await alias(ceph, current=V1)
    await ceph.allow("one", "uid:1001")
    await ceph.grant("g", V1 if where == "alias" else "ceph", "one")
    client = await in_loop.connect(role="client", uid=1001)
    source, sink = os.pipe()
    await client.send(b'{"execute":"secret-read","arguments":{"id":"ceph"}}', (sink,))
    os.close(sink)
    assert await asyncio.to_thread(os.read, source, 1)
    explain = {"id": "ceph", "peer": ["uid:1001"]}
    found = await ceph.ok("secret-explain", explain)
    assert (found["allowed"], found["grant"], found["version"]) == (True, "g", V1)
    denial = {"rules": [{"match": "uid:1001", "policy": "deny"}], "policy": "allow"}
    await ceph.ok("object-add", {"qom-type": "authz-list", "id": "no", **denial})
    await ceph.grant("h", "ceph" if where == "alias" else V1, "no")
    assert (await client.reply())["error"]["desc"] == "Secret 'ceph.v1' was withdrawn"
    os.close(source)
    assert await client.denied("ceph")
    found = await ceph.ok("secret-explain", explain)
    assert not found["allowed"]
    assert {each["grant"]: each["allowed"] for each in found["grants"]} == {"g": True, "h": False}
    # A policy that denies is silence, and no denial.
    await ceph.ok("object-del", {"id": "no"})
    await ceph.allow("no", "uid:7")
    assert await client.read("ceph") == b"x" * 300_000


async def test_a_delivery_keeps_its_version(in_loop: Served, aqmp: AsyncClient) -> None:
    """Though the alias has moved on meanwhile, and is deleted."""
    need_root()
    await aqmp.add(V1, data="x" * 300_000)
    await aqmp.add(V2, data="y")
    await alias(aqmp, current=V1)
    await aqmp.allow("one", "uid:1001")
    await aqmp.grant("g", "ceph", "one")
    client = await in_loop.connect(role="client", uid=1001)
    source, sink = os.pipe()
    await client.send(b'{"execute":"secret-read","arguments":{"id":"ceph"}}', (sink,))
    os.close(sink)
    data = await asyncio.to_thread(os.read, source, 1)
    await set_(aqmp, {"current": V1}, current=V2, previous=V1)
    await aqmp.ok("object-del", {"id": "ceph"})
    while piece := await asyncio.to_thread(os.read, source, 1 << 20):
        data += piece
    os.close(source)
    assert data == b"x" * 300_000
    assert (await client.reply())["return"] == {"size": 300_000}


async def test_events_follow_a_rotation(in_loop: Served, ceph: AsyncClient) -> None:
    """SECRET_ROTATED to those who may read; a read names version and alias."""
    need_root()
    await ceph.allow("one", "uid:1001")
    await ceph.grant("g", V2, "one")
    watcher = await (await in_loop.connect()).watch("SECRET_ROTATED", "SECRET_READ")
    reader = await (await in_loop.connect(role="client", uid=1001)).watch("SECRET_ROTATED")
    stranger = await (await in_loop.connect(role="client", uid=1002)).watch()
    await set_(ceph, {"current": V1}, current=V2)
    event = await watcher.event()
    assert (event["event"], event["data"]["id"]) == ("SECRET_ROTATED", "ceph")
    assert event["data"]["version"] == V2
    assert event["data"]["peer"]["uid"] == os.getuid()
    assert (await reader.event())["data"] == {"id": "ceph", "version": V2}
    assert await reader.read("ceph") == b"second"
    event = await watcher.event()
    assert (event["event"], event["data"]["id"], event["data"]["version"]) == (
        "SECRET_READ", "ceph", V2,
    )  # fmt: skip
    await ceph.allow("all", "uid:*")
    await ceph.grant("h", "x", "all")
    await ceph.add("x", data="x")
    assert (await stranger.event())["data"] == {"id": "x"}  # and no other before


async def test_a_secret_becomes_an_alias_in_one_step(in_loop: Served, aqmp: AsyncClient) -> None:
    """With its content, lifetime, owner and grants; a second time is refused."""
    need_root()
    await aqmp.add("web", data="letmein")
    await aqmp.ok("secret-expire", {"id": "web", "after": 1000})
    await aqmp.allow("one", "uid:1001")
    await aqmp.grant("g", "web", "one")
    watcher = await (await in_loop.connect()).watch()
    assert await aqmp.ok("secret-alias-convert", {"id": "web"}) == {}
    assert (await watcher.event())["data"]["version"] == "web.v1"
    client = await in_loop.connect(role="client", uid=1001)
    assert await client.read("web") == b"letmein"
    assert await client.denied("web.v1")
    assert [each["id"] for each in await client.secrets()] == ["web"]
    listed = {each["id"]: each for each in await aqmp.secrets()}
    assert listed["web"]["version"] == "web.v1"
    assert 0 < listed["web.v1"]["expires-in"] <= 1000
    assert await aqmp.fail("secret-alias-convert", {"id": "x"}) == "No secret with id 'x'"
    # One that a stopped conversion left is taken; any other is in the way.
    for name, left, in_the_way in (("a", "same", False), ("b", "other", True)):
        await aqmp.add(name, data="same")
        await aqmp.add(f"{name}.v1", data=left)
        reply = await aqmp.cmd("secret-alias-convert", {"id": name})
        assert ("error" in reply) is in_the_way
        assert await aqmp.read(name) == b"same"
    in_loop.tree.pin("b")
    assert "is in use" in await aqmp.fail("secret-alias-convert", {"id": "b"})


async def test_the_daemons_keys_have_no_readers_by_alias(
    in_loop: Served, ceph: AsyncClient
) -> None:
    """As by their own ids, for any but the trusted."""
    need_root()
    in_loop.tree.pin(V1)
    await ceph.allow("all", "uid:*")
    await ceph.grant("g", "*", "all")
    client = await in_loop.connect(role="client", uid=1001)
    assert await client.denied("ceph")
    assert await client.denied(V1)
    assert await ceph.read("ceph") == b"first"


async def test_aliases_are_listed_in_pages(
    aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of their ids, as many as fit."""
    monkeypatch.setattr("secretd.monitor.commands.pages.PAGE_BYTES", 200)
    for number in range(9):
        options = {"qom-type": "secret-alias", "id": f"a{number}", "current": f"a{number}.v7"}
        await aqmp.ok("object-add", {**options, "staged": f"a{number}.v8"})
    found: list[dict] = []
    pages = 0
    while page := await aqmp.ok("query-secret-alias", {"after": found[-1]["id"]} if found else {}):
        found += page
        pages += 1
    assert [each["id"] for each in found] == [f"a{number}" for number in range(9)]
    assert pages > 3
    assert (found[0]["staged"], found[0]["next"]) == ("a0.v8", "a0.v9")
    await aqmp.add("a0.v9", data="in the way")
    (first,) = await aqmp.ok("query-secret-alias", {"id": "a0"})
    assert first["next"] == "a0.v10"


async def test_more_readers_than_are_remembered(
    in_loop: Served, ceph: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alias says so, until its consumers are named."""
    need_root()
    monkeypatch.setattr("secretd.qom.rotation.CONSUMERS", 0)
    await ceph.allow("all", "uid:*")
    await ceph.grant("g", "ceph", "all")
    client = await in_loop.connect(role="client", uid=1001)
    for _ in range(2):
        await client.read("ceph")
        assert ((await info(ceph))["more"], (await info(ceph))["readers"]) == (True, [])
    # A commit does not say which version they hold; named consumers are all that count.
    await set_(ceph, {"current": V1}, current=V2)
    assert (await info(ceph))["more"]
    await set_(ceph, {"current": V2}, consumers=["uid:1001"])
    assert "more" not in await info(ceph)


async def test_a_used_up_grant_does_not_stand_against_a_denial(
    in_loop: Served, ceph: AsyncClient
) -> None:
    """It allows no more; a grant of the other name does not help."""
    need_root()
    await ceph.allow("one", "uid:1001")
    await ceph.grant("g", "ceph", "one", **{"max-reads": 1})
    await ceph.grant("h", V1, "one")
    rules = [{"match": "uid:1001", "policy": "deny"}]
    await ceph.ok("object-add", {"qom-type": "authz-list", "id": "no", "rules": rules})
    await ceph.grant("d", "ceph", "no")
    client = await in_loop.connect(role="client", uid=1001)
    assert await client.read("ceph") == b"first"  # by h, which has no limit; g allows it, too
    await ceph.ok("qom-set", {"path": "g", "property": "secret", "value": V1})
    assert await client.denied("ceph")


async def test_a_list_file_denies_by_name(
    in_loop: Served, ceph: AsyncClient, tmp_path: Path
) -> None:
    """As it is at the moment of the read."""
    need_root()
    await ceph.allow("one", "uid:1001")
    await ceph.grant("g", "ceph", "one")
    list_ = tmp_path / "list"
    list_.write_text("{}")
    options = {"qom-type": "authz-listfile", "id": "file", "filename": str(list_)}
    await ceph.ok("object-add", options)
    await ceph.grant("d", V1, "file")
    client = await in_loop.connect(role="client", uid=1001)
    assert await client.read("ceph") == b"first"
    list_.write_text('{"rules": [{"match": "uid:1001", "policy": "deny"}]}')
    assert await client.denied("ceph")


async def test_an_admitted_administrator_names_no_key_of_the_daemon(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """Neither in an alias nor by a conversion, whose outcome would compare the key."""
    need_root()
    await aqmp.allow("admins", "uid:1001")
    await aqmp.add("k.v1", data="same")
    in_loop.tree.own_keys.add("k.v1")
    admin = await in_loop.connect(role="admins", uid=1001)
    await admin.add("k", data="same")
    words = "Only uid 0 and the daemon's own uid may add, change or delete 'k.v1'"
    assert await admin.fail("secret-alias-convert", {"id": "k"}) == words
    await admin.ok("object-del", {"id": "k"})
    for given in ({"current": "k.v1"}, {"current": "k.v2", "staged": "k.v1"}):
        options = {"qom-type": "secret-alias", "id": "k", **given}
        assert await admin.fail("object-add", options) == words
    await admin.ok("object-add", {"qom-type": "secret-alias", "id": "k", "current": "k.v2"})
    change = {"id": "k", "expect": {"current": "k.v2"}, "current": "k.v1"}
    assert await admin.fail("secret-alias-set", change) == words
    assert await aqmp.ok("secret-alias-set", change) == {}
    assert await aqmp.ok("object-del", {"id": "k.v1"}) == {}  # a key can always be deleted


async def test_a_conversion_is_charged_to_its_caller(in_loop: Served, aqmp: AsyncClient) -> None:
    """The version stays its owner's."""
    need_root()
    await aqmp.allow("admins", "uid:1001")
    await aqmp.add("a", data="x")
    admin = await in_loop.connect(role="admins", uid=1001)
    await admin.ok("secret-alias-convert", {"id": "a"})
    owners = {
        name: (await aqmp.ok("query-secret-usage", {"id": name}))["uid"] for name in ("a.v1",)
    }
    assert owners == {"a.v1": 0}
    assert in_loop.tree.limits.objects.held(1001) == 1
    assert await admin.fail("secret-alias-convert", {"id": "a.v1"}) == (
        "'a.v1' is a version of alias 'a', and is written once; add another version instead"
    )
    long = "x" * 1100
    await aqmp.add(long, data="x")
    assert await aqmp.fail("secret-alias-convert", {"id": long}) == (
        "Parameter 'id' is longer than the limit of 1024 bytes for an alias"
    )


async def test_readers_of_a_deleted_version_are_forgotten(
    in_loop: Served, ceph: AsyncClient
) -> None:
    """Another secret of that id is another secret."""
    need_root()
    await ceph.allow("all", "uid:*")
    await ceph.grant("g", "ceph*", "all")
    client = await in_loop.connect(role="client", uid=1001)
    await set_(ceph, {"current": V1}, current=V2, previous=V1)
    await client.read("ceph")
    await client.read(V1)
    assert len(await missing(ceph)) == 1
    await ceph.ok("object-del", {"id": V1})
    await ceph.add(V1, data="another")
    assert (await info(ceph))["readers"] == []


async def test_a_number_beyond_all_others_blocks_no_rotation(ceph: AsyncClient) -> None:
    """The next version is one that can be named."""
    await set_(ceph, {"current": V1}, staged="ceph.v999999999")
    assert (await info(ceph))["next"] == V3
