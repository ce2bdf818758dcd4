# SPDX-License-Identifier: LGPL-2.1-or-later
"""The directory of a store: whose it must be, and the tombstones in it.

A tombstone records that a row is deleted when the database cannot: a full disk fails every DELETE.
It lies in space that was reserved when the store was made. store.store calls this module, in the
store's thread.
"""

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from secretd.errors import StoreError
from secretd.store.keys import MAC_BYTES, ROW_KEY_BYTES

DATABASE: Final = "store.db"
TOMBSTONES: Final = "tombstones"
BACKUP: Final = "backup"
"""The name of a copy of the database while it is being made."""

LEFTOVERS: Final = (
    f"{DATABASE}.new", f"{DATABASE}.new-wal", f"{TOMBSTONES}.new", BACKUP, f"{BACKUP}-journal",
    f"{BACKUP}-wal",
)  # fmt: skip
"""Files that an interrupted creation or backup may leave."""

FILES: Final = (
    DATABASE, f"{DATABASE}-wal", f"{DATABASE}-journal", f"{DATABASE}-shm", TOMBSTONES, *LEFTOVERS,
)  # fmt: skip
"""All files that a store may have."""

_TOMBSTONE: Final = struct.Struct(f"<{ROW_KEY_BYTES}sQ{MAC_BYTES}s")
TOMBSTONES_BYTES: Final = 64 << 10
"""Bytes reserved for tombstones, which is room for 1024."""


def check_directory(path: str) -> None:
    """Raise StoreError unless only this process's user can have prepared the directory ``path``.

    As OpenSSH's StrictModes: no part of the path is a symlink or belongs to another user than root,
    and none can be written by others (except directories with the sticky bit above it).
    """
    if not path.startswith("/"):
        raise StoreError("its path is not absolute")
    parts = [part for part in path.split("/") if part]
    for depth in range(1, len(parts) + 1):
        _check(f"/{'/'.join(parts[:depth])}", last=depth == len(parts))


def _check(place: str, *, last: bool) -> None:
    try:
        found = os.lstat(place)
    except OSError as error:
        raise StoreError(f"{place}: {error.strerror}") from None
    if stat.S_ISLNK(found.st_mode):
        raise StoreError(f"{place} is a symlink; name the directory itself")
    if not stat.S_ISDIR(found.st_mode):
        raise StoreError(f"{place} is not a directory")
    own = os.geteuid()
    if found.st_uid != own and (last or found.st_uid != 0):
        raise StoreError(f"{place} belongs to uid {found.st_uid}, not to uid {own}")
    others = found.st_mode & (0o077 if last else 0o022)
    if others and (last or not found.st_mode & stat.S_ISVTX):
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        what = "mode 0700 is needed" if last else "others can write to it"
        raise StoreError(f"{place} has mode {mode}; {what}")


def check_file(path: str) -> None:
    """Raise StoreError unless a file of the store is a plain file of this user, mode 0600."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        raise StoreError("there is no store; secretctl store init makes one") from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(f"{path} is not a plain file")
    if found.st_uid != os.geteuid():
        raise StoreError(f"{path} belongs to uid {found.st_uid}, not to uid {os.geteuid()}")
    if found.st_mode & 0o077 or found.st_nlink != 1:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        raise StoreError(
            f"{path} has mode {mode} and {found.st_nlink} links; 0600 and 1 are needed"
        )


def create_file(path: str, size: int) -> None:
    """Create a file of ``size`` zeros, which are on the disk on return. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        if size:
            os.pwrite(fd, bytes(size), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Tombstone(NamedTuple):
    """A deleted row, and the sequence number of its deletion."""

    row_key: bytes
    sequence: int


class Tombstones:
    """The file of tombstones; ``mac`` authenticates each."""

    def __init__(self, directory: str, mac: Callable[[bytes], bytes]) -> None:
        path = f"{directory}/{TOMBSTONES}"
        check_file(path)
        self.mac = mac
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from None
        self._end = 0
        self.present = list(self._read())

    def _read(self) -> Iterator[Tombstone]:
        data = os.pread(self._fd, TOMBSTONES_BYTES, 0)
        for at in range(0, len(data) - _TOMBSTONE.size + 1, _TOMBSTONE.size):
            row_key, sequence, mac = _TOMBSTONE.unpack_from(data, at)
            if mac == self.mac(row_key + sequence.to_bytes(8)):
                self._end = at + _TOMBSTONE.size
                yield Tombstone(row_key, sequence)

    def add(self, row_key: bytes, sequence: int) -> None:
        """Record a deletion durably. Raises OSError."""
        if self._end + _TOMBSTONE.size > TOMBSTONES_BYTES:
            raise OSError(errno.ENOSPC, "all space for tombstones is used")
        mac = self.mac(row_key + sequence.to_bytes(8))
        os.pwrite(self._fd, _TOMBSTONE.pack(row_key, sequence, mac), self._end)
        os.fdatasync(self._fd)
        self._end += _TOMBSTONE.size
        self.present.append(Tombstone(row_key, sequence))

    def clear(self) -> None:
        """Remove all: the database has them. Raises OSError."""
        if self.present:
            os.pwrite(self._fd, bytes(self._end), 0)
            os.fdatasync(self._fd)
            self._end = 0
            self.present.clear()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
