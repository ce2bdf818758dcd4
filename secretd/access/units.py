# SPDX-License-Identifier: LGPL-2.1-or-later
"""The systemd unit of a process, from its cgroup.

The cgroup is read without a race. Where the kernel has PIDFD_GET_INFO (6.13), the cgroup is the one
with the number that the kernel gives. On older kernels it is the one in /proc, if the pidfd shows
afterwards that the process has not ended. If neither works, `PeerUnknown` is raised. access.peer
calls this module.
"""

import errno
import os
import re
import select
from collections import deque
from functools import lru_cache
from typing import Final

from secretd.errors import PeerUnknown
from secretd.linux import peercred

_CGROUP_MOUNTS: Final = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")

_CGROUPS_WALKED: Final = 4096
"""Cgroups that are searched for one that /proc does not name; with more the peer is unknown."""

_NOT_FOUND: Final = "its cgroup was not found"
_ENDED: Final = "the process has ended, or is in a PID namespace that secretd does not see"
_UNIT: Final = re.compile(
    r"[A-Za-z0-9:_.\\@-]{1,248}\.(?:service|scope|socket|mount|automount|swap|timer|path|target|device)"
)
_USER_MANAGER: Final = re.compile(r"user@([0-9]{1,10})\.service")


def cgroup_of(pidfd: int) -> str | None:
    """Return the path, below the mount point, of the cgroup of a running process.

    ``pidfd`` is borrowed. Returns None if the cgroup is outside our cgroup namespace, or if there
    are no version 2 cgroups. Raises PeerUnknown if the process has ended or cannot be read.
    """
    mount = _mount()
    try:
        info = None if _is_zombie(pidfd) else peercred.pid_and_cgroup(pidfd)
    except ProcessLookupError:
        raise PeerUnknown(_ENDED) from None
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.EPERM):
            raise PeerUnknown(reason(error)) from None
        return _read_by_pid(pidfd)
    if info is None:
        raise PeerUnknown(_ENDED)
    pid, number = info
    if mount is None:
        return None
    path = _read_proc(pid)
    if path is not None and _number_of(mount + path) == number:
        return path
    if path is not None and _outside(path):
        return None
    return _walk(mount, number)


def _is_zombie(pidfd: int) -> bool:
    """Return True if a process has ended, reaped or not: its pidfd is readable then
    (pidfd_open(2)).
    """
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def _read_by_pid(pidfd: int) -> str | None:
    """Return the cgroup in /proc; it counts if the pidfd shows afterwards that the pid was not
    reused.
    """
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        pid = next(int(line[4:]) for line in file if line.startswith("Pid:"))
    path = _read_proc(pid) if pid > 0 else None
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if pid <= 0 or poll.poll(0):
        raise PeerUnknown(_ENDED)
    if path is None:
        raise PeerUnknown(f"/proc/{pid}/cgroup cannot be read")
    return None if _outside(path) else path


def _read_proc(pid: int) -> str | None:
    """Return the version 2 cgroup in /proc/PID/cgroup, "/.." if there is none; None if it cannot be
    read.
    """
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            found = [line[3:].rstrip("\n") for line in file if line.startswith("0::")]
    except OSError:
        return None
    return found[0] if found else "/.."


def _outside(path: str) -> bool:
    return path == "/.." or path.startswith("/../")


def _number_of(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:
        return None


@lru_cache(1)
def _mount() -> str | None:
    """Return the mount point of version 2 cgroups, where systemd mounts them; None if there is
    none.
    """
    return next((m for m in _CGROUP_MOUNTS if os.path.exists(f"{m}/cgroup.procs")), None)


MISSES_KEPT: Final = 1024
"""Numbers of missing cgroups that are remembered, and not searched for again."""

_missed: Final[dict[int, None]] = {}


def _walk(mount: str, number: int) -> str:
    """Find a cgroup by its number, which is never reused; a missing one is searched for once."""
    if number in _missed:
        raise PeerUnknown(_NOT_FOUND)
    try:
        return _walk_once(mount, number)
    except PeerUnknown:
        if len(_missed) >= MISSES_KEPT:
            del _missed[next(iter(_missed))]
        _missed[number] = None
        raise


@lru_cache(1024)
def _walk_once(mount: str, number: int) -> str:
    """Search the hierarchy, where /proc hides the processes of others."""
    # Breadth first, so that the cgroups that users create inside their own come last.
    waiting = deque([mount])
    for _ in range(_CGROUPS_WALKED):
        if not waiting:
            break
        directory = waiting.popleft()
        if _number_of(directory) == number:
            return directory[len(mount) :] or "/"
        try:
            with os.scandir(directory) as entries:
                waiting += [e.path for e in entries if e.is_dir(follow_symlinks=False)]
        except OSError:
            continue
    raise PeerUnknown(_NOT_FOUND)


def units_of(path: str | None) -> list[str]:
    """Return the identities in a cgroup's path: the system manager's unit, then the user manager's.

    This follows cg_path_get_unit() of systemd's basic/cgroup-util.c: slices are skipped, and the
    next component is the unit. Units of a user manager stand below ``user@UID.service``, so their
    identity carries the uid.
    """
    parts = (path or "").split("/")[1:]
    found = []
    unit = _skip_slices(parts)
    if unit is not None:
        found.append(f"unit:{unit}")
        manager = _USER_MANAGER.fullmatch(unit)
        if manager and (user_unit := _skip_slices(parts)) is not None:
            found.append(f"user-unit:{manager[1]}/{user_unit}")
    return found


def _skip_slices(parts: list[str]) -> str | None:
    """Remove leading slices; return the next component if it is a unit, else None."""
    while parts:
        # An underscore protects names that the kernel uses itself (cg_escape()).
        part = parts.pop(0).removeprefix("_")
        if not part.endswith(".slice"):
            return part if _UNIT.fullmatch(part) else None
    return None


def reason(error: OSError) -> str:
    """Return the system's text for an error."""
    return os.strerror(error.errno or 0)
