# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands on a running server: objects, properties, descriptors, hand-over, both sockets."""

import asyncio
import base64
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from secretd.descriptors import source
from secretd.errors import CommandError
from secretd.monitor.monitor import MAX_REPLY_BYTES
from secretd.qom.paths import CHILDREN_PER_REPLY
from secretd.wire.connection import MAX_ID_BYTES
from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served
from tests.support.needs import ARENA_LEVEL, need_locked_memory

KEY = base64.b64encode(bytes(range(32))).decode()
IV = base64.b64encode(bytes(range(16))).decode()


def encrypt(content: bytes) -> bytes:
    """AES-256-CBC with PKCS#7 padding under KEY and IV, by other code."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    padding = 16 - len(content) % 16
    encryptor = Cipher(algorithms.AES(bytes(range(32))), modes.CBC(bytes(range(16)))).encryptor()
    return encryptor.update(content + bytes([padding]) * padding) + encryptor.finalize()


# --- negotiation and general commands


async def test_nothing_but_negotiation_is_answered_before_it(in_loop: Served) -> None:
    """QEMU's words; malformed messages get their usual error."""
    client = await in_loop.connect(negotiate=False)
    greeting = await client.reply()
    assert greeting["QMP"]["version"]["qemu"] == {"major": 10, "minor": 0, "micro": 0}
    assert greeting["QMP"]["version"]["package"] == "secretd test"
    assert greeting["QMP"]["capabilities"] == ["oob"]
    words = "Expecting capabilities negotiation with 'qmp_capabilities'"
    for command in ("query-version", "nope"):
        reply = await client.cmd(command)
        assert reply == {"error": {"class": "CommandNotFound", "desc": words}}
    assert (await client.ask(b'{"execute":"query-version","id":7}'))["id"] == 7
    assert (await client.ask(b"{]"))["error"]["desc"] == "JSON parse error, expecting value"
    assert await client.fail("qmp_capabilities", {"enable": ["nope"]}) == (
        "Parameter 'null' does not accept value 'nope'"
    )
    assert await client.cmd("qmp_capabilities", {"enable": []}) == {"return": {}}
    assert await client.cmd("qmp_capabilities") == {
        "error": {
            "class": "CommandNotFound",
            "desc": "Capabilities negotiation is already complete, command ignored",
        }
    }


async def test_general_commands(aqmp: AsyncClient) -> None:
    """Version, name, the list of commands, and what is no command."""
    assert await aqmp.ok("query-version") == aqmp.greeting["QMP"]["version"]
    assert await aqmp.ok("query-name") == {}
    names = [command["name"] for command in await aqmp.ok("query-commands")]
    assert {"object-add", "secret-read", "query-commands", "qmp_capabilities"} <= set(names)
    assert await aqmp.cmd("nope") == {
        "error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}
    }
    assert await aqmp.ask(b'{"execute":"query-name","id":{"b":1,"a":["x",null]}}') == {
        "return": {},
        "id": {"b": 1, "a": ["x", None]},
    }


# --- objects


async def test_secrets_are_added_in_every_encoding(aqmp: AsyncClient, tmp_path: Path) -> None:
    """Data or file, raw or base64, in clear or encrypted, chains of keys."""
    raw, b64, aes = tmp_path / "raw", tmp_path / "b64", tmp_path / "aes"
    raw.write_bytes(b"letmein\0\xff")
    b64.write_bytes(base64.encodebytes(b"letmein\0\xff"))
    aes.write_bytes(encrypt(b"letmein\0\xff"))
    assert await aqmp.add("data", data="letmein") == {"return": {}}
    assert await aqmp.read("data") == b"letmein"
    assert await aqmp.add("escaped", data='l\u00e9t"m\\e\0in') == {"return": {}}
    assert await aqmp.read("escaped") == 'l\u00e9t"m\\e'.encode() + b"\xc0\x80in"
    assert await aqmp.add("b64", data="bGV0\nbWVpbg==", format="base64") == {"return": {}}
    assert await aqmp.read("b64") == b"letmein"
    assert await aqmp.add("empty", data="") == {"return": {}}
    assert await aqmp.read("empty") == b""
    assert await aqmp.add("file", file=str(raw)) == {"return": {}}
    assert await aqmp.add("file64", file=str(b64), format="base64") == {"return": {}}
    assert await aqmp.add("k", data=KEY, format="base64") == {"return": {}}
    assert await aqmp.add("aes", file=str(aes), keyid="k", iv=IV) == {"return": {}}
    sealed = base64.encodebytes(encrypt(b"letmein\0\xff")).decode()
    assert await aqmp.add("aes64", data=sealed, keyid="k", iv=IV, format="base64") == {"return": {}}
    for name in ("file", "file64", "aes", "aes64"):
        assert await aqmp.read(name) == b"letmein\0\xff", name
    chained = await aqmp.ok("secret-seal", {"id": "k", "keyid": "k"})
    assert await aqmp.add("k2", keyid="k", format="base64", **chained) == {"return": {}}
    assert await aqmp.cmd("object-del", {"id": "k"}) == {"return": {}}
    assert await aqmp.read("k2") == bytes(range(32))
    assert await aqmp.add("plain-iv", data="x", iv="rubbish") == {"return": {}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Either 'file' or 'data' must be provided"),
        ({"data": "", "file": ""}, "'file' and 'data' are mutually exclusive"),
        ({"file": "/nope"},
         "Unable to read /nope: Failed to open file “/nope”: No such file or directory"),
        ({"file": ""}, "Unable to read : Failed to open file “”: No such file or directory"),
        ({"file": "/n\0"},
         "Unable to read /n\0: Failed to open file “/n\ufffd\ufffd”: No such file or directory"),
        ({"file": "/dev"}, "Unable to read /dev: Error reading file “/dev”: Is a directory"),
        ({"file": "/proc/self/cwd"},
         "Unable to read /proc/self/cwd: Failed to open file “/proc/self/cwd”: "
         "Too many levels of symbolic links"),
        ({"file": "/dev/fd/0"},
         "Unable to read /dev/fd/0: Failed to open file “/dev/fd/0”: No such file or directory"),
        ({"file": "/dev/fdset/7"},
         "Unable to read /dev/fdset/7: Failed to open file “/dev/fdset/7”: No such file or "
         "directory"),
        ({"data": "x", "keyid": "nope"}, "No secret with id 'nope'"),
        ({"data": "x", "keyid": "new"}, "Secret with id 'new' has no data"),
        ({"data": "x", "keyid": "short"}, "Key should be 32 bytes in length"),
        ({"data": "x", "keyid": "k"}, "IV is required to decrypt secret"),
        ({"data": "x", "keyid": "k", "iv": "!"}, "Base64 data contains invalid characters"),
        ({"data": "x", "keyid": "k", "iv": "AAAA"}, "IV should be 16 bytes in length not 3"),
        ({"data": "!", "keyid": "k", "iv": IV, "format": "base64"},
         "Base64 data contains invalid characters"),
        ({"data": "x", "keyid": "k", "iv": IV}, "Length 1 must be a multiple of block size 16"),
        ({"data": "!!", "format": "base64"}, "Base64 data contains invalid characters"),
    ],
)  # fmt: skip
async def test_a_failed_add_says_why_and_leaves_nothing(
    in_loop: Served, aqmp: AsyncClient, options: dict[str, str], words: str
) -> None:
    """QEMU's words, and the same objects and memory as before."""
    await aqmp.add("k", data=KEY, format="base64")
    await aqmp.add("short", data="x")
    held = (in_loop.journal.arena.held, in_loop.scratch.held)
    assert (await aqmp.add("new", **options))["error"] == {"class": "GenericError", "desc": words}
    assert [secret["id"] for secret in await aqmp.ok("query-secrets")] == ["k", "short"]
    assert (in_loop.journal.arena.held, in_loop.scratch.held) == held


async def test_ids_are_checked(aqmp: AsyncClient) -> None:
    """Well-formed, not too long, not taken; `type` is taken."""
    for bad in ("", "1a", "_a", "a b", "a/b", "é"):
        assert await aqmp.fail("object-add", {"qom-type": "secret", "id": bad, "data": "x"}) == (
            "Parameter 'id' expects an identifier"
        )
    assert await aqmp.add("a" * 4096, data="x") == {"return": {}}
    assert (await aqmp.add("a" * 4097, data="x"))["error"]["desc"] == (
        "Parameter 'id' is longer than the limit of 4096 bytes"
    )
    assert await aqmp.add("a.b-c_d", data="x") == {"return": {}}
    for taken in ("a.b-c_d", "type"):
        assert (await aqmp.add(taken, data="x"))["error"]["desc"] == (
            f"attempt to add duplicate property '{taken}' to object (type 'container')"
        )
    assert await aqmp.fail("object-del", {"id": "nope"}) == "object 'nope' not found"
    assert await aqmp.cmd("object-del", {"id": "a.b-c_d"}) == {"return": {}}
    assert await aqmp.add("a.b-c_d", data="x") == {"return": {}}


async def test_a_secret_has_a_largest_size(aqmp: AsyncClient, tmp_path: Path) -> None:
    """1 MiB is taken, one byte more is refused; a source that could hold no secret is not read
    on.
    """
    need_locked_memory(16 << 20)  # it shares the limit with the worker's other tests
    big = tmp_path / "big"
    big.write_bytes(b"x" * (1 << 20))
    assert await aqmp.add("fits", file=str(big)) == {"return": {}}
    assert await aqmp.read("fits") == b"x" * (1 << 20)
    with open(os.memfd_create("x"), "w+b") as memfd:
        await aqmp.ok("secret-read", {"id": "fits", "format": "base64"}, (memfd.fileno(),))
        assert memfd.read() == base64.b64encode(b"x" * (1 << 20))
    words = "The secret has 1048577 bytes, more than the limit of 1048576 bytes"
    big.write_bytes(b"x" * ((1 << 20) + 1))
    assert (await aqmp.add("big", file=str(big)))["error"]["desc"] == words
    big.write_bytes(base64.b64encode(b"x" * ((1 << 20) + 1)))
    assert (await aqmp.add("big", file=str(big), format="base64"))["error"]["desc"] == words
    big.write_bytes(b"x" * ((2 << 20) + 1))
    assert (await aqmp.add("big", file=str(big)))["error"]["desc"] == (
        f"Unable to read {big}: larger than the limit of 2097152 bytes"
    )
    assert (await aqmp.add("zero", file="/dev/zero"))["error"]["desc"] == (
        "Unable to read /dev/zero: larger than the limit of 2097152 bytes"
    )


async def test_properties_read_and_change_as_in_qemu_but_for_data(aqmp: AsyncClient) -> None:
    """What the client gave is returned, data never; what was loaded stays."""
    await aqmp.add("s", data="letmein", iv="i")

    async def get(name: str, path: str = "s") -> dict:
        return await aqmp.cmd("qom-get", {"path": path, "property": name})

    async def set_(name: str, value: object, path: str = "s") -> dict:
        return await aqmp.cmd("qom-set", {"path": path, "property": name, "value": value})

    assert (await get("data"))["error"]["desc"] == "Property 'secret.data' is not readable"
    assert [(await get(name))["return"] for name in ("type", "format", "keyid", "iv", "file")] == [
        "secret", "raw", "", "i", "",
    ]  # fmt: skip
    assert (await get("nope"))["error"]["desc"] == "Property 'secret.nope' not found"
    for name, value in (("format", "base64"), ("keyid", "k"), ("iv", ""), ("file", "/x")):
        assert await set_(name, value) == {"return": {}}
        assert (await get(name))["return"] == value
    assert await set_("data", "other") == {"return": {}}
    assert await aqmp.read("s") == b"letmein"
    assert (await set_("data", 5))["error"][
        "desc"
    ] == "Invalid parameter type for 'data', expected: string"
    assert (await set_("format", 5))["error"]["desc"] == (
        "Invalid parameter type for 'format', expected: string"
    )
    assert (await set_("format", "hex"))["error"]["desc"] == (
        "Parameter 'format' does not accept value 'hex'"
    )
    assert (await set_("type", "x"))["error"]["desc"] == "Property 'secret.type' is not writable"
    assert (await set_("nope", None))["error"]["desc"] == "Property 'secret.nope' not found"
    assert (await get("type", "/objects"))["return"] == "container"
    assert (await get("objects", "/"))["return"] == "/objects"
    assert (await get("s", "/objects"))["return"] == "/objects/s"
    assert (await get("x", "/"))["error"]["desc"] == "Property 'container.x' not found"
    assert (await set_("s", "x", "/objects"))["error"][
        "desc"
    ] == "Property 'container.s' is not writable"
    assert (await set_("x", "x", "/objects"))["error"]["desc"] == "Property 'container.x' not found"
    for reply in (await get("type", "/nope"), await set_("data", "x", "/nope")):
        assert reply["error"] == {"class": "DeviceNotFound", "desc": "Device '/nope' not found"}


async def test_paths_lead_where_they_do_in_qemu(aqmp: AsyncClient) -> None:
    """Absolute, partial, with slashes too many, ambiguous."""
    await aqmp.add("s", data="x")
    secret = ["type", "iv", "keyid", "format", "file", "data"]

    async def names(path: str) -> list[str]:
        return [entry["name"] for entry in await aqmp.ok("qom-list", {"path": path})]

    assert await aqmp.ok("qom-list", {"path": "/objects"}) == [
        {"name": "type", "type": "string"},
        {"name": "s", "type": "child<secret>"},
    ]
    assert await names("/") == await names("//") == ["type", "objects"]
    for path in ("/objects/s", "objects/s", "s", "s/", "//objects//s", "/objects/s/"):
        assert await names(path) == secret
    for path in ("/s", "nope", "/objects/nope", "s/type", "."):
        assert (await aqmp.cmd("qom-list", {"path": path}))["error"] == {
            "class": "DeviceNotFound",
            "desc": f"Device '{path}' not found",
        }
    assert await aqmp.fail("qom-list", {"path": ""}) == "Path '' is ambiguous"
    assert await aqmp.fail("qom-get", {"path": "", "property": "type"}) == "Device '' not found"
    await aqmp.add("objects", data="x")
    assert await aqmp.fail("qom-list", {"path": "objects"}) == "Path 'objects' is ambiguous"


async def test_types_are_listed(aqmp: AsyncClient) -> None:
    """With their parents, abstract ones on request, by what they implement."""
    assert [entry["name"] for entry in await aqmp.ok("qom-list-types")] == [
        "container", "secret", "secret_keyring", "authz-list-file", "secret-grant", "secret-store",
            "secret-alias", "secret-host", "secret-peer", "secret-offer",
            "secret-fleet", "secret-roster", "secret-manifest",
        "authz-simple", "authz-list",
    ]  # fmt: skip
    abstract = await aqmp.ok("qom-list-types", {"abstract": True})
    assert {"abstract": True, "name": "secret_common", "parent": "object"} in abstract
    assert {"abstract": True, "name": "object"} in abstract
    assert await aqmp.ok("qom-list-types", {"implements": "secret_common"}) == [
        {"name": "secret", "parent": "secret_common"},
        {"name": "secret_keyring", "parent": "secret_common"},
    ]
    assert await aqmp.ok("qom-list-types", {"implements": "nope"}) == []
    assert (await aqmp.ok("qom-list-properties", {"typename": "secret"}))[3] == {
        "name": "format",
        "type": "QCryptoSecretFormat",
    }
    assert await aqmp.fail("qom-list-properties", {"typename": "interface"}) == (
        "Parameter 'typename' expects a QOM type"
    )
    assert (await aqmp.cmd("qom-list-properties", {"typename": "nope"}))["error"] == {
        "class": "DeviceNotFound",
        "desc": "Class 'nope' not found",
    }


async def test_secrets_are_listed_with_size_and_protection(aqmp: AsyncClient) -> None:
    """query-secrets, whose words are ours."""
    await aqmp.add("a", data="letmein")
    assert await aqmp.ok("secret-generate", {"id": "b", "size": 48}) == {}
    assert await aqmp.ok("query-secrets") == [
        {"id": "a", "qom-type": "secret", "size": 7, "memory": ARENA_LEVEL},
        {"id": "b", "qom-type": "secret", "size": 48, "memory": ARENA_LEVEL},
    ]


async def test_random_secrets_are_made_inside(aqmp: AsyncClient) -> None:
    """Of the size asked for, different each time, up to the limit."""
    for name in ("a", "b"):
        assert await aqmp.cmd("secret-generate", {"id": name, "size": 32}) == {"return": {}}
    a, b = await aqmp.read("a"), await aqmp.read("b")
    assert len(a) == 32
    assert a != b
    assert await aqmp.cmd("secret-generate", {"id": "c", "size": 1 << 20}) == {"return": {}}
    for size in (0, -1, (1 << 20) + 1):
        assert await aqmp.fail("secret-generate", {"id": "d", "size": size}) == (
            "Parameter 'size' expects a value between 1 and 1048576"
        )
    assert (await aqmp.fail("secret-generate", {"id": "a", "size": 1})).startswith(
        "attempt to add duplicate"
    )
    assert await aqmp.fail("secret-generate", {"id": "1", "size": 1}) == (
        "Parameter 'id' expects an identifier"
    )


async def test_sealing_wants_two_secrets_and_a_key_of_32_bytes(aqmp: AsyncClient) -> None:
    """What is sealed is taken by object-add."""
    await aqmp.add("k", data=KEY, format="base64")
    await aqmp.add("s", data="letmein")
    sealed = await aqmp.ok("secret-seal", {"id": "s", "keyid": "k"})
    assert await aqmp.add("again", keyid="k", format="base64", **sealed) == {"return": {}}
    assert await aqmp.read("again") == b"letmein"
    assert (
        await aqmp.fail("secret-seal", {"id": "nope", "keyid": "k"}) == "No secret with id 'nope'"
    )
    assert (
        await aqmp.fail("secret-seal", {"id": "s", "keyid": "nope"}) == "No secret with id 'nope'"
    )
    assert (
        await aqmp.fail("secret-seal", {"id": "k", "keyid": "s"})
        == "Key should be 32 bytes in length"
    )


# --- descriptors


async def test_descriptors_are_named_and_numbered_as_in_qemu(aqmp: AsyncClient) -> None:
    """add-fd, remove-fd, query-fdsets, getfd, closefd with QEMU's words."""
    none = "No file descriptor supplied via SCM_RIGHTS"
    assert await aqmp.fail("add-fd") == await aqmp.fail("getfd", {"fdname": "a"}) == none
    with open("/dev/null") as file:
        fd = (file.fileno(),)
        assert await aqmp.fail("add-fd", {"fdset-id": -1}, fd) == (
            "Parameter 'fdset-id' expects a non-negative value"
        )
        first = await aqmp.ok("add-fd", None, fd)
        assert first["fdset-id"] == 0
        second = await aqmp.ok("add-fd", {"fdset-id": 5, "opaque": "o"}, fd)
        third = await aqmp.ok("add-fd", {"fdset-id": 5, "opaque": ""}, fd)
        assert (await aqmp.ok("add-fd", {}, fd))["fdset-id"] == 1
        assert (await aqmp.ok("query-fdsets"))[0] == {
            "fdset-id": 5,
            "fds": [{"fd": second["fd"], "opaque": "o"}, {"fd": third["fd"], "opaque": ""}],
        }
        assert [fdset["fdset-id"] for fdset in await aqmp.ok("query-fdsets")] == [5, 1, 0]
        assert await aqmp.cmd("remove-fd", {"fdset-id": 5, "fd": second["fd"]}) == {"return": {}}
        assert await aqmp.fail("remove-fd", {"fdset-id": 5, "fd": second["fd"]}) == (
            f"File descriptor named 'fdset-id:5, fd:{second['fd']}' not found"
        )
        assert await aqmp.cmd("remove-fd", {"fdset-id": 5}) == {"return": {}}
        assert await aqmp.fail("remove-fd", {"fdset-id": 5}) == (
            "File descriptor named 'fdset-id:5' not found"
        )
        assert await aqmp.cmd("getfd", {"fdname": "a"}, fd) == {"return": {}}
        assert await aqmp.cmd("getfd", {"fdname": "a"}, fd) == {"return": {}}
        assert await aqmp.cmd("getfd", {"fdname": ""}, fd) == {"return": {}}
        assert await aqmp.fail("getfd", {"fdname": "1a"}, fd) == (
            "Parameter 'fdname' expects a name not starting with a digit"
        )
        assert await aqmp.fail("getfd", {"fdname": "b"}) == none
    assert await aqmp.cmd("closefd", {"fdname": "a"}) == {"return": {}}
    assert await aqmp.fail("closefd", {"fdname": "a"}) == "File descriptor named 'a' not found"


async def test_a_descriptor_waits_for_the_command_that_takes_it(aqmp: AsyncClient) -> None:
    """It may come before the command, with other commands, with bad ones; only the first counts."""
    with open("/dev/null") as file:
        fd = file.fileno()
        await aqmp.send(b" ", (fd,))
        assert await aqmp.cmd("query-name") == {"return": {}}
        assert (await aqmp.fail("getfd", {"fdname": 5})).startswith("Invalid parameter type")
        assert (await aqmp.ask(b"{]", (fd, fd, fd)))["error"][
            "desc"
        ] == "JSON parse error, expecting value"
        assert await aqmp.cmd("getfd", {"fdname": "a"}) == {"return": {}}
        assert (
            await aqmp.fail("getfd", {"fdname": "b"})
            == "No file descriptor supplied via SCM_RIGHTS"
        )


async def test_a_connection_holds_a_limited_number_of_descriptors(aqmp: AsyncClient) -> None:
    """The limit is named, and closing one makes room."""
    with open("/dev/null") as file:
        fd = (file.fileno(),)
        for number in range(64):
            command = "getfd" if number % 2 else "add-fd"
            assert "return" in await aqmp.cmd(
                command, {"fdname": f"n{number}"} if number % 2 else {}, fd
            )
        words = (
            "This connection holds 64 descriptors, which is the limit; close some with closefd "
            "or remove-fd"
        )
        assert (
            await aqmp.fail("getfd", {"fdname": "more"}, fd)
            == await aqmp.fail("add-fd", None, fd)
            == words
        )
        assert await aqmp.cmd("closefd", {"fdname": "n1"}) == {"return": {}}
        assert await aqmp.cmd("getfd", {"fdname": "more"}, fd) == {"return": {}}


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


async def test_a_secret_comes_from_a_passed_descriptor(aqmp: AsyncClient, tmp_path: Path) -> None:
    """Memfd and file from their start whatever the offset, pipe and socket to their end; both
    spellings; the descriptor's offset stays.
    """
    fd = memfd(b"letmein")
    added = await aqmp.ok("add-fd", {"fdset-id": 3}, (fd,))
    assert await aqmp.add("m1", file="/dev/fdset/3") == {"return": {}}
    assert await aqmp.add("m2", file=f"/dev/fd/{added['fd']}") == {"return": {}}
    assert await aqmp.read("m1") == await aqmp.read("m2") == b"letmein"
    assert os.lseek(fd, 0, os.SEEK_CUR) == 7
    os.close(fd)
    (tmp_path / "f").write_bytes(base64.encodebytes(b"x" * 5000))
    with open(tmp_path / "f") as file:
        await aqmp.ok("add-fd", {"fdset-id": 4}, (file.fileno(),))
    assert await aqmp.add("f", file="/dev/fdset/4", format="base64") == {"return": {}}
    assert await aqmp.read("f") == b"x" * 5000
    source_, sink = os.pipe()
    os.write(sink, b"y" * 20000)
    os.close(sink)
    await aqmp.ok("add-fd", {"fdset-id": 5}, (source_,))
    os.close(source_)
    assert await aqmp.add("p", file="/dev/fdset/5") == {"return": {}}
    assert await aqmp.read("p") == b"y" * 20000
    ours, theirs = socket.socketpair()
    await aqmp.ok("add-fd", {"fdset-id": 6}, (theirs.fileno(),))
    theirs.close()
    ours.sendall(b"from a socket")
    ours.close()
    assert await aqmp.add("s", file="/dev/fdset/6") == {"return": {}}
    assert await aqmp.read("s") == b"from a socket"


async def test_a_descriptor_that_is_no_source_is_refused(aqmp: AsyncClient, tmp_path: Path) -> None:
    """Write-only, O_PATH, directories, devices; of a set, the one that can be read is taken."""
    target = tmp_path / "f"
    target.write_bytes(b"x")
    for number, (path, flags) in enumerate(
        (
            (target, os.O_WRONLY),
            (target, os.O_PATH),
            (tmp_path, os.O_RDONLY),
            (Path("/dev/null"), os.O_RDONLY),
        )
    ):
        fd = os.open(path, flags)
        await aqmp.ok("add-fd", {"fdset-id": number}, (fd,))
        os.close(fd)
    for number in (0, 1):
        assert (await aqmp.add("a", file=f"/dev/fdset/{number}"))["error"]["desc"] == (
            f"Unable to read /dev/fdset/{number}: the descriptor is not open for reading"
        )
    for number in (2, 3):
        assert (await aqmp.add("a", file=f"/dev/fdset/{number}"))["error"]["desc"] == (
            f"Unable to read /dev/fdset/{number}: the descriptor is not a pipe, socket pair, memfd "
            "or file"
        )
    fd = memfd(b"z")
    await aqmp.ok("add-fd", {"fdset-id": 0}, (fd,))
    os.close(fd)
    assert await aqmp.add("a", file="/dev/fdset/0") == {"return": {}}


async def test_descriptors_and_names_belong_to_their_connection(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """Unlike QEMU's, which all monitors share."""
    other = await in_loop.connect()
    fd = memfd(b"letmein")
    added = await aqmp.ok("add-fd", {"fdset-id": 3}, (fd,))
    await aqmp.ok("getfd", {"fdname": "a"}, (fd,))
    os.close(fd)
    assert await other.ok("query-fdsets") == []
    assert (await other.add("x", file=f"/dev/fd/{added['fd']}"))["error"]["desc"].endswith(
        "No such file or directory"
    )
    assert await other.fail("secret-read", {"id": "x", "fdname": "a"}) == (
        "File descriptor named 'a' not found"
    )


@pytest.mark.tuning(source_seconds=0.5)
async def test_a_fifo_holds_up_only_the_connection_that_asked(
    in_loop: Served, aqmp: AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are answered meanwhile; the id is taken but not yet there; the time is limited."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    other = await in_loop.connect()
    await aqmp.send(
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"slow","file":"%s"}}'
        b'{"execute":"query-name","id":"after"}' % fifo.encode()
    )
    while not set(in_loop.tree.reserved):
        await asyncio.sleep(0)
    assert "duplicate" in (await other.add("slow", data="x"))["error"]["desc"]
    assert await other.fail("object-del", {"id": "slow"}) == "object 'slow' not found"
    with open(fifo, "wb") as writer:
        writer.write(b"letmein")
    assert await aqmp.reply() == {"return": {}}
    assert await aqmp.reply() == {"return": {}, "id": "after"}
    assert await aqmp.read("slow") == b"letmein"
    assert (await aqmp.add("never", file=fifo))["error"]["desc"] == (
        f"Unable to read {fifo}: no end of data within 0.5 seconds"
    )
    assert await other.add("never", data="x") == {"return": {}}
    while not in_loop.server.core.threads.idle():
        await asyncio.sleep(0)


async def test_a_connection_that_ends_during_a_read_leaves_nothing(
    in_loop: Served, tmp_path: Path
) -> None:
    """The thread finishes by itself; what it read is wiped."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    client = await in_loop.connect()
    await client.send(
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","file":"%s"}}'
        % fifo.encode()
    )
    while not set(in_loop.tree.reserved):
        await asyncio.sleep(0)
    # Only the server ends this connection: it does not read from it while it waits.
    for session in list(in_loop.server.sessions):
        session.transport.close()
    await asyncio.to_thread(Path(fifo).write_bytes, b"letmein")
    deadline = time.monotonic() + 10
    while not in_loop.server.core.threads.idle() and time.monotonic() < deadline:
        await asyncio.sleep(0)
    while set(in_loop.tree.reserved):
        await asyncio.sleep(0)
    assert len(in_loop.journal) == 0


async def test_a_source_that_is_not_ready_after_all_is_waited_for(
    aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another reader of the same pipe may have been faster."""
    real, calls = os.readv, []

    def readv(fd: int, buffers: list[memoryview]) -> int:
        calls.append(fd)
        if len(calls) == 1:
            raise BlockingIOError
        return real(fd, buffers)

    source_, sink = os.pipe()
    await aqmp.ok("add-fd", None, (source_,))
    os.close(source_)
    os.write(sink, b"letmein")
    os.close(sink)
    monkeypatch.setattr(os, "readv", readv)
    assert await aqmp.add("s", file="/dev/fdset/0") == {"return": {}}
    assert await aqmp.read("s") == b"letmein"
    assert len(calls) > 2


@pytest.mark.tuning(source_seconds=0.05)
async def test_a_read_that_never_returns_is_given_up(
    in_loop: Served, aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a dead network file system, where the thread hangs; the connection goes on."""
    returns = threading.Event()

    def read_path(*_args: object, **_keywords: object) -> object:
        returns.wait(20)
        raise CommandError("never sent")

    monkeypatch.setattr(source, "read_path", read_path)
    assert (await aqmp.add("s", file="/dead/file"))["error"]["desc"] == (
        "Unable to read /dead/file: no end of data within 0.05 seconds"
    )
    assert await aqmp.ok("query-name") == {}
    returns.set()
    while not in_loop.server.core.threads.idle():
        await asyncio.sleep(0)


async def test_what_cannot_be_stored_is_freed(
    in_loop: Served, aqmp: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the journal has no room, or the random source fails."""

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(in_loop.journal, "_write", full)
        assert (await aqmp.add("s", data="x"))["error"]["desc"].startswith("Internal error")
        simple = {"qom-type": "authz-simple", "id": "a", "identity": "x"}
        assert (await aqmp.fail("object-add", simple)).startswith("Internal error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "readv", full)
        assert (await aqmp.fail("secret-generate", {"id": "s", "size": 9})).startswith(
            "Internal error"
        )
    assert in_loop.journal.arena.held == 0
    assert await aqmp.add("s", data="x") == {"return": {}}


# --- the client socket


async def test_the_client_socket_refuses_every_read_and_shows_nothing(
    in_loop: Served, aqmp: AsyncClient
) -> None:
    """The same words whether the secret exists or not; administration is not there at all."""
    await aqmp.add("s", data="letmein")
    client = await in_loop.connect(role="client")
    source_, sink = os.pipe()
    for name in ("s", "nope"):
        assert (await client.cmd("secret-read", {"id": name}, (sink,)))["error"] == {
            "class": "GenericError",
            "desc": f"Reading secret '{name}' is not permitted",
        }
    os.close(sink)
    assert await asyncio.to_thread(os.read, source_, 10) == b""
    os.close(source_)
    assert await client.ok("query-secrets") == []
    for command in ("object-add", "object-del", "qom-list", "qom-get", "secret-seal", "quit"):
        assert await client.fail(command) == f"The command {command} has not been found"
    names = {command["name"] for command in await client.ok("query-commands")}
    assert names == {
        "qmp_capabilities", "query-version", "query-commands", "query-qmp-schema", "add-fd",
        "remove-fd", "query-fdsets", "getfd", "closefd", "secret-read", "query-secrets",
        "query-status", "secret-events", "secret-wrap", "secret-accept", "query-secret-host",
        "secret-fleet-accept", "query-secret-fleet", "query-secret-fleet-missing",
    }  # fmt: skip


async def test_a_list_of_secrets_comes_in_pieces(in_loop: Served, aqmp: AsyncClient) -> None:
    """Each reply is a line of 64 KiB at most, whatever ids there are; what is deleted meanwhile is
    no gap.
    """
    ids = sorted([f"s{number}" for number in range(900)] + [f"{c * 4000}" for c in "abcdefgh"])
    for object_id in ids:
        assert await aqmp.add(object_id, data="x") == {"return": {}}
    await aqmp.ok("object-add", {"qom-type": "authz-simple", "id": "s1a", "identity": "x"})
    pages: list[list[str]] = []
    while not pages or pages[-1]:
        after = {"after": pages[-1][-1]} if pages else {}
        await aqmp.send(json.dumps({"execute": "query-secrets", "arguments": after}).encode())
        line = await aqmp.line()
        assert len(line) <= MAX_REPLY_BYTES
        pages.append([s["id"] for s in json.loads(line)["return"]])
        if len(pages) == 1:
            assert await aqmp.ok("object-del", {"id": pages[0][-1]}) == {}
    assert [i for page in pages for i in page] == ids
    assert await aqmp.ok("query-secrets", {"after": "zzz"}) == []
    assert (await aqmp.ok("query-secrets", {"after": "s899"}))[0]["id"] == "s9"
    lines = await aqmp.ok("human-monitor-command", {"command-line": "info name"})
    assert lines == ""


async def test_a_reply_of_more_than_the_limit_is_an_error_that_says_so(aqmp: AsyncClient) -> None:
    """At the limit it comes, with one byte more it does not."""
    for number in range(40):
        await aqmp.add(f"{'x' * 1500}{number:02}", data="x")
    await aqmp.ok("qom-list", {"path": "/objects"})
    for number in range(40, 60):
        await aqmp.add(f"{'x' * 1500}{number:02}", data="x")
    words = await aqmp.fail("qom-list", {"path": "/objects"})
    assert words.startswith("The reply has 9")
    assert words.endswith(f"more than the limit of {MAX_REPLY_BYTES} bytes")
    add = b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s%d","data":""}}\n'
    for start in range(0, CHILDREN_PER_REPLY, 400):
        await aqmp.send(b"".join(add % n for n in range(start, start + 400)))
        assert all([await aqmp.reply() == {"return": {}} for _ in range(400)])
    assert await aqmp.fail("qom-list", {"path": "/objects"}) == (
        f"Path '/objects' has {CHILDREN_PER_REPLY + 60} children, more than the limit of "
        f"{CHILDREN_PER_REPLY}; query-secrets lists any number of secrets in pieces"
    )
    empty = len('{"return": ""}\r\n')
    await aqmp.add("s", data="x")
    for size in (MAX_REPLY_BYTES - empty, MAX_REPLY_BYTES - empty + 1):
        await aqmp.ok("qom-set", {"path": "s", "property": "iv", "value": "i" * size})
        await aqmp.send(b'{"execute": "qom-get", "arguments": {"path": "s", "property": "iv"}}')
        line = await aqmp.line()
        assert len(line) == MAX_REPLY_BYTES or b"more than the limit" in line
    assert b"more than the limit" in line


async def test_an_id_and_words_of_unusual_length_are_limited(aqmp: AsyncClient) -> None:
    """So that no reply is longer than a line may be."""
    quotes = len('""')
    reply = await aqmp.ask(
        b'{"execute": "query-name", "id": "%s"}' % (b"x" * (MAX_ID_BYTES - quotes))
    )
    assert len(reply["id"]) == MAX_ID_BYTES - quotes
    reply = await aqmp.ask(b'{"execute": "query-name", "id": "%s"}' % (b"x" * (MAX_ID_BYTES - 1)))
    assert reply["error"]["desc"] == "QMP input member 'id' is longer than the limit of 16384 bytes"
    for character in ("x", "\U0001f600"):
        text = json.dumps({"execute": character * 60_000, "id": "y" * (MAX_ID_BYTES - quotes)})
        await aqmp.send(text.encode())
        line = await aqmp.line()
        assert len(line) <= MAX_REPLY_BYTES
        assert json.loads(line)["error"]["desc"].startswith(f"The command {character}")
    assert await aqmp.fail("x" * 40_000) == f"The command {'x' * 40_000} has not been found"


async def test_of_very_many_unexpected_arguments_one_is_named(aqmp: AsyncClient) -> None:
    """Without looking for the one that QEMU would name, which may take long."""
    names = {f"n{number}": 1 for number in range(2000)}
    assert await aqmp.fail("query-name", names) == "Parameter 'n0' is unexpected"


async def test_keys_need_the_right_to_name_files(in_loop: Served, aqmp: AsyncClient) -> None:
    """The daemon reads them with its own rights, as it does files."""
    source_ = next(iter(in_loop.server.sessions)).monitor.loading.sources
    source_._trusted = False
    assert (
        await aqmp.fail("object-add", {"qom-type": "secret_keyring", "id": "k", "serial": 5})
        == "Only uid 0 and the daemon's own uid may name a key"
    )
    assert (
        await aqmp.fail("object-add", {"qom-type": "authz-listfile", "id": "k", "filename": "/x"})
        == "Only uid 0 and the daemon's own uid may name a file"
    )
    source_._trusted = True
    assert "Required key not available" in await aqmp.fail(
        "object-add", {"qom-type": "secret_keyring", "id": "k", "serial": 5}
    )
