# SPDX-License-Identifier: LGPL-2.1-or-later
"""JSON-RPC clients as they come, unmodified: pjrpc, and the npm package jayson."""

import json
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pjrpc.client import AbstractClient
from pjrpc.client.exceptions import JsonRpcError

from tests.e2e.conftest import Process
from tests.support.needs import need, need_program

CLIENTS = Path(__file__).parent / "clients"


@pytest.fixture
def path(start: Callable[..., Process], tmp_path: Path) -> str:
    """A JSON-RPC control socket."""
    found = str(tmp_path / "rpc.sock")
    start("--control", f"{found},protocol=jsonrpc")
    return found


class UnixClient(AbstractClient):
    """pjrpc brings transports over HTTP and message brokers; this is one over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(path)
        self._file = self._sock.makefile("rw")

    def _request(
        self, request_text: str, is_notification: bool, request_kwargs: Mapping[str, Any]
    ) -> str | None:
        assert not request_kwargs
        self._file.write(request_text)
        self._file.flush()
        return None if is_notification else self._file.readline()

    def close(self) -> None:
        """Disconnect."""
        self._file.close()
        self._sock.close()


@pytest.fixture
def client(path: str) -> Iterator[UnixClient]:
    """Connected."""
    made = UnixClient(path)
    yield made
    made.close()


def test_pjrpc_adds_lists_and_gets_errors(client: UnixClient) -> None:
    """Calls, a notification, a batch, and an error in QEMU's words."""
    secret = {"qom-type": "secret", "id": "py", "data": "letmein"}
    assert client.call("object-add", **secret) == {}
    with pytest.raises(JsonRpcError) as caught:
        client.call("object-add", **secret)
    assert caught.value.code == -32000
    assert caught.value.message == (
        "attempt to add duplicate property 'py' to object (type 'container')"
    )
    assert caught.value.data == {"class": "GenericError"}
    client.notify("secret-expire", id="py", after=100)
    listed: Any = client.call("query-secrets")
    assert [(each["id"], each["expires-in"]) for each in listed] == [("py", 100)]
    with client.batch() as batch:
        batch("query-name")
        batch("object-del", id="py")
        batch("query-secrets")
    assert list(batch.get_results()) == [{}, {}, []]
    with pytest.raises(JsonRpcError, match="parameters are taken by name"):
        client.call("object-del", "py")


def test_jayson_and_openrpcs_meta_schema(path: str) -> None:
    """One JSON text after the other on a Unix socket; what rpc.discover returns is valid."""
    need_program("node")
    need((CLIENTS / "node_modules/jayson").is_dir(), "no jayson")
    done = subprocess.run(
        ["node", str(CLIENTS / "rpc.js"), path],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "added {}",
        "error -32000 attempt to add duplicate property 'js' to object (type 'container') "
        "GenericError",
        "listed js",
        "batch ok,ok,-32000",
        "openrpc true ",
        "methods true",
    ], done.stderr


def test_socat_by_hand(path: str) -> None:
    """As a person tries it."""
    need_program("socat")
    typed = '{"jsonrpc": "2.0", "id": 1, "method": "query-version"}'
    done = subprocess.run(
        ["socat", "-t", "5", "-", f"UNIX-CONNECT:{path}"],
        input=typed, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout)["result"]["package"].startswith("secretd ")
