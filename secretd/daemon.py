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
import signal
import stat
import sys
from typing import NamedTuple

from secretd import __version__, keyval, paths
from secretd.access import Door
from secretd.commands import COMMANDS
from secretd.errors import CommandError, SecretdError, UsageError
from secretd.memory import (
    SCRATCH_RESERVE,
    SCRATCH_WINDOW,
    Arena,
    LockedBuffer,
    choose_level,
    forbid_dumps,
    limit_text,
)
from secretd.qom.object import ObjectTree
from secretd.qom.secret import SECRET_COMMON, Secret, SecretOptions
from secretd.qom.source import read_path
from secretd.schema import check
from secretd.server import Listener, Server, listen
from secretd.state import Journal
from secretd.wire import encode
from secretd.wire.qjson import Text

ARGV_FDS = "SECRETD_ARGV_FDS"
"""Environment variable from one incarnation to the next: memfds that hold what ``data=`` had."""

_EPILOG = """\
The control socket takes every command from uid 0 and the daemon's own uid; the client socket lets
programs fetch what they have been granted. With neither option both open at their defaults:
DIR/control.sock and DIR/client.sock, DIR being /run/secretd for root, else $XDG_RUNTIME_DIR/secretd.

SPEC of a socket is PATH[,mode=OCTAL][,group=NAME], a comma in PATH doubled.
SPEC of an object is as in QEMU:  secret,id=NAME,file=PATH[,format=raw|base64][,keyid=ID,iv=BASE64]
or the same as JSON.

examples:
  secretd
  secretd --object secret,id=sec0,file=passphrase.txt
  secretd --object secret,id=master0,format=base64,file=key.b64 \\
          --object secret,id=sec0,keyid=master0,format=base64,file=sec0.aes,iv=$(<iv.b64)
"""


class DoorSpec(NamedTuple):
    """What ``--control`` or ``--client`` says. ``mode`` is the socket's, ``gid`` -1 for no change."""

    door: Door
    path: str
    mode: int
    gid: int


_MODES = {Door.CONTROL: 0o600, Door.CLIENT: 0o666}


def main() -> int:
    """Run the daemon; return the exit status."""
    try:
        hide_data()
        options = _parse_options(_argv())
        return run(options)
    except (SecretdError, OSError) as error:
        print(f"secretd: {error}", file=sys.stderr)
        return 1


def _argv() -> list[str]:
    """QEMU's users type one dash."""
    one = ("-object", "-object=")
    return [f"-{word}" if word.startswith(one) else word for word in sys.argv[1:]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
    add("--version", action="version", version=f"secretd {__version__}")
    return parser


def _parse_options(words: list[str]) -> argparse.Namespace:
    """Parse; argparse would print unknown arguments whole, and a secret may stand in one."""
    parser = _parser()
    options, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].partition("=")[0]
        shown = f"option {name}" if name.startswith("-") else "argument"
        parser.error(f"unknown {shown}")
    return options


# --- before anything else: what stands in argv


def hide_data() -> None:
    """Run this program anew without the values of ``--object …data=``.

    They move to memfds that the next incarnation reads as files: the same process, but with no copy
    of them in its memory or in /proc/PID/cmdline.
    """
    words = _argv()
    fds: list[int] = []
    for index, word in enumerate(words):
        option, equals, text = word.partition("=")
        if option != "--object":
            continue
        if not equals:
            if index + 1 == len(words):
                continue
            text = words[index + 1]
        hidden = _without_data(text)
        if hidden is not None:
            fd, text = hidden
            fds.append(fd)
            if equals:
                words[index] = f"--object={text}"
            else:
                words[index + 1] = text
    if not fds:
        return
    print(
        "secretd: warning: --object with data= shows the secret to every user of this machine until "
        "secretd has started; use file= instead (a path, or <(command) in bash)",
        file=sys.stderr,
        flush=True,
    )
    os.environ[ARGV_FDS] = ",".join(map(str, fds))
    interpreter = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    os.execv(sys.executable, [*interpreter, *words])


def _without_data(text: str) -> tuple[int, str] | None:
    """Return a memfd with the value of ``data`` and the text that names it instead."""
    try:
        given = keyval.arguments(text)
    except UsageError:
        return None  # said again, with the option's name, when the objects are made
    data = given.pop("data", None)
    if not isinstance(data, Text):
        return None
    if "file" in given:
        raise UsageError("--object: 'file' and 'data' are mutually exclusive")
    value = data.decode_in_place()[1:-1]
    fd = os.memfd_create("secretd-argv", 0)
    with open(fd, "wb", closefd=False) as memfd:
        memfd.write(value)
    file = {"file": f"/dev/fd/{fd}"}
    if text.startswith("{"):
        return fd, encode.value(given | file)
    members = keyval.parse(text, "qom-type")
    del members["data"]
    return fd, keyval.compose(members | file, "qom-type")


def _argv_fds() -> list[int]:
    return [int(number) for number in filter(None, os.environ.pop(ARGV_FDS, "").split(","))]


def _close_argv_fds(fds: list[int]) -> None:
    for fd in fds:
        os.ftruncate(fd, 0)
        os.close(fd)


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
        tree = ObjectTree(journal, scratch, (Secret(),), (SECRET_COMMON,))
        hidden = _argv_fds()
        for number, text in enumerate(options.object, 1):
            make_object(tree, text, number, hidden)
        _close_argv_fds(hidden)
        asyncio.run(_serve(tree, doors))
    finally:
        journal.close()
        journal.arena.close()
        scratch.wipe()
    return 0


def make_object(tree: ObjectTree, text: str, number: int, hidden: list[int]) -> None:
    """Make the object that ``--object TEXT`` says, or raise UsageError naming the option.

    ``number``: which of the options it is, from 1. ``hidden``: descriptors that stand for data=.
    """

    def read(name: str) -> LockedBuffer:
        return read_path(name, tree.scratch, magic_links=True)

    try:
        options = check(COMMANDS.by_name["object-add"], keyval.arguments(text))
        tree.add(options, read)
    except (CommandError, UsageError) as error:
        if "data" in text:
            # It may hold a secret, and the words may quote a part of it.
            raise UsageError(
                f"--object number {number} (not shown, since it has data): {_unquoted(str(error))}; "
                "a comma in a value is written twice"
            ) from None
        raise UsageError(f"--object {text}: {error}") from None
    assert isinstance(options, SecretOptions)
    if options.file in [f"/dev/fd/{fd}" for fd in hidden]:
        record = tree.journal.get(options.id)
        assert record is not None
        tree.journal.set_properties(options.id, record.properties | {"file": ""})


def _unquoted(words: str) -> str:
    known = ("data", "file", "format", "keyid", "iv", "id", "qom-type")
    return re.sub("'([^']*)'", lambda m: m[0] if m[1] in known else "'…'", words)


def door_spec(door: Door, text: str) -> DoorSpec:
    """Read PATH[,mode=OCTAL][,group=NAME], or raise UsageError."""
    option = f"--{door.value} {text}"
    try:
        members = keyval.parse(text, "path")
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None
    path = members.pop("path", "")
    if not path:
        raise UsageError(f"{option}: the path of the socket is missing")
    mode, gid = _MODES[door], -1
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
    return DoorSpec(door, path, mode, gid)


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


async def _serve(tree: ObjectTree, doors: list[DoorSpec]) -> None:
    server = Server(tree, COMMANDS.by_name.values(), f"secretd {__version__}")
    opened: list[Listener] = []
    try:
        for spec in doors:
            listener = listen(spec.path, spec.door, spec.mode, spec.gid)
            opened.append(listener)
            server.add(listener)
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)
    await server.run(lambda: _say_ready(tree, doors))
    print("secretd: stopped; all secrets are wiped", file=sys.stderr)


_MEMORY = {
    "secretmem": "secretmem: secrets are in memfd_secret(2) memory, unseen even by root's /proc/PID/mem",
    "mlock": "mlock: secrets never reach swap or a core dump; root can read one copy of each",
    "none": "none: MEMORY IS NOT LOCKED and secrets may reach swap",
}


def _say_ready(tree: ObjectTree, doors: list[DoorSpec]) -> None:
    lines = [f"version {__version__}, {len(tree.journal)} objects"]
    lines += [f"{spec.door.value} socket  {spec.path}" for spec in doors]
    level = tree.journal.arena.level
    lines.append(f"memory {_MEMORY[level]}")
    if level == "none":
        lines.append(limit_text())
    control = next((spec.path for spec in doors if spec.door is Door.CONTROL), None)
    if control is not None:
        option = "" if control == paths.control_path() else f" --socket {control}"
        lines.append(f"try: secretctl{option} add disk0 --prompt   or: secretctl{option} --help")
    for line in lines:
        print(f"secretd: {line}", file=sys.stderr)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
