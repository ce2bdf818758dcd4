# SPDX-License-Identifier: LGPL-2.1-or-later
"""What people do every day: replace, expire, delete several, list some; and what they mistype."""

import json
import os
import pty
import re
import sys
from pathlib import Path

import pytest

from secretd.ctl import output, times
from secretd.ctl.completion import COMPLETIONS
from secretd.ctl.frame import cli
from secretd.qom.deadlines import LIFETIME_SECONDS
from tests.support.daemon import Daemon
from tests.support.qmp import Client
from tests.support.secretctl import Ctl, in_terminal


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "value"
    path.write_text("hunter22")
    return path


def test_a_secret_is_replaced_in_one_step(run: Ctl, qmp: Client, file: Path) -> None:
    """From a file and through a pipe; without --replace the old one stays."""
    assert run("add", "s", "--file", str(file))[0] == "added s, 8 bytes\n"
    file.write_text("correct horse")
    _, err = run("add", "s", "--file", str(file), status=1)
    assert "the id is taken; choose another one" in err
    assert run("add", "s", "--file", str(file), "--replace")[0] == "added s, 13 bytes\n"
    source, sink = os.pipe()
    os.write(sink, b"battery")
    os.close(sink)
    assert run("add", "s", "--fd", str(source), "--replace")[0] == "added s, 7 bytes\n"
    os.close(source)
    assert run("add", "new", "--file", str(file), "--replace")[0] == "added new, 13 bytes\n"
    assert [s["id"] for s in qmp.secrets()] == ["new", "s"]


def test_a_secret_is_added_with_a_lifetime(run: Ctl, qmp: Client, file: Path) -> None:
    """If that is impossible, it is not added."""
    out, _ = run("add", "s", "--file", str(file), "--expires", "8h")
    assert out.startswith("added s, 8 bytes; it will be wiped at ")
    assert qmp.secrets()[0]["expires-in"] in (28799, 28800)
    for wrong in ("99999999d", "0s", "9999-12-31"):
        for more in (["t"], ["s", "--replace"]):
            _, err = run("add", *more, "--file", str(file), "--expires", wrong, status=1)
            assert f"'{wrong}': a time between one second and 100 years" in err
    assert [(s["id"], s["size"]) for s in qmp.secrets()] == [("s", 8)]
    assert times.MAX_SECONDS == LIFETIME_SECONDS
    assert "a time is expected" in run("add", "t", "--file", str(file), "--expires", "x",
                                       status=1)[1]  # fmt: skip


def test_a_question_is_agreed_to_by_yes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal."""
    ours, theirs = pty.openpty()
    with open(theirs) as terminal, open(ours, "wb", buffering=0) as typing:
        monkeypatch.setattr(sys, "stdin", terminal)
        for typed, agreed in ((b"y\n", True), (b"YES\n", True), (b"\n", False), (b"no\n", False)):
            typing.write(typed)
            assert output.agreed("Delete x?") is agreed


def test_a_directory_that_is_named_must_exist(run: Ctl, file: Path) -> None:
    """A typing error is no valid configuration."""
    assert "No such file or directory" in run("check-config", "/nowhere", status=1)[1]
    assert f"{file}: Not a directory" in run("check-config", str(file), status=1)[1]


def test_without_virsh_the_package_is_named(
    run: Ctl, qmp: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before and after the search for the usage; no descriptor stays open."""
    qmp.add("s", data="letmein")
    monkeypatch.setenv("PATH", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    for secret in ("3f2f7a4e-7c0a-4a52-9d0c-3b3b8a5f7c11", "ceph name"):
        _, err = run("libvirt", "set", secret, "s", status=1)
        assert "virsh was not found; on Debian: apt install libvirt-clients" in err
    assert os.listdir("/proc/self/fd") == before


def test_several_are_deleted_by_id_and_pattern(daemon: Daemon, run: Ctl, qmp: Client) -> None:
    """A pattern that matches nothing is an error, and what is missing names what was deleted."""
    for name in ("vm1.a", "vm1.b", "vm2.a", "x", "y", *(f"z{number}" for number in range(7))):
        qmp.add(name, data="letmein")
    assert json.loads(run("del", "x", "vm1.*", "--yes", "--json")[0])["ids"] == [
        "x", "vm1.a", "vm1.b",
    ]  # fmt: skip
    assert "no secret matches 'vm1.*'" in run("del", "vm1.*", status=1)[1]
    _, err = run("del", "y", "nope", status=1)
    assert err.startswith("secretctl: deleted before: y\nsecretctl: object 'nope' not found\n")
    _, err = run("del", "z*", status=1)
    assert "There is no terminal to ask, and --yes agrees beforehand" in err
    assert len(qmp.secrets()) == 8
    words = ["--socket", daemon.control, "del", "z*"]
    status, seen = in_terminal(words, b"n\n", expect=b"[y/N]", hidden=False)
    assert status == 1
    assert b"Delete z0, z1, z2, z3, z4 and 2 more? [y/N]" in seen
    assert b"nothing was deleted" in seen
    status, seen = in_terminal(words, b"yes\n", expect=b"[y/N]", hidden=False)
    assert status == 0
    assert b"deleted z0, z1, z2, z3, z4 and 2 more" in seen
    assert [s["id"] for s in qmp.secrets()] == ["vm2.a"]


def test_ids_are_listed_by_pattern_and_alone(run: Ctl, qmp: Client) -> None:
    """For scripts, one in a line."""
    for name in ("vm1.a", "vm1.b", "vm2.a"):
        qmp.add(name, data="letmein")
    assert run("list", "vm1.*", "-q")[0] == "vm1.a\nvm1.b\n"
    assert run("list", "--quiet")[0] == "vm1.a\nvm1.b\nvm2.a\n"
    assert [s["id"] for s in json.loads(run("list", "vm?.a", "--json")[0])] == ["vm1.a", "vm2.a"]
    assert run("list", "nope*", "-q")[0] == ""


def test_the_names_of_other_tools_are_understood(run: Ctl, qmp: Client) -> None:
    """ls, rm and their like, and help; what nobody knows gets a suggestion."""
    qmp.add("s", data="letmein")
    assert run("ls", "-q")[0] == "s\n"
    assert run("rm", "s") == ("", "")
    assert run("help")[0] == run("--help")[0]
    assert run("help", "grant")[0].startswith("Usage: secretctl grant")
    assert run("help", "ls")[0].startswith("Usage: secretctl list")
    assert "there is no such verb" in run("help", "nope", status=2)[1]
    assert "there is no such verb; list?" in run("lits", status=2)[1]


def test_errors_of_qemu_get_help_where_they_do_not_help(run: Ctl, qmp: Client, file: Path) -> None:
    """Identifiers, IVs in hexadecimal, keys of the wrong size."""
    key = os.urandom(32).hex()[:31]
    qmp.add("short", data=key)
    added = ("add", "s", "--file", str(file), "--format", "base64", "--keyid", "short")
    cases = {
        ("add", "1x", "--file", str(file)): "an id begins with a letter",
        (*added, "--iv", "0" * 32): "it means the secret that --keyid names",
    }
    for words, step in cases.items():
        assert step in run(*words, status=1)[1], words
    qmp.add("long", data=key + "x")
    added = (*added[:-1], "long")
    for iv, step in (("0" * 32, "--iv takes base64, not hexadecimal"),
                     ("AAAA", "--iv takes 16 bytes in base64")):  # fmt: skip
        assert step in run(*added, "--iv", iv, status=1)[1]


def test_a_change_is_confirmed_on_a_terminal_only(daemon: Daemon, qmp: Client) -> None:
    """A script has the exit status."""
    socket = ["--socket", daemon.control]
    for words, seen in (
        (["generate", "k"], b"generated k, 32 bytes"),
        (["grant", "k", "--to", "uid:0", "--id", "g"], b"g"),
        (["revoke", "g"], b"revoked g"),
        (["del", "k"], b"deleted k"),
    ):
        status, printed = in_terminal([*socket, *words], b"", expect=seen)
        assert (status, seen in printed) == (0, True)


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_narrow_terminal_cuts_ids_and_no_numbers(
    daemon: Daemon, qmp: Client, columns: int
) -> None:
    """Sizes stay whole."""
    qmp.add("a" * 60, data="x" * 1234)
    words = ["--socket", daemon.control, "list"]
    status, printed = in_terminal(words, b"", expect=b"1234", columns=columns)
    assert status == 0
    assert b"1234" in printed


def test_grants_identities_and_commands_are_completed(
    daemon: Daemon, run: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With descriptions; what cannot be found out is not completed."""
    run("grant", "a", "--to", "uid:0", "--id", "g1")
    root = cli.make_context("secretctl", ["--socket", daemon.control, "list"])

    def completed(kind: str, begun: str, **given: object) -> list[str]:
        verb = cli.commands["run"].make_context("run", [], parent=root, resilient_parsing=True)
        verb.params |= given
        (param,) = (each for each in verb.command.params if each.name == "command")
        return [item.value for item in COMPLETIONS[kind](verb, param, begun)]

    assert completed("grants", "g") == ["g1"]
    assert completed("identities", "u") == ["unit:", "user:", "uid:", "user-unit:"]
    assert "user:root" in completed("identities", "user:ro")
    assert "group:root" in completed("identities", "group:ro")
    assert completed("identities", "uid:1") == []
    tool = tmp_path / "systemctl"
    tool.write_text("#!/bin/sh\necho 'nginx.service enabled enabled'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere:{os.environ['PATH']}")
    assert completed("identities", "unit:ng") == ["unit:nginx.service"]
    assert completed("commands", "systemc")[0] == "systemctl"
    assert completed("commands", "x", command=("cat",)) == ["x"]
    assert completed("commands", "./x") == ["./x"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert completed("identities", "unit:ng") == []
    items = cli.shell_complete(root, "gr")
    words = "Let a user, group or unit read secrets on the client socket"
    assert (items[0].value, items[0].help) == ("grant", words)


def test_a_time_that_no_calendar_has_is_told_as_a_duration() -> None:
    """A lifetime may end after the year 9999."""
    assert output.at_and_in(10**25).startswith("in ")


@pytest.mark.parametrize(
    ("name", "value", "escapes"), [("TERM", "dumb", rb"\x1b"), ("NO_COLOR", "1", rb"\x1b\[3[0-9]")]
)
def test_no_colour_where_none_is_wanted(
    daemon: Daemon,
    qmp: Client,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    escapes: bytes,
) -> None:
    """Tables and prompts; a dumb terminal gets no control sequences at all."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(name, value)
    qmp.add("s", data="letmein")
    for words in (["list"], ["grants"], ["stats"], ["--help"]):
        status, seen = in_terminal(["--socket", daemon.control, *words], b"", expect=b"\n")
        assert status == 0
        assert not re.search(escapes, seen), seen
