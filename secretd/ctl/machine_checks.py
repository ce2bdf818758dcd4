# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checks of `secretctl doctor` that examine this machine. They change nothing."""

import os
import platform
import resource
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from typing import Final

from secretd import __version__, paths
from secretd.client import default_socket
from secretd.ctl.findings import Check, Finding
from secretd.ctl.output import Common
from secretd.errors import MemoryLockError
from secretd.linux import user_namespace
from secretd.memory.level import choose_level

LOCKED_BYTES: Final = 8 << 20
"""Bytes of locked memory with room for 100,000 small secrets: systemd's default limit."""

_SO_PEERPIDFD: Final = 77
_POWER_STATE = "/sys/power/state"
_UNITS: Final = ("secretd-control.socket", "secretd-client.socket", "secretd-credentials.socket")

COMMAND_SECONDS: Final = 0.4
"""Seconds that systemctl or journalctl may take for one answer."""


def _python(_common: Common) -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()}, secretd {__version__}")


def _kernel(_common: Common) -> Iterator[Finding]:
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
                "client sockets are closed to all but root and secretd's user; use Linux 6.5 or "
                "newer",
            )
        else:
            os.close(fd)
            yield Finding("kernel", "ok", f"Linux {release}")
        finally:
            one.close()
            for each in pair:
                each.close()


def _memory(_common: Common) -> Iterator[Finding]:
    # 1. The protection level.
    try:
        level = choose_level(require=True)
    except MemoryLockError:
        level = "none"
    if level == "secretmem":
        yield Finding("memory", "ok", "secretmem: not even root's debugger reads secrets")
        if _can_hibernate():
            yield Finding(
                "hibernation",
                "warning",
                "impossible while secretd runs: secretmem forbids it",
                "start secretd with --memory=mlock if this machine must hibernate; encrypt swap "
                "then",
            )
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
    # 2. The amount.
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
            "raise it with LimitMEMLOCK= in the unit, 'ulimit -l', or memlock in "
            "/etc/security/limits.conf",
        )


def _can_hibernate() -> bool:
    """Return True if this machine can suspend to disk at all (/sys/power/state)."""
    try:
        with open(_POWER_STATE, encoding="ascii") as file:
            return "disk" in file.read().split()
    except OSError:
        return False


def _files(_common: Common) -> Iterator[Finding]:
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


def _sockets(common: Common) -> Iterator[Finding]:
    # 1. Does it exist, and is it a socket?
    path = common.socket or default_socket()
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
            f"{path} is in a directory that you may not search",
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
    # 2. Can another user replace it?
    if not paths.is_trusted(directory):
        yield Finding(
            "socket",
            "warning",
            f"{directory} belongs to another user, and that user can replace the socket",
            "use a directory of root's or your own",
        )
    else:
        yield Finding("socket", "ok", path)


def _namespace(_common: Common) -> Iterator[Finding]:
    """Check that this user namespace maps all ids, so that peers can be distinguished."""
    words = user_namespace.unmapped_words()
    if words:
        yield Finding(
            "user namespace",
            "warning",
            words,
            "a secretd in this namespace refuses peers with such ids, and no rule can name them",
        )


def _systemctl(*words: str) -> str:
    """Return the output of a command such as systemctl; "" if it does not answer soon."""
    try:
        shown = subprocess.run(
            [*words], capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired:
        return ""
    return shown.stdout


def _units(_common: Common) -> Iterator[Finding]:
    if not os.path.isdir("/run/systemd/system") or shutil.which("systemctl") is None:
        return
    # 1. The sockets.
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
    # 2. The service, which a connection starts.
    service = _facts("secretd.service")
    if service.get("ActiveState") == "failed" or service.get("SubState") == "auto-restart":
        last = _systemctl("journalctl", "--quiet", "--unit=secretd", "--lines=1", "--output=cat")
        yield Finding(
            "secretd.service",
            "failed",
            f"{service.get('SubState')}, after {service.get('NRestarts')} restarts: {last.strip()}",
            "see journalctl -u secretd",
        )


def _facts(unit: str) -> dict[str, str]:
    shown = _systemctl(
        "systemctl",
        "show",
        "--property=LoadState,ActiveState,SubState,UnitFileState,NRestarts",
        unit,
    )
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


CHECKS: Final[tuple[Check, ...]] = (
    _python, _kernel, _namespace, _memory, _files, _units, _sockets,
)  # fmt: skip
"""The checks of this machine; those of the daemon follow."""
