# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretctl rotate: its steps, what it says, and a kill between any two of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from secretd.client import SyncClient
from secretd.ctl import readers
from tests.support.daemon import Daemon
from tests.support.grants import allow, grant
from tests.support.needs import need_root
from tests.support.qmp import Client
from tests.support.secretctl import Ctl, in_terminal


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ASKED_SECONDS", 0.01)


@pytest.fixture
def db(qmp: Client) -> Client:
    """With the secret db, whose value is first."""
    qmp.add("db", data="first")
    return qmp


def state(qmp: Client) -> tuple[str, str, str]:
    """The versions of db: current, staged and previous."""
    (found,) = qmp.ok("query-secret-alias", {"id": "db"})
    return found["current"], found.get("staged", ""), found.get("previous", "")


def ids(qmp: Client) -> set[str]:
    """The secrets and aliases."""
    return {each["id"] for each in qmp.secrets()}


def is_under_way(qmp: Client) -> bool:
    """True if there is a way back."""
    found = {each["id"]: each for each in qmp.ok("query-secret-alias")}.get("db", {})
    return ("staged" in found or "previous" in found) and "retiring" not in found["note"]


def test_a_secret_is_rotated(run: Ctl, db: Client) -> None:
    """The first time it becomes an alias; the version before is gone at the end."""
    out, err = run("rotate", "db", "--generate", "20")
    assert out.splitlines() == [
        "'db' is an alias now; its value is db.v1", "staged: db.v2", "committed: 'db' is db.v2",
        "retired: db.v1",
    ]  # fmt: skip
    assert err == ""
    assert len(db.read("db")) == 20
    assert ids(db) == {"db", "db.v2"}
    out, _ = run("rotate", "db", "--generate", "8", "--text", "--json")
    assert json.loads(out) == {"id": "db", "version": "db.v3"}
    assert len(bytes.fromhex(db.read("db").decode())) == 8


def test_the_value_comes_from_a_file_or_by_hand(run: Ctl, db: Client, tmp_path: Path) -> None:
    """Of several that were added by hand none is chosen, and an equal one is no new value."""
    file = tmp_path / "value"
    file.write_text("second")
    run("rotate", "db", "--file", str(file))
    assert db.read("db") == b"second"
    _, err = run("rotate", "db", "--file", str(file), status=1)
    assert "the new value of 'db' is the current one, so nothing was rotated" in err
    assert ids(db) == {"db", "db.v2"}
    _, err = run("rotate", "db", status=1)
    assert "give the new value with --generate N, --file FILE or --prompt" in err
    db.add("db.v7", data="third")
    db.add("db.v9", data="fourth")
    _, err = run("rotate", "db", status=1)
    assert "one of db.v7, db.v9 is to be staged; remove the others" in err
    db.ok("object-del", {"id": "db.v9"})
    run("rotate", "db")
    assert db.read("db") == b"third"
    run("rotate", "db", "--file", "/nope", status=1)
    assert state(db) == ("db.v7", "", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--generate", "1", "--prompt"], "--generate, --file and --prompt exclude each other"),
        (["--apply"], "--apply needs a command after it"),
        (["true"], "--apply takes a command"),
        (["--restart-units", "--reload-units"], "--restart-units and --reload-units exclude"),
        (["--status", "--rollback"], "--status and --rollback exclude each other"),
        (["--text"], "--text belongs to --generate"),
        (["--iter-time", "5"], "--iter-time belongs to --luks, and takes milliseconds"),
        (["--generate", "4", "--wait=-5"], "--wait takes seconds from 0 on"),
    ],
)
def test_options_that_do_not_fit(run: Ctl, words: list[str], said: str) -> None:
    """They are wrong usage."""
    assert said in run("rotate", "db", *words, status=2)[1]


def test_what_does_not_exist_is_not_rotated(run: Ctl, qmp: Client) -> None:
    """Neither is it shown, nor is what has lost its current version."""
    for more in ([], ["--status"], ["--rollback"]):
        assert "No secret with id 'nope'" in run("rotate", "nope", *more, status=1)[1]
    qmp.ok("object-add", {"qom-type": "secret-alias", "id": "db", "current": "db.v1"})
    assert (
        "'db' has no current version: there is no secret 'db.v1'"
        in (run("rotate", "db", "--generate", "1", status=1)[1])
    )
    assert "--generate takes 1 to 65,536 bytes with --text" in (
        _with_current(run, qmp, "rotate", "db", "--generate", "0", "--text")
    )


def _with_current(run: Ctl, qmp: Client, *words: str) -> str:
    qmp.add("db.v1", data="x")
    return run(*words, status=1)[1]


def test_a_command_applies_the_new_value(run: Ctl, db: Client, tmp_path: Path) -> None:
    """As a file or on standard input; a failure commits nothing, and is repeated or undone."""
    out = tmp_path / "out"
    script = f'cat - "$0" > {out}; echo " $SECRETD_ID $SECRETD_OLD $SECRETD_NEW" >> {out}'
    (tmp_path / "value").write_text("second ")
    source = ["--file", str(tmp_path / "value")]
    run("rotate", "db", *source, "--apply", "sh", "-c", script, "{old}")
    assert out.read_text() == "second first db db.v1 db.v2\n"
    (tmp_path / "value").write_text("third")
    words = ["--apply", "sh", "-c", f"cat $0 >> {out}; exit 3", "{new}"]
    _, err = run("rotate", "db", *source, *words, status=1)
    assert "the command failed (exit status 3), and the current version stays" in err
    assert state(db) == ("db.v2", "db.v3", "")
    _, err = run("rotate", "db", status=1)
    assert "applies the value by a command: give --apply and the command again" in err
    run("rotate", "db", "--apply", "--", "sh", "-c", f"cat $0 >> {out}", "{new}")
    assert out.read_text().endswith("thirdthird")
    assert state(db) == ("db.v3", "", "")
    (tmp_path / "value").write_text("fourth")
    _, err = run("rotate", "db", *source, "--apply", "/no/such/command", status=1)
    assert "exit status 127" in err
    _, err = run("rotate", "db", "--apply", str(tmp_path), status=1)
    assert f"{tmp_path}: Permission denied" in err
    words = ["--apply", "sh", "-c", f"cat > {out}; cat $0 >> {out}", "{old}"]
    run("rotate", "db", "--rollback", *words)
    assert out.read_text() == "thirdfourth"
    assert (state(db), ids(db)) == (("db.v3", "", ""), {"db", "db.v3"})


def test_a_rotation_goes_back(run: Ctl, db: Client) -> None:
    """Before the commit and after it; where there is none it says so."""
    _, err = run("rotate", "db", "--rollback", status=1)
    assert "no rotation of 'db' is under way" in err
    db.ok("secret-alias-convert", {"id": "db"})
    _, err = run("rotate", "db", "--rollback", status=1)
    assert "no rotation of 'db' is under way" in err
    expect = {"id": "db", "expect": {"current": "db.v1"}}
    db.ok("secret-alias-set", {**expect, "staged": "db.v2"})
    out, _ = run("rotate", "db", "--rollback")
    assert out == "rolled back: 'db' is db.v1, as it was\n"
    db.add("db.v2", data="second")
    db.ok("secret-alias-set", {**expect, "current": "db.v2", "previous": "db.v1"})
    out, _ = run("rotate", "db", "--rollback")
    assert out == "rolled back: 'db' is db.v1 again\nretired: db.v2\n"
    assert (db.read("db"), ids(db)) == (b"first", {"db", "db.v1"})


def test_the_status_shows_versions_and_readers(run: Ctl, db: Client, daemon: Daemon) -> None:
    """A secret that was never rotated has none; --json has everything."""
    need_root()
    out, err = run("rotate", "db", "--status")
    assert (out, "was never rotated" in err) == ("", True)
    run("rotate", "db", "--generate", "4")
    allow(db, "one", "uid:1001")
    grant(db, "g", "db", "one")
    client = daemon.connect(role="client", uid=1001)
    client.read("db")
    db.ok("secret-alias-set", {"id": "db", "expect": {"current": "db.v2"}, "staged": "db.v3"})
    out, err = run("rotate", "db", "--status")
    assert "staged    db.v3  (there is no such secret)" in out
    assert "db.v2" in out.splitlines()[-1]
    assert "'db.v3' is not committed" in err
    db.add("db.v3", data="x")
    expect = {"current": "db.v2", "staged": "db.v3"}
    change = {"current": "db.v3", "previous": "db.v2", "staged": ""}
    db.ok("secret-alias-set", {"id": "db", "expect": expect, **change})
    out, err = run("rotate", "db", "--status")
    assert out.splitlines()[-1].split()[-1] == "yes"
    assert "'db.v2' is not retired" in err
    found = json.loads(run("rotate", "db", "--status", "--json")[0])
    assert found["missing"] == list(found["readers"])


def test_it_waits_for_the_readers(run: Ctl, db: Client, daemon: Daemon) -> None:
    """Each is named when it has read; at the deadline the rest are."""
    need_root()
    allow(db, "all", "uid:*")
    grant(db, "g", "db", "all")
    run("rotate", "db", "--generate", "4")
    for uid in (1001, 1002):
        daemon.connect(role="client", uid=uid).read("db")
    out, err = run("rotate", "db", "--generate", "4", "--wait", "0")
    assert out.splitlines()[-1] == "retired: db.v2"
    assert "retired all the same, though" in err
    assert err.count(",") >= 1
    for uid in (1001, 1002):
        daemon.connect(role="client", uid=uid).read("db")
    process = subprocess.Popen(
        [sys.executable, "-m", "secretd.ctl.main", "--socket", daemon.control, "rotate", "db",
         "--generate", "4"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(4)]
    assert [line.split(":")[0] for line in lines] == ["staged", "committed", "waiting", "waiting"]
    for uid in (1001, 1002):
        daemon.connect(role="client", uid=uid).read("db")
        assert process.stdout.readline().startswith("read: ")
    assert process.stdout.readline() == "retired: db.v3\n"
    process.stdout.close()
    assert process.wait(20) == 0


def test_it_ends_after_the_commit_if_asked(run: Ctl, db: Client) -> None:
    """For what has to happen before readers can have the new version; the next run retires."""
    run("rotate", "db", "--generate", "4")
    db.read("db")
    out, err = run("rotate", "db", "--generate", "4", "--no-wait")
    assert out.splitlines()[-1] == "committed: 'db' is db.v3"
    assert err == "secretctl: 'db' is rotated; run rotate again to retire what was before\n"
    (alias,) = db.ok("query-secret-alias", {"id": "db"})
    assert (alias["current"], alias["previous"]) == ("db.v3", "db.v2")
    out, _ = run("rotate", "db")
    assert out.splitlines()[-1] == "retired: db.v2"
    for option in ("--rollback", "--restart-units", "--wait=1"):
        _, err = run("rotate", "db", "--no-wait", option, status=2)
        assert "--no-wait excludes the options of waiting, and --rollback" in err


def test_units_are_named_or_restarted(
    run: Ctl, db: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By systemctl, which is looked for in PATH; others cannot be."""
    run("rotate", "db", "--generate", "4")
    consumers = ["unit:a.service", "user-unit:1000/b.service", "uid:7"]
    expect = {"id": "db", "expect": {"current": "db.v2"}}
    db.ok("secret-alias-set", {**expect, "consumers": consumers})
    _, err = run("rotate", "db", "--generate", "4", "--wait", "0")
    assert "units that hold db.v2: systemctl restart a.service; " in err
    assert "systemctl --user --machine=1000@.host restart b.service (or --restart-units)" in err
    log = tmp_path / "log"
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$*" >> {log}\n[ "$2" = a.service ] || exit 1\n')
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for option, action in (("--restart-units", "restart"), ("--reload-units", "reload")):
        _, err = run("rotate", "db", "--generate", "4", "--wait", "0", option)
        assert log.read_text().splitlines()[-2:] == [
            f"{action} a.service", f"--user --machine=1000@.host {action} b.service",
        ]  # fmt: skip
        assert f"{action} b.service: it failed" in err
    monkeypatch.setenv("PATH", "/nonexistent")
    _, err = run("rotate", "db", "--generate", "4", "--wait", "0", "--restart-units")
    assert "there is no systemctl here" in err


KILLED = """
import os, sys
from secretd.client.channel import Channel
from secretd.ctl.main import main
left = int(sys.argv.pop(1))
real = Channel.exchange
def exchange(channel, command, *arguments):
    global left
    if not command.startswith("query") and command not in ("getfd", "add-fd", "remove-fd"):
        left -= 1
        if not left:
            os.kill(os.getpid(), 9)
    return real(channel, command, *arguments)
Channel.exchange = exchange
sys.argv[0] = "secretctl"
sys.exit(main())
"""


def killed_after(steps: int, daemon: Daemon, *words: str) -> int:
    """Run secretctl, and kill it before a request that changes or reads something."""
    return subprocess.run(
        [sys.executable, "-c", KILLED, str(steps), "--socket", daemon.control, *words],
        capture_output=True,
        check=False,
        timeout=30,
    ).returncode


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "back"])
def test_a_kill_between_any_steps_loses_nothing(
    daemon: Daemon, db: Client, direction: str, run: Ctl
) -> None:
    """Readers always get a version; run again, it comes to the same end, and nothing is left."""
    for steps in range(1, 30):
        status = killed_after(steps, daemon, "rotate", "db", "--generate", "4")
        assert db.read("db")
        if direction == "back" and status == -signal.SIGKILL and is_under_way(db):
            run("rotate", "db", "--rollback")
            assert len(ids(db)) == 2
        else:
            run("rotate", "db", "--generate", "4")
        current, staged, previous = state(db)
        assert (staged, previous) == ("", "")
        assert ids(db) == {"db", current}
        if direction == "forward" and status == -signal.SIGKILL:
            assert len(db.read("db")) == 4
        if status != -signal.SIGKILL:
            assert status == 0
            assert steps > 7
            return
    raise AssertionError("it never came to its end")


@pytest.mark.slow
def test_a_person_interrupts_a_rotation_and_goes_on(
    daemon: Daemon, db: Client, tmp_path: Path
) -> None:
    """Ctrl-C at the wait: a table shows the readers, and the words say how it goes on."""
    need_root()
    allow(db, "all", "uid:*")
    grant(db, "g", "db", "all")
    with SyncClient(daemon.control) as client:
        client.convert("db")
    daemon.connect(role="client", uid=1001).read("db")
    words = ["--socket", daemon.control, "rotate", "db", "--generate", "4"]
    status, seen = in_terminal(words, b"\x03", expect=b"Ctrl-C stops it", hidden=False)
    assert status == 130
    assert b"waiting for 1 reader" in seen
    assert b"run it again with the same options to go on, or with --rollback" in b" ".join(
        seen.split()
    )
    assert state(db) == ("db.v2", "", "db.v1")
    daemon.connect(role="client", uid=1001).read("db")
    status, seen = in_terminal(words, b"", expect=b"", hidden=False)
    assert (status, b"retired: db.v1" in seen, b"done" in seen) == (0, True, True)


@pytest.mark.slow
def test_a_new_value_is_typed(daemon: Daemon, db: Client) -> None:
    """Twice; if the entries differ, nothing is staged."""
    words = ["--socket", daemon.control, "rotate", "db", "--prompt"]
    prompt = b"New value of db.v2: "
    status, seen = in_terminal(words, b"one\n", expect=prompt, again=b"two\n")
    assert (status, b"the two entries differ" in seen) == (1, True)
    assert state(db) == ("db.v1", "", "")
    prompt = b"New value of db.v3: "
    status, _ = in_terminal(words, b"typed\n", expect=prompt, again=b"typed\n")
    assert (status, db.read("db")) == (0, b"typed")


def test_two_rotations_do_not_mix(run: Ctl, db: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later one learns that the alias is not what it was."""
    real = SyncClient.generate

    def generate(client: SyncClient, object_id: str, size: int = 32) -> None:
        real(client, object_id, size)
        monkeypatch.setattr(SyncClient, "generate", real)
        run("rotate", "db", "--rollback")

    monkeypatch.setattr(SyncClient, "generate", generate)
    _, err = run("rotate", "db", "--generate", "4", status=1)
    assert "is not as expected" in err or "No secret with id 'db.v2'" in err
    assert state(db) == ("db.v1", "", "")


def test_what_cannot_be_deleted_is_said(
    run: Ctl, db: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing pretends to be retired."""
    monkeypatch.setattr(SyncClient, "delete", lambda _client, _id: None)
    _, err = run("rotate", "db", "--generate", "4", status=1)
    assert "'db.v1' was not deleted" in err
    assert state(db) == ("db.v2", "", "db.v1")


def test_a_retirement_that_has_begun_has_no_way_back(
    run: Ctl, db: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resource may have lost the version before; running again ends it, without waiting."""
    real = SyncClient.delete

    def interrupted(_client: SyncClient, _object_id: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SyncClient, "delete", interrupted)
    _, err = run("rotate", "db", "--generate", "4", status=130)
    assert "'secretctl rotate db --status' shows where it is" in err
    monkeypatch.setattr(SyncClient, "delete", real)
    _, err = run("rotate", "db", "--rollback", status=1)
    assert "the retirement of 'db.v1' has begun, so there is no way back" in err
    assert (
        "the retirement of 'db.v1' has begun: run rotate again"
        in (run("rotate", "db", "--status")[1])
    )
    assert run("rotate", "db")[0] == "retired: db.v1\n"


def test_a_way_back_that_is_interrupted_goes_on_back(run: Ctl, db: Client) -> None:
    """Going back again does not go forward."""
    run("rotate", "db", "--generate", "4")
    consumers = {"consumers": ["uid:7"]}
    db.ok("secret-alias-set", {"id": "db", "expect": {"current": "db.v2"}, **consumers})
    db.add("db.v3", data="third")
    versions = {"current": "db.v3", "previous": "db.v2"}
    note = json.dumps({"phase": "forward", "luks": "", "command": False})
    expect = {"id": "db", "expect": {"current": "db.v2"}}
    db.ok("secret-alias-set", {**expect, **versions, "note": note})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers.Readers, "wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run("rotate", "db", "--rollback", status=130)
        assert state(db) == ("db.v2", "", "db.v3")
        run("rotate", "db", "--rollback", status=130)
    assert state(db) == ("db.v2", "", "db.v3")
    run("rotate", "db", "--wait", "0")
    assert ids(db) == {"db", "db.v2"}


def test_what_changes_during_the_wait_is_not_retired(
    run: Ctl, db: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another administrator went back meanwhile."""

    def wait(_readers: readers.Readers, _patience: readers.Patience) -> None:
        expect = {"current": "db.v2", "previous": "db.v1"}
        change = {"id": "db", "expect": expect, "current": "db.v1", "previous": "db.v2"}
        db.ok("secret-alias-set", change)

    monkeypatch.setattr(readers.Readers, "wait", wait)
    _, err = run("rotate", "db", "--generate", "4", status=1)
    assert "another process has changed the rotation of 'db'" in err
    assert ids(db) == {"db", "db.v1", "db.v2"}


def test_a_version_that_another_run_has_added_stays(
    run: Ctl, db: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one of two stops, and leaves it staged."""
    real = SyncClient.generate

    def generate(client: SyncClient, object_id: str, size: int = 32) -> None:
        real(client, object_id, size)
        real(client, object_id, size)

    monkeypatch.setattr(SyncClient, "generate", generate)
    _, err = run("rotate", "db", "--generate", "4", status=1)
    assert "another rotation of 'db' is under way: it has added 'db.v2'" in err
    assert (state(db), "db.v2" in ids(db)) == (("db.v1", "db.v2", ""), True)


def test_another_programs_note_is_none(run: Ctl, db: Client) -> None:
    """It is replaced when a rotation begins."""
    db.ok("secret-alias-convert", {"id": "db"})
    for note in ("mine", '{"phase": "other", "luks": "", "command": false}', "[]"):
        expect = {"id": "db", "expect": {"current": "db.v1"}}
        db.ok("secret-alias-set", {**expect, "note": note})
        assert run("rotate", "db", "--status")[0] == "current   db.v1\n"
    run("rotate", "db", "--generate", "4")
    assert "note" not in db.ok("query-secret-alias")[0]
    words = "Parameter 'note' expects at most 1024 characters"
    expect = {"id": "db", "expect": {"current": "db.v2", "note": ""}}
    assert db.fail("secret-alias-set", {**expect, "note": "x" * 1025}) == words
    wrong = {"id": "db", "expect": {"current": "db.v2", "note": "x"}, "note": "y"}
    assert "is not as expected: its note is ''" in db.fail("secret-alias-set", wrong)


def test_programs_get_json(run: Ctl, db: Client) -> None:
    """Of a status that is none yet, and of a whole rotation; a list shows what an alias means."""
    assert json.loads(run("rotate", "db", "--status", "--json")[0]) == {"id": "db", "current": None}
    out, err = run("rotate", "db", "--generate", "4", "--json")
    assert (json.loads(out)["version"], err) == ("db.v2", "")
    consumers = {"consumers": ["uid:7"]}
    db.ok("secret-alias-set", {"id": "db", "expect": {"current": "db.v2"}, **consumers})
    out, err = run("rotate", "db", "--generate", "4", "--json", "--wait", "0")
    assert json.loads(out) == {"id": "db", "version": "db.v3"}
    assert "version   db.v3; 'secretctl rotate db --status' says more" in run("show", "db")[0]
    assert "secret-alias of db.v3" in run("list")[0]
    assert "1" in run("status")[0]


def test_going_back_runs_the_command_again(run: Ctl, db: Client, tmp_path: Path) -> None:
    """With the values exchanged; a staged version that has no value needs one."""
    db.ok("secret-alias-convert", {"id": "db"})
    db.add("db.v2", data="second")
    note = json.dumps({"phase": "forward", "luks": "", "command": True})
    expect = {"id": "db", "expect": {"current": "db.v1"}}
    versions = {"current": "db.v2", "previous": "db.v1"}
    db.ok("secret-alias-set", {**expect, **versions, "note": note})
    out = tmp_path / "out"
    run("rotate", "db", "--rollback", "--apply", "sh", "-c", f"cat > {out}")
    assert out.read_text() == "first"
    db.ok("secret-alias-set", {**expect, "staged": "db.v5"})
    _, err = run("rotate", "db", status=1)
    assert "'db.v5' is staged and has no value yet" in err
    assert state(db) == ("db.v1", "db.v5", "")
    run("rotate", "db", "--generate", "4")
    assert state(db) == ("db.v5", "", "")


@pytest.mark.slow
def test_many_readers_fit_into_a_terminal(daemon: Daemon, db: Client) -> None:
    """Those that are waited for come first, and the others are counted."""
    db.ok("secret-alias-convert", {"id": "db"})
    db.add("db.v2", data="second")
    consumers = [f"unit:a-rather-long-name-{number:03}.service" for number in range(60)]
    expect = {"id": "db", "expect": {"current": "db.v1"}}
    versions = {"current": "db.v2", "previous": "db.v1"}
    db.ok("secret-alias-set", {**expect, **versions, "consumers": consumers})
    words = ["--socket", daemon.control, "rotate", "db", "--wait", "2"]
    status, seen = in_terminal(words, b"", expect=b"waiting", hidden=False, columns=40)
    assert status == 0
    assert b"and 41 more" in seen
    assert b"waiting for 60 readers, " in seen
    assert b"retired: db.v1" in seen
