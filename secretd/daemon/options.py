# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of secretd, with an argparse that does not print unknown arguments.

A mistyped argument may hold a secret. daemon.process calls `parser`.
"""

import argparse
from collections.abc import Sequence

from secretd import __version__


class QuietParser(argparse.ArgumentParser):
    """Names an unknown option without its value, and an unknown argument not at all."""

    def parse_args(  # type: ignore[override]  # the overload with a namespace is not used
        self, args: Sequence[str] | None = None
    ) -> argparse.Namespace:
        """Return the options, or end the process with status 2 and a usage message."""
        options, unknown = self.parse_known_args(args)
        if unknown:
            name = unknown[0].partition("=")[0]
            shown = f"option {name}" if name.startswith("-") else "argument"
            self.error(f"unknown {shown} (secrets are not given as arguments)")
        return options


_EPILOG = """\
The control socket accepts every command from uid 0 and the daemon's own uid.
The client socket gives each program the secrets that secret-grant objects let it read.
The credentials socket gives systemd's units the secrets that their LoadCredential= names.
Without these options, and without sockets from systemd, secretd opens control.sock and
client.sock in /run/secretd for root, else $XDG_RUNTIME_DIR/secretd, else $TMPDIR/secretd-UID.

SPEC of a socket is PATH[,mode=OCTAL][,group=NAME]; double each comma in PATH. A control socket
with authz=ID also admits the peers that this authz object allows, with all rights.
With protocol=jsonrpc a control or client socket speaks JSON-RPC 2.0 instead of QMP.
SPEC of an object is QEMU's: secret,id=NAME,file=PATH[,format=raw|base64][,keyid=ID,iv=BASE64],
or the same as JSON; --object help lists the types, --object TYPE,help their properties.

examples:
  secretd
  secretd --object secret,id=sec0,file=passphrase.txt
  secretd --object secret,id=master0,format=base64,file=key.b64 \\
          --object secret,id=sec0,keyid=master0,format=base64,file=sec0.aes,iv=$(<iv.b64)
"""


def parser() -> QuietParser:
    """Return the parser of the command line."""
    made = QuietParser(
        prog="secretd",
        description="Keep secrets in locked memory, and hand them out through descriptors.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # Sockets and objects, then policies, then the audit.
    add = made.add_argument
    add("--control", action="append", default=[], metavar="SPEC", help="open a control socket")
    add("--client", action="append", default=[], metavar="SPEC", help="open a client socket")
    add(
        "--credentials",
        action="append",
        default=[],
        metavar="SPEC",
        help="open a credentials socket, for LoadCredential= of systemd's units",
    )
    add("--object", action="append", default=[], metavar="SPEC", help="add an object at start")
    add(
        "--object-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="add the objects of all files *.json in a directory at start, after those of --object",
    )
    add(
        "--object-policy",
        choices=("best-effort", "require"),
        default="require",
        help="best-effort: start without objects that cannot be added (default: require)",
    )
    add(
        "--memory",
        choices=("auto", "secretmem", "mlock"),
        default="auto",
        help="where secrets lie; secretmem keeps them even from root, and the machine from "
        "hibernating (default: auto, which is secretmem where the kernel has it, else mlock)",
    )
    add(
        "--memory-lock",
        choices=("prefer", "require"),
        default="prefer",
        help="require: refuse to start where memory cannot be locked (default: prefer)",
    )
    add(
        "--audit",
        default="-",
        metavar="FILE|-|none",
        help="where to write the audit, one line of JSON for each event (default: -, which is "
        "stderr)",
    )
    add(
        "--audit-policy",
        choices=("best-effort", "require"),
        default="best-effort",
        help="require: release a secret only when its audit record is written (default: "
        "best-effort)",
    )
    add(
        "--audit-key",
        metavar="ID",
        help="the secret under which audit records are chained, so that they cannot be forged",
    )
    add(
        "--check-config",
        action="store_true",
        help="add all objects, say what is wrong, and end without serving",
    )
    add("--version", action="version", version=f"secretd {__version__}")
    return made
