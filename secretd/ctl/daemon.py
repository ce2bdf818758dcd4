# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs about the daemon itself: status, and qmp-shell on its socket."""

import json
import os
import shutil
import sys

from secretd.client import default_socket
from secretd.ctl.connection import client_of
from secretd.ctl.output import Common, fail
from secretd.ctl.verb import COMMAND, argument, verb


@verb("status")
def status(common: Common) -> None:
    """Print the daemon's version, socket, secrets and level."""
    with client_of(common) as client:
        secrets = client.list()
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
    "shell",
    argument("arguments", nargs=-1, type=COMMAND),
    context_settings={"ignore_unknown_options": True},
)
def shell(common: Common, arguments: tuple[str, ...]) -> int:
    """Become qmp-shell on secretd's socket.

    ARGUMENTS are its options, such as -H. qmp-shell keeps what is typed in ~/.qmp-shell_history:
    type no secrets there.
    """
    # From an environment, from scripts/install, or from the system.
    places = (sys.executable, os.path.join(os.path.dirname(__file__), "..", "..", "bin", "here"))
    beside = [os.path.join(os.path.dirname(place), "qmp-shell") for place in places]
    program = next((p for p in beside if os.access(p, os.X_OK)), shutil.which("qmp-shell"))
    if program is None:
        return fail("qmp-shell was not found; it comes with the Python package qemu.qmp")
    return os.execv(program, [program, *arguments, common.socket or default_socket()])
