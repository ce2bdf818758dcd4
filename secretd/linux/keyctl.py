# SPDX-License-Identifier: LGPL-2.1-or-later
"""keyctl(2)'s KEYCTL_READ, which Python lacks, through ctypes and straight into locked memory.

descriptors.source calls it, for secret_keyring.
"""

import ctypes
import os
import platform
from typing import Final

_SYS_KEYCTL: Final = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "ppc64le": 271, "s390x": 280}
_KEYCTL_READ: Final = 11

_libc = ctypes.CDLL(None, use_errno=True)


def read(serial: int, into: memoryview | None) -> int:
    """Read the payload of a key; return its size in bytes.

    ``serial``: the key's number (int32). A payload larger than ``into`` is not read, nor is any if
    ``into`` is None. Raises OSError.
    """
    number = _SYS_KEYCTL[platform.machine()]
    address, room = None, 0
    if into is not None:
        address, room = ctypes.addressof(ctypes.c_char.from_buffer(into)), len(into)
    size: int = _libc.syscall(
        number,
        _KEYCTL_READ,
        ctypes.c_int32(serial),
        ctypes.c_void_p(address),
        ctypes.c_size_t(room),
    )
    if size < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return size
