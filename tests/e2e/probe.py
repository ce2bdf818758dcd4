# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a process can do inside secretd's unit: tries each thing and prints, as JSON, what came of
it.

Run by test_systemd.py in place of secretd, in an otherwise equal unit.
"""

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import socket
import subprocess
from collections.abc import Callable

libc = ctypes.CDLL(None, use_errno=True)


def call(*arguments: object) -> int:
    result: int = libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def write_execute() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def ptrace() -> None:
    child = os.fork()
    if not child:
        os.read(os.pipe()[0], 1)
    try:
        if libc.ptrace(16, child, 0, 0):  # PTRACE_ATTACH
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def connect() -> None:
    with socket.socket() as sock:
        sock.settimeout(2)
        sock.connect(("127.0.0.1", 1))


def memfd_secret() -> None:
    os.close(call(447, 0))


def peer_lookup() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        os.close(int.from_bytes(ours.getsockopt(socket.SOL_SOCKET, 77, 4), "little"))


def log_file() -> None:
    with open("/var/log/secretd/probe", "w") as file:
        file.write("x")
    os.unlink("/var/log/secretd/probe")


def listing(path: str) -> Callable[[], None]:
    def look() -> None:
        if not os.listdir(path):
            raise FileNotFoundError(path)

    return look


TRIES: dict[str, Callable[[], object]] = {
    "network": connect,
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "exec": lambda: subprocess.run(["/bin/true"], check=True),
    "exec sh": lambda: subprocess.run(["/bin/sh", "-c", ":"], check=True),
    "exec copy": lambda: subprocess.run(["/tmp/probe"], check=True),
    "exec copy in log": lambda: subprocess.run(["/var/log/secretd/copy"], check=True),
    "exec copy in shm": lambda: subprocess.run(["/dev/shm/copy"], check=True),
    "ptrace": ptrace,
    "write and execute": write_execute,
    "read shadow": lambda: open("/etc/shadow").close(),
    "read home": listing("/root"),
    "read opt": listing("/opt"),
    "read dev": lambda: open("/dev/kmsg").close(),
    "write etc": lambda: open("/etc/probe", "w").close(),
    "write usr": lambda: open("/usr/probe", "w").close(),
    "write run": lambda: open("/run/secretd/probe", "w").close(),
    "write var": lambda: open("/var/lib/probe", "w").close(),
    "write cgroup": lambda: os.mkdir("/sys/fs/cgroup/probe"),
    "user namespace": lambda: call(272, 0x10000000),  # unshare
    "set uid": lambda: os.setuid(0),
    "mount": lambda: call(165, b"none", b"/tmp", b"tmpfs", 0, 0),
    "set clock": lambda: call(227, 0, (ctypes.c_long * 2)(0, 0)),
    "set limit": lambda: call(160, 7, (ctypes.c_ulong * 2)(64, 64)),  # setrlimit
    "read other memory": lambda: call(310, 1, 0, 0, 0, 0, 0),  # process_vm_readv
    "memfd_secret": memfd_secret,
    "peer lookup": peer_lookup,
    "log": log_file,
    "keyring": lambda: call(250, 0, -3, 0),  # KEYCTL_GET_KEYRING_ID of the session keyring
}


def main() -> None:
    for path in ("/tmp/probe", "/var/log/secretd/copy", "/dev/shm/copy"):
        with contextlib.suppress(OSError):
            shutil.copy("/bin/true", path)
    results = {}
    for name, attempt in TRIES.items():
        try:
            attempt()
            results[name] = "works"
        except (OSError, subprocess.CalledProcessError) as error:
            results[name] = type(error).__name__
    with open("/proc/self/coredump_filter") as file:
        results["dumped"] = file.read().strip()
    print("PROBE", json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
