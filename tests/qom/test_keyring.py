# SPDX-License-Identifier: LGPL-2.1-or-later
"""secret_keyring beyond what the transcripts show: what happens to keys meanwhile, and odd keys."""

import base64
from collections.abc import Iterator

import pytest

from secretd.linux import keyctl as kernel_keyctl
from tests.support.needs import need_program
from tests.support.qmp import Client
from tests.support.transcript import add_key, keyctl


@pytest.fixture
def key() -> Iterator[int]:
    """A key of the user's keyring."""
    need_program("keyctl")
    serial = add_key(b"letmein")
    yield serial
    keyctl("unlink", str(serial), "@u")


def add(qmp: Client, serial: int) -> dict:
    return qmp.cmd("object-add", {"qom-type": "secret_keyring", "id": "k", "serial": serial})


def test_the_secret_outlives_its_key(qmp: Client, key: int) -> None:
    """It is a copy; the key's end does not touch it."""
    assert add(qmp, key) == {"return": {}}
    keyctl("revoke", str(key))
    assert qmp.read("k") == b"letmein"
    assert [s["qom-type"] for s in qmp.ok("query-secrets")] == ["secret_keyring"]
    assert qmp.ok("object-del", {"id": "k"}) == {}
    assert add(qmp, key)["error"]["desc"] == (
        f"Unable to read serial key {key:08x}: Key has been revoked"
    )


@pytest.mark.slow
def test_an_expired_key_is_an_error(qmp: Client, key: int) -> None:
    """In the kernel's words."""
    keyctl("timeout", str(key), "1")
    while "return" in (reply := add(qmp, key)):
        assert qmp.ok("object-del", {"id": "k"}) == {}
    assert reply["error"]["desc"] == f"Unable to read serial key {key:08x}: Key has expired"


def test_a_key_that_grows_while_it_is_read_is_read_whole(
    qmp: Client, key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the first part of it."""
    real = kernel_keyctl.read

    def read(serial: int, into: memoryview | None) -> int:
        size = real(serial, into)
        if into is None and size == len(b"letmein"):
            keyctl("update", str(serial), "much longer than before")
        return size

    monkeypatch.setattr(kernel_keyctl, "read", read)
    assert add(qmp, key) == {"return": {}}
    assert qmp.read("k") == b"much longer than before"


def test_a_key_that_goes_while_it_is_read_is_an_error(
    qmp: Client, key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves no locked memory behind."""
    real = kernel_keyctl.read

    def read(serial: int, into: memoryview | None) -> int:
        size = real(serial, into)
        keyctl("revoke", str(serial))
        return size

    monkeypatch.setattr(kernel_keyctl, "read", read)
    assert "Key has been revoked" in add(qmp, key)["error"]["desc"]


def test_an_empty_key_and_one_without_permission_are_errors(qmp: Client, key: int) -> None:
    """QEMU says of an empty one what went wrong before."""
    ring = keyctl("newring", "secretd-test", "@u").strip()
    try:
        keyctl("setperm", ring, "0x3f3f0000")
        assert add(qmp, int(ring))["error"]["desc"] == (
            f"Unable to read serial key {int(ring):08x}: No data available"
        )
    finally:
        keyctl("unlink", ring, "@u")
    keyctl("setperm", str(key), "0x35350000")
    assert add(qmp, key)["error"]["desc"] == (
        f"Unable to read serial key {key:08x}: Permission denied"
    )


@pytest.mark.slow
def test_a_key_may_be_base64_of_any_length(qmp: Client) -> None:
    """QEMU looks one byte too far and refuses some, by what happens to stand there."""
    need_program("keyctl")
    for size in range(1, 60):
        serial = add_key(base64.b64encode(bytes(range(size))))
        try:
            reply = qmp.cmd(
                "object-add",
                {"qom-type": "secret_keyring", "id": "k", "serial": serial, "format": "base64"},
            )
            assert reply == {"return": {}}
            assert qmp.read("k") == bytes(range(size))
            assert qmp.ok("object-del", {"id": "k"}) == {}
        finally:
            keyctl("unlink", str(serial), "@u")
