# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of another uid that passes descriptors which block whoever touches them. Run as a program.

hostile.py SOCKET KIND ACT UID prints a line when it has done what it can, and holds on until its stdin
ends. KIND: mutex (a pipe whose mutex is held by a splice from a terminal), linger (a TCP socket with
SO_LINGER and unsent data), fuse (a file of a file system that never answers), opath (an O_PATH descriptor of
a file that this uid cannot read). ACT: write (secret-read to it), read (object-add from it, on a control
door), drop (pass it and let it go).
"""

import contextlib
import ctypes
import json
import os
import pty
import socket
import struct
import sys
import threading
from collections.abc import Callable

DESCRIPTORS_PER_MESSAGE = 253


def mutex() -> int:
    """The write end of a pipe whose mutex a thread of this process holds for good."""
    source, sink = os.pipe()
    master, slave = pty.openpty()
    HELD.update(source=source, sink=sink, master=master)
    threading.Thread(target=os.splice, args=(slave, sink, 4096), daemon=True).start()
    # Until the splice waits for the terminal with the mutex held.
    ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: so that this process sees its own threads
    while not any("wait_woken" in state or "tty" in state for state in wchans()):
        pass
    return sink


def wchans() -> list[str]:
    """Where the threads of this process wait in the kernel."""
    found = []
    for thread in os.listdir("/proc/self/task"):
        with (
            contextlib.suppress(FileNotFoundError),  # it has ended
            open(f"/proc/self/task/{thread}/wchan") as file,
        ):
            found.append(file.read())
    return found


def linger() -> int:
    """A TCP socket whose close waits for data to be sent that nobody takes."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
    sock.connect(listener.getsockname())
    other, _ = listener.accept()
    other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(1 << 16))
    KEPT.extend((listener, other))
    return sock.detach()


KEPT: list[object] = []
HELD: dict[str, int] = {}


def let_go() -> bytes:
    """Release the mutex; return all that is written to the pipe until nobody has it any more."""
    os.write(HELD["master"], b"\n" * 4)
    while any("wait_woken" in state or "tty" in state for state in wchans()):
        pass
    os.close(HELD["sink"])
    received = b""
    while data := os.read(HELD["source"], 1 << 16):
        received += data
    return received


def fuse(prepared: str) -> int:
    """A file of a FUSE file system whose server answers no more, opened before that."""
    return int(prepared)


def serve_fuse(mountpoint: str) -> int:
    """Mount a file system (as root), open its file, answer nothing from then on; return the file."""
    device = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"hostile", mountpoint.encode(), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    opened: list[int] = []

    def open_file() -> None:
        opened.append(os.open(f"{mountpoint}/file", os.O_RDWR))

    opener = threading.Thread(target=open_file)
    opener.start()
    attributes = struct.pack(
        "<QQQQQQIIIIIIIIII", 2, 5, 0, 0, 0, 0, 0, 0, 0, 0o100666, 1, 0, 0, 0, 4096, 0
    )
    while True:
        request = os.read(device, 1 << 17)
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        if opcode == 26:  # FUSE_INIT
            answer = struct.pack(
                "<IIIIHHIIHHI", 7, 31, 1 << 16, 0, 12, 9, 4096, 1, 0, 0, 0
            ) + bytes(28)
        elif opcode == 1:  # FUSE_LOOKUP
            answer = struct.pack("<QQQQII", 2, 0, 1 << 20, 0, 0, 0) + attributes
        elif opcode == 3:  # FUSE_GETATTR
            directory = struct.pack(
                "<QQQQQQIIIIIIIIII", 1, 5, 0, 0, 0, 0, 0, 0, 0, 0o40777, 1, 0, 0, 0, 4096, 0
            )
            answer = struct.pack("<QII", 1 << 20, 0, 0) + (directory if node == 1 else attributes)
        elif opcode == 14:  # FUSE_OPEN
            answer = struct.pack("<QII", 1, 1, 0)  # with direct I/O
        else:
            answer = b""
        os.write(device, struct.pack("<IiQ", 16 + len(answer), 0, unique) + answer)
        if opcode == 14:
            break
    opener.join()
    KEPT.append(device)
    return opened[0]


def ask(sock: socket.socket, command: str, arguments: dict, fds: list[int]) -> None:
    """Send a command with descriptors; the reply is not waited for."""
    data = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
    if fds:
        socket.send_fds(sock, [data], fds)
    else:
        sock.sendall(data)


def act(path: str, act_name: str, fd: int) -> None:
    """Do it four times over and more, so that all threads that this uid may have are stuck."""
    for number in range(8):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        sock.settimeout(5)
        with contextlib.suppress(OSError):
            sock.recv(1 << 16)
            ask(sock, "qmp_capabilities", {}, [])
            sock.recv(1 << 16)
            if act_name == "write":
                ask(sock, "secret-read", {"id": "granted"}, [fd])
            elif act_name == "read":
                ask(sock, "add-fd", {"fdset-id": 0}, [fd])
                sock.recv(1 << 16)
                ask(
                    sock,
                    "object-add",
                    {"qom-type": "secret", "id": f"h{number}", "file": "/dev/fdset/0"},
                    [],
                )
            else:
                ask(sock, "getfd", {"fdname": "x"}, [fd])
                ask(sock, "closefd", {"fdname": "x"}, [])
                ask(sock, "query-version", {}, [fd] * DESCRIPTORS_PER_MESSAGE)
        KEPT.append(sock)


def main() -> None:
    """See above."""
    path, kind, act_name, uid = sys.argv[1:5]
    prepare: dict[str, Callable[[], int]] = {
        "fuse": lambda: serve_fuse(sys.argv[5]),
        "opath": lambda: os.open(sys.argv[5], os.O_PATH),
    }
    fd = prepare[kind]() if kind in prepare else -1
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    if kind == "mutex":
        fd = mutex()
    elif kind == "linger":
        fd = linger()
    act(path, act_name, fd)
    if act_name == "drop" and kind != "fuse":  # whose close would hold up this process too
        os.close(fd)
    print("done", flush=True)
    if sys.stdin.readline():
        print(let_go().hex(), flush=True)
        sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
