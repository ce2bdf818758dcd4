# SPDX-License-Identifier: LGPL-2.1-or-later
"""openat2(2), which Python lacks, for the one use that secretd has: paths without magic links.

Where the kernel refuses the call, `walk` resolves the path by hand: systemd's RestrictSUIDSGID=
refuses it always, since a filter cannot see its flags, and kernels before 5.6 lack it.
descriptors.source and qom.authz call this module.
"""

import ctypes
import errno
import os
import stat

_SYS_OPENAT2 = 437
_AT_FDCWD = -100
_RESOLVE_NO_MAGICLINKS = 0x02
_O_PATH = 0o10000000
_PROC_SUPER_MAGIC = 0x9FA0
_PROC_ROOT_INO = 1
_ST_NOSYMFOLLOW = 0x2000
_LINKS_MAX = 40
"""Symbolic links in one path (path_resolution(7))."""

_libc = ctypes.CDLL(None, use_errno=True)


def open_without_magic_links(path: bytes, flags: int) -> int:
    """Open a path unless it leads through a magic link such as /proc/PID/fd/N; return a descriptor.

    The caller closes the descriptor. Raises OSError, with ELOOP for a magic link.
    """
    how = (ctypes.c_uint64 * 3)(flags, 0, _RESOLVE_NO_MAGICLINKS)
    fd: int = _libc.syscall(_SYS_OPENAT2, _AT_FDCWD, path, ctypes.byref(how), ctypes.sizeof(how))
    if fd < 0:
        error = ctypes.get_errno()
        if error == errno.ENOSYS:
            return walk(path, flags)
        raise OSError(error, os.strerror(error))
    return fd


def walk(path: bytes, flags: int) -> int:
    """Open a path by hand: component by component, reading links instead of following them."""
    if not path:
        raise _error(errno.ENOENT)
    directory = _open_directory(path)
    try:
        rest = _parts(path)
        links = 0
        while True:  # there is always another component
            name = rest.pop(0)
            found = os.open(name, _O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                # 1. No link: open it, or continue in it.
                if not stat.S_ISLNK(os.fstat(found).st_mode):
                    if not rest:
                        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=directory)
                    directory, found = found, directory
                    continue
                # 2. A link: continue with its target, from here or from the root.
                links += 1
                if links > _LINKS_MAX:
                    raise _error(errno.ELOOP)
                _check_link(found, directory)
                target = os.readlink(b"", dir_fd=found)
            finally:
                os.close(found)
            if target.startswith(b"/"):
                root = _open_directory(target)
                os.close(directory)
                directory = root
            rest = _parts(target) + rest
    finally:
        os.close(directory)


def _open_directory(path: bytes) -> int:
    start = b"/" if path.startswith(b"/") else b"."
    return os.open(start, _O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _parts(path: bytes) -> list[bytes]:
    """Return the components; a trailing slash asks for a directory."""
    return [part for part in path.split(b"/") if part] + [b"."] * path.endswith(b"/")


def _check_link(link: int, directory: int) -> None:
    """Raise OSError for a link that the kernel would refuse.

    These are magic links (all in /proc except top-level ones such as self), links on a mount
    without links, and links of other users in a directory such as /tmp (proc_sys_fs(5),
    protected_symlinks).
    """
    buffer = (ctypes.c_long * 32)()
    if _libc.fstatfs(link, buffer):
        raise _error(ctypes.get_errno())
    status, place = os.fstat(link), os.fstat(directory)
    if buffer[0] == _PROC_SUPER_MAGIC and place.st_ino != _PROC_ROOT_INO:
        raise _error(errno.ELOOP)
    if os.fstatvfs(link).f_flag & _ST_NOSYMFOLLOW:
        raise _error(errno.ELOOP)
    shared = stat.S_ISVTX | stat.S_IWOTH
    if place.st_mode & shared == shared and status.st_uid not in (os.geteuid(), place.st_uid):
        raise _error(errno.EACCES)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
