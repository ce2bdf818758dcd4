# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connecting as another user, from this process."""

import ctypes
import os
import socket

from tests.support.needs import need_root

_SETID = {"x86_64": (117, 119, 116, 122), "aarch64": (147, 149, 159, 151)}


def connect_as(path: str, uid: int, gid: int, groups: tuple[int, ...] = ()) -> socket.socket:
    """Connect as another user: this thread becomes it for as long as that takes (setresuid(2) as
    the kernel has it is for one thread). Files are still opened as root.
    """
    need_root()
    libc = ctypes.CDLL(None, use_errno=True)
    setresuid, setresgid, setgroups, setfsuid = _SETID[os.uname().machine]
    sock = socket.socket(socket.AF_UNIX)

    def call(*arguments: object) -> None:
        if libc.syscall(*arguments):
            raise OSError(ctypes.get_errno(), "set*id")

    before = os.getgroups()

    def as_user() -> None:
        call(setgroups, len(groups), (ctypes.c_uint32 * len(groups))(*groups))
        call(setresgid, -1, gid, -1)
        call(setresuid, -1, uid, -1)
        libc.syscall(setfsuid, 0)
        try:
            sock.connect(path)
        finally:
            call(setresuid, -1, 0, -1)
            call(setresgid, -1, 0, -1)
            call(setgroups, len(before), (ctypes.c_uint32 * len(before))(*before))

    as_user()
    return sock
