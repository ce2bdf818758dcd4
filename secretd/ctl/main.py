# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `secretctl`: its start, and its errors."""

import errno
import os
import sys

from secretd.ctl import words
from secretd.ctl.output import INTERRUPTED, REFUSED, USAGE, fail
from secretd.ctl.verb import WrongUsage, carry_out
from secretd.errors import SecretdError


def main() -> int:
    """Run `secretctl`; return the exit status."""
    _open_closed()
    try:
        status = _run()
        sys.stdout.flush()
    except WrongUsage as error:
        fail(str(error))
        print(f"secretctl: 'secretctl {error.verb} --help' explains it", file=sys.stderr)
        return USAGE
    except SecretdError as error:
        return fail(str(error))
    except BrokenPipeError:  # the reader has ended, as 'head' does
        _drop_output()
        return REFUSED
    except OSError as error:
        _drop_output()
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        if error.errno in (errno.EBADF, errno.ENOSPC, errno.EIO) and not where:
            where = "standard output: "
        return fail(f"{where}{error.strerror or error}")
    else:
        return status


def _run() -> int:
    """Call the verb of a usual command line; let click read any other."""
    usual = None if "_SECRETCTL_COMPLETE" in os.environ else words.read(sys.argv[1:])
    if usual is None:
        from secretd.ctl import frame

        return frame.run()
    try:
        return carry_out(*usual)
    except (KeyboardInterrupt, EOFError):
        print(file=sys.stderr)
        return INTERRUPTED


def _open_closed() -> None:
    """Open /dev/null for each closed standard descriptor, so that no later one is taken for it.

    Output to a closed standard output is then an error and not lost, as with GNU coreutils.
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, flags)  # the lowest free number
            assert opened == fd
            if fd == 1:
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for as long as the process runs
            elif fd == 2:
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _drop_output() -> None:
    """Keep the interpreter from writing failed output again at its end."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.close(devnull)


if __name__ == "__main__":
    sys.exit(main())
