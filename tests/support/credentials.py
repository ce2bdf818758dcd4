# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fetching a credential as systemd does."""

import os
import subprocess
import sys

from tests.support.daemon import Daemon

FETCH = """
import ctypes, os, socket, sys
path, address, uid, wait = sys.argv[1:]
sock = socket.socket(socket.AF_UNIX)
if address: sock.bind(eval(address))
place = os.open(path, os.O_PATH)  # others may not go through the directories
os.setuid(int(uid))
ctypes.CDLL(None).prctl(4, 1)
sock.connect(f"/proc/self/fd/{place}")
sock.shutdown(socket.SHUT_RDWR if wait == "shut" else socket.SHUT_WR)
if wait: print("connected", flush=True); sys.stdin.read(1)
while data := sock.recv(1 << 16): sys.stdout.buffer.write(data)
"""


def fetch(daemon: Daemon, unit: str, address: bytes, uid: int = 0) -> bytes:
    """What a unit gets that asks from an address."""
    command = words(daemon, unit, repr(address), uid)
    return subprocess.run(command, capture_output=True, check=True, timeout=20).stdout


def address(unit: str, name: str) -> bytes:
    """As systemd makes it."""
    return f"\0{os.urandom(8).hex()}/unit/{unit}/{name}".encode()


SLICE = f"/secretd-cred-{os.getpid()}.slice"


def words(daemon: Daemon, unit: str, address: str, uid: int, wait: str = "") -> list[str]:
    """A command that fetches a credential from within a cgroup."""
    return [
        "sh", "-c", 'echo $$ > "$1/cgroup.procs" && shift && exec "$@"', "sh", unit,
        sys.executable, "-S", "-c", FETCH, daemon.credentials, address, str(uid), wait,
    ]  # fmt: skip
