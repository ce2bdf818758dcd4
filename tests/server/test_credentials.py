# SPDX-License-Identifier: LGPL-2.1-or-later
"""The credentials socket: what a unit's LoadCredential= gets, and what others that connect there
get.

The units here are real cgroups, and what connects from them does as systemd does, which itself is
in tests/e2e.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secretd.access.decision import UNITS_WAITING
from secretd.access.peer import PeerUnknown, SocketRole, identify
from secretd.audit.log import Audit
from secretd.limits import Tuning
from secretd.linux import peercred
from secretd.qom.sorted_ids import IDS_PER_LOOK
from secretd.server.credentials import _REFUSAL, _REFUSAL_TIMES
from secretd.systemd.credential_address import CREDENTIAL_BYTES
from tests.support.cgroups import accepted, cgroup, process_in
from tests.support.credentials import SLICE, address, fetch, words
from tests.support.daemon import Daemon
from tests.support.needs import need_root
from tests.support.qmp import Client

REFUSED = len(_REFUSAL) * _REFUSAL_TIMES


def grant(
    qmp: Client,
    grant_id: str,
    secret: str,
    unit: str = "unit:app.service",
    more: "dict[str, object] | None" = None,
) -> None:
    """Make a grant, with its authz object."""
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": f"{grant_id}.z", "identity": unit})
    options = {
        "qom-type": "secret-grant", "id": grant_id, "secret": secret, "authz": f"{grant_id}.z",
    }  # fmt: skip
    qmp.ok("object-add", options | (more or {}))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.slow
def test_the_secret_is_the_one_of_that_name(daemon: Daemon, qmp: Client, app: str) -> None:
    """Or the one that a grant maps the name to; of any size; fetched again and again."""
    for name, content in (("a", b"letmein"), ("empty", b""), ("large", b"x" * 1_000_000)):
        fd = os.memfd_create("x")
        os.write(fd, content)
        added = qmp.ok("add-fd", None, (fd,))
        os.close(fd)
        qmp.add(name, file=f"/dev/fd/{added['fd']}")
        grant(qmp, f"g-{name}", name, more={"max-reads": 1})
        for _ in range(2):
            assert fetch(daemon, app, address("app.service", name)) == content
    grant(qmp, "map", "a", more={"credential": "token"})
    assert fetch(daemon, app, address("app.service", "token")) == b"letmein"
    # One grant says it for many, another maps a pattern of which one secret is left.
    grant(qmp, "glob", "em*", more={"credential": "only"})
    assert fetch(daemon, app, address("app.service", "only")) == b""


@pytest.mark.slow
def test_a_users_unit_is_that_of_the_user(daemon: Daemon, qmp: Client) -> None:
    """Root's own manager is one, too: its unit is not the system's of that name."""
    need_root()
    qmp.add("a", data="letmein")
    grant(qmp, "system", "a")
    path = f"{SLICE}/user@0.service/app.slice/app.service"
    with cgroup(path) as unit:
        assert len(fetch(daemon, unit, address("app.service", "a"))) == REFUSED
        grant(qmp, "user", "a", "user-unit:0/app.service")
        assert fetch(daemon, unit, address("app.service", "a")) == b"letmein"
    # Another user's is not for root's daemon, though it is granted, and the unit is real.
    grant(qmp, "other", "a", "user-unit:1001/app.service")
    with cgroup(f"{SLICE}/user@1001.service/app.slice/app.service") as unit:
        assert len(fetch(daemon, unit, address("app.service", "a"), uid=1001)) == REFUSED
        assert len(fetch(daemon, unit, address("app.service", "a"))) == REFUSED


@pytest.mark.parametrize(
    ("unit", "name", "reason"),
    [
        ("app.service", "nope", "no grant lets unit:app.service have it"),
        ("app.service", "gone", "there is no secret 'gone'"),
        ("app.service", "mapped", "there is no secret 'missing'"),
        ("app.service", "two", "it could be more than one secret: 'x1', 'x2'"),
        ("app.service", "x1", "it could be more than one secret: 'x1', 'x3'"),
        ("app.service", "authz", "there is no secret 'authz'"),
        ("app.service", "ended", "no grant lets unit:app.service have it"),
        ("other.service", "a", "it claims to be other.service, and is in unit:app.service"),
    ],
)
def test_what_is_refused_gets_too_much(
    tmp_path: Path, app: str, unit: str, name: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """So that the unit fails; the log says why, and so does the audit."""
    daemon = Daemon(tmp_path, make_audit=lambda: Audit(str(tmp_path / "audit")))
    try:
        qmp = daemon.connect()
        for secret in ("a", "x1", "x2", "x3"):
            qmp.add(secret, data=secret)
        grant(qmp, "g1", "gone")
        grant(qmp, "g2", "missing", more={"credential": "mapped"})
        grant(qmp, "g3", "x?", more={"credential": "two"})
        qmp.ok("object-del", {"id": "x3"})
        grant(qmp, "g4", "authz")
        qmp.ok("object-add", {"qom-type": "authz-list", "id": "authz"})
        qmp.add("x3", data="3")
        if name == "two":
            qmp.ok("object-del", {"id": "x3"})
        grant(qmp, "g5", "x3", more={"credential": "x1"})
        grant(qmp, "g6", "ended", more={"expires-after": 1})
        daemon.call(lambda: daemon.tree.deadlines.set("g6", 1))
        got = fetch(daemon, app, address(unit, name))
        assert len(got) == REFUSED > CREDENTIAL_BYTES
        assert not got.strip(b"\0")
        assert warnings(caplog) == [
            f"credential '{name}' of {unit} refused: {reason}; the unit fails with 243/CREDENTIALS"
        ]
    finally:
        daemon.stop()
        daemon.server.core.audit.stop()
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    (denied,) = (line for line in lines if line.get("decision") == "deny")
    assert denied["event"] == "credential"
    assert denied["credential"] == name
    assert denied["reason"] == reason
    assert denied["door"] == "credentials"
    assert denied["peer"]["unit"] == "unit:app.service"


@pytest.mark.slow
def test_a_mapping_through_many_secrets_finds_the_one(
    daemon: Daemon, qmp: Client, app: str
) -> None:
    """Others have their turn meanwhile; a grant that is taken back then counts no more."""
    for number in range(IDS_PER_LOOK + 10):
        qmp.add(f"a{number:04}", data="x")
    qmp.add("a.token", data="letmein")
    grant(qmp, "g", "a*.token", more={"credential": "token"})
    assert fetch(daemon, app, address("app.service", "token")) == b"letmein"
    find = daemon.tree.secrets_after

    def revoked(*arguments: Any) -> Iterator[str | None]:
        for found in find(*arguments):
            if found is None:
                daemon.tree.delete("g")
            yield found

    daemon.tree.secrets_after = revoked  # type: ignore[method-assign, assignment]
    assert len(fetch(daemon, app, address("app.service", "token"))) == REFUSED


def test_the_audits_key_is_no_credential(
    daemon: Daemon, qmp: Client, app: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A grant does not change that."""
    qmp.add("key", data="letmein")
    grant(qmp, "g", "key")
    daemon.tree.own_keys.add("key")
    assert len(fetch(daemon, app, address("app.service", "key"))) == REFUSED
    assert "refused: secret 'key' is a key of secretd itself" in warnings(caplog)[0]
    daemon.tree.own_keys.clear()


@pytest.mark.slow
def test_a_credential_is_audited_and_an_event(tmp_path: Path, app: str) -> None:
    """With the rule, the secret and the name it was asked by; the control socket hears of both."""
    daemon = Daemon(tmp_path, make_audit=lambda: Audit(str(tmp_path / "audit")))
    try:
        qmp = daemon.connect().watch()
        qmp.add("a", data="letmein")
        grant(qmp, "g", "a", more={"credential": "token"})
        assert fetch(daemon, app, address("app.service", "token")) == b"letmein"
        event = qmp.event()
        assert (event["event"], event["data"]["id"]) == ("SECRET_READ", "a")
        assert event["data"]["peer"]["unit"] == "unit:app.service"
        fetch(daemon, app, address("app.service", "nope"))
        event = qmp.event()
        assert (event["event"], event["data"]["id"]) == ("SECRET_DENIED", "nope")
    finally:
        daemon.stop()
        daemon.server.core.audit.stop()
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    (read,) = (line for line in lines if line.get("decision") == "allow")
    assert {name: read[name] for name in ("event", "rule", "id", "credential", "size", "door")} == {
        "event": "credential", "rule": "grant g", "id": "a", "credential": "token", "size": 7,
        "door": "credentials",
    }  # fmt: skip


@pytest.mark.slow
def test_other_addresses_and_other_uids_are_refused(
    daemon: Daemon, qmp: Client, app: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Even from within the unit."""
    qmp.add("a", data="letmein")
    grant(qmp, "g", "a")
    for bad in (b"\0x/unit/app.service/a", b"\0a/unit/app.service", b""):
        assert len(fetch(daemon, app, bad)) == REFUSED
    assert warnings(caplog) == 3 * [
        "a connection to the credentials socket was refused: the address it came from is not one "
        "of LoadCredential="
    ]
    caplog.clear()
    assert len(fetch(daemon, app, address("app.service", "a"), uid=1001)) == REFUSED
    assert warnings(caplog) == [
        "credential 'a' of app.service refused: uid 1001 is not that of the service manager; the "
        "unit fails with 243/CREDENTIALS"
    ]
    assert fetch(daemon, app, address("app.service", "a")) == b"letmein"


def test_an_unidentified_peer_is_refused(
    daemon: Daemon,
    qmp: Client,
    app: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As where the kernel says nothing of the cgroup."""
    qmp.add("a", data="letmein")
    grant(qmp, "g", "a")
    monkeypatch.setattr(peercred, "pid_and_cgroup", lambda _pidfd: None)
    assert len(fetch(daemon, app, address("app.service", "a"))) == REFUSED
    (said,) = warnings(caplog)
    assert said.startswith(
        "credential 'a' of app.service refused: Cannot identify the peer completely: the process "
        "has"
    )


def test_on_old_kernels_root_is_identified_by_pid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 6.5 there is no SO_PEERPIDFD. That is good enough for root only."""
    monkeypatch.setattr(peercred, "SO_PEERPIDFD", 999)
    with cgroup(f"{SLICE}/old.service") as path, process_in(path, tmp_path) as sock:
        assert identify(sock, SocketRole.CREDENTIALS).unit == "unit:old.service"
        with pytest.raises(PeerUnknown, match="this kernel has no SO_PEERPIDFD"):
            identify(sock, SocketRole.CLIENT)
    (tmp_path / "s").unlink()
    with accepted(tmp_path, uid=1001, gid=1001) as sock:
        with pytest.raises(PeerUnknown, match="this kernel has no SO_PEERPIDFD"):
            identify(sock, SocketRole.CREDENTIALS)


@pytest.mark.slow
def test_a_secret_that_systemd_would_not_take_is_refused(
    daemon: Daemon, qmp: Client, app: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Together with its name it may have a mebibyte; the limit is said."""
    for size in (CREDENTIAL_BYTES - 1, CREDENTIAL_BYTES):
        fd = os.memfd_create("x")
        os.ftruncate(fd, size)
        added = qmp.ok("add-fd", None, (fd,))
        os.close(fd)
        qmp.add("a", file=f"/dev/fd/{added['fd']}")
        qmp.ok("remove-fd", {"fdset-id": added["fdset-id"]})
        if size == CREDENTIAL_BYTES - 1:
            grant(qmp, "g", "a")
            assert len(fetch(daemon, app, address("app.service", "a"))) == size
            qmp.ok("object-del", {"id": "a"})
    assert len(fetch(daemon, app, address("app.service", "a"))) == REFUSED
    (said,) = warnings(caplog)
    assert (
        "secret 'a' has 1048576 bytes, which with the credential's name is more than the 1048576"
        in said
    )


def test_names_that_systemd_has_no_room_for_are_logged(
    daemon: Daemon, qmp: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """They come through at times, by a short random number."""
    need_root()
    unit, name = "u" * 42 + ".service", "c" * 34
    qmp.add("a", data="letmein")
    grant(qmp, "g", "a", f"unit:{unit}", more={"credential": name})
    with cgroup(f"{SLICE}/{unit}") as path:
        assert fetch(daemon, path, f"\0a/unit/{unit}/{name}".encode()) == b"letmein"
    (said,) = warnings(caplog)
    assert said.startswith(
        f"credential '{name}' of {unit}: their names have more than 83 bytes together"
    )


@contextlib.contextmanager
def slow(
    daemon: Daemon, unit: str, name: str, wait: str = "wait"
) -> "Iterator[subprocess.Popen[bytes]]":
    """A unit that has asked for a credential and does not read it yet, or, with "shut", never
    will.
    """
    command = words(daemon, unit, repr(address("app.service", name)), 0, wait)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"connected\n"
        yield process


def test_a_secret_that_is_withdrawn_half_way_ends_in_too_much(
    daemon: Daemon, qmp: Client, app: str
) -> None:
    """It must not be taken for the whole."""
    fd = os.memfd_create("x")
    os.write(fd, b"x" * 1_000_000)
    added = qmp.ok("add-fd", None, (fd,))
    os.close(fd)
    qmp.add("a", file=f"/dev/fd/{added['fd']}")
    grant(qmp, "g", "a")
    with slow(daemon, app, "a") as process:
        while not daemon.call(lambda: daemon.server.core.deliveries._running):
            pass
        qmp.ok("object-del", {"id": "g"})
        assert not daemon.call(lambda: daemon.server.core.deliveries._running)
        got, _ = process.communicate(b"\n")
    assert len(got) > CREDENTIAL_BYTES
    assert got.strip(b"x").strip(b"\0") == b""


@pytest.mark.tuning(delivery_seconds=0.05)
def test_one_that_takes_nothing_for_too_long_is_not_ended(
    daemon: Daemon, qmp: Client, app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets too much in the end, however late it reads."""
    fd = os.memfd_create("x")
    os.write(fd, b"x" * 1_000_000)
    added = qmp.ok("add-fd", None, (fd,))
    os.close(fd)
    qmp.add("a", file=f"/dev/fd/{added['fd']}")
    grant(qmp, "g", "a")
    with slow(daemon, app, "a") as process:
        while not daemon.call(lambda: daemon.server.core.deliveries._running):
            pass
        while daemon.call(lambda: daemon.server.core.deliveries._running):
            pass
        assert daemon.server.credentials.busy
        got, _ = process.communicate(b"\n")
    assert len(got) > CREDENTIAL_BYTES


def test_nothing_is_given_without_its_record(tmp_path: Path, app: str) -> None:
    """--audit-policy=require holds here too."""

    def make() -> Audit:
        audit = Audit("none")
        audit._require = True
        audit._sink = _Full()
        return audit

    daemon = Daemon(tmp_path, make_audit=make)
    try:
        qmp = daemon.connect()
        qmp.add("a", data="letmein")
        grant(qmp, "g", "a")
        assert len(fetch(daemon, app, address("app.service", "a"))) == REFUSED
    finally:
        daemon.stop()
        daemon.server.core.audit.stop()


class _Full:
    """A disk without room."""

    certain = True

    def write(self, _data: bytes) -> int:
        """See secretd.audit.sinks.Sink."""
        raise OSError(28, "No space left on device")

    def status(self) -> os.stat_result:
        """See secretd.audit.sinks.Sink."""
        return os.stat("/dev/full")

    def close(self) -> None:
        """See secretd.audit.sinks.Sink."""


def test_an_error_of_our_own_is_a_refusal_too(
    daemon: Daemon,
    qmp: Client,
    app: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Such as having no descriptor left; others go on."""
    qmp.add("a", data="letmein")
    grant(qmp, "g", "a")

    def none(_fd: int) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("secretd.server.credentials.os.dup", none)
        assert len(fetch(daemon, app, address("app.service", "a"))) == REFUSED
    assert "internal error: OSError" in caplog.text
    assert fetch(daemon, app, address("app.service", "a")) == b"letmein"


def test_a_unit_that_goes_away_disturbs_no_other(daemon: Daemon, qmp: Client, app: str) -> None:
    """In the middle of a refusal, or of its secret: that is no read."""
    fd = os.memfd_create("x")
    os.write(fd, b"x" * 1_000_000)
    added = qmp.ok("add-fd", None, (fd,))
    os.close(fd)
    qmp.add("a", file=f"/dev/fd/{added['fd']}")
    grant(qmp, "g", "a")
    for name in ("a", "nope"):
        with slow(daemon, app, name) as process:
            process.kill()
    while daemon.call(lambda: daemon.server.credentials.busy):
        pass
    assert qmp.ok("query-name") == {}


def test_one_of_which_nothing_was_taken_is_withheld(tmp_path: Path, app: str) -> None:
    """The audit says so, behind the record that it was given."""
    daemon = Daemon(tmp_path, make_audit=lambda: Audit(str(tmp_path / "audit")))
    try:
        qmp = daemon.connect()
        qmp.add("a", data="letmein")
        grant(qmp, "g", "a", more={"max-reads": 5})
        # It must have shut before it is accepted.
        role = daemon.server._listeners[3]
        daemon.call(lambda: daemon.loop.remove_reader(role.sock.fileno()))
        with slow(daemon, app, "a", "shut") as process:
            daemon.call(lambda: daemon.server._watch(role))
            while daemon.call(lambda: daemon.server.credentials._number == 0):
                pass
            while daemon.call(lambda: daemon.server.credentials.busy):
                pass
            process.communicate(b"\n")
        assert qmp.ok("qom-get", {"path": "g", "property": "reads"}) == 0
    finally:
        daemon.stop()
        daemon.server.core.audit.stop()
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [(r["event"], r.get("reason")) for r in lines if r.get("door") == "credentials"] == [
        ("credential", None), ("withheld", "Unable to write the secret: Broken pipe"),
    ]  # fmt: skip


def test_one_that_is_on_its_way_at_the_end_is_left(
    tmp_path: Path, app: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the service manager, which stores it; here there is none."""
    daemon = Daemon(tmp_path, tuning=Tuning(stop_seconds=0.01))
    try:
        qmp = daemon.connect()
        fd = os.memfd_create("x")
        os.write(fd, b"x" * 1_000_000)
        added = qmp.ok("add-fd", None, (fd,))
        os.close(fd)
        qmp.add("a", file=f"/dev/fd/{added['fd']}")
        grant(qmp, "g", "a")
        with slow(daemon, app, "a") as process:
            while not daemon.call(lambda: daemon.server.core.deliveries._running):
                pass
            daemon.stop()
            got, _ = process.communicate(b"\n")
        assert got.strip(b"x") == b""
    finally:
        daemon.stop()


@pytest.mark.slow
def test_a_unit_waits_until_the_store_is_open(
    tmp_path: Path, daemon: Daemon, qmp: Client, app: str
) -> None:
    """For what the store has; not for a false claim, and 64 units at most; not for ever."""
    key = {"qom-type": "secret", "id": "key", "data": "k" * 32}
    store = {
        "qom-type": "secret-store", "id": "store", "path": str(tmp_path / "store"), "keyid": "key",
    }  # fmt: skip
    qmp.ok("object-add", key)
    qmp.ok("object-add", {**store, "create": True})
    qmp.ok("secret-store-unlock", {"id": "store"})
    qmp.add("token", data="letmein")
    grant(qmp, "g", "token")
    qmp.ok("object-del", {"id": "key"})
    while "error" in qmp.cmd("object-del", {"id": "store"}):
        pass  # its files are not closed yet
    daemon.empty()
    qmp.ok("object-add", {**store, "unlock-timeout": 30})
    access = daemon.server.core.access

    def wait_for(number: int) -> None:
        while daemon.call(lambda: access._units_waiting) != number:
            pass

    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(fetch, daemon, app, address("app.service", "token"))
        wait_for(1)
        assert len(fetch(daemon, app, address("other.service", "token"))) == REFUSED
        daemon.call(lambda: setattr(access, "_units_waiting", UNITS_WAITING))
        assert len(fetch(daemon, app, address("app.service", "token"))) == REFUSED
        daemon.call(lambda: setattr(access, "_units_waiting", 1))
        qmp.ok("object-add", key)
        assert waiting.result(20) == b"letmein"
        assert len(fetch(daemon, app, address("app.service", "nope"))) == REFUSED
        qmp.ok("object-del", {"id": "key"})
        while "error" in qmp.cmd("object-del", {"id": "store"}):
            pass
        daemon.empty()
        qmp.ok("object-add", {**store, "unlock-timeout": 0})
        assert len(fetch(daemon, app, address("app.service", "token"))) == REFUSED


def test_an_alias_is_a_credential(daemon: Daemon, qmp: Client, app: str) -> None:
    """By its own name, by one that maps to it, and where a grant names only the version."""
    qmp.add("web.v1", data="first")
    qmp.add("web.v2", data="second")
    qmp.ok("object-add", {"qom-type": "secret-alias", "id": "web", "current": "web.v1"})
    assert fetch(daemon, app, address("app.service", "web")) != b"first"
    grant(qmp, "g", "web.v1")
    assert fetch(daemon, app, address("app.service", "web")) == b"first"
    change = {"id": "web", "expect": {"current": "web.v1"}}
    qmp.ok("secret-alias-set", {**change, "current": "web.v2", "previous": "web.v1"})
    assert len(fetch(daemon, app, address("app.service", "web"))) == REFUSED
    qmp.ok("object-del", {"id": "g"})
    # Its versions do not make a pattern that covers them, too, ambiguous.
    grant(qmp, "h", "web*", more={"credential": "token"})
    (found,) = qmp.ok("query-secret-alias")
    reader = {"identity": "unit:app.service", "read": "previous", "awaited": True}
    assert found["readers"] == [reader]
    for name in ("web", "token"):
        assert fetch(daemon, app, address("app.service", name)) == b"second"
    (found,) = qmp.ok("query-secret-alias")
    assert found["readers"] == [{**reader, "read": "current"}]
    rules = [{"match": "unit:app.service", "policy": "deny"}]
    qmp.ok("object-add", {"qom-type": "authz-list", "id": "no", "rules": rules})
    denial = {"qom-type": "secret-grant", "id": "d", "secret": "web.v2", "authz": "no"}
    qmp.ok("object-add", denial)
    qmp.ok("object-del", {"id": "h"})
    grant(qmp, "i", "web")
    assert len(fetch(daemon, app, address("app.service", "web"))) == REFUSED
