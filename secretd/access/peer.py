# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is at the other end of a connection, by what the kernel says of the moment it connected.

Reads SO_PEERCRED, SO_PEERGROUPS and SO_PEERPIDFD (unix(7), socket(7)) and, through the pidfd, the
cgroup and so the systemd unit. It decides nothing: access does. server calls `identify` at accept.
The ctypes here are for groups that do not fit into Python's getsockopt.

The unit is read without a race: where the kernel has PIDFD_GET_INFO (6.13) the cgroup is the one
whose number it tells, elsewhere what /proc says while the pidfd shows that the process has not
ended. Where neither can be had, `PeerUnknown` is raised.
"""

import array
import ctypes
import errno
import fcntl
import os
import re
import select
import socket
import struct
from collections import deque
from enum import Enum
from functools import lru_cache
from typing import Final, NamedTuple

from secretd.errors import PeerUnknown, UsageError

_UCRED: Final = struct.Struct("=iII")
_SO_PEERGROUPS: Final = 59
_SO_PEERPIDFD: Final = 77
GROUPS_MAX: Final = 4096
"""Groups of a peer; one with more is refused, since the time to read them is everybody's. The kernel has
65,536, and who may use a range of subordinate gids can be in all of them.
"""

_PIDFD_GET_INFO: Final = 0xC040FF0B
_PIDFD_INFO: Final = struct.Struct("=QQII")  # mask, cgroupid, pid, tgid, as far as they are needed
_PIDFD_INFO_BYTES: Final = 64
_INFO_PID: Final = 1
_INFO_CGROUPID: Final = 4

_CGROUP_MOUNTS: Final = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
_CGROUPS_WALKED: Final = 4096
"""Cgroups looked through for one whose path /proc does not tell; with more the peer is not known."""

_NOT_FOUND: Final = "its cgroup was not found"
_ENDED: Final = "the process has ended, or is in a PID namespace that we do not see"

_UNIT: Final = re.compile(
    r"[A-Za-z0-9:_.\\@-]{1,248}\.(?:service|scope|socket|mount|automount|swap|timer|path|target|device)"
)
_USER_MANAGER: Final = re.compile(r"user@([0-9]{1,10})\.service")


_ALL_IDS: Final = (1 << 32) - 1


class IdMap(NamedTuple):
    """Which ids of one kind this user namespace maps (user_namespaces(7)).

    ``overflow`` is what the kernel shows for every id that it does not map, None where it maps all: then
    it is an id like others.
    """

    ranges: tuple[range, ...]
    overflow: int | None

    def is_mapped(self, number: int) -> bool:
        """True if the map has this id."""
        return any(number in each for each in self.ranges)


def read_id_map(kind: str, root: str = "/proc") -> IdMap:
    """Return the map of "uid" or "gid" of this process."""
    try:
        with open(f"{root}/self/{kind}_map", encoding="ascii") as file:
            lines = [[int(word) for word in line.split()] for line in file]
        with open(f"{root}/sys/kernel/overflow{kind}", encoding="ascii") as file:
            overflow = int(file.read())
    except FileNotFoundError:  # a kernel without user namespaces, or /proc with subset=pid
        overflow = _OVERFLOW_ID
        try:
            with open(f"{root}/self/{kind}_map", encoding="ascii") as file:
                lines = [[int(word) for word in line.split()] for line in file]
        except FileNotFoundError:
            return IdMap((range(_ALL_IDS),), None)
    ranges = tuple(range(first, first + count) for first, _, count in lines)
    return IdMap(ranges, None if sum(map(len, ranges)) >= _ALL_IDS else overflow)


_OVERFLOW_ID: Final = 65534
UIDS: Final = read_id_map("uid")
GIDS: Final = read_id_map("gid")


def unmapped_words(uids: IdMap = UIDS, gids: IdMap = GIDS) -> str:
    """Say which ids this user namespace does not map; "" where it maps all."""
    missing = [
        f"{kind} {each.overflow} stands for all that are not"
        for kind, each in (("uid", uids), ("gid", gids))
        if each.overflow is not None
    ]
    return f"this user namespace does not map all ids: {', '.join(missing)}" if missing else ""


def check_own_uid(uids: IdMap = UIDS) -> None:
    """Raise UsageError if the daemon's own uid cannot be told from others: it would trust them all."""
    if os.getuid() == uids.overflow:
        raise UsageError(
            f"uid {os.getuid()}, under which secretd runs, stands for every uid that this user "
            "namespace does not map; run it under one that is mapped and is not the overflow uid "
            "(user_namespaces(7))"
        )


_TRUSTED: Final = (0, os.getuid())
"""uid 0 and the daemon's own uid, which never changes."""


class Door(Enum):
    """A listening socket's dialect and rights."""

    CONTROL = "control"
    CLIENT = "client"
    CREDENTIALS = "credentials"


class Peer(NamedTuple):
    """The process at the other end at the time it connected.

    ``identities``: all that authz objects may name, such as ``uid:33``, ``gid:33``, ``unit:nginx.service``,
    ``user-unit:1000/foo.service``. ``unit``: the systemd unit as the last of these says it. ``authz``: the id
    of the object that admits to this door others than uid 0 and the daemon's own uid.
    """

    uid: int
    gid: int
    pid: int
    door: Door
    identities: frozenset[str] = frozenset()
    unit: str | None = None
    authz: str | None = None

    @property
    def info(self) -> dict[str, object]:
        """Who it is, for audit records and events."""
        info: dict[str, object] = {"uid": self.uid, "gid": self.gid, "pid": self.pid}
        if self.unit is not None:
            info["unit"] = self.unit
        return info

    @property
    def trusted(self) -> bool:
        """True for uid 0 and the daemon's own uid, who could kill the daemon anyway."""
        return self.uid in _TRUSTED


def identify(sock: socket.socket, door: Door, authz: str | None = None) -> Peer:
    """Return the peer of a connected AF_UNIX socket, or raise PeerUnknown.

    For uid 0 and the daemon's own uid on the control door what is told beyond the uid is for the audit only,
    so there nothing is refused.
    """
    try:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    except OSError as error:
        raise PeerUnknown(_why(error)) from None
    pid, uid, gid = _UCRED.unpack(credentials)
    if uid == UIDS.overflow:
        raise PeerUnknown(
            f"uid {uid} stands for every uid that the daemon's user namespace does not map", uid
        )
    own = frozenset((f"uid:{uid}",) if gid == GIDS.overflow else (f"uid:{uid}", f"gid:{gid}"))
    peer = Peer(uid, gid, pid, door, own, None, authz)
    try:
        identities = [f"gid:{group}" for group in _groups(sock) if group != GIDS.overflow]
        units = units_of(_cgroup(sock, pid if door is Door.CREDENTIALS and uid == 0 else -1))
    except (PeerUnknown, OSError) as error:
        if door is Door.CONTROL and peer.trusted:
            return peer
        words = _why(error) if isinstance(error, OSError) else str(error)
        raise PeerUnknown(words, uid) from None
    identities += units
    return peer._replace(
        identities=peer.identities.union(identities), unit=units[-1] if units else None
    )


def _groups(sock: socket.socket) -> "array.array[int]":
    groups = array.array("I")
    try:
        groups.frombytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024))
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise PeerUnknown(_why(error)) from None
        room = (ctypes.c_uint32 * GROUPS_MAX)()
        size = ctypes.c_uint32(ctypes.sizeof(room))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.getsockopt(
            sock.fileno(), socket.SOL_SOCKET, _SO_PEERGROUPS, room, ctypes.byref(size)
        ):
            raise PeerUnknown(f"it is in more than {GROUPS_MAX} groups") from None
        groups.extend(room[: size.value // 4])
    return groups


def _cgroup(sock: socket.socket, pid: int) -> str | None:
    """Return the path of the peer's cgroup, None if it has none that we can name.

    ``pid``: where the kernel gives no pidfd of who connected, look at the process that has this number
    now. It may be another one only if the peer has ended: that is good enough for root, who
    connects as a service manager and waits for the answer. -1: for nobody else.
    """
    try:
        pidfd = _peer_pidfd(sock, pid)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            raise PeerUnknown("this kernel has no SO_PEERPIDFD; Linux 6.5 has") from None
        raise PeerUnknown(_why(error)) from None
    try:
        return cgroup_of(pidfd)
    finally:
        os.close(pidfd)


def _peer_pidfd(sock: socket.socket, pid: int) -> int:
    try:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4), "little")
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT or pid <= 0:
            raise
        return os.pidfd_open(pid)


def cgroup_of(pidfd: int) -> str | None:
    """Return the path, below the mount point, of the cgroup of a process that lives, or raise PeerUnknown.

    ``pidfd`` is borrowed. None: it is outside our cgroup namespace, or there are no version 2 cgroups.
    """
    mount = _mount()
    try:
        told = None if _is_zombie(pidfd) else _told_by_kernel(pidfd)
    except ProcessLookupError:
        raise PeerUnknown(_ENDED) from None
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.EPERM):
            raise PeerUnknown(_why(error)) from None
        return _told_by_proc(pidfd)
    if told is None:
        raise PeerUnknown(_ENDED)
    pid, number = told
    if mount is None:
        return None
    path = _read_proc(pid)
    if path is not None and _number_of(mount + path) == number:
        return path
    if path is not None and _outside(path):
        return None
    return _walk(mount, number)


def _is_zombie(pidfd: int) -> bool:
    """True if a process has ended, whether it was waited for or not: a pidfd is readable then."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def _told_by_kernel(pidfd: int) -> tuple[int, int] | None:
    """Return a process's pid and the number of its cgroup (PIDFD_GET_INFO), None if it has ended."""
    info = bytearray(_PIDFD_INFO_BYTES)
    _PIDFD_INFO.pack_into(info, 0, _INFO_PID | _INFO_CGROUPID, 0, 0, 0)
    fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    mask, number, pid, _ = _PIDFD_INFO.unpack_from(info)
    return (pid, number) if mask & _INFO_PID and mask & _INFO_CGROUPID and pid else None


def _told_by_proc(pidfd: int) -> str | None:
    """The same by /proc: what it says of a pid counts if the pidfd shows afterwards that nobody
    else has it.
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
    """Return the version 2 cgroup that /proc tells; None if it cannot be read. "/.." if there is none."""
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
    """Return where version 2 cgroups are mounted, as systemd mounts them; None if nowhere."""
    return next((m for m in _CGROUP_MOUNTS if os.path.exists(f"{m}/cgroup.procs")), None)


MISSES_KEPT: Final = 1024
"""Numbers of cgroups that were not found and are not looked for again."""

_missed: Final[dict[int, None]] = {}


def _walk(mount: str, number: int) -> str:
    """Find a cgroup by its number, which no other ever gets; where there is none of it, only once."""
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
    """Look through the hierarchy, where /proc does not tell of others' processes."""
    # Level by level, so that what users make inside their own cgroups comes last.
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
    """Return the identities that a cgroup's path gives: the system manager's unit, then the user manager's.

    As systemd reads it (cg_path_get_unit() of basic/cgroup-util.c): slices are skipped, the next
    component is the unit; a user manager's units stand below ``user@UID.service``. What a user
    calls a unit of theirs stands behind their uid.
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
    """Take components off the front up to the first that is no slice; return it if it is a unit."""
    while parts:
        # An underscore protects names that the kernel uses itself (cg_escape()).
        part = parts.pop(0).removeprefix("_")
        if not part.endswith(".slice"):
            return part if _UNIT.fullmatch(part) else None
    return None


def _why(error: OSError) -> str:
    return os.strerror(error.errno or 0)
