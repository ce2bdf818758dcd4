# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the program `secretd` begins: what has to be so before anything else is imported.

Descriptors 0 to 2 are open, so that nothing is taken for one of them later. The C library binds
functions at once: bound lazily, the resolver leaves the vector registers on the stack when a
function is called for the first time, and with them what was copied last
(_dl_runtime_resolve_xsavec() of glibc's dl-trampoline.h). That is decided when a program starts, so
it is started anew where the environment does not say so; the units do. Then daemon.main() is
called.
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
    """Open /dev/null for each standard descriptor that is closed; return which were."""
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
    """Execute this program anew with BIND_NOW, unless it was."""
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
