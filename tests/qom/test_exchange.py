# SPDX-License-Identifier: LGPL-2.1-or-later
"""secret-replace: a secret's content changes in one step."""

import asyncio
import base64
import contextlib
import json
import os
from pathlib import Path

import pytest

from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served
from tests.support.needs import need_root


def replacing(object_id: str, **content: object) -> dict[str, object]:
    """The arguments of secret-replace."""
    return {"qom-type": "secret", "id": object_id, **content}


async def opened_for_writing(fifo: Path) -> int:
    """Open a FIFO once the daemon reads it."""
    while True:
        with contextlib.suppress(OSError):  # ENXIO: there is no reader yet
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        await asyncio.sleep(0)


async def test_a_secret_gets_new_content(in_loop: Served, aqmp: AsyncClient) -> None:
    """In any encoding; its lifetime ends, and others get the events of both steps."""
    other = await in_loop.connect()
    names = ["SECRET_ADDED", "SECRET_DELETED"]
    await other.ok("secret-events", {"enable": True, "events": names})
    await aqmp.add("s", data="old")
    await aqmp.ok("secret-expire", {"id": "s", "after": 100})
    await aqmp.ok("secret-replace", replacing("s", data="new and longer"))
    assert await aqmp.read("s") == b"new and longer"
    (info,) = await aqmp.secrets()
    assert (info["size"], "expires-in" in info) == (14, False)
    encoded = base64.b64encode(b"third").decode()
    await aqmp.ok("secret-replace", replacing("s", data=encoded, format="base64"))
    assert await aqmp.read("s") == b"third"
    names = [(await other.event())["event"] for _ in range(5)]
    assert names == ["SECRET_ADDED", *["SECRET_DELETED", "SECRET_ADDED"] * 2]


async def test_a_failure_leaves_the_old_content(aqmp: AsyncClient, tmp_path: Path) -> None:
    """Wrong content, a missing secret, another type of object."""
    await aqmp.add("s", data="old")
    await aqmp.allow("a", "uid:1")
    for arguments, words in (
        (replacing("s", data="?", format="base64"), "Base64 data contains"),
        (replacing("s"), "Either 'file' or 'data' must be provided"),
        (replacing("none", data="x"), "No secret with id 'none'"),
        (replacing("a", data="x"), "Object with id 'a' is not a secret"),
        (replacing("s", file=str(tmp_path / "no")), "Unable to read"),
    ):
        assert words in await aqmp.fail("secret-replace", arguments)
    assert await aqmp.read("s") == b"old"


async def test_content_that_comes_later_replaces_what_is_there_then(
    in_loop: Served, aqmp: AsyncClient, tmp_path: Path
) -> None:
    """If the secret was deleted meanwhile, nothing is added."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    other = await in_loop.connect()
    await aqmp.add("s", data="old")
    for deleted in (False, True):
        message = {"execute": "secret-replace", "arguments": replacing("s", file=str(fifo))}
        await aqmp.send(json.dumps(message).encode() + b"\n")
        if deleted:
            await other.ok("object-del", {"id": "s"})
        sink = await opened_for_writing(fifo)
        os.write(sink, b"from a fifo")
        os.close(sink)
        reply = await aqmp.reply()
        if deleted:
            assert "No secret with id 's'" in reply["error"]["desc"]
        else:
            assert reply == {"return": {}}
            assert await aqmp.read("s") == b"from a fifo"
    assert await aqmp.secrets() == []


async def test_an_administrators_quota_counts_what_is_more(
    in_loop: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an own secret the difference, of another's all of it."""
    need_root()
    root = await in_loop.connect()
    await root.allow("admins", "uid:1000")
    admin = await in_loop.connect(role="admins", uid=1000)
    limit = 700
    monkeypatch.setattr(in_loop.tree.limits.object_bytes, "limit", limit)
    await admin.add("mine", data="x" * 300)
    await admin.ok("secret-replace", replacing("mine", data="y" * 600))
    assert "object-bytes-per-uid" in await admin.fail(
        "secret-replace", replacing("mine", data="z" * 760)
    )
    await root.add("roots", data="x" * 300)
    assert "object-bytes-per-uid" in await admin.fail(
        "secret-replace", replacing("roots", data="z" * 300)
    )
    await root.ok("secret-replace", replacing("mine", data="z" * 690))
    assert await root.read("mine") == b"z" * 690


async def test_the_audits_key_cannot_be_replaced(in_loop: Served, aqmp: AsyncClient) -> None:
    """As it cannot be deleted."""
    await aqmp.add("key", data="k" * 32)
    in_loop.tree.pin("key")
    assert await aqmp.fail("secret-replace", replacing("key", data="x")) == (
        "object 'key' is in use, can not be deleted"
    )
