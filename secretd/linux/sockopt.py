# SPDX-License-Identifier: LGPL-2.1-or-later
"""Socket options and questions that Python's socket module lacks; none of them waits for a peer.

`domain` takes a descriptor's number, since creating a Python socket calls getsockname(2), which
takes the lock of a TCP socket. The others decide whether peers may send descriptors (SO_PASSRIGHTS,
Linux 6.16), and find unread descriptors in a connection. net, descriptors and server call this
module.
"""

import contextlib
import ctypes
import fcntl
import os
import re
import socket
from typing import Final

SO_DOMAIN: Final = 39
SO_PEEK_OFF: Final = 42
SO_PASSRIGHTS: Final = 83

_SIOCINQ: Final = 0x541B
_PEEKS: Final = 64  # more than a socket's buffer holds, at 8 KiB each

_libc = ctypes.CDLL(None, use_errno=True)
_libc.getsockopt.argtypes = [
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
]


def domain(fd: int) -> int:
    """Return the address family of a borrowed socket (socket(7), SO_DOMAIN). Raises OSError.

    The kernel answers without the socket's lock (sk_getsockopt() of net/core/sock.c), which a peer
    can hold for any time.
    """
    value, size = ctypes.c_int(), ctypes.c_uint32(ctypes.sizeof(ctypes.c_int))
    if _libc.getsockopt(fd, socket.SOL_SOCKET, SO_DOMAIN, ctypes.byref(value), ctypes.byref(size)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return value.value


def permit_descriptors(sock: socket.socket, *, permit: bool) -> None:
    """Permit or forbid the peer of an AF_UNIX socket to send descriptors (SO_PASSRIGHTS).

    A forbidden peer's sendmsg(2) fails with EPERM. Connections inherit the option from their
    listener. Does nothing before Linux 6.16.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, int(permit))


def keep_urgent_inline(sock: socket.socket) -> None:
    """Receive MSG_OOB bytes in order (SO_OOBINLINE).

    Otherwise recvmsg(2) skips such a byte and closes its descriptors inside the caller's thread
    (manage_oob() of net/unix/af_unix.c).
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def unread_bytes(fd: int) -> int:
    """Return the number of unread bytes in a borrowed socket (SIOCINQ)."""
    return int.from_bytes(fcntl.ioctl(fd, _SIOCINQ, b"\0" * 4), "little")


def peek(sock: socket.socket, into: memoryview) -> tuple[int, bool]:
    """Report what the next recvmsg(2) into the same view would receive, without receiving it.

    Returns the number of bytes, 0 at the end, and whether descriptors come with them. Raises
    BlockingIOError if there is nothing. Peeking installs no descriptor and closes none
    (scm_recv_unix() of net/core/scm.c).
    """
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
    count, _, found, _ = sock.recvmsg_into((into,), 0, flags)
    return count, bool(found & socket.MSG_CTRUNC)


def holds_descriptors(sock: socket.socket, scratch: memoryview) -> bool:
    """Return True if a connection that was shut down has unread descriptors, or may have some.

    ``scratch``: the view through which the unread bytes pass.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        for _ in range(_PEEKS):
            count, descriptors = peek(sock, scratch)
            if descriptors or not count:
                return descriptors
    except BlockingIOError:
        return False
    except OSError:  # a peer that closed with unread bytes leaves a reset, for example
        return True
    return True


def kernel_version() -> tuple[int, int]:
    """Return the first two numbers of the kernel's release."""
    major, minor = re.match(r"(\d+)\.(\d+)", os.uname().release).groups()  # type: ignore[union-attr]
    return int(major), int(minor)
