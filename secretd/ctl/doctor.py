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
from secretd import client as api
from secretd.client import SyncClient, default_socket
from secretd.client.types import figures
from secretd.ctl.verb import Options, unsure_denials, verb
from secretd.errors import MemoryLockError
from secretd.linux import user_namespace
from secretd.memory.level import choose_level

State = Literal["ok", "warning", "failed"]

LOCKED_BYTES: Final = 8 << 20
"""Bytes that may be locked with which there is room for 100,000 small secrets: what systemd allows
by default.
"""

_SO_PEERPIDFD: Final = 77
_UNITS: Final = ("secretd-control.socket", "secretd-client.socket", "secretd-credentials.socket")

ANSWER_SECONDS: Final = 3.0
"""Seconds that the daemon may take for an answer."""

COMMAND_SECONDS: Final = 0.4
"""Seconds that systemctl may take for one."""


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
                f"Linux {release} lacks SO_PEERPIDFD (added in 6.5)",
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
            f"{directory} belongs to another user, who can put another socket there",
            "use a directory of root's or your own",
        )
    else:
        yield Finding("socket", "ok", path)


def _namespace(_options: Options) -> Iterator[Finding]:
    """Look whether this user namespace maps all ids, so that peers can be told apart."""
    words = user_namespace.unmapped_words()
    if words:
        yield Finding(
            "user namespace",
            "warning",
            words,
            "where secretd runs in it, peers with such ids are refused, and no rule can name them",
        )


def _systemctl(*words: str) -> str:
    """Return what systemctl prints; nothing if it does not answer soon."""
    try:
        shown = subprocess.run(
            [*words], capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired:
        return ""
    return shown.stdout


def _units(_options: Options) -> Iterator[Finding]:
    if not os.path.isdir("/run/systemd/system") or shutil.which("systemctl") is None:
        return
    for unit in _UNITS:
        facts = _facts(unit)
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
    service = _facts("secretd.service")
    if service.get("ActiveState") == "failed" or service.get("SubState") == "auto-restart":
        last = _systemctl("journalctl", "--quiet", "--unit=secretd", "--lines=1", "--output=cat")
        yield Finding(
            "secretd.service",
            "failed",
            f"{service.get('SubState')}, after {service.get('NRestarts')} restarts: {last.strip()}",
            "journalctl -u secretd has the whole story",
        )


def _facts(unit: str) -> dict[str, str]:
    shown = _systemctl(
        "systemctl",
        "show",
        "--property=LoadState,ActiveState,SubState,UnitFileState,NRestarts",
        unit,
    )
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def _daemon(options: Options) -> Iterator[Finding]:
    path = options.socket or default_socket()
    seconds = ANSWER_SECONDS if options.timeout is None else options.timeout
    try:
        with SyncClient(path, retry_seconds=0, timeout=seconds) as client:
            if not client.package.startswith("secretd"):
                yield Finding(
                    "daemon",
                    "failed",
                    f"{path} is the monitor of a QEMU",
                    "name secretd's socket with --socket",
                )
                return
            yield from _answers(client)
    except api.ConnectError as error:
        yield Finding(
            "daemon", "failed", f"no answer: {error.exc}", "systemctl status secretd, or its stderr"
        )
    except api.QMPError as error:
        yield Finding("daemon", "failed", str(error), "systemctl status secretd, or its stderr")


def _answers(client: SyncClient) -> Iterator[Finding]:
    version = client.version()
    if version != f"secretd {__version__}":
        yield Finding(
            "daemon",
            "warning",
            f"{version}, and this is secretctl {__version__}",
            "restart secretd: its secrets survive that under systemd",
        )
    else:
        yield Finding("daemon", "ok", version)
    control = paths.control_path()
    if client.path != control:
        yield Finding(
            "its socket", "ok", f"{client.path}, which is not the control socket {control}"
        )
    secrets = client.list()
    if "none" in {s.memory for s in secrets}:
        yield Finding("its memory", "failed", "not locked", "start it where memory can be locked")
    yield Finding("secrets", "ok", str(len(secrets)))
    yield from _figures(client)
    yield from _rules(client)


def _figures(client: SyncClient) -> Iterator[Finding]:
    """Look at the limits that were reached; only the control socket has them."""
    try:
        found = figures(client.execute("query-secret-stats"))
    except api.ExecuteError:
        return
    reached = [name for name, hits in found.items() if name.endswith("-hits") and hits]
    for name in reached:
        yield Finding(
            "limits", "warning", f"{name.removesuffix('-hits')} was reached {found[name]} times",
            "docs/protocol.md, 'Limits', lists the limits and what each is for",
        )  # fmt: skip
    if found.get("audit-dropped"):
        yield Finding(
            "audit",
            "failed",
            f"{found['audit-dropped']} records were lost",
            "make room where --audit writes; --audit-policy=require releases nothing without a record",
        )
    if found.get("log-dropped"):
        yield Finding(
            "log",
            "warning",
            f"{found['log-dropped']} lines were lost, since stderr took none",
            "look at what reads secretd's stderr, such as systemd-journald",
        )
    if not reached:
        yield Finding("limits", "ok", "none was reached")


def _rules(client: SyncClient) -> Iterator[Finding]:
    """Look for rules that deny something by what a process can drop."""
    try:
        listed = client.execute("qom-list", {"path": "/objects"})
    except api.ExecuteError:  # the client socket, or too many objects
        return
    assert isinstance(listed, list)
    for entry in listed:
        if entry["type"] == "child<authz-list>":
            for match in unsure_denials(client, entry["name"]):
                yield Finding(
                    "rules",
                    "warning",
                    f"'{entry['name']}' denies '{match}', which a process can drop",
                    "allow by what it must have instead; only a denial of uid:N is certain",
                )


CHECKS: Final[tuple[Check, ...]] = (
    _python, _kernel, _namespace, _memory, _files, _units, _sockets,
)  # fmt: skip
"""What is looked at here; then the daemon is asked."""

_MARKS: Final = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}


@verb("doctor", examples=("secretctl doctor --json | jq '.[] | select(.state != \"ok\")'",))
def doctor(options: Options) -> int:
    """Check what secretd needs, and say how to mend it.

    Memory locking, kernel, limits, units, sockets, and the daemon itself; it takes 5 seconds at
    most. The exit status is 1 if something has failed; a warning is not a failure.
    """
    findings: list[Finding] = []

    def found(some: Iterator[Finding]) -> None:
        for finding in some:
            findings.append(finding)
            if not options.json:
                _print(finding)

    for check in CHECKS:
        found(check(options))
    if not any(f.check == "socket" and f.state == "failed" for f in findings):
        found(_daemon(options))
    if options.json:
        print(json.dumps([f._asdict() for f in findings]))
    return int(any(f.state == "failed" for f in findings))


_WIDTH: Final = len("secretd-credentials.socket")


def _print(finding: Finding) -> None:
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    mark, color = _MARKS[finding.state]
    shown = click.style(finding.state.ljust(7) if plain else mark, fg=color)
    click.echo(f"{shown} {finding.check:<{_WIDTH}}  {finding.found}")
    if finding.mend:
        indent = "       " if plain else " "
        click.echo(f"{indent} {'':<{_WIDTH}}  {'->' if plain else '→'} {finding.mend}")
