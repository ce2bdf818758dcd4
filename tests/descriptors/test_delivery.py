# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hand-over: what is taken, what is refused in words, and that the caller's descriptor stays as it
was.
"""

import asyncio
import ctypes
import fcntl
import os
import pty
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from secretd.access.decision import Grant
from secretd.access.peer import Peer, SocketRole
from secretd.audit.records import Subject
from secretd.descriptors import kinds, target
from secretd.linux import statx
from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served
from tests.support.needs import need_level

SECRET = b"letmein-" * 4


@pytest.fixture
async def loaded(aqmp: AsyncClient) -> AsyncClient:
    """A client, with secret s (32 bytes) and secret big (1 MiB)."""
    await aqmp.add("s", data=SECRET.decode())
    await aqmp.ok("secret-generate", {"id": "big", "size": 1 << 20})
    return aqmp


def flags_and_offset(fd: int) -> tuple[int, int | None]:
    try:
        offset = os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        offset = None
    return fcntl.fcntl(fd, fcntl.F_GETFL), offset


async def test_a_pipe_takes_a_secret_of_any_size(loaded: AsyncClient) -> None:
    """Also one that is larger than the pipe, with a reader that reads slowly."""
    source, sink = os.pipe()
    before = flags_and_offset(sink)
    assert await loaded.ok("secret-read", {"id": "s"}, (sink,)) == {"size": 32}
    assert flags_and_offset(sink) == before
    assert await asyncio.to_thread(os.read, source, 100) == SECRET
    await loaded.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (sink,))
    os.close(sink)
    received = b""
    while chunk := await asyncio.to_thread(os.read, source, 5000):
        received += chunk
    os.close(source)
    assert await loaded.reply() == {"return": {"size": 1 << 20}}
    assert len(received) == 1 << 20


async def test_a_named_descriptor_is_used_once(loaded: AsyncClient) -> None:
    """Getfd before, secret-read by name; the daemon's copy is closed then."""
    source, sink = os.pipe()
    assert await loaded.cmd("getfd", {"fdname": "out"}, (sink,)) == {"return": {}}
    os.close(sink)
    assert (await loaded.ok("secret-read", {"id": "s", "fdname": "out", "format": "base64"}))[
        "size"
    ] == 44
    assert (
        await asyncio.to_thread(os.read, source, 100)
        == b"bGV0bWVpbi1sZXRtZWluLWxldG1laW4tbGV0bWVpbi0="
    )
    assert await asyncio.to_thread(os.read, source, 100) == b""
    os.close(source)
    assert await loaded.fail("secret-read", {"id": "s", "fdname": "out"}) == (
        "File descriptor named 'out' not found"
    )
    assert (
        await loaded.fail("secret-read", {"id": "s"})
        == "No file descriptor supplied via SCM_RIGHTS"
    )


async def test_a_memfd_gets_the_secrets_size_and_content(loaded: AsyncClient) -> None:
    """From its start, whatever it held before and wherever its offset is."""
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.write(fd, b"y" * 100)
    before = flags_and_offset(fd)
    assert await loaded.ok("secret-read", {"id": "s"}, (fd,)) == {"size": 32}
    assert flags_and_offset(fd) == before
    assert os.pread(fd, 200, 0) == SECRET
    assert await loaded.ok("secret-read", {"id": "big"}, (fd,)) == {"size": 1 << 20}
    assert os.fstat(fd).st_size == 1 << 20
    os.close(fd)


async def test_a_socket_pair_takes_a_secret(loaded: AsyncClient) -> None:
    """Its flags stay, and a large secret waits for its reader."""
    ours, theirs = socket.socketpair()
    before = flags_and_offset(theirs.fileno())
    await loaded.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (theirs.fileno(),))
    received = 0
    while received < 1 << 20:
        received += len(await asyncio.to_thread(ours.recv, 1 << 16))
    assert await loaded.reply() == {"return": {"size": 1 << 20}}
    assert flags_and_offset(theirs.fileno()) == before
    ours.close()
    theirs.close()


async def test_a_fifo_in_the_file_system_takes_a_secret(
    loaded: AsyncClient, tmp_path: Path
) -> None:
    """It knows no RWF_NOWAIT, so the secret goes through a pipe of the daemon's own."""
    path = str(tmp_path / "fifo")
    os.mkfifo(path)
    source = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = os.open(path, os.O_WRONLY)
    os.set_blocking(source, True)
    await loaded.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (sink,))
    os.close(sink)
    received = b""
    while chunk := await asyncio.to_thread(os.read, source, 7000):
        received += chunk
    os.close(source)
    assert await loaded.reply() == {"return": {"size": 1 << 20}}
    assert received == await loaded.read("big")


def full_pipe() -> tuple[int, list[int]]:
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    try:
        while True:
            os.write(sink, bytes(4096))
    except BlockingIOError:
        os.set_blocking(sink, True)
    return sink, [source]


def full_fifo(tmp_path: Path) -> tuple[int, list[int]]:
    path = str(tmp_path / "full-fifo")
    os.mkfifo(path)
    source = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    sink = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        while True:
            os.write(sink, bytes(4096))
    except BlockingIOError:
        return sink, [source]


async def test_a_thread_writes_nothing_to_a_full_fifo(tmp_path: Path) -> None:
    """What is spliced would wait in the kernel, so it asks first, and takes what one page takes."""
    sink, others = full_fifo(tmp_path)
    aim = target.PipeTarget(sink)
    aim.may_block = True
    assert aim.write(memoryview(b"letmein"), 0) == 0
    await asyncio.to_thread(os.read, others[0], 1 << 20)
    assert aim.write(memoryview(b"letmein"), 0) == 7
    for fd in (sink, *others):
        os.close(fd)


def closed_pipe() -> tuple[int, list[int]]:
    source, sink = os.pipe()
    os.close(source)
    return sink, []


def read_end() -> tuple[int, list[int]]:
    source, sink = os.pipe()
    return source, [sink]


def sealed_memfd() -> tuple[int, list[int]]:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, 1033, 0x8)
    return fd, []


def read_only_memfd() -> tuple[int, list[int]]:
    fd = os.memfd_create("x")
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    return again, [fd]


def memfd_secret() -> tuple[int, list[int]]:
    need_level("secretmem")
    return ctypes.CDLL(None).syscall(447, 0), []


def terminal() -> tuple[int, list[int]]:
    ours, theirs = pty.openpty()
    return theirs, [ours]


def datagram() -> tuple[int, list[int]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return theirs.detach(), [ours.detach()]


def unconnected() -> tuple[int, list[int]]:
    return socket.socket(socket.AF_UNIX).detach(), []


def inet() -> tuple[int, list[int]]:
    return socket.socket(socket.AF_INET).detach(), []


def named(tmp_path: Path) -> tuple[int, list[int]]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "named"))
    listener.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "named"))
    return client.detach(), [listener.detach()]


def opened(path: str, flags: int) -> Callable[[], tuple[int, list[int]]]:
    return lambda: (os.open(path, flags), [])


TAKES = "; secret-read takes the write end of a pipe, an end of a stream socket pair, or a memfd"
REFUSED = {
    "full pipe": (full_pipe, "The descriptor did not take the secret within 0.2 seconds"),
    "full fifo": (full_fifo, "The descriptor did not take the secret within 0.2 seconds"),
    "closed pipe": (closed_pipe, "Unable to write the secret: Broken pipe"),
    "read end": (read_end, "The descriptor is a pipe not open for writing" + TAKES),
    "sealed memfd": (sealed_memfd, "The descriptor is a sealed memfd" + TAKES),
    "read-only memfd": (read_only_memfd, "The descriptor is a memfd not open for writing" + TAKES),
    "memfd_secret": (memfd_secret, "The descriptor is a regular file" + TAKES),
    "O_PATH": (opened("/tmp", os.O_PATH), "The descriptor is a directory" + TAKES),
    "directory": (opened("/tmp", os.O_RDONLY), "The descriptor is a directory" + TAKES),
    "device": (opened("/dev/null", os.O_WRONLY), "The descriptor is a character device" + TAKES),
    "eventfd": (lambda: (os.eventfd(0), []),
              "The descriptor is of a kind that cannot be written to" + TAKES),
    "terminal": (terminal, "The descriptor is a character device" + TAKES),
    "datagram": (datagram, "The descriptor is a socket that is no end of a stream pair" + TAKES),
    "unconnected": (unconnected,
    "The descriptor is a socket that is no end of a stream pair" + TAKES),
    "inet": (inet, "The descriptor is a socket that is no end of a stream pair" + TAKES),
    "named socket": (named, "The descriptor is a socket that is no end of a stream pair" + TAKES),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.tuning(delivery_seconds=0.2)
@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_take_a_secret_is_refused_in_words(
    in_loop: Served, loaded: AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Within the time limit, with flags and offset as they were, while others are answered."""
    make, words = REFUSED[name]
    fd, others = make(tmp_path) if make.__code__.co_argcount else make()
    try:
        before = flags_and_offset(fd)
        await loaded.send(b'{"execute":"secret-read","arguments":{"id":"s"}}\n', (fd,))
        assert await (await in_loop.connect()).cmd("query-name") == {"return": {}}
        assert (await loaded.reply())["error"]["desc"] == words
        assert flags_and_offset(fd) == before
        assert await loaded.read("s") == SECRET
    finally:
        for each in (fd, *others):
            os.close(each)


async def test_a_regular_file_and_an_opath_pipe_are_refused(
    loaded: AsyncClient, tmp_path: Path
) -> None:
    """They are never written to, and keep their offset."""
    with open(tmp_path / "f", "wb") as file:
        file.write(b"abc")
        file.flush()
        before = flags_and_offset(file.fileno())
        words = await loaded.fail("secret-read", {"id": "s"}, (file.fileno(),))
        assert words == "The descriptor is a regular file" + TAKES
        assert flags_and_offset(file.fileno()) == before
    os.mkfifo(tmp_path / "fifo")
    fd = os.open(tmp_path / "fifo", os.O_PATH)
    assert await loaded.fail("secret-read", {"id": "s"}, (fd,)) == (
        "The descriptor is a pipe opened with O_PATH" + TAKES
    )
    os.close(fd)
    assert (tmp_path / "f").read_bytes() == b"abc"


async def test_the_daemons_own_socket_is_refused(in_loop: Served, loaded: AsyncClient) -> None:
    """A connection to the daemon is no way for it to talk to itself."""
    assert await loaded.fail("secret-read", {"id": "s"}, (loaded.sock.fileno(),)) == (
        "The descriptor is a socket that is no end of a stream pair" + TAKES
    )


async def test_a_missing_secret_is_an_error_and_closes_the_descriptor(
    loaded: AsyncClient,
) -> None:
    """The reader sees the end at once."""
    source, sink = os.pipe()
    assert await loaded.fail("secret-read", {"id": "nope"}, (sink,)) == "No secret with id 'nope'"
    os.close(sink)
    assert await asyncio.to_thread(os.read, source, 1) == b""
    os.close(source)


async def test_the_end_of_a_delivery_leaves_others_running(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """Each has its own reader."""
    other = await in_loop.connect()
    message = b'{"execute":"secret-read","arguments":{"id":"big"}}'
    first, first_sink = os.pipe()
    second, second_sink = os.pipe()
    await loaded.send(message, (first_sink,))
    await other.send(message, (second_sink,))
    os.close(first_sink)
    os.close(second_sink)
    waiting = in_loop.server.core.deliveries._running
    while len(waiting.get("big", ())) < 2:
        await asyncio.sleep(0)
    os.close(first)
    assert (await loaded.reply())["error"]["desc"] == "Unable to write the secret: Broken pipe"
    received = 0
    while chunk := await asyncio.to_thread(os.read, second, 1 << 16):
        received += len(chunk)
    os.close(second)
    assert received == 1 << 20
    assert await other.reply() == {"return": {"size": 1 << 20}}


@pytest.mark.parametrize("form", ["raw", "base64"])
async def test_deleting_ends_a_running_delivery(
    in_loop: Served, loaded: AsyncClient, form: str
) -> None:
    """The client gets an error, and nothing more of the secret is written."""
    source, sink = os.pipe()
    await loaded.send(
        b'{"execute":"secret-read","arguments":{"id":"big","format":"%s"}}' % form.encode(), (sink,)
    )
    os.close(sink)
    waiting = in_loop.server.core.deliveries._running
    while not dict(waiting):
        await asyncio.sleep(0)
    other = await in_loop.connect()
    assert await other.cmd("object-del", {"id": "big"}) == {"return": {}}
    assert (await loaded.reply())["error"]["desc"] == "Secret 'big' was withdrawn"
    received = b""
    while chunk := await asyncio.to_thread(os.read, source, 1 << 16):
        received += chunk
    os.close(source)
    assert len(received) <= 1 << 16
    assert not waiting


async def test_a_client_that_leaves_during_a_delivery_ends_it(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """The descriptor is closed and nothing waits any more; so also when the server stops."""
    source, sink = os.pipe()
    waiting = in_loop.server.core.deliveries._running
    await loaded.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (sink,))
    os.close(sink)
    while not dict(waiting):
        await asyncio.sleep(0)
    ([session.transport.close() for session in list(in_loop.server.sessions)])
    while await asyncio.to_thread(os.read, source, 1 << 16):
        pass
    os.close(source)
    assert dict(waiting) == {}


async def test_a_reader_that_goes_away_during_a_delivery_is_an_error(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """Broken pipe, as for one that was closed from the start."""
    source, sink = os.pipe()
    await loaded.send(b'{"execute":"secret-read","arguments":{"id":"big"}}', (sink,))
    os.close(sink)
    waiting = in_loop.server.core.deliveries._running
    while not dict(waiting):
        await asyncio.sleep(0)
    os.close(source)
    assert (await loaded.reply())["error"]["desc"] == "Unable to write the secret: Broken pipe"


async def test_withdrawing_before_the_first_wait_ends_the_delivery(
    in_loop: Served, loaded: AsyncClient
) -> None:
    """Deleting in the same turn of the loop is seen too."""
    source, sink = os.pipe()
    await loaded.send(b'{"execute":"query-name"}')
    await loaded.reply()

    def read_and_delete() -> None:
        (session,) = in_loop.server.sessions
        monitor = session.monitor
        monitor.receive([os.dup(sink)])
        request = monitor.table.decode(
            memoryview(b'{"execute":"secret-read","arguments":{"id":"big"}}')
        )
        assert request is not None
        reply = monitor.handle(request)
        assert isinstance(reply, Coroutine)
        in_loop.server.start(session._finish(reply))
        in_loop.server.core.deliveries.withdraw("big")

    read_and_delete()
    assert (await loaded.reply())["error"]["desc"] == "Secret 'big' was withdrawn"
    os.close(sink)
    os.close(source)


def test_only_access_makes_a_grant() -> None:
    """There is no way to deliver without a decision."""
    peer = Peer(0, 0, 1, SocketRole.CONTROL)
    with pytest.raises(TypeError, match="only access makes"):
        Grant(object(), peer, Subject("client", None), "s", None, memoryview(b"x"), "")


async def test_an_unidentified_descriptor_is_refused(
    loaded: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE tells other users nothing; statx(2) itself fails only for what is none."""

    def nothing(_fd: int) -> tuple[int, int]:
        raise PermissionError

    with pytest.raises(OSError, match="Bad file descriptor"):
        statx.type_and_links(9999)
    monkeypatch.setattr(kinds, "type_and_links", nothing)
    monkeypatch.setattr(target, "type_and_links", nothing)
    words = "The descriptor is a file that is closed to the daemon" + TAKES
    with open(os.devnull, "w") as file:
        assert await loaded.fail("secret-read", {"id": "s"}, (file.fileno(),)) == words


async def test_an_error_of_our_own_leaves_no_descriptor(
    loaded: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client sees the end of its pipe."""

    def broken(_self: object, _size: int) -> None:
        raise RuntimeError

    monkeypatch.setattr(target.PipeTarget, "begin", broken)
    source, sink = os.pipe()
    words = await loaded.fail("secret-read", {"id": "s"}, (sink,))
    assert words == "Internal error; the log of secretd has the details"
    os.close(sink)
    assert await asyncio.to_thread(os.read, source, 1) == b""
    os.close(source)
