# SPDX-License-Identifier: LGPL-2.1-or-later
"""The event loop: readers are called at once, and all else is as on asyncio's own."""

import asyncio
import os
import socket
from collections.abc import Coroutine, Iterator
from selectors import EVENT_WRITE
from typing import Any

import pytest

from secretd.net.loop import Loop, running_loop


def run(main: Coroutine[Any, Any, None]) -> None:
    """On the daemon's loop, with a limit."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(asyncio.wait_for(main, 20))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets that do not block."""
    a, b = socket.socketpair()
    a.setblocking(False)
    b.setblocking(False)
    with a, b:
        yield a, b


def test_a_reader_is_called_for_each_readable_event(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Until it ends that; the end of the other side is something to read too."""
    a, b = pair

    async def main() -> None:
        watch, unwatch = running_loop().watch, running_loop().unwatch
        came: asyncio.Queue[bytes] = asyncio.Queue()
        watch(a.fileno(), lambda: came.put_nowait(a.recv(10)))
        b.send(b"one")
        assert await came.get() == b"one"
        b.send(b"two")
        assert await came.get() == b"two"
        b.close()
        assert await came.get() == b""
        unwatch(a.fileno())
        unwatch(a.fileno())
        while not came.empty():
            assert came.get_nowait() == b""
        await asyncio.sleep(0.01)
        assert came.empty()

    run(main())


def test_a_number_that_is_in_use_again_is_watched_anew(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """The kernel forgot the first descriptor when it was closed."""
    a, b = pair

    async def main() -> None:
        watch, unwatch = running_loop().watch, running_loop().unwatch
        source, sink = os.pipe()
        watch(source, lambda: None)
        os.close(source)
        os.close(sink)
        assert os.dup2(a.fileno(), source) == source
        came: asyncio.Queue[bytes] = asyncio.Queue()
        watch(source, lambda: came.put_nowait(a.recv(10)))
        b.send(b"one")
        assert await came.get() == b"one"
        os.close(source)
        unwatch(source)  # the number is free
        first, second = os.pipe()
        watch(first, lambda: None)
        os.dup2(second, first)
        unwatch(first)  # the number is another's
        os.close(first)
        os.close(second)

    run(main())


def test_one_descriptor_can_be_watched_and_written_to(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Asyncio waits for writing, in any order with watching, and each ends without the other."""
    a, b = pair

    async def main() -> None:
        loop = asyncio.get_running_loop()
        watch, unwatch = loop.watch, loop.unwatch
        came: asyncio.Queue[bytes] = asyncio.Queue()
        writable: asyncio.Queue[str] = asyncio.Queue()
        watch(a.fileno(), lambda: came.put_nowait(a.recv(10)))
        loop.add_writer(a.fileno(), writable.put_nowait, "yes")
        assert await writable.get() == "yes"
        b.send(b"both")
        assert await came.get() == b"both"
        loop.remove_writer(a.fileno())
        b.send(b"read")
        assert await came.get() == b"read"
        loop.add_writer(a.fileno(), writable.put_nowait, "again")
        unwatch(a.fileno())
        b.send(b"unread")
        while await writable.get() != "again":
            pass
        assert came.empty()
        loop.add_reader(a.fileno(), lambda: came.put_nowait(a.recv(10)))
        assert await came.get() == b"unread"
        loop.remove_reader(a.fileno())
        loop.remove_writer(a.fileno())

    run(main())


def test_a_reader_can_remove_another(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Both are ready in the same turn, and the one that comes first closes the other."""
    a, b = pair

    async def main() -> None:
        watch, unwatch = running_loop().watch, running_loop().unwatch
        called = []

        def first(mine: int, other: int) -> None:
            called.append(mine)
            unwatch(other)
            unwatch(mine)

        watch(a.fileno(), lambda: first(a.fileno(), b.fileno()))
        watch(b.fileno(), lambda: first(b.fileno(), a.fileno()))
        a.send(b"x")
        b.send(b"x")
        await asyncio.sleep(0.01)
        assert len(called) == 1

    run(main())


def test_an_error_in_a_reader_is_reported_and_the_loop_goes_on(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """As asyncio does with callbacks."""
    a, b = pair

    async def main() -> None:
        loop = asyncio.get_running_loop()
        reported: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop.set_exception_handler(lambda _loop, context: reported.put_nowait(context))
        watch, unwatch = loop.watch, loop.unwatch

        def fail() -> None:
            unwatch(a.fileno())
            raise ValueError("no")

        watch(a.fileno(), fail)
        b.send(b"x")
        assert isinstance((await reported.get())["exception"], ValueError)

    run(main())


def test_what_cannot_be_watched_is_refused(tmp_path: os.PathLike[str]) -> None:
    """A directory; nothing of it is left behind. What was closed can be forgotten all the same."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        fd = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(PermissionError):
            loop.add_reader(fd, print)
        assert not loop.remove_reader(fd)
        os.close(fd)
        with socket.socket() as sock, pytest.raises(TypeError, match="by its number"):
            loop.add_reader(sock, print)
        read, write = os.pipe()
        loop.add_reader(read, print)
        os.close(read)
        os.close(write)
        assert loop.remove_reader(read)

    run(main())


def test_asyncios_own_means_work_on_it(pair: tuple[socket.socket, socket.socket]) -> None:
    """Timers, threads, sockets, and what wakes the loop."""
    a, b = pair

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert await asyncio.to_thread(lambda: 7) == 7
        sending = asyncio.create_task(loop.sock_sendall(a, b"x" * 1_000_000))
        received = 0
        while received < 1_000_000:
            received += len(await loop.sock_recv(b, 65536))
        await sending
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.sock_recv(b, 1), 0.01)

    run(main())


def test_what_a_watcher_asks_of_asyncio_is_done_while_more_comes(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """A callback, a timer, a timer that was there before, and the end of the loop, each in time."""
    a, b = pair
    done: list[str] = []
    loop = Loop()
    watch, unwatch = loop.watch, loop.unwatch

    def came() -> None:
        a.recv(1)
        b.send(b"x")  # so that there is always more to read
        if "soon" in done and "later" in done and "before" in done:
            loop.stop()
        elif not done:
            done.append("asked")
            loop.call_soon(done.append, "soon")
            loop.call_later(0.001, done.append, "later")

    try:
        loop.call_later(0.002, done.append, "before")
        watch(a.fileno(), came)
        b.send(b"x")
        loop.run_forever()
        unwatch(a.fileno())
    finally:
        loop.close()
    assert sorted(done) == ["asked", "before", "later", "soon"]


def test_what_a_watcher_changes_holds_for_what_came_with_it(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Only descriptors that are waited for at the time of the call are reported."""
    a, b = pair
    loop = Loop()
    selector = loop._waiting
    selector.register(b.fileno(), EVENT_WRITE, "before")
    assert [key.data for key, _ in selector.select(0)] == ["before"]
    a.send(b"x")
    b.send(b"x")
    selector.watch(a.fileno(), lambda: selector.modify(b.fileno(), EVENT_WRITE, "after"))
    assert [key.data for key, _ in selector.select(0)] == ["after"]
    loop.close()
