# SPDX-License-Identifier: LGPL-2.1-or-later
"""Peers in cgroups of their own."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from secretd.access import units
from tests.support.needs import need, need_root
from tests.support.users import connect_as


@contextlib.contextmanager
def accepted(path: Path, **who: object) -> Iterator[socket.socket]:
    """The server's end of a connection, made as another user if one is given."""
    if who:
        need_root()  # before anything is opened
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path / "s"))
    listener.listen()
    if who:
        client = connect_as(str(path / "s"), **who)  # type: ignore[arg-type]
    else:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(path / "s"))
    server, _ = listener.accept()
    try:
        yield server
    finally:
        for sock in (listener, client, server):
            sock.close()


@contextlib.contextmanager
def cgroup(name: str) -> Iterator[str]:
    """A real cgroup below the mount point; what it is for may run in it."""
    need_root()
    mount = units._mount()
    need(mount is not None, "there are no version 2 cgroups")
    assert mount is not None
    made: list[str] = []
    directory = mount
    for part in name.strip("/").split("/"):
        directory = f"{directory}/{part}"
        if not os.path.exists(directory):
            try:
                os.mkdir(directory)
            except OSError as error:
                need(False, f"no cgroup can be made: {error.strerror}")
            made.append(directory)
    try:
        yield directory
    finally:
        for each in reversed(made):
            os.rmdir(each)


@contextlib.contextmanager
def running_in(directory: str, path: str) -> Iterator[None]:
    """A process in a cgroup, connected to a socket."""
    with subprocess.Popen(
        ["sh", "-c", 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"', "sh", directory,
         sys.executable, "-S", "-c", CONNECT, path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"connected\n"
        try:
            yield
        finally:
            process.communicate()


@contextlib.contextmanager
def process_in(directory: str, path: Path) -> Iterator[socket.socket]:
    """The server's end of a connection by a process in a cgroup."""
    need_root()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path / "s"))
        listener.listen()
        with running_in(directory, str(path / "s")):
            server, _ = listener.accept()
            with server:
                yield server


CONNECT = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
print("connected", flush=True)
sys.stdin.read()
"""
