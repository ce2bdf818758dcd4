# SPDX-License-Identifier: LGPL-2.1-or-later
"""Compare this checkout with an older commit: both take turns under the same load."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rig import HERE, ROOT, Machine, Row, Server, master, ratio_row

from tests.support.qmp import Client


def exported(machine: Machine, revision: str) -> Path:
    """Write the tree of a commit into a directory of its own."""
    tree = machine.directory / "tree"
    tree.mkdir()
    archive = subprocess.Popen(
        ["git", "-C", str(ROOT), "archive", revision, "secretd"], stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x", "-C", str(tree)], stdin=archive.stdout, check=True)
    if archive.wait():
        raise SystemExit(f"scripts/bench: git has no commit '{revision}'")
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(tree)], check=True)
    return tree


def start(machine: Machine, tree: Path, name: str) -> Server:
    """Start the secretd of a tree with its defaults, and its audit in a file."""
    path = machine.path()
    command = [sys.executable, str(HERE / "start.py"), str(tree), "--control", path]
    return Server(name, [*command, f"--audit={machine.path('audit')}"], path)


def compared(machine: Machine, revision: str) -> Iterator[Row]:
    """Return rates of this checkout and of a commit, the rate of the C server beside them."""
    ours = start(machine, ROOT, "this checkout")
    theirs = start(machine, exported(machine, revision), revision)
    least = machine.least()
    seconds = str(machine.seconds)
    aes = (f"DATA={machine.sealed}", f"IV={machine.iv}")
    try:
        for server in (ours, theirs):
            master(server)
            with contextlib.closing(Client(server.path)) as client:
                client.add("held", data="x" * 32)
        for title, words in (
            ("object-add + object-del, 32 bytes", ("pair", seconds, "1", "1")),
            ("the same, AES-256-CBC by keyid", ("aes", seconds, "1", "1", *aes)),
            ("pipelined, window 64, pairs", ("pair", seconds, "64", "1")),
            ("query-version", ("version", seconds, "1", "1")),
            ("getfd + closefd", ("fd", seconds, "1", "1")),
            ("4 KiB secret, inline", ("pair", seconds, "1", "1", "SIZE=4096")),
            ("secret-read into a pipe", ("read", seconds, "1", "1")),
            ("100 clients at once, pairs", ("pair", seconds, "1", "100")),
        ):
            servers = [ours, theirs] + [least] * (words[0] in {"pair", "version", "read"})
            found = machine.compare(servers, *words)
            mine, other = found[ours.name], found[theirs.name]
            note = f"{mine.cpu:.1f} µs of processor time, {revision} {other.cpu:.1f}"
            if least.name in found:
                note += f", {least.name} {found[least.name].cpu:.1f}"
            yield ratio_row(title, mine.rate, other.rate, 1.0, "/s", revision, note=note)
    finally:
        for server in (ours, theirs, least):
            server.stop()
