# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that may block, in threads of their own."""

import asyncio
import os
import socket
import threading

import pytest

from secretd.descriptors import threads as module
from secretd.descriptors.fd import Fd
from secretd.descriptors.threads import BlockingCalls
from secretd.errors import LockedMemoryExhausted
from secretd.memory.arena import Arena, LockedBuffer
from tests.support.needs import ARENA_LEVEL

OTHER = os.getuid() + 1000
"""A uid that is neither root's nor our own, which have more threads."""


def occupy(calls: BlockingCalls, go_on: threading.Event) -> "list[asyncio.Future[bool]]":
    """Keep all threads of another uid waiting."""
    return [
        asyncio.ensure_future(calls.run(OTHER, lambda _: None, go_on.wait))
        for _ in range(module.THREADS_PER_UID)
    ]


async def idle(calls: BlockingCalls) -> None:
    """Wait until all threads have ended."""
    while not calls.idle():
        await asyncio.sleep(0)


async def test_blocking_calls_run_in_a_bounded_number_of_threads() -> None:
    """A uid that has used up its share waits for itself; another uid does not."""
    calls = BlockingCalls()
    go_on = threading.Event()
    running = occupy(calls, go_on)
    await asyncio.sleep(0)
    waiting = asyncio.ensure_future(calls.run(OTHER, lambda _: None, lambda: "later"))
    assert await calls.run(1001, lambda _: None, lambda: "done") == "done"
    go_on.set()
    assert await asyncio.gather(*running) == [True] * module.THREADS_PER_UID
    assert await waiting == "later"
    with pytest.raises(ZeroDivisionError):
        await calls.run(OTHER, lambda _: None, lambda: 1 // 0)
    await idle(calls)
    assert calls._queues == {}


async def test_a_thread_serves_one_uid_after_the_other() -> None:
    """Starting one for each call would cost more than a read."""
    calls = BlockingCalls()
    used = []
    for uid in range(1000, 1020):
        used.append(await calls.run(uid, lambda _: None, threading.get_ident))
        await idle(calls)
    assert len(set(used)) == 1


async def test_idle_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few wait for further calls, for a while; others end at once."""
    monkeypatch.setattr(module, "_IDLE_SECONDS", 0.01)
    calls = BlockingCalls()
    go_on = threading.Event()
    running = occupy(calls, go_on)
    running += [asyncio.ensure_future(calls.run(1001, lambda _: None, go_on.wait))] * 2
    await asyncio.sleep(0)
    threads = [each for each in threading.enumerate() if each.name.startswith("blocking-")]
    assert len(threads) >= module.THREADS_PER_UID + 1
    go_on.set()
    await asyncio.gather(*running)
    while any(each.is_alive() for each in threads):
        await asyncio.sleep(0.001)
    assert calls._idle == []
    assert await calls.run(1002, lambda _: None, lambda: "again") == "again"


async def test_a_thread_that_is_woken_at_the_last_moment_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call may take it just when its time is over."""
    calls = BlockingCalls()
    source, sink = os.pipe()

    class Late:
        """An idle thread whose time is over while a call takes it; then its time ends again."""

        uid = -1
        asked = 0

        def __init__(self) -> None:
            self.woken = self

        def acquire(self, timeout: float = -1) -> bool:
            self.asked += 1
            if self.asked == 1:
                calls.close(OTHER, sink)
            return timeout < 0

        def release(self) -> None:
            """It is not needed: `acquire` does not wait."""

    monkeypatch.setattr(module, "_IdleThread", Late)
    assert await calls.run(1001, lambda _: None, lambda: "done") == "done"
    await idle(calls)
    assert os.read(source, 1) == b""
    os.close(source)
    while calls._idle:
        await asyncio.sleep(0)


async def test_the_thread_closes_what_the_call_used() -> None:
    """After it has given the result; until then the descriptor counts as open."""
    calls = BlockingCalls()
    source, sink = os.pipe()
    released: list[int] = []
    fd = Fd(sink, lambda _fd: pytest.fail("the owner closes"), lambda: released.append(1))
    assert await calls.run(OTHER, lambda _: None, lambda: os.write(sink, b"x"), None, fd) == 1
    assert released == [1]
    assert fd.fileno() == -1
    fd.close()
    await idle(calls)
    assert (calls.closing(OTHER), calls.closing_of_others) == (0, 0)
    assert (os.read(source, 2), os.read(source, 1)) == (b"x", b"")
    os.close(source)


async def test_the_result_of_an_abandoned_call_is_discarded() -> None:
    """Whatever it holds is released, once the call has ended; errors are dropped."""
    calls = BlockingCalls()
    go_on = threading.Event()
    discarded: list[str] = []

    def work() -> str:
        go_on.wait()
        return "result"

    def fail() -> str:
        go_on.wait()
        raise ValueError

    tasks = [
        asyncio.ensure_future(calls.run(1, discarded.append, function)) for function in (work, fail)
    ]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    go_on.set()
    await idle(calls)
    await asyncio.sleep(0)
    assert discarded == ["result"]


async def test_a_thread_that_outlives_the_loop_ends_quietly() -> None:
    """A stuck descriptor keeps neither the loop nor the process from ending."""
    go_on = threading.Event()
    calls = BlockingCalls()
    task = asyncio.ensure_future(calls.run(1, lambda _: None, go_on.wait))
    await asyncio.sleep(0)
    task.cancel()
    go_on.set()
    while not calls.idle():
        pass
    assert all(each.daemon for each in threading.enumerate() if each.name == "blocking-1")


async def test_closing_for_a_stranger_happens_in_a_thread() -> None:
    """The loop does not wait for close(2)."""
    calls = BlockingCalls()
    source, sink = os.pipe()
    calls.close(OTHER, sink)
    await idle(calls)
    assert not calls.stuck(OTHER)
    assert os.read(source, 1) == b""
    os.close(source)


async def test_a_result_that_comes_with_the_cancellation_is_discarded() -> None:
    """Both may happen in one turn of the loop."""
    calls = BlockingCalls()
    discarded: list[str] = []
    go_on = threading.Event()

    def work() -> str:
        go_on.wait()
        return "result"

    task = asyncio.ensure_future(calls.run(1, discarded.append, work))
    await asyncio.sleep(0)
    go_on.set()
    while not calls.idle():  # without giving the loop its turn
        pass
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.gather(task, return_exceptions=True)
    assert discarded == ["result"]


async def test_a_uid_whose_threads_are_stuck_is_known() -> None:
    """Its descriptors are kept until a thread is free, and counted."""
    calls = BlockingCalls()
    go_on = threading.Event()
    running = occupy(calls, go_on)
    await asyncio.sleep(0)
    source, sink = os.pipe()
    for number in range(100):
        assert calls.closing(OTHER) == number
        calls.close(OTHER, os.dup(sink))
    assert not calls.stuck(OTHER)
    calls._stuck_seconds = 0.0
    assert calls.stuck(OTHER)
    assert not calls.stuck(OTHER + 1)
    assert calls.closing(OTHER + 1) == 0
    assert calls.closing_of_others == 100
    os.close(sink)
    go_on.set()
    await asyncio.gather(*running)
    await idle(calls)
    assert not calls.stuck(OTHER)
    assert calls.closing(OTHER) == calls.closing_of_others == 0
    assert os.read(source, 1) == b""
    os.close(source)


async def test_without_a_new_thread_the_call_waits_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the system has no thread to give, nothing is lost."""
    calls = BlockingCalls()
    source, sink = os.pipe()
    with monkeypatch.context() as patch:

        def none(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", none)
        calls.close(OTHER, sink)
    assert calls.idle()
    assert await calls.run(OTHER, lambda _: None, lambda: "done") == "done"
    await idle(calls)
    assert not calls.stuck(OTHER)
    assert os.read(source, 1) == b""
    os.close(source)


async def test_a_call_whose_turn_comes_too_late_is_not_made() -> None:
    """What it would have used is released instead."""
    calls = BlockingCalls()
    go_on = threading.Event()
    made: list[str] = []
    running = occupy(calls, go_on)
    late = [
        asyncio.ensure_future(calls.run(OTHER, lambda _: None, lambda: made.append("call"), unused))
        for unused in (lambda: made.append("unused"), None)
    ]
    late.append(asyncio.ensure_future(calls.run(OTHER, lambda _: None, lambda: made.append("x"))))
    await asyncio.sleep(0)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    go_on.set()
    await asyncio.gather(*running)
    await idle(calls)
    assert made == ["unused"]


def test_an_unreadable_connection_is_closed_in_a_thread() -> None:
    """It may hold descriptors, where there is no memory to look."""

    class Starved(Arena):
        def allocate(self, _size: int) -> LockedBuffer:
            raise LockedMemoryExhausted("none left")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(b"x")
        for kind, expected in ((Arena, False), (Starved, True)):
            scratch = kind(ARENA_LEVEL)
            assert module._holds_descriptors(ours, scratch) == expected
            scratch.close()
