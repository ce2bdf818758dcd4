# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretctl store, with the real age: the steps, what is refused, and what is left after a failure.

tests/e2e has systemd-creds with a TPM, and machines that reboot.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from secretd import paths
from secretd.ctl import recipients, store, store_checks, store_keys
from secretd.errors import UsageError
from tests.support.daemon import Daemon
from tests.support.needs import need_program, need_root
from tests.support.qmp import Client
from tests.support.secretctl import SECRETCTL, Ctl


class Escrow:
    """A key of age: ``file`` has the private part, ``public`` is the other one."""

    def __init__(self, directory: Path, name: str = "escrow") -> None:
        need_program("age", "age-keygen")
        self.file = str(directory / name)
        subprocess.run(["age-keygen", "-o", self.file], check=True, capture_output=True)
        self.public = subprocess.run(
            ["age-keygen", "-y", self.file], check=True, capture_output=True, text=True
        ).stdout.strip()

    def open(self, path: str) -> bytes:
        """What is sealed in a file."""
        return subprocess.run(
            ["age", "-d", "-i", self.file, path], check=True, capture_output=True
        ).stdout


@pytest.fixture
def escrow(tmp_path: Path) -> Escrow:
    """A key of age."""
    return Escrow(tmp_path)


@pytest.fixture
def place(tmp_path: Path) -> str:
    """Where the store lies."""
    return str(tmp_path / "state" / "store")


@pytest.fixture
def made(run: Ctl, escrow: Escrow, place: str, tmp_path: Path) -> str:
    """A store with an age recipient; its path."""
    os.makedirs(tmp_path / "state", 0o700, exist_ok=True)
    out, err = run("store", "init", place, "--age", escrow.public, "--identity", escrow.file)
    assert out == f"made the store {place}; it keeps all secrets\nsealed its key for age (tried)\n"
    assert "start it with --object secret-store,id=store,path=" in err
    assert "warning: it has one recipient" in err
    return place


def test_a_store_is_made_looked_at_and_destroyed(
    run: Ctl, qmp: Client, made: str, escrow: Escrow, tmp_path: Path
) -> None:
    """Each step says what was done, in words or as JSON."""
    assert escrow.open(f"{made}/recipients/age") == qmp.read("store.key")
    qmp.add("disk0", data="letmein")
    out, _ = run("store", "status")
    assert out.splitlines() == [
        "store: open", f"path        {made}", "keeps       *", "key         store.key",
        "holds       1 row after 1 change", "recipients  age",
    ]  # fmt: skip
    status = json.loads(run("store", "status", "--json")[0])
    assert (status["rows"], status["recipients"]) == (1, ["age"])
    assert run("store", "verify")[0] == "1 row opened, and no other is missing\n"
    assert run("store", "verify", "--json")[0] == '{"rows": 1}\n'
    copy = tmp_path / "copy.db"
    assert json.loads(run("store", "backup", str(copy), "--json")[0])["size"] == copy.stat().st_size
    assert "File exists" in run("store", "backup", str(copy), status=1)[1]
    assert "agrees beforehand" in run("store", "destroy", status=1)[1]
    assert run("store", "destroy", "--yes") == ("", "")
    assert qmp.ok("query-secrets") == []
    assert qmp.ok("query-secret-store") == []
    assert os.listdir(made) == []
    _, err = run("store", "status", status=1)
    assert "secretd has no store; 'secretctl store init' makes one" in err


def test_a_locked_store_is_opened_by_its_key(
    run: Ctl, qmp: Client, made: str, escrow: Escrow, tmp_path: Path
) -> None:
    """From a file, standard input or an identity; a wrong key is removed again."""
    qmp.add("disk0", data="letmein")
    key = tmp_path / "key"
    key.write_bytes(escrow.open(f"{made}/recipients/age"))
    assert json.loads(run("store", "unlock", "--json")[0])["state"] == "open"
    (tmp_path / "wrong").write_bytes(b"x" * 32)
    for words in (("--file", str(key)), ("--identity", escrow.file)):
        qmp.ok("object-del", {"id": "store.key"})
        out, _ = run("store", "status", status=1)
        assert out.startswith("store: locked\n")
        _, err = run("store", "unlock", status=1)
        assert "can be opened without a person; give the key with --stdin or --file" in err
        _, err = run("store", "unlock", "--file", str(tmp_path / "wrong"), status=1)
        assert "Store 'store' has failed: the key is not this store's" in err
        assert "store.key" not in run("list", "--quiet")[0]
        assert "failed (the key is not" in run("store", "status", status=1)[0]
        run("store", "unlock", *words)
    qmp.ok("object-del", {"id": "store.key"})
    stdin = os.dup(0)
    try:
        with open(key) as file:
            os.dup2(file.fileno(), 0)
        run("store", "unlock", "--stdin")
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
    assert qmp.read("disk0") == b"letmein"
    _, err = run("store", "unlock", "--stdin", "--file", "x", status=2)
    assert "--file and --stdin exclude each other" in err


def test_recipients_are_added_tried_listed_and_removed(
    run: Ctl, made: str, escrow: Escrow, tmp_path: Path
) -> None:
    """A failure keeps the earlier file."""
    assert run("store", "recipient", "list")[0] == f"age       {made}/recipients/age\n"
    assert json.loads(run("store", "recipient", "list", "--json")[0]) == {"recipients": ["age"]}
    run("store", "recipient", "test", "age", "--identity", escrow.file)
    other = Escrow(tmp_path, "other")
    _, err = run("store", "recipient", "test", "age", "--identity", other.file, status=1)
    assert "recipient 'age': age -d: " in err
    _, err = run("store", "recipient", "test", "age", status=1)
    assert "age needs --identity FILE" in err
    _, err = run(
        "store", "recipient", "add", "age", other.public, "--identity", escrow.file, status=1
    )
    assert "recipient 'age': age -d: " in err
    assert escrow.open(f"{made}/recipients/age")
    assert "age needs a public key" in run("store", "recipient", "add", "age", status=1)[1]
    assert "recipient 'age': age -r: " in run("store", "recipient", "add", "age", "x", status=1)[1]
    _, err = run("store", "recipient", "add", "age", other.public, escrow.public)
    assert "it was not tried" in err
    for each in (other, escrow):
        run("store", "recipient", "test", "age", "--identity", each.file)
    (tmp_path / "stranger").write_bytes(b"x" * 32)
    subprocess.run(
        ["age", "-r", escrow.public, "-o", f"{made}/recipients/age", str(tmp_path / "stranger")],
        check=True,
    )
    _, err = run("store", "recipient", "test", "age", "--identity", escrow.file, status=1)
    assert "recipient 'age' opens, and has another key" in err
    assert "It is the last one" in run("store", "recipient", "remove", "age", status=1)[1]
    run("store", "recipient", "remove", "age", "--yes")
    assert run("store", "recipient", "list")[0] == ""
    for words in (("remove", "age"), ("test", "systemd")):
        _, err = run("store", "recipient", *words, status=1)
        assert "there is no recipient" in err
    assert "recipients  none" in run("store", "status")[0]
    for wrong in ((), ("paint",), ("add",), ("add", "vault")):
        run("store", "recipient", *wrong, status=2)


@pytest.mark.parametrize("data", [False, True])
def test_the_key_is_replaced(run: Ctl, qmp: Client, made: str, escrow: Escrow, data: bool) -> None:
    """For all recipients; the earlier key opens nothing any more."""
    qmp.add("disk0", data="letmein")
    before = qmp.read("store.key")
    words = ("--data",) if data else ()
    run("store", "rekey", "--identity", escrow.file, *words)
    fresh = qmp.read("store.key")
    assert fresh != before
    assert escrow.open(f"{made}/recipients/age") == fresh
    assert "store.key.new" not in run("list", "--quiet")[0]
    for key, error in ((before, "the key is not this store's"), (fresh, "")):
        qmp.ok("object-del", {"id": "store.key"})
        fd = os.memfd_create("key")
        os.write(fd, key)
        _, err = run("store", "unlock", "--file", f"/proc/self/fd/{fd}", status=1 if error else 0)
        os.close(fd)
        if error:
            assert error in err
            qmp.add("store.key", data="x")
    assert qmp.read("disk0") == b"letmein"


def test_a_change_of_keys_is_interrupted_anywhere(
    run: Ctl, qmp: Client, made: str, escrow: Escrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of its steps the recipient's file opens the store; run again, it completes."""
    qmp.add("disk0", data="letmein")
    steps = (
        (recipients.Recipients, "add"), (recipients.Recipients, "rename"),
        (store.SyncClient, "read_into"), (store.SyncClient, "add"), (store.SyncClient, "delete"),
    )  # fmt: skip
    for place, name in steps:
        with monkeypatch.context() as patch:

            def fail(*_args: object, **_named: object) -> None:
                raise UsageError("interrupted")

            patch.setattr(place, name, fail)
            run("store", "rekey", "--identity", escrow.file, status=1)
        key = escrow.open(f"{made}/recipients/age")
        qmp.ok("object-del", {"id": "store.key"})
        fd = os.memfd_create("key")
        os.write(fd, key)
        run("store", "unlock", "--file", f"/proc/self/fd/{fd}")
        os.close(fd)
    run("store", "rekey")
    assert escrow.open(f"{made}/recipients/age") == qmp.read("store.key")


def test_what_cannot_be_made_leaves_nothing(
    run: Ctl, qmp: Client, escrow: Escrow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No recipient, a wrong one, a place that cannot be used, a second store, a missing program."""
    _, err = run("store", "init", str(tmp_path / "s"), status=2)
    assert "store init needs a recipient that brings the key back after a reboot" in err
    _, err = run("store", "init", str(tmp_path / "s"), "--age", "age1x", status=1)
    assert "recipient 'age': age -r: " in err
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        _, err = run("store", "init", str(tmp_path / "s"), "--age", escrow.public, status=1)
        assert "age was not found; on Debian: apt install age" in err
    qmp.add("disk0", data="letmein")
    _, err = run("store", "init", str(tmp_path / "s"), "--age", "age1x", status=1)
    assert qmp.read("disk0") == b"letmein"
    assert not (tmp_path / "s").exists()
    qmp.ok("object-del", {"id": "disk0"})
    os.symlink(tmp_path, tmp_path / "link")
    _, err = run("store", "init", str(tmp_path / "link"), "--age", escrow.public, status=1)
    assert "link is a symlink" in err
    assert qmp.ok("query-secrets") == []
    assert qmp.ok("query-secret-store") == []
    out, err = run("store", "init", str(tmp_path / "s"), "--age", escrow.public, "--secrets", "vm*")
    assert "it keeps vm*\nsealed its key for age (not tried yet" in out
    assert ",secrets=vm*" in err
    _, err = run("store", "init", str(tmp_path / "t"), "--age", escrow.public, status=1)
    assert f"secretd has a store already: {tmp_path}/s" in err
    run("store", "recipient", "remove", "age", "--yes")
    _, err = run("store", "rekey", status=1)
    assert "the store has no recipient, so nothing would bring the new key back" in err
    qmp.ok("object-del", {"id": "store.key"})
    while "error" in qmp.cmd("object-del", {"id": "store"}):
        pass
    _, err = run("store", "init", str(tmp_path / "s"), "--age", escrow.public, status=1)
    assert f"{tmp_path}/s has a store already; docs/howto/recover.md opens it" in err
    for wrong in (("backup",), ("verify", "x"), ("init", "a", "b")):
        run("store", *wrong, status=2)


def test_the_system_daemon_knows_its_store_after_a_restart(
    run: Ctl, daemon: Daemon, escrow: Escrow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory of objects has the declaration, and loses it with the store."""
    need_root()
    monkeypatch.setattr(paths, "control_path", lambda: daemon.control)
    objects = tmp_path / "objects.d"
    monkeypatch.setattr(paths, "OBJECTS_DIR", str(objects))
    place = str(tmp_path / "store")
    _, err = run("store", "init", place, "--systemd", status=1)
    assert "secretd-unlock.service brings the key of /var/lib/secretd/store only" in err
    out, err = run("store", "init", place, "--age", escrow.public, "--secrets", "vm*", "--json")
    assert json.loads(out)["declared"] == str(objects / "store.json")
    assert json.loads((objects / "store.json").read_text()) == {
        "qom-type": "secret-store", "id": "store", "path": place, "keyid": "store.key",
        "secrets": "vm*",
    }  # fmt: skip
    assert err == ""
    run("store", "destroy", "--yes", "--json")
    assert list(objects.iterdir()) == []
    out, err = run("store", "init", place, "--age", escrow.public)
    assert "it keeps all secrets" in out
    assert "start it with" not in err
    assert "secrets" not in json.loads((objects / "store.json").read_text())


def test_the_usual_place_is_the_users_own(
    run: Ctl, escrow: Escrow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below $XDG_STATE_HOME; root's is that of the unit."""
    assert store.default_directory() == (
        "/var/lib/secretd/store"
        if os.getuid() == 0
        else os.path.expanduser("~/.local/state/secretd/store")
    )
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    out, _ = run("store", "init", "--age", escrow.public)
    assert f"made the store {tmp_path}/state/secretd/store" in out


def test_doctor_says_what_a_store_needs(
    run: Ctl, daemon: Daemon, qmp: Client, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state, and its recipients."""

    def findings() -> list[tuple[str, str]]:
        with store.client_of(store.Common(daemon.control, None, json=False)) as client:
            return [(f.state, f.found) for f in store_checks.store_findings(client)]

    assert findings() == [
        ("ok", "open, 0 rows"),
        ("warning", "only age: after a reboot a person must unlock the store"),
    ]  # fmt: skip
    qmp.ok("object-del", {"id": "store.key"})
    assert findings()[0] == ("warning", "locked: its key 'store.key' is missing")
    qmp.add("store.key", data="x" * 32)
    while findings()[0][0] == "warning":
        pass
    assert findings()[0] == ("failed", "the key is not this store's")
    run("store", "recipient", "remove", "age", "--yes")
    assert findings()[1] == ("warning", "none: after a reboot nothing opens the store")
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda _path: (_ for _ in ()).throw(PermissionError(13, "no")))
        assert len(findings()) == 1
        assert "only root or its owner" in run("store", "status", status=1)[0]
    Path(f"{made}/recipients").mkdir(exist_ok=True)
    Path(f"{made}/recipients/systemd").write_text("x")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert findings()[1] == ("warning", "none is off this machine: with it the store is lost")


def test_watch_shows_the_store(daemon: Daemon, qmp: Client, made: str) -> None:
    """Its states, with the reason of a failure."""
    assert made
    process = subprocess.Popen(
        [SECRETCTL, "--socket", daemon.control, "watch"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while not daemon.call(lambda: bool(daemon.server.core.broadcaster.subscribers)):
        pass
    qmp.ok("object-del", {"id": "store.key"})
    qmp.add("store.key", data="short")
    shown = ""
    while "has 5 bytes" not in shown:
        shown += process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert "SECRET_STORE        store is locked\n" in shown
    assert "store is failed: key 'store.key' has 5 bytes, and 32 are needed\n" in shown


def test_what_fails_half_way_leaves_what_was(
    run: Ctl, qmp: Client, made: str, escrow: Escrow, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A backup without room, a refusal at the terminal, a recipient's directory that is a link."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _fd: (_ for _ in ()).throw(OSError(28, "No space")))
        _, err = run("store", "backup", str(tmp_path / "copy"), status=1)
        assert "No space" in err
    assert not (tmp_path / "copy").exists()
    with monkeypatch.context() as patch:
        for module in (store, store_keys):
            patch.setattr(module, "agreed", lambda _question: False)
        run("store", "destroy", status=1)
        run("store", "recipient", "remove", "age", status=1)
    assert qmp.ok("query-secret-store")[0]["state"] == "open"
    run("store", "recipient", "add", "age", escrow.public, "--identity", escrow.file)
    # A recipient of unknown making cannot be sealed for again.
    os.unlink(f"{made}/recipients/age.how")
    assert "age needs a public key" in run("store", "rekey", status=1)[1]
    run("store", "recipient", "add", "age", escrow.public)
    real, calls = store_keys.SyncClient.read_into, iter(range(9))

    def second_fails(*args: object, **named: object) -> int:
        if next(calls) == 1:
            raise UsageError("interrupted")
        return real(*args, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(store_keys.SyncClient, "read_into", second_fails)
        assert "interrupted" in run("store", "rekey", status=1)[1]
    os.rename(f"{made}/recipients", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", f"{made}/recipients")
    _, err = run("store", "recipient", "add", "age", escrow.public, status=1)
    assert "recipients is a symlink" in err


def test_doctor_is_silent_without_a_store(daemon: Daemon) -> None:
    """And on a socket that does not have the command."""
    for path in (daemon.control, daemon.client):
        with store.client_of(store.Common(path, None, json=False)) as client:
            assert list(store_checks.store_findings(client)) == []
