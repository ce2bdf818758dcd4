# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs about the daemon itself: status, its configuration, and qmp-shell on its socket."""

import errno
import json
import os
import shutil
import sys

from secretd.client import default_socket
from secretd.ctl.connection import client_of
from secretd.ctl.output import Common, fail
from secretd.ctl.verb import COMMAND, PATH, argument, verb
from secretd.paths import OBJECTS_DIR


@verb("status")
def status(common: Common) -> None:
    """Print the daemon's version, socket, secrets and level."""
    with client_of(common) as client:
        secrets = [each for each in client.list() if not each.version]
        facts = {
            "daemon": client.version(),
            "socket": client.path,
            "secrets": len(secrets),
            "bytes": sum(s.size for s in secrets),
            "memory": ", ".join(sorted({s.memory for s in secrets})) or "-",
        }
    if common.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name:<8} {value}" for name, value in facts.items()))


@verb(
    "check-config",
    argument("directories", nargs=-1, type=PATH, metavar="[DIR]"),
    examples=("secretctl check-config", "secretctl check-config ./objects.d"),
)
def check_config(_common: Common, directories: tuple[str, ...]) -> int:
    """Check the objects that secretd adds at its start.

    DIR has their files (default: /etc/secretd/objects.d). They are read as secretd reads them, with
    the files that they name, and errors name file and line.
    """
    for each in directories:
        if not os.path.isdir(each):
            kind = errno.ENOTDIR if os.path.exists(each) else errno.ENOENT
            return fail(f"{each}: {os.strerror(kind)}")
    program = beside("secretd")
    if program is None:
        return fail("secretd was not found; it comes with secretctl")
    options = [f"--object-dir={each}" for each in directories or (OBJECTS_DIR,)]
    return os.execv(program, [program, "--check-config", *options])


def beside(name: str) -> str | None:
    """Return the path of a program that was installed with this one, or else in PATH; None if there
    is none.
    """
    # From an environment, from scripts/install, or from the system.
    places = (sys.executable, os.path.join(os.path.dirname(__file__), "..", "..", "bin", "here"))
    found = [os.path.join(os.path.dirname(place), name) for place in places]
    return next((p for p in found if os.access(p, os.X_OK)), shutil.which(name))


@verb(
    "shell",
    argument("arguments", nargs=-1, type=COMMAND),
    context_settings={"ignore_unknown_options": True},
)
def shell(common: Common, arguments: tuple[str, ...]) -> int:
    """Become qmp-shell on secretd's socket.

    ARGUMENTS are its options, such as -H. qmp-shell keeps what is typed in ~/.qmp-shell_history:
    type no secrets there.
    """
    program = beside("qmp-shell")
    if program is None:
        return fail("qmp-shell was not found; it comes with the Python package qemu.qmp")
    return os.execv(program, [program, *arguments, common.socket or default_socket()])
