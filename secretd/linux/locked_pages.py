# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages of locked memory from the kernel: memfd_secret(2), mlock(2), madvise(2).

Code sees memoryviews of a mapping, made with PyMemoryView_FromMemory. An `mmap` object would return
copies when sliced, and keeps a duplicate of the descriptor. memory decides what lies where, and
wipes.
"""

import ctypes
import errno
import mmap
import os
import resource
from typing import Literal

from secretd.errors import LockedMemoryExhausted

Level = Literal["secretmem", "mlock", "none"]

SYS_MEMFD_SECRET = 447
"""memfd_secret(2), Linux 5.14; the same number on every architecture."""

FILE_BYTES = 64 << 30
"""Bytes of each arena's file. memfd_secret cannot be resized; only mapped pages count as locked."""

_MADV_DONTFORK = 10
_MADV_DONTDUMP = 16
_PR_SET_DUMPABLE = 4
_PYBUF_WRITE = 0x200
_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_view_of = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of.restype = ctypes.py_object
_view_of.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]


def forbid_dumps() -> None:
    """Make this process write no core file, and refuse ptrace and /proc/PID/mem without
    CAP_SYS_PTRACE.

    prctl(2) PR_SET_DUMPABLE, setrlimit(2) RLIMIT_CORE.
    """
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def map_pages(fd: int, offset: int, length: int, level: Level) -> tuple[int, memoryview]:
    """Map a part of a file so that it stays out of swap, core dumps and child processes.

    ``offset`` and ``length`` are bytes. Returns the address and a writable view. Raises
    LockedMemoryExhausted.
    """
    address = _libc.mmap(
        None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, offset
    )
    if address == _MAP_FAILED:
        raise _exhausted(length, ctypes.get_errno())
    if level == "mlock" and _libc.mlock(address, length) != 0:
        error = ctypes.get_errno()
        _libc.munmap(address, length)
        raise _exhausted(length, error)
    _libc.madvise(address, length, _MADV_DONTFORK)
    _libc.madvise(address, length, _MADV_DONTDUMP)
    return address, _view_of(address, length, _PYBUF_WRITE)


def unmap_pages(address: int, length: int) -> None:
    """Undo `map_pages`. The pages keep their content: wipe first."""
    _libc.munmap(address, length)


def open_file(level: Level) -> int:
    """Return a new file of FILE_BYTES with pages of this level; the caller closes it. Raises
    OSError.
    """
    # The name appears only in /proc/PID/maps, and says nothing about the content.
    fd = _memfd_secret() if level == "secretmem" else os.memfd_create("secretd", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, FILE_BYTES)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _memfd_secret() -> int:
    fd: int = _libc.syscall(SYS_MEMFD_SECRET, os.O_CLOEXEC)
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return fd


def limit_text() -> str:
    """Return a text with the value of RLIMIT_MEMLOCK and how to raise it."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    value = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft} bytes"
    return f"RLIMIT_MEMLOCK is {value}; raise it with LimitMEMLOCK= in the unit or 'ulimit -l'"


def _exhausted(length: int, error: int) -> LockedMemoryExhausted:
    if error not in (errno.EAGAIN, errno.ENOMEM, errno.EPERM):
        return LockedMemoryExhausted(f"Unable to map {length} bytes: {os.strerror(error)}")
    return LockedMemoryExhausted(
        f"No locked memory left for another {length} bytes: {limit_text()}"
    )
