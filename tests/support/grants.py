# SPDX-License-Identifier: LGPL-2.1-or-later
"""Making grants, as an administrator does."""

import os

from tests.support.qmp import Client

SECRET = b"letmein-" * 4


def list_options(name: str, *identities: str, **more: object) -> dict:
    rules = [{"match": i, "policy": "allow", "format": "glob"} for i in identities]
    return {"qom-type": "authz-list", "id": name, "rules": rules, **more}


def allow(qmp: Client, name: str, *identities: str, **more: object) -> None:
    qmp.ok("object-add", list_options(name, *identities, **more))


def grant(qmp: Client, name: str, secret: str, authz: str, **more: object) -> None:
    qmp.ok(
        "object-add",
        {"qom-type": "secret-grant", "id": name, "secret": secret, "authz": authz, **more},
    )


def denied(client: Client, name: str) -> bool:
    """True if reading is refused; False if it works."""
    source, sink = os.pipe()
    try:
        reply = client.cmd("secret-read", {"id": name}, (sink,))
    finally:
        os.close(sink)
        data = os.read(source, 100)
        os.close(source)
    check_denial(reply, name, data)
    return "error" in reply


def check_denial(reply: dict, name: str, data: bytes) -> None:
    """A reply to secret-read and what came through the pipe fit together."""
    if "return" in reply:
        assert data == SECRET
    else:
        assert data == b""
        assert reply["error"] == {"class": "GenericError", "desc": DENIED % name}


DENIED = "Reading secret '%s' is not permitted"


def begin_delivery(client: Client, name: str) -> int:
    """Ask for a secret that does not fit into the pipe; return the read end once it is full."""
    source, sink = os.pipe()
    client.send(b'{"execute":"secret-read","arguments":{"id":"%s"}}' % name.encode(), (sink,))
    os.close(sink)
    assert os.read(source, 1)
    return source


def drained(source: int) -> int:
    total = 1
    while chunk := os.read(source, 1 << 16):
        total += len(chunk)
    os.close(source)
    return total
