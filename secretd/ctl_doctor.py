# SPDX-License-Identifier: LGPL-2.1-or-later
"""`secretctl doctor`: is all here that secretd needs, and what to do about what is not.

Each check is a function that yields findings. It changes nothing. ctl calls it.
"""

import json
import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Final, Literal, NamedTuple

import click

from secretd import __version__, paths
from secretd.client import Client, ExecuteError, QMPError, default_socket
from secretd.ctl_frame import Options, verb
from secretd.errors import MemoryLockError
from secretd.memory import choose_level

State = Literal["ok", "warning", "failed"]

LOCKED_BYTES: Final = 8 << 20
"""Bytes that may be locked with which there is room for 100,000 small secrets: what systemd allows by
default.
"""

_SO_PEERPIDFD: Final = 77
_UNITS: Final = ("secretd-control.socket", "secretd-client.socket", "secretd-credentials.socket")


class Finding(NamedTuple):
    """What a check has found; ``mend``: what to do about it, "" where nothing is to be done."""

    check: str
    state: State
    found: str
    mend: str = ""


Check = Callable[[Options], Iterator[Finding]]


def _python(_options: Options) -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()}, secretd {__version__}")


def _kernel(_options: Options) -> Iterator[Finding]:
    release = os.uname().release
    with socket.socket(socket.AF_UNIX) as one:
        pair = socket.socketpair()
        try:
            fd = pair[0].getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:
            yield Finding(
                "kernel",
                "warning",
                f"Linux {release} does not tell who is at a socket by pidfd (6.5 does)",
                "client sockets are closed to all but root and secretd's user; use Linux 6.5 or newer",
            )
        else:
            os.close(fd)
            yield Finding("kernel", "ok", f"Linux {release}")
        finally:
            one.close()
            for each in pair:
                each.close()


def _memory(_options: Options) -> Iterator[Finding]:
    try:
        level = choose_level(require=True)
    except MemoryLockError:
        level = "none"
    if level == "secretmem":
        yield Finding("memory", "ok", "secretmem: not even root's debugger reads secrets")
    elif level == "mlock":
        yield Finding(
            "memory",
            "warning",
            "mlock: secrets cannot reach swap, but root can read them",
            "boot with secretmem.enable=1 (Linux 5.14 or newer; on by default since 6.5)",
        )
    else:
        yield Finding(
            "memory",
            "failed",
            "none: secrets may reach swap and core dumps",
            "allow memory to be locked: see below",
        )
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if os.geteuid() == 0 or soft == resource.RLIM_INFINITY:
        yield Finding("locked memory", "ok", "without limit")
    elif soft >= LOCKED_BYTES:
        yield Finding("locked memory", "ok", f"{soft >> 20} MiB")
    else:
        yield Finding(
            "locked memory",
            "warning",
            f"{soft >> 10} KiB",
            "raise it with LimitMEMLOCK= in the unit, 'ulimit -l', or memlock in /etc/security/limits.conf",
        )


def _files(_options: Options) -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 4096:
        yield Finding(
            "descriptors",
            "warning",
            f"a process may have {hard}",
            "clients may hold few descriptors at a time then; raise LimitNOFILE= or 'ulimit -Hn'",
        )
    else:
        yield Finding("descriptors", "ok", f"a process may have {hard}")


def _sockets(options: Options) -> Iterator[Finding]:
    path = options.socket or default_socket()
    directory = os.path.dirname(os.path.abspath(path))
    try:
        status = os.stat(path)
    except FileNotFoundError:
        yield Finding(
            "socket",
            "failed",
            f"{path} does not exist",
            "start secretd, or name its socket with --socket or $SECRETD_SOCKET",
        )
        return
    except PermissionError:
        yield Finding(
            "socket",
            "failed",
            f"{path} lies where you may not look",
            "ask root which socket is yours",
        )
        return
    if not stat.S_ISSOCK(status.st_mode):
        yield Finding(
            "socket",
            "failed",
            f"{path} is not a socket",
            "remove it, or name another with --socket",
        )
        return
    if not paths.is_trusted(directory):
        yield Finding(
            "socket",
            "warning",
            f"{directory} belongs to somebody else, who can put another socket there",
            "use a directory of root's or your own",
        )
    else:
        yield Finding("socket", "ok", path)


def _units(_options: Options) -> Iterator[Finding]:
    if not os.path.isdir("/run/systemd/system") or shutil.which("systemctl") is None:
        return
    for unit in _UNITS:
        show = subprocess.run(
            ["systemctl", "show", "--property=LoadState,ActiveState,UnitFileState", unit],
            capture_output=True,
            text=True,
            check=False,
        )
        facts = dict(line.split("=", 1) for line in show.stdout.splitlines() if "=" in line)
        if facts.get("LoadState") != "loaded":
            yield Finding(
                "units",
                "warning",
                f"{unit} is not installed",
                "scripts/install, or the Debian package",
            )
            return
        if facts.get("ActiveState") != "active":
            yield Finding(
                unit, "warning", f"{facts.get('ActiveState')}", f"systemctl enable --now {unit}"
            )
        else:
            yield Finding(unit, "ok", f"active, {facts.get('UnitFileState')}")


async def _daemon(options: Options) -> list[Finding]:
    findings: list[Finding] = []
    try:
        async with Client(options.socket, retry_seconds=0) as client:
            version = await client.version()
            if version != f"secretd {__version__}":
                findings.append(
                    Finding(
                        "daemon",
                        "warning",
                        f"{version}, and this is secretctl {__version__}",
                        "restart secretd: its secrets survive that under systemd",
                    )
                )
            else:
                findings.append(Finding("daemon", "ok", version))
            secrets = await client.list()
            levels = {s.memory for s in secrets}
            if "none" in levels:
                findings.append(
                    Finding(
                        "its memory", "failed", "not locked", "start it where memory can be locked"
                    )
                )
            findings.append(Finding("secrets", "ok", str(len(secrets))))
            findings += await _figures(client)
    except QMPError as error:
        findings.append(
            Finding(
                "daemon", "failed", f"no answer: {error}", "systemctl status secretd, or its stderr"
            )
        )
    return findings


async def _figures(client: Client) -> list[Finding]:
    """What query-secret-stats tells of limits that were reached; only on the control door."""
    try:
        parts = await client.execute("query-secret-stats")
    except ExecuteError:
        return []
    assert isinstance(parts, list)
    figures = {s["name"]: int(s["value"]) for part in parts for s in part["stats"]}
    findings = [
        Finding(
            "limits", "warning", f"{name.removesuffix('-hits')} was reached {count} times",
            "docs/protocol.md, 'Limits', says who may have how much",
        )
        for name, count in figures.items()
        if name.endswith("-hits") and count
    ]  # fmt: skip
    if figures.get("audit-dropped"):
        findings.append(
            Finding(
                "audit",
                "failed",
                f"{figures['audit-dropped']} records were lost",
                "make room where --audit writes; --audit-policy=require releases nothing without a record",
            )
        )
    return findings or [Finding("limits", "ok", "none was reached")]


CHECKS: Final[tuple[Check, ...]] = (_python, _kernel, _memory, _files, _units, _sockets)
"""What is looked at here; then the daemon is asked."""

_MARKS: Final = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}


@verb("doctor", examples=("secretctl doctor --json | jq '.[] | select(.state != \"ok\")'",))
async def doctor(options: Options) -> int:
    """Check what secretd needs, and say how to mend it.

    Memory locking, kernel, limits, units, sockets, and the daemon itself. The exit status is 1 if
    something has failed; a warning is not a failure.
    """
    findings = [finding for check in CHECKS for finding in check(options)]
    if not any(f.check == "socket" and f.state == "failed" for f in findings):
        findings += await _daemon(options)
    if options.json:
        print(json.dumps([f._asdict() for f in findings]))
    else:
        _print(findings)
    return int(any(f.state == "failed" for f in findings))


def _print(findings: list[Finding]) -> None:
    width = max(len(f.check) for f in findings)
    plain = not sys.stdout.encoding.lower().startswith("utf")
    for finding in findings:
        mark, color = _MARKS[finding.state]
        shown = click.style(finding.state.ljust(7) if plain else mark, fg=color)
        click.echo(f"{shown} {finding.check:<{width}}  {finding.found}")
        if finding.mend:
            click.echo(
                f"{'' if not plain else '      '}  {'':<{width}}  {'->' if plain else '→'} {finding.mend}"
            )
