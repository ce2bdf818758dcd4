# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretctl doctor: what it finds, and what it says to do about it."""

import json
import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secretd.ctl import daemon_checks, doctor, machine_checks
from secretd.ctl.findings import Finding
from secretd.ctl.output import Common
from secretd.errors import MemoryLockError
from secretd.linux import user_namespace
from tests.support.daemon import Daemon
from tests.support.qmp import Client
from tests.support.secretctl import Ctl

NONE = Common(socket=None, timeout=None, json=False)


def found(check: Callable[[Common], Any], options: Common = NONE) -> list[Finding]:
    """What a check finds."""
    return list(check(options))


def test_where_all_is_well_it_says_so(
    run: Ctl, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For people, a line each; for programs as JSON; the exit status is 0."""
    version = qmp.ok("query-version")["package"].removeprefix("secretd ")
    monkeypatch.setattr(daemon_checks, "__version__", version)
    out, err = run("doctor")
    assert err == ""
    assert "✓ daemon" in out
    assert "none was reached" in out
    listed = json.loads(run("doctor", "--json")[0])
    assert {"python", "kernel", "memory", "locked memory", "socket", "daemon"} <= {
        f["check"] for f in listed
    }
    assert not [f for f in listed if f["state"] == "failed"]
    assert all(bool(f["mend"]) == (f["state"] != "ok") for f in listed)


def test_a_terminal_that_has_no_such_marks_gets_words(
    run: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    findings = [
        Finding("memory", "failed", "none", "do this"),
        Finding("python", "ok", "3"),
    ]
    lines: list[str] = []
    monkeypatch.setattr(doctor.click, "echo", lines.append)

    class Ascii:
        encoding = "ANSI_X3.4-1968"

    monkeypatch.setattr(doctor.sys, "stdout", Ascii())
    for finding in findings:
        doctor._print(finding)
    monkeypatch.undo()
    text = "\n".join(lines)
    assert text.isascii()
    assert "failed" in text
    assert "-> do this" in text


@pytest.mark.parametrize(
    ("level", "state", "mend"),
    [
        ("secretmem", "ok", ""),
        ("mlock", "warning", "secretmem.enable=1"),
        (None, "failed", "below"),
    ],
)
def test_each_level_of_memory_is_reported(
    monkeypatch: pytest.MonkeyPatch, level: str | None, state: str, mend: str
) -> None:
    """And how to get a better one."""

    def choose(*, require: bool) -> str:
        assert require
        if level is None:
            raise MemoryLockError("no")
        return level

    monkeypatch.setattr(machine_checks, "choose_level", choose)
    first = found(machine_checks._memory)[0]
    assert first.state == state
    assert mend in first.mend


def test_hibernation_that_secretmem_forbids_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the machine could hibernate."""
    monkeypatch.setattr(machine_checks, "choose_level", lambda *, require: "secretmem")  # noqa: ARG005
    for states, reported in (("freeze mem disk\n", True), ("freeze mem\n", False)):
        (tmp_path / "state").write_text(states)
        monkeypatch.setattr(machine_checks, "_POWER_STATE", str(tmp_path / "state"))
        names = [finding.check for finding in found(machine_checks._memory)]
        assert ("hibernation" in names) is reported
    monkeypatch.setattr(machine_checks, "_POWER_STATE", str(tmp_path / "none"))
    assert "hibernation" not in [finding.check for finding in found(machine_checks._memory)]


@pytest.mark.parametrize(
    ("limit", "uid", "state"),
    [
        (64 << 10, 1000, "warning"),
        (8 << 20, 1000, "ok"),
        (resource.RLIM_INFINITY, 1000, "ok"),
        (64 << 10, 0, "ok"),
    ],
)
def test_the_memory_limit_is_reported(
    monkeypatch: pytest.MonkeyPatch, limit: int, uid: int, state: str
) -> None:
    """There is none for root."""
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (limit, limit))
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert found(machine_checks._memory)[-1].state == state
    assert found(machine_checks._files)[0].state == ("warning" if 0 <= limit < 4096 else "ok")


def test_few_descriptors_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a way to get more."""
    monkeypatch.setattr(resource, "getrlimit", lambda _what: (1024, 1024))
    (finding,) = found(machine_checks._files)
    assert finding.state == "warning"
    assert "LimitNOFILE" in finding.mend


def test_a_kernel_without_pidfds_of_peers_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which has them."""
    monkeypatch.setattr(machine_checks, "_SO_PEERPIDFD", 9999)
    (finding,) = found(machine_checks._kernel)
    assert finding.state == "warning"
    assert "6.5" in finding.mend


def test_the_socket_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, no socket, in another user's directory, in one without permission."""

    def at(path: Path) -> Finding:
        (finding,) = found(
            machine_checks._sockets, Common(socket=str(path), timeout=None, json=False)
        )
        return finding

    assert at(tmp_path / "no").found.endswith("does not exist")
    assert at(tmp_path).found.endswith("is not a socket")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        assert at(tmp_path / "s").state == "ok"
        monkeypatch.setattr(machine_checks.paths, "is_trusted", lambda _path: False)
        assert at(tmp_path / "s").state == "warning"

    def forbidden(_path: str) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "stat", forbidden)
    finding = at(tmp_path / "s")
    monkeypatch.undo()
    assert finding.found.endswith("is in a directory that you may not search")


def test_units_are_looked_at_where_systemd_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed or not, started or not."""
    answers: list[str] = []
    monkeypatch.setattr(os.path, "isdir", lambda _path: True)
    monkeypatch.setattr(shutil, "which", lambda _name: "/bin/systemctl")
    monkeypatch.setattr(
        subprocess, "run", lambda *_a, **_k: subprocess.CompletedProcess([], 0, answers.pop(0), "")
    )
    answers += ["LoadState=not-found\nActiveState=inactive\n"]
    assert [f.found for f in found(machine_checks._units)] == [
        "secretd-control.socket is not installed"
    ]
    answers += ["LoadState=loaded\nActiveState=active\nUnitFileState=enabled\n"] * 2
    answers += ["LoadState=loaded\nActiveState=inactive\nUnitFileState=disabled\n"]
    answers += ["ActiveState=active\nSubState=running\n"]
    findings = found(machine_checks._units)
    assert [f.state for f in findings] == ["ok", "ok", "warning"]
    assert findings[2].mend == "systemctl enable --now secretd-credentials.socket"
    answers += ["LoadState=loaded\nActiveState=active\nUnitFileState=enabled\n"] * 3
    answers += ["ActiveState=activating\nSubState=auto-restart\nNRestarts=7\n", "no such file\n"]
    (failing,) = found(machine_checks._units)[3:]
    assert failing.state == "failed"
    assert failing.found == "auto-restart, after 7 restarts: no such file"

    def message_timed_out(*_words: object, **_named: object) -> None:
        raise subprocess.TimeoutExpired("systemctl", 1)

    monkeypatch.setattr(subprocess, "run", message_timed_out)
    assert [f.state for f in found(machine_checks._units)] == ["warning"]
    monkeypatch.setattr(os.path, "isdir", lambda _path: False)
    assert found(machine_checks._units) == []


def test_a_daemon_that_does_not_answer_is_a_failure(run: Ctl, tmp_path: Path) -> None:
    """And where there is no socket it is not asked."""
    out, _ = run("doctor", status=1, socket=str(tmp_path / "no"))
    assert "does not exist" in out
    assert "✓ daemon" not in out
    assert "no answer" not in out
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        out, _ = run("doctor", status=1, socket=str(tmp_path / "s"))
    assert "no answer" in out


def test_what_the_daemon_tells_is_judged(
    run: Ctl, daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version, memory that is not locked, limits that were hit, audit records that were
    lost.
    """
    qmp.add("a", data="letmein")
    daemon.server.core.limits.note_hit("objects-per-uid")
    daemon.server.core.audit.dropped = 3
    daemon.server.core.log_dropped = lambda: 5
    monkeypatch.setattr(daemon_checks, "__version__", "99")
    # The level of the daemon that these tests run in this process.
    monkeypatch.setattr(daemon.tree.journal.arena, "level", "none")
    out, _ = run("doctor", status=1)
    assert "and this is secretctl 99" in out
    assert "its memory" in out
    assert "objects-per-uid was reached 1 times" in out
    assert "3 records were lost" in out
    assert "5 lines were lost, since stderr took none" in out
    out, _ = run("doctor", "--socket", daemon.client, status=0)
    assert "limits" not in out


def test_ids_that_are_not_mapped_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers with such ids are refused."""
    monkeypatch.setattr(user_namespace, "unmapped_words", lambda: "only uid 0 is mapped")
    (finding,) = machine_checks._namespace(NONE)
    assert (finding.state, finding.found) == ("warning", "only uid 0 is mapped")
