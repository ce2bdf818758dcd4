# SPDX-License-Identifier: LGPL-2.1-or-later
"""The entry point of the program `secretd`, which prepares the process before other imports.

Descriptors 0 to 2 are opened, so that no later descriptor is taken for one of them. The C library
must bind functions at once: with lazy binding the resolver leaves the vector registers on the stack
at each first call, and with them the bytes that were copied last (_dl_runtime_resolve_xsavec() of
glibc's dl-trampoline.h). The linker decides that at exec, so the program executes itself again
unless the environment already asks for it, as the units do. Then process.main() runs.
"""

import os
import sys

from secretd.daemon.fast_start import fast_imports

BIND_NOW = "LD_BIND_NOW"
"""Environment variable that makes the dynamic linker resolve all functions at start (ld.so(8))."""

CLOSED = "SECRETD_CLOSED"
"""Environment variable from one incarnation to the next: which of descriptors 0 to 2 were
closed.
"""


def open_closed() -> list[int]:
    """Open /dev/null for each closed standard descriptor; return their numbers."""
    closed = []
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
            os.set_inheritable(fd, True)
            closed.append(fd)
    return closed


def bind_now() -> None:
    """Execute this program again with BIND_NOW, unless it is set."""
    if os.environ.get(BIND_NOW):
        return
    os.environ[BIND_NOW] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> int:
    """Prepare the process and run the daemon; return the exit status."""
    closed = open_closed()
    if closed:
        os.environ[CLOSED] = ",".join(map(str, closed))
    bind_now()
    with fast_imports():
        from secretd.daemon.process import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
