# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory files with a content."""

import os


def memfd(content: bytes, size: int = 0) -> int:
    fd = os.memfd_create("test")
    os.ftruncate(fd, size)
    os.pwrite(fd, content, 0)
    return fd
