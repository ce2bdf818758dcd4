# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of another uid that passes descriptors which block whoever touches them.

Run as a program.

hostile.py SOCKET KIND ACT UID prints a line when it has done what it can, and holds on until its
stdin ends. KIND: mutex (a pipe whose mutex is held by a splice from a terminal), linger, mptcp,
vsock (a connected socket of TCP, MPTCP or vsock with SO_LINGER and unsent data), locked (a TCP
socket whose lock is held by a thread that waits for a page of a FUSE file), fuse (a file of a file
system that never answers), opath (an O_PATH descriptor of a file that this uid cannot read). ACT:
write (secret-read to it), read (object-add from it, on a control socket), drop (pass it and let it
go), oob (pass it with an urgent byte), crowd (let four go, then pass 253 on each of many
connections), knock (connect again and again, pass it at once and hang up).
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
            contextlib.suppress(OSError),  # it has ended
            open(f"/proc/self/task/{thread}/wchan") as file,
        ):
            found.append(file.read())
    return found


SOCKETS = {
    "linger": (socket.AF_INET, 0, ("127.0.0.1", 0)),
    "mptcp": (socket.AF_INET, 262, ("127.0.0.1", 0)),
    "vsock": (socket.AF_VSOCK, 0, (1, 0xFFFFFFFF)),  # VMADDR_CID_LOCAL, VMADDR_PORT_ANY
}


def linger(kind: str = "linger") -> int:
    """A socket whose close waits for data that is never received."""
    family, protocol, address = SOCKETS[kind]
    listener = socket.socket(family, socket.SOCK_STREAM, protocol)
    listener.bind(address)
    listener.listen()
    sock = socket.socket(family, socket.SOCK_STREAM, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
    name = listener.getsockname()
    sock.connect((1, name[1]) if family == socket.AF_VSOCK else name)
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
    """Release the mutex; return all that is written to the pipe until its last writer has gone."""
    os.write(HELD["master"], b"\n" * 4)
    while any("wait_woken" in state or "tty" in state for state in wchans()):
        pass
    os.close(HELD["sink"])
    received = b""
    while data := os.read(HELD["source"], 1 << 16):
        received += data
    return received


def locked(file: int) -> int:
    """A TCP socket that a thread sends a page of a FUSE file on: it holds the lock until that is
    read.
    """
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    page = libc.mmap(None, 4096, 1, 2, file, 0)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    sock = socket.socket()
    sock.connect(listener.getsockname())
    KEPT.extend((listener, listener.accept()[0], sock))
    libc.send.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    threading.Thread(target=lambda: libc.send(sock.fileno(), page, 100, 0), daemon=True).start()
    libc.prctl(4, 1)
    while not any("request_wait" in state or "folio" in state for state in wchans()):
        pass
    return os.dup(sock.fileno())


def fuse(prepared: str) -> int:
    """A file of a FUSE file system whose server answers no more, opened before that."""
    return int(prepared)


def serve_fuse(mountpoint: str, *, direct: bool = True) -> int:
    """Mount a file system (as root), open its file, answer nothing from then on; return the file.
    Without ``direct`` I/O it can be mapped.
    """
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
            answer = struct.pack("<QII", 1, int(direct), 0)  # FOPEN_DIRECT_IO
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


def knock(path: str, fd: int) -> None:
    """Connect, pass the descriptor before the accept, and hang up; many times."""
    for _ in range(600):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(path)
            socket.send_fds(sock, [b"x"], [fd])
    with open(os.devnull) as null:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(5)
                sock.connect(path)
                socket.send_fds(sock, [b"x"], [null.fileno()])


def crowd(path: str) -> None:
    """Pass as many descriptors as a message takes, on as many connections as fill a table."""
    with open(os.devnull) as null:
        for _ in range(40):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(5)
            with contextlib.suppress(OSError):
                sock.connect(path)
                sock.recv(1 << 16)
                data = b'{"execute":"query-version"}\n'
                socket.send_fds(sock, [data], [null.fileno()] * DESCRIPTORS_PER_MESSAGE)
            KEPT.append(sock)


def act(path: str, act_name: str, fd: int) -> None:
    """Do it four times over and more, so that all threads that this uid may have are stuck."""
    if act_name == "knock":
        knock(path, fd)
        return
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
            elif act_name == "oob":
                sock.sendmsg(
                    [b"x"],
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))],
                    socket.MSG_OOB,
                )
                sock.send(b" ")
            else:
                ask(sock, "getfd", {"fdname": "x"}, [fd])
                ask(sock, "closefd", {"fdname": "x"}, [])
                ask(sock, "query-version", {}, [fd] * DESCRIPTORS_PER_MESSAGE)
        KEPT.append(sock)
    if act_name == "crowd":
        crowd(path)


def main() -> None:
    """See above."""
    path, kind, act_name, uid = sys.argv[1:5]
    prepare: dict[str, Callable[[], int]] = {
        "fuse": lambda: serve_fuse(sys.argv[5]),
        "locked": lambda: serve_fuse(sys.argv[5], direct=False),
        "opath": lambda: os.open(sys.argv[5], os.O_PATH),
    }
    fd = prepare[kind]() if kind in prepare else -1
    os.setgroups([])
    os.setresgid(int(uid), int(uid), int(uid))
    os.setresuid(int(uid), int(uid), int(uid))
    if kind == "mutex":
        fd = mutex()
    elif kind in SOCKETS:
        fd = linger(kind)
    elif kind == "locked":
        fd = locked(fd)
    act(path, act_name, fd)
    if act_name not in ("write", "read") and kind not in (
        "fuse",
        "locked",
    ):  # whose close would hold up this process too
        threading.Thread(target=os.close, args=(fd,), daemon=True).start()
    print("done", flush=True)
    if sys.stdin.readline():
        print(let_go().hex(), flush=True)
        sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
