# SPDX-License-Identifier: LGPL-2.1-or-later
"""The commands on a running server: objects, properties, descriptors, hand-over, both sockets."""

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
from tests.support.daemon import Daemon
from tests.support.needs import ARENA_LEVEL
from tests.support.qmp import Client

KEY = base64.b64encode(bytes(range(32))).decode()
IV = base64.b64encode(bytes(range(16))).decode()


def encrypt(content: bytes) -> bytes:
    """AES-256-CBC with PKCS#7 padding under KEY and IV, by other code."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    padding = 16 - len(content) % 16
    encryptor = Cipher(algorithms.AES(bytes(range(32))), modes.CBC(bytes(range(16)))).encryptor()
    return encryptor.update(content + bytes([padding]) * padding) + encryptor.finalize()


# --- negotiation and general commands


def test_nothing_but_negotiation_is_answered_before_it(daemon: Daemon) -> None:
    """QEMU's words; malformed messages get their usual error."""
    client = daemon.connect(negotiate=False)
    greeting = client.reply()
    assert greeting["QMP"]["version"]["qemu"] == {"major": 10, "minor": 0, "micro": 0}
    assert greeting["QMP"]["version"]["package"] == "secretd test"
    assert greeting["QMP"]["capabilities"] == ["oob"]
    words = "Expecting capabilities negotiation with 'qmp_capabilities'"
    for command in ("query-version", "nope"):
        reply = client.cmd(command)
        assert reply == {"error": {"class": "CommandNotFound", "desc": words}}
    assert client.ask(b'{"execute":"query-version","id":7}')["id"] == 7
    assert client.ask(b"{]")["error"]["desc"] == "JSON parse error, expecting value"
    assert client.fail("qmp_capabilities", {"enable": ["nope"]}) == (
        "Parameter 'null' does not accept value 'nope'"
    )
    assert client.cmd("qmp_capabilities", {"enable": []}) == {"return": {}}
    assert client.cmd("qmp_capabilities") == {
        "error": {
            "class": "CommandNotFound",
            "desc": "Capabilities negotiation is already complete, command ignored",
        }
    }


def test_general_commands(qmp: Client) -> None:
    """Version, name, the list of commands, and what is no command."""
    assert qmp.ok("query-version") == qmp.greeting["QMP"]["version"]
    assert qmp.ok("query-name") == {}
    names = [command["name"] for command in qmp.ok("query-commands")]
    assert {"object-add", "secret-read", "query-commands", "qmp_capabilities"} <= set(names)
    assert qmp.cmd("nope") == {
        "error": {"class": "CommandNotFound", "desc": "The command nope has not been found"}
    }
    assert qmp.ask(b'{"execute":"query-name","id":{"b":1,"a":["x",null]}}') == {
        "return": {},
        "id": {"b": 1, "a": ["x", None]},
    }


# --- objects


def test_secrets_are_added_in_every_encoding(qmp: Client, tmp_path: Path) -> None:
    """Data or file, raw or base64, in clear or encrypted, chains of keys."""
    raw, b64, aes = tmp_path / "raw", tmp_path / "b64", tmp_path / "aes"
    raw.write_bytes(b"letmein\0\xff")
    b64.write_bytes(base64.encodebytes(b"letmein\0\xff"))
    aes.write_bytes(encrypt(b"letmein\0\xff"))
    assert qmp.add("data", data="letmein") == {"return": {}}
    assert qmp.read("data") == b"letmein"
    assert qmp.add("escaped", data='l\u00e9t"m\\e\0in') == {"return": {}}
    assert qmp.read("escaped") == 'l\u00e9t"m\\e'.encode() + b"\xc0\x80in"
    assert qmp.add("b64", data="bGV0\nbWVpbg==", format="base64") == {"return": {}}
    assert qmp.read("b64") == b"letmein"
    assert qmp.add("empty", data="") == {"return": {}}
    assert qmp.read("empty") == b""
    assert qmp.add("file", file=str(raw)) == {"return": {}}
    assert qmp.add("file64", file=str(b64), format="base64") == {"return": {}}
    assert qmp.add("k", data=KEY, format="base64") == {"return": {}}
    assert qmp.add("aes", file=str(aes), keyid="k", iv=IV) == {"return": {}}
    sealed = base64.encodebytes(encrypt(b"letmein\0\xff")).decode()
    assert qmp.add("aes64", data=sealed, keyid="k", iv=IV, format="base64") == {"return": {}}
    for name in ("file", "file64", "aes", "aes64"):
        assert qmp.read(name) == b"letmein\0\xff", name
    chained = qmp.ok("secret-seal", {"id": "k", "keyid": "k"})
    assert qmp.add("k2", keyid="k", format="base64", **chained) == {"return": {}}
    assert qmp.cmd("object-del", {"id": "k"}) == {"return": {}}
    assert qmp.read("k2") == bytes(range(32))
    assert qmp.add("plain-iv", data="x", iv="rubbish") == {"return": {}}


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
         "Unable to read /dev/fdset/7: Failed to open file “/dev/fdset/7”: No such file or directory"),
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
def test_a_failed_add_says_why_and_leaves_nothing(
    daemon: Daemon, qmp: Client, options: dict[str, str], words: str
) -> None:
    """QEMU's words, and the same objects and memory as before."""
    qmp.add("k", data=KEY, format="base64")
    qmp.add("short", data="x")
    held = daemon.call(lambda: (daemon.journal.arena.held, daemon.scratch.held))
    assert qmp.add("new", **options)["error"] == {"class": "GenericError", "desc": words}
    assert [secret["id"] for secret in qmp.ok("query-secrets")] == ["k", "short"]
    assert daemon.call(lambda: (daemon.journal.arena.held, daemon.scratch.held)) == held


def test_ids_are_checked(qmp: Client) -> None:
    """Well-formed, not too long, not taken; `type` is taken."""
    for bad in ("", "1a", "_a", "a b", "a/b", "é"):
        assert qmp.fail("object-add", {"qom-type": "secret", "id": bad, "data": "x"}) == (
            "Parameter 'id' expects an identifier"
        )
    assert qmp.add("a" * 4096, data="x") == {"return": {}}
    assert qmp.add("a" * 4097, data="x")["error"]["desc"] == (
        "Parameter 'id' is longer than the limit of 4096 bytes"
    )
    assert qmp.add("a.b-c_d", data="x") == {"return": {}}
    for taken in ("a.b-c_d", "type"):
        assert qmp.add(taken, data="x")["error"]["desc"] == (
            f"attempt to add duplicate property '{taken}' to object (type 'container')"
        )
    assert qmp.fail("object-del", {"id": "nope"}) == "object 'nope' not found"
    assert qmp.cmd("object-del", {"id": "a.b-c_d"}) == {"return": {}}
    assert qmp.add("a.b-c_d", data="x") == {"return": {}}


def test_a_secret_has_a_largest_size(qmp: Client, tmp_path: Path) -> None:
    """1 MiB is taken, one byte more is refused; a source that could hold no secret is not read
    on.
    """
    big = tmp_path / "big"
    big.write_bytes(b"x" * (1 << 20))
    assert qmp.add("fits", file=str(big)) == {"return": {}}
    assert qmp.read("fits") == b"x" * (1 << 20)
    with open(os.memfd_create("x"), "w+b") as memfd:
        qmp.ok("secret-read", {"id": "fits", "format": "base64"}, (memfd.fileno(),))
        assert memfd.read() == base64.b64encode(b"x" * (1 << 20))
    words = "The secret has 1048577 bytes, more than the limit of 1048576 bytes"
    big.write_bytes(b"x" * ((1 << 20) + 1))
    assert qmp.add("big", file=str(big))["error"]["desc"] == words
    big.write_bytes(base64.b64encode(b"x" * ((1 << 20) + 1)))
    assert qmp.add("big", file=str(big), format="base64")["error"]["desc"] == words
    big.write_bytes(b"x" * ((2 << 20) + 1))
    assert qmp.add("big", file=str(big))["error"]["desc"] == (
        f"Unable to read {big}: larger than the limit of 2097152 bytes"
    )
    assert qmp.add("zero", file="/dev/zero")["error"]["desc"] == (
        "Unable to read /dev/zero: larger than the limit of 2097152 bytes"
    )


def test_properties_read_and_change_as_in_qemu_but_for_data(qmp: Client) -> None:
    """What the client gave is returned, data never; what was loaded stays."""
    qmp.add("s", data="letmein", iv="i")

    def get(name: str, path: str = "s") -> dict:
        return qmp.cmd("qom-get", {"path": path, "property": name})

    def set_(name: str, value: object, path: str = "s") -> dict:
        return qmp.cmd("qom-set", {"path": path, "property": name, "value": value})

    assert get("data")["error"]["desc"] == "Property 'secret.data' is not readable"
    assert [get(name)["return"] for name in ("type", "format", "keyid", "iv", "file")] == [
        "secret", "raw", "", "i", "",
    ]  # fmt: skip
    assert get("nope")["error"]["desc"] == "Property 'secret.nope' not found"
    for name, value in (("format", "base64"), ("keyid", "k"), ("iv", ""), ("file", "/x")):
        assert set_(name, value) == {"return": {}}
        assert get(name)["return"] == value
    assert set_("data", "other") == {"return": {}}
    assert qmp.read("s") == b"letmein"
    assert set_("data", 5)["error"]["desc"] == "Invalid parameter type for 'data', expected: string"
    assert set_("format", 5)["error"]["desc"] == (
        "Invalid parameter type for 'format', expected: string"
    )
    assert set_("format", "hex")["error"]["desc"] == (
        "Parameter 'format' does not accept value 'hex'"
    )
    assert set_("type", "x")["error"]["desc"] == "Property 'secret.type' is not writable"
    assert set_("nope", None)["error"]["desc"] == "Property 'secret.nope' not found"
    assert get("type", "/objects")["return"] == "container"
    assert get("objects", "/")["return"] == "/objects"
    assert get("s", "/objects")["return"] == "/objects/s"
    assert get("x", "/")["error"]["desc"] == "Property 'container.x' not found"
    assert set_("s", "x", "/objects")["error"]["desc"] == "Property 'container.s' is not writable"
    assert set_("x", "x", "/objects")["error"]["desc"] == "Property 'container.x' not found"
    for reply in (get("type", "/nope"), set_("data", "x", "/nope")):
        assert reply["error"] == {"class": "DeviceNotFound", "desc": "Device '/nope' not found"}


def test_paths_lead_where_they_do_in_qemu(qmp: Client) -> None:
    """Absolute, partial, with slashes too many, ambiguous."""
    qmp.add("s", data="x")
    secret = ["type", "iv", "keyid", "format", "file", "data"]

    def names(path: str) -> list[str]:
        return [entry["name"] for entry in qmp.ok("qom-list", {"path": path})]

    assert qmp.ok("qom-list", {"path": "/objects"}) == [
        {"name": "type", "type": "string"},
        {"name": "s", "type": "child<secret>"},
    ]
    assert names("/") == names("//") == ["type", "objects"]
    for path in ("/objects/s", "objects/s", "s", "s/", "//objects//s", "/objects/s/"):
        assert names(path) == secret
    for path in ("/s", "nope", "/objects/nope", "s/type", "."):
        assert qmp.cmd("qom-list", {"path": path})["error"] == {
            "class": "DeviceNotFound",
            "desc": f"Device '{path}' not found",
        }
    assert qmp.fail("qom-list", {"path": ""}) == "Path '' is ambiguous"
    assert qmp.fail("qom-get", {"path": "", "property": "type"}) == "Device '' not found"
    qmp.add("objects", data="x")
    assert qmp.fail("qom-list", {"path": "objects"}) == "Path 'objects' is ambiguous"


def test_types_are_listed(qmp: Client) -> None:
    """With their parents, abstract ones on request, by what they implement."""
    assert [entry["name"] for entry in qmp.ok("qom-list-types")] == [
        "container", "secret", "secret_keyring", "authz-list-file", "secret-grant", "authz-simple",
        "authz-list",
    ]  # fmt: skip
    abstract = qmp.ok("qom-list-types", {"abstract": True})
    assert {"abstract": True, "name": "secret_common", "parent": "object"} in abstract
    assert {"abstract": True, "name": "object"} in abstract
    assert qmp.ok("qom-list-types", {"implements": "secret_common"}) == [
        {"name": "secret", "parent": "secret_common"},
        {"name": "secret_keyring", "parent": "secret_common"},
    ]
    assert qmp.ok("qom-list-types", {"implements": "nope"}) == []
    assert qmp.ok("qom-list-properties", {"typename": "secret"})[3] == {
        "name": "format",
        "type": "QCryptoSecretFormat",
    }
    assert qmp.fail("qom-list-properties", {"typename": "interface"}) == (
        "Parameter 'typename' expects a QOM type"
    )
    assert qmp.cmd("qom-list-properties", {"typename": "nope"})["error"] == {
        "class": "DeviceNotFound",
        "desc": "Class 'nope' not found",
    }


def test_secrets_are_listed_with_size_and_protection(qmp: Client) -> None:
    """query-secrets, whose words are ours."""
    qmp.add("a", data="letmein")
    assert qmp.ok("secret-generate", {"id": "b", "size": 48}) == {}
    assert qmp.ok("query-secrets") == [
        {"id": "a", "qom-type": "secret", "size": 7, "memory": ARENA_LEVEL},
        {"id": "b", "qom-type": "secret", "size": 48, "memory": ARENA_LEVEL},
    ]


def test_random_secrets_are_made_inside(qmp: Client) -> None:
    """Of the size asked for, different each time, up to the limit."""
    for name in ("a", "b"):
        assert qmp.cmd("secret-generate", {"id": name, "size": 32}) == {"return": {}}
    a, b = qmp.read("a"), qmp.read("b")
    assert len(a) == 32
    assert a != b
    assert qmp.cmd("secret-generate", {"id": "c", "size": 1 << 20}) == {"return": {}}
    for size in (0, -1, (1 << 20) + 1):
        assert qmp.fail("secret-generate", {"id": "d", "size": size}) == (
            "Parameter 'size' expects a value between 1 and 1048576"
        )
    assert qmp.fail("secret-generate", {"id": "a", "size": 1}).startswith(
        "attempt to add duplicate"
    )
    assert qmp.fail("secret-generate", {"id": "1", "size": 1}) == (
        "Parameter 'id' expects an identifier"
    )


def test_sealing_wants_two_secrets_and_a_key_of_32_bytes(qmp: Client) -> None:
    """What is sealed is taken by object-add."""
    qmp.add("k", data=KEY, format="base64")
    qmp.add("s", data="letmein")
    sealed = qmp.ok("secret-seal", {"id": "s", "keyid": "k"})
    assert qmp.add("again", keyid="k", format="base64", **sealed) == {"return": {}}
    assert qmp.read("again") == b"letmein"
    assert qmp.fail("secret-seal", {"id": "nope", "keyid": "k"}) == "No secret with id 'nope'"
    assert qmp.fail("secret-seal", {"id": "s", "keyid": "nope"}) == "No secret with id 'nope'"
    assert qmp.fail("secret-seal", {"id": "k", "keyid": "s"}) == "Key should be 32 bytes in length"


# --- descriptors


def test_descriptors_are_named_and_numbered_as_in_qemu(qmp: Client) -> None:
    """add-fd, remove-fd, query-fdsets, getfd, closefd with QEMU's words."""
    none = "No file descriptor supplied via SCM_RIGHTS"
    assert qmp.fail("add-fd") == qmp.fail("getfd", {"fdname": "a"}) == none
    with open("/dev/null") as file:
        fd = (file.fileno(),)
        assert qmp.fail("add-fd", {"fdset-id": -1}, fd) == (
            "Parameter 'fdset-id' expects a non-negative value"
        )
        first = qmp.ok("add-fd", None, fd)
        assert first["fdset-id"] == 0
        second = qmp.ok("add-fd", {"fdset-id": 5, "opaque": "o"}, fd)
        third = qmp.ok("add-fd", {"fdset-id": 5, "opaque": ""}, fd)
        assert qmp.ok("add-fd", {}, fd)["fdset-id"] == 1
        assert qmp.ok("query-fdsets")[0] == {
            "fdset-id": 5,
            "fds": [{"fd": second["fd"], "opaque": "o"}, {"fd": third["fd"], "opaque": ""}],
        }
        assert [fdset["fdset-id"] for fdset in qmp.ok("query-fdsets")] == [5, 1, 0]
        assert qmp.cmd("remove-fd", {"fdset-id": 5, "fd": second["fd"]}) == {"return": {}}
        assert qmp.fail("remove-fd", {"fdset-id": 5, "fd": second["fd"]}) == (
            f"File descriptor named 'fdset-id:5, fd:{second['fd']}' not found"
        )
        assert qmp.cmd("remove-fd", {"fdset-id": 5}) == {"return": {}}
        assert qmp.fail("remove-fd", {"fdset-id": 5}) == (
            "File descriptor named 'fdset-id:5' not found"
        )
        assert qmp.cmd("getfd", {"fdname": "a"}, fd) == {"return": {}}
        assert qmp.cmd("getfd", {"fdname": "a"}, fd) == {"return": {}}
        assert qmp.cmd("getfd", {"fdname": ""}, fd) == {"return": {}}
        assert qmp.fail("getfd", {"fdname": "1a"}, fd) == (
            "Parameter 'fdname' expects a name not starting with a digit"
        )
        assert qmp.fail("getfd", {"fdname": "b"}) == none
    assert qmp.cmd("closefd", {"fdname": "a"}) == {"return": {}}
    assert qmp.fail("closefd", {"fdname": "a"}) == "File descriptor named 'a' not found"


def test_a_descriptor_waits_for_the_command_that_takes_it(qmp: Client) -> None:
    """It may come before the command, with other commands, with bad ones; only the first counts."""
    with open("/dev/null") as file:
        fd = file.fileno()
        qmp.send(b" ", (fd,))
        assert qmp.cmd("query-name") == {"return": {}}
        assert qmp.fail("getfd", {"fdname": 5}).startswith("Invalid parameter type")
        assert qmp.ask(b"{]", (fd, fd, fd))["error"]["desc"] == "JSON parse error, expecting value"
        assert qmp.cmd("getfd", {"fdname": "a"}) == {"return": {}}
        assert qmp.fail("getfd", {"fdname": "b"}) == "No file descriptor supplied via SCM_RIGHTS"


def test_a_connection_holds_a_limited_number_of_descriptors(qmp: Client) -> None:
    """The limit is named, and closing one makes room."""
    with open("/dev/null") as file:
        fd = (file.fileno(),)
        for number in range(64):
            command = "getfd" if number % 2 else "add-fd"
            assert "return" in qmp.cmd(command, {"fdname": f"n{number}"} if number % 2 else {}, fd)
        words = (
            "This connection holds 64 descriptors, which is the limit; close some with closefd "
            "or remove-fd"
        )
        assert qmp.fail("getfd", {"fdname": "more"}, fd) == qmp.fail("add-fd", None, fd) == words
        assert qmp.cmd("closefd", {"fdname": "n1"}) == {"return": {}}
        assert qmp.cmd("getfd", {"fdname": "more"}, fd) == {"return": {}}


def memfd(content: bytes) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def test_a_secret_comes_from_a_passed_descriptor(qmp: Client, tmp_path: Path) -> None:
    """Memfd and file from their start whatever the offset, pipe and socket to their end; both
    spellings; the descriptor's offset stays.
    """
    fd = memfd(b"letmein")
    added = qmp.ok("add-fd", {"fdset-id": 3}, (fd,))
    assert qmp.add("m1", file="/dev/fdset/3") == {"return": {}}
    assert qmp.add("m2", file=f"/dev/fd/{added['fd']}") == {"return": {}}
    assert qmp.read("m1") == qmp.read("m2") == b"letmein"
    assert os.lseek(fd, 0, os.SEEK_CUR) == 7
    os.close(fd)
    (tmp_path / "f").write_bytes(base64.encodebytes(b"x" * 5000))
    with open(tmp_path / "f") as file:
        qmp.ok("add-fd", {"fdset-id": 4}, (file.fileno(),))
    assert qmp.add("f", file="/dev/fdset/4", format="base64") == {"return": {}}
    assert qmp.read("f") == b"x" * 5000
    source_, sink = os.pipe()
    os.write(sink, b"y" * 20000)
    os.close(sink)
    qmp.ok("add-fd", {"fdset-id": 5}, (source_,))
    os.close(source_)
    assert qmp.add("p", file="/dev/fdset/5") == {"return": {}}
    assert qmp.read("p") == b"y" * 20000
    ours, theirs = socket.socketpair()
    qmp.ok("add-fd", {"fdset-id": 6}, (theirs.fileno(),))
    theirs.close()
    ours.sendall(b"from a socket")
    ours.close()
    assert qmp.add("s", file="/dev/fdset/6") == {"return": {}}
    assert qmp.read("s") == b"from a socket"


def test_a_descriptor_that_is_no_source_is_refused(qmp: Client, tmp_path: Path) -> None:
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
        qmp.ok("add-fd", {"fdset-id": number}, (fd,))
        os.close(fd)
    for number in (0, 1):
        assert qmp.add("a", file=f"/dev/fdset/{number}")["error"]["desc"] == (
            f"Unable to read /dev/fdset/{number}: the descriptor is not open for reading"
        )
    for number in (2, 3):
        assert qmp.add("a", file=f"/dev/fdset/{number}")["error"]["desc"] == (
            f"Unable to read /dev/fdset/{number}: the descriptor is not a pipe, socket pair, memfd "
            "or file"
        )
    fd = memfd(b"z")
    qmp.ok("add-fd", {"fdset-id": 0}, (fd,))
    os.close(fd)
    assert qmp.add("a", file="/dev/fdset/0") == {"return": {}}


def test_descriptors_and_names_belong_to_their_connection(daemon: Daemon, qmp: Client) -> None:
    """Unlike QEMU's, which all monitors share."""
    other = daemon.connect()
    fd = memfd(b"letmein")
    added = qmp.ok("add-fd", {"fdset-id": 3}, (fd,))
    qmp.ok("getfd", {"fdname": "a"}, (fd,))
    os.close(fd)
    assert other.ok("query-fdsets") == []
    assert other.add("x", file=f"/dev/fd/{added['fd']}")["error"]["desc"].endswith(
        "No such file or directory"
    )
    assert other.fail("secret-read", {"id": "x", "fdname": "a"}) == (
        "File descriptor named 'a' not found"
    )


@pytest.mark.tuning(source_seconds=0.05)
def test_a_fifo_holds_up_only_the_connection_that_asked(
    daemon: Daemon, qmp: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are answered meanwhile; the id is taken but not yet there; the time is limited."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    other = daemon.connect()
    qmp.send(
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"slow","file":"%s"}}'
        b'{"execute":"query-name","id":"after"}' % fifo.encode()
    )
    while not daemon.call(lambda: set(daemon.tree._being_loaded)):
        pass
    assert "duplicate" in other.add("slow", data="x")["error"]["desc"]
    assert other.fail("object-del", {"id": "slow"}) == "object 'slow' not found"
    with open(fifo, "wb") as writer:
        writer.write(b"letmein")
    assert qmp.reply() == {"return": {}}
    assert qmp.reply() == {"return": {}, "id": "after"}
    assert qmp.read("slow") == b"letmein"
    assert qmp.add("never", file=fifo)["error"]["desc"] == (
        f"Unable to read {fifo}: no end of data within 0.05 seconds"
    )
    assert other.add("never", data="x") == {"return": {}}
    while not daemon.server.core.threads.idle():
        pass


def test_a_connection_that_ends_while_its_source_is_read_leaves_nothing(
    daemon: Daemon, tmp_path: Path
) -> None:
    """The thread finishes by itself; what it read is wiped."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    client = daemon.connect()
    client.send(
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","file":"%s"}}'
        % fifo.encode()
    )
    while not daemon.call(lambda: set(daemon.tree._being_loaded)):
        pass
    # Only the server ends this connection: it does not read from it while it waits.
    daemon.call(lambda: [session.transport.close() for session in list(daemon.server.sessions)])
    with open(fifo, "wb") as writer:
        writer.write(b"letmein")
    deadline = time.monotonic() + 10
    while not daemon.server.core.threads.idle() and time.monotonic() < deadline:
        pass
    while daemon.call(lambda: set(daemon.tree._being_loaded)):
        pass
    assert daemon.call(lambda: len(daemon.journal)) == 0


def test_a_source_that_is_not_ready_after_all_is_waited_for(
    qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another reader of the same pipe may have been faster."""
    real, calls = os.readv, []

    def readv(fd: int, buffers: list[memoryview]) -> int:
        calls.append(fd)
        if len(calls) == 1:
            raise BlockingIOError
        return real(fd, buffers)

    source_, sink = os.pipe()
    qmp.ok("add-fd", None, (source_,))
    os.close(source_)
    os.write(sink, b"letmein")
    os.close(sink)
    monkeypatch.setattr(os, "readv", readv)
    assert qmp.add("s", file="/dev/fdset/0") == {"return": {}}
    assert qmp.read("s") == b"letmein"
    assert len(calls) > 2


@pytest.mark.tuning(source_seconds=0.05)
def test_a_read_that_never_returns_is_given_up(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a dead network file system, where the thread hangs; the connection goes on."""
    returns = threading.Event()

    def read_path(*_args: object, **_keywords: object) -> object:
        returns.wait(20)
        raise CommandError("nobody hears this")

    monkeypatch.setattr(source, "read_path", read_path)
    assert qmp.add("s", file="/dead/file")["error"]["desc"] == (
        "Unable to read /dead/file: no end of data within 0.05 seconds"
    )
    assert qmp.ok("query-name") == {}
    returns.set()
    while not daemon.server.core.threads.idle():
        pass


def test_what_cannot_be_stored_is_freed(
    daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the journal has no room, or the random source fails."""

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.journal, "_append", full)
        assert qmp.add("s", data="x")["error"]["desc"].startswith("Internal error")
        simple = {"qom-type": "authz-simple", "id": "a", "identity": "x"}
        assert qmp.fail("object-add", simple).startswith("Internal error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "readv", full)
        assert qmp.fail("secret-generate", {"id": "s", "size": 9}).startswith("Internal error")
    assert daemon.call(lambda: daemon.journal.arena.held) == 0
    assert qmp.add("s", data="x") == {"return": {}}


# --- the client socket


def test_the_client_socket_refuses_every_read_and_shows_nothing(
    daemon: Daemon, qmp: Client
) -> None:
    """The same words whether the secret exists or not; administration is not there at all."""
    qmp.add("s", data="letmein")
    client = daemon.connect(role="client")
    source_, sink = os.pipe()
    for name in ("s", "nope"):
        assert client.cmd("secret-read", {"id": name}, (sink,))["error"] == {
            "class": "GenericError",
            "desc": f"Reading secret '{name}' is not permitted",
        }
    os.close(sink)
    assert os.read(source_, 10) == b""
    os.close(source_)
    assert client.ok("query-secrets") == []
    for command in ("object-add", "object-del", "qom-list", "qom-get", "secret-seal", "quit"):
        assert client.fail(command) == f"The command {command} has not been found"
    names = {command["name"] for command in client.ok("query-commands")}
    assert names == {
        "qmp_capabilities", "query-version", "query-commands", "query-qmp-schema", "add-fd",
        "remove-fd", "query-fdsets", "getfd", "closefd", "secret-read", "query-secrets",
        "query-status", "secret-events",
    }  # fmt: skip


def test_a_list_of_secrets_comes_in_pieces(daemon: Daemon, qmp: Client) -> None:
    """Each reply is a line of 64 KiB at most, whatever ids there are; what is deleted meanwhile is
    no gap.
    """
    ids = sorted([f"s{number}" for number in range(900)] + [f"{c * 4000}" for c in "abcdefgh"])
    for object_id in ids:
        assert qmp.add(object_id, data="x") == {"return": {}}
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": "s1a", "identity": "x"})
    pages: list[list[str]] = []
    while not pages or pages[-1]:
        after = {"after": pages[-1][-1]} if pages else {}
        qmp.send(json.dumps({"execute": "query-secrets", "arguments": after}).encode())
        line = qmp.line()
        assert len(line) <= MAX_REPLY_BYTES
        pages.append([s["id"] for s in json.loads(line)["return"]])
        if len(pages) == 1:
            assert qmp.ok("object-del", {"id": pages[0][-1]}) == {}
    assert [i for page in pages for i in page] == ids
    assert qmp.ok("query-secrets", {"after": "zzz"}) == []
    assert qmp.ok("query-secrets", {"after": "s899"})[0]["id"] == "s9"
    lines = qmp.ok("human-monitor-command", {"command-line": "info name"})
    assert lines == ""


def test_a_reply_of_more_than_the_limit_is_an_error_that_says_so(qmp: Client) -> None:
    """At the limit it comes, with one byte more it does not."""
    for number in range(40):
        qmp.add(f"{'x' * 1500}{number:02}", data="x")
    qmp.ok("qom-list", {"path": "/objects"})
    for number in range(40, 60):
        qmp.add(f"{'x' * 1500}{number:02}", data="x")
    words = qmp.fail("qom-list", {"path": "/objects"})
    assert words.startswith("The reply has 9")
    assert words.endswith(f"more than the limit of {MAX_REPLY_BYTES} bytes")
    add = b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s%d","data":""}}\n'
    for start in range(0, CHILDREN_PER_REPLY, 400):
        qmp.send(b"".join(add % n for n in range(start, start + 400)))
        assert all(qmp.reply() == {"return": {}} for _ in range(400))
    assert qmp.fail("qom-list", {"path": "/objects"}) == (
        f"Path '/objects' has {CHILDREN_PER_REPLY + 60} children, more than the limit of "
        f"{CHILDREN_PER_REPLY}; query-secrets lists any number of secrets in pieces"
    )
    empty = len('{"return": ""}\r\n')
    qmp.add("s", data="x")
    for size in (MAX_REPLY_BYTES - empty, MAX_REPLY_BYTES - empty + 1):
        qmp.ok("qom-set", {"path": "s", "property": "iv", "value": "i" * size})
        qmp.send(b'{"execute": "qom-get", "arguments": {"path": "s", "property": "iv"}}')
        line = qmp.line()
        assert len(line) == MAX_REPLY_BYTES or b"more than the limit" in line
    assert b"more than the limit" in line


def test_an_id_and_words_of_unusual_length_are_limited(qmp: Client) -> None:
    """So that no reply is longer than a line may be."""
    quotes = len('""')
    reply = qmp.ask(b'{"execute": "query-name", "id": "%s"}' % (b"x" * (MAX_ID_BYTES - quotes)))
    assert len(reply["id"]) == MAX_ID_BYTES - quotes
    reply = qmp.ask(b'{"execute": "query-name", "id": "%s"}' % (b"x" * (MAX_ID_BYTES - 1)))
    assert reply["error"]["desc"] == "QMP input member 'id' is longer than the limit of 16384 bytes"
    for character in ("x", "\U0001f600"):
        text = json.dumps({"execute": character * 60_000, "id": "y" * (MAX_ID_BYTES - quotes)})
        qmp.send(text.encode())
        line = qmp.line()
        assert len(line) <= MAX_REPLY_BYTES
        assert json.loads(line)["error"]["desc"].startswith(f"The command {character}")
    assert qmp.fail("x" * 40_000) == f"The command {'x' * 40_000} has not been found"


def test_of_very_many_unexpected_arguments_one_is_named(qmp: Client) -> None:
    """Without looking for the one that QEMU would name, which may take long."""
    names = {f"n{number}": 1 for number in range(2000)}
    assert qmp.fail("query-name", names) == "Parameter 'n0' is unexpected"


def test_keys_are_for_who_may_name_files(daemon: Daemon, qmp: Client) -> None:
    """The daemon reads them with its own rights, as it does files."""
    source_ = daemon.call(lambda: next(iter(daemon.server.sessions)).monitor.loading.sources)
    source_._trusted = False
    assert (
        qmp.fail("object-add", {"qom-type": "secret_keyring", "id": "k", "serial": 5})
        == "Only uid 0 and the daemon's own uid may name a key"
    )
    assert (
        qmp.fail("object-add", {"qom-type": "authz-listfile", "id": "k", "filename": "/x"})
        == "Only uid 0 and the daemon's own uid may name a file"
    )
    source_._trusted = True
    assert "Required key not available" in qmp.fail(
        "object-add", {"qom-type": "secret_keyring", "id": "k", "serial": 5}
    )
