# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `secretd`: its options, its start, its end.

Builds what the other modules provide and runs it; the only module that reads the command line of the
daemon. What it says on stderr is for the person who started it.
"""

import argparse
import asyncio
import contextlib
import grp
import logging
import os
import re
import resource
import shutil
import signal
import stat
import sys
from typing import NamedTuple

from secretd import __version__, argv, keyval, paths
from secretd.audit import Audit
from secretd.commands import COMMANDS
from secretd.errors import CommandError, SecretdError, UsageError
from secretd.memory import (
    SCRATCH_RESERVE,
    SCRATCH_WINDOW,
    Arena,
    choose_level,
    forbid_dumps,
    limit_text,
)
from secretd.options import QuietParser
from secretd.peer import Door
from secretd.qom.object import ObjectTree, with_hint
from secretd.qom.secret import SecretOptions, secret_plaintext
from secretd.qom.source import StartSources
from secretd.qom.typeinfo import ObjectOptions
from secretd.qom.types import TYPES
from secretd.schema import check
from secretd.server import Listener, Server, listen
from secretd.state import Journal
from secretd.wire.parser import Text

_EPILOG = """\
The control socket takes every command from uid 0 and the daemon's own uid; the client socket gives each
program the secrets that secret-grant objects let it read. With neither option both open at their
defaults, control.sock and client.sock in /run/secretd for root, else $XDG_RUNTIME_DIR/secretd, else
$TMPDIR/secretd-UID.

SPEC of a socket is PATH[,mode=OCTAL][,group=NAME], a comma in PATH doubled. With authz=ID in the SPEC
of a control socket, those whom that authz object allows may use it too, with all rights.
SPEC of an object is as in QEMU:  secret,id=NAME,file=PATH[,format=raw|base64][,keyid=ID,iv=BASE64]
or the same as JSON; --object help lists the types, --object TYPE,help what each takes.

examples:
  secretd
  secretd --object secret,id=sec0,file=passphrase.txt
  secretd --object secret,id=master0,format=base64,file=key.b64 \\
          --object secret,id=sec0,keyid=master0,format=base64,file=sec0.aes,iv=$(<iv.b64)
"""


class DoorSpec(NamedTuple):
    """What ``--control`` or ``--client`` says. ``mode`` is the socket's, ``gid`` -1 for no change;
    ``authz``: the object that says who else may use a control socket.
    """

    door: Door
    path: str
    mode: int
    gid: int
    authz: str | None = None


_MODES = {Door.CONTROL: 0o600, Door.CLIENT: 0o666}


def main() -> int:
    """Run the daemon; return the exit status."""
    try:
        argv.hide_data()
        options = _parser().parse_args(argv.words())
        return run(options)
    except (SecretdError, OSError) as error:
        print(f"secretd: {error}", file=sys.stderr)
        return 1


def _parser() -> QuietParser:
    parser = QuietParser(
        prog="secretd",
        description="Keep secrets in locked memory and hand them out through descriptors, over QMP.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--control", action="append", default=[], metavar="SPEC", help="open a control socket")
    add("--client", action="append", default=[], metavar="SPEC", help="open a client socket")
    add("--object", action="append", default=[], metavar="SPEC", help="make an object at start")
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
        help="where the audit goes, a line of JSON for each thing done (default: -, which is stderr)",
    )
    add(
        "--audit-policy",
        choices=("best-effort", "require"),
        default="best-effort",
        help="require: release a secret only when its audit record is written (default: best-effort)",
    )
    add(
        "--audit-key",
        metavar="ID",
        help="the secret under which audit records are chained, so that nobody else can make some up",
    )
    add("--version", action="version", version=f"secretd {__version__}")
    return parser


# --- start


def run(options: argparse.Namespace) -> int:
    """Start, serve, stop."""
    logging.basicConfig(format="secretd: %(message)s", level=logging.INFO)
    forbid_dumps()
    _raise_descriptor_limit()
    doors = [
        door_spec(door, text)
        for door, texts in ((Door.CONTROL, options.control), (Door.CLIENT, options.client))
        for text in texts
    ] or _default_doors()
    level = choose_level(require=options.memory_lock == "require")
    scratch = Arena(level, window=SCRATCH_WINDOW, reserve=SCRATCH_RESERVE)
    journal = Journal(Arena(level))
    try:
        tree = ObjectTree(journal, scratch, TYPES)
        hidden = argv.hidden_fds()
        for number, text in enumerate(options.object, 1):
            if not make_object(tree, text, number, hidden):
                return 0
        argv.close(hidden)
        audit = _audit(tree, options)
        try:
            asyncio.run(_serve(tree, doors, audit))
        finally:
            audit.stop()
    finally:
        journal.close()
        journal.arena.close()
        scratch.wipe()
    print("secretd: stopped; all secrets are wiped", file=sys.stderr)
    return 0


AUDIT_KEY_BYTES = 16
"""Bytes of the shortest audit key."""


def _audit(tree: ObjectTree, options: argparse.Namespace) -> Audit:
    """Open the audit. Its key cannot be deleted from then on."""
    key_id: str | None = options.audit_key
    key = None
    if key_id is not None:
        if options.audit == "none":
            raise UsageError("--audit-key needs --audit")
        try:
            size = len(secret_plaintext(tree, key_id))
        except CommandError as error:
            raise UsageError(f"--audit-key={key_id}: {error.desc}") from None
        if size < AUDIT_KEY_BYTES:
            raise UsageError(
                f"--audit-key={key_id}: the secret has {size} bytes; {AUDIT_KEY_BYTES} at least are needed"
            )
        tree.pinned.add(key_id)

        def key() -> memoryview:
            return tree.journal.plaintext(key_id)

    return Audit(options.audit, require=options.audit_policy == "require", key=key)


def make_object(tree: ObjectTree, text: str, number: int, hidden: list[int]) -> bool:
    """Make the object that ``--object TEXT`` says, or raise UsageError naming the option.

    ``number``: which of the options it is, from 1. ``hidden``: descriptors that stand for data=.
    Returns False if help was asked for, and printed.
    """
    try:
        options = add_object(tree, text)
    except UsageError as error:
        if _may_be_shown(text, hidden):
            raise UsageError(f"--object {text}: {error}") from None
        # Its words may quote a part of it.
        words = f"{argv.unnamed(number)}: {_unquoted(str(error))}"
        raise UsageError(f"{words}; {argv.DOUBLED}" if "…" in words else words) from None
    if isinstance(options, SecretOptions) and options.file in [f"/dev/fd/{fd}" for fd in hidden]:
        record = tree.journal.get(options.id)
        assert record is not None
        tree.replace_properties(options.id, record.properties | {"file": ""})
    return options is not None


def add_object(tree: ObjectTree, text: str) -> ObjectOptions | None:
    """Make the object of ``--object TEXT`` and return its options; None if it asks for help.

    Help is printed. Raises UsageError in QEMU's words.
    """
    given = keyval.arguments(keyval.buffer(text))
    if given.help:
        print(tree.types.help(given.members.get("qom-type")), end="")
        return None
    try:
        options = check(COMMANDS.by_name["object-add"], given.members, given.visitor)
        assert isinstance(options, ObjectOptions)
        tree.add(options, StartSources(tree.scratch))
    except CommandError as error:
        raise UsageError(with_hint(error.desc)) from None
    return options


def _may_be_shown(text: str, hidden: list[int]) -> bool:
    """True if nothing in the text of an object, as it stands now or as it was typed, is a secret."""
    try:
        given = keyval.arguments(keyval.buffer(text)).members
    except UsageError:
        return False
    file = given.get("file")
    typed = not isinstance(file, Text) or file.to_str() not in [f"/dev/fd/{fd}" for fd in hidden]
    return typed and given.keys() <= argv.MEMBERS


def _unquoted(words: str) -> str:
    known = {*argv.MEMBERS, "data", "="}
    return re.sub("'([^']*)'", lambda m: m[0] if m[1] in known else "'…'", words)


def door_spec(door: Door, text: str) -> DoorSpec:
    """Read PATH[,mode=OCTAL][,group=NAME], or raise UsageError."""
    option = f"--{door.value} {text}"
    try:
        # Unlike a type's name, a path may have commas.
        members = keyval.parse(text if text.startswith("path=") else f"path={text}", "path")
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None
    path = members.pop("path", "")
    if not path:
        raise UsageError(f"{option}: the path of the socket is missing")
    mode, gid = _MODES[door], -1
    authz = members.pop("authz", None) if door is Door.CONTROL else None
    if authz is not None:
        mode = 0o666  # who may use it is decided at accept
    if "mode" in members:
        try:
            mode = int(members.pop("mode"), 8)
        except ValueError:
            raise UsageError(f"{option}: mode expects an octal number such as 0660") from None
    if "group" in members:
        name = members.pop("group")
        try:
            gid = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
        except KeyError:
            raise UsageError(f"{option}: there is no group '{name}'") from None
    if members:
        raise UsageError(f"{option}: Parameter '{next(iter(members))}' is unexpected")
    return DoorSpec(door, path, mode, gid, authz)


def _default_doors() -> list[DoorSpec]:
    directory = paths.default_directory()
    own = not paths.has_runtime_directory()
    with contextlib.suppress(FileExistsError):
        try:
            os.mkdir(directory, 0o700 if own else 0o755)
        except FileNotFoundError as error:
            raise UsageError(f"{directory}: {os.strerror(error.errno or 0)}") from None
    status = os.lstat(directory)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UsageError(f"{directory}: is not a directory of uid {os.getuid()}; remove it")
    if own and status.st_mode & 0o077:
        raise UsageError(f"{directory}: others may enter it; run 'chmod 700 {directory}'")
    return [
        DoorSpec(Door.CONTROL, paths.control_path(), _MODES[Door.CONTROL], -1),
        DoorSpec(Door.CLIENT, paths.client_path(), _MODES[Door.CLIENT], -1),
    ]


def _raise_descriptor_limit() -> None:
    """A message may bring 253 descriptors; the soft limit is often 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(tree: ObjectTree, doors: list[DoorSpec], audit: Audit) -> None:
    server = Server(tree, COMMANDS.by_name.values(), f"secretd {__version__}", audit)
    opened: list[Listener] = []
    try:
        for spec in doors:
            listener = listen(spec.path, spec.door, spec.mode, spec.gid, spec.authz)
            opened.append(listener)
            server.add(listener)
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    loop.add_signal_handler(signal.SIGHUP, _reopen, audit)

    def ready() -> None:
        audit.start(__version__, len(tree.journal))
        for object_id in tree.journal:
            kind = tree.type_of(object_id)
            assert kind is not None
            audit.note("add", id=object_id, type=kind.info.name, door="command line")
        _say_ready(tree, doors)

    await server.run(ready)


def _reopen(audit: Audit) -> None:
    """SIGHUP: the audit file was moved away."""
    try:
        audit.reopen()
    except UsageError as error:
        logging.getLogger("secretd").error("%s; the old file goes on", error)


_MEMORY = {
    "secretmem": "secretmem (memfd_secret(2), unseen even by root's /proc/PID/mem)",
    "mlock": "mlock (never in swap or a core dump; root can read one copy of each secret)",
    "none": "none: MEMORY IS NOT LOCKED, secrets may reach swap (--memory-lock=require refuses this)",
}


def _say_ready(tree: ObjectTree, doors: list[DoorSpec]) -> None:
    count = len(tree.journal)
    lines = [f"version {__version__}, {count} object{'' if count == 1 else 's'}"]
    lines += [f"{spec.door.value + ' socket':<15} {spec.path}" for spec in doors]
    level = tree.journal.arena.level
    lines.append(f"{'memory':<15} {_MEMORY[level]}")
    if level == "none":
        lines.append(limit_text())
    control = next((spec.path for spec in doors if spec.door is Door.CONTROL), None)
    if control is not None:
        tool = "secretctl"
        if shutil.which(tool) is None:
            tool = os.path.join(os.path.dirname(sys.executable), tool)
        option = "" if control == paths.control_path() else f" --socket {control}"
        lines.append(f"try: {tool}{option} add disk0 --prompt   or: {tool} --help")
    for line in lines:
        print(f"secretd: {line}", file=sys.stderr)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
