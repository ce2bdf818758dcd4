# SPDX-License-Identifier: LGPL-2.1-or-later
"""The log on stderr, which never waits."""

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Iterator

import pytest

from secretd.daemon.log import KEPT_LINES, LINE_BYTES, LogHandler


@contextlib.contextmanager
def stderr_pipe() -> Iterator[int]:
    """Stderr is a pipe; its read end. (A fixture would come before pytest's own capture.)"""
    source, sink = os.pipe()
    saved = os.dup(2)
    os.dup2(sink, 2)
    os.close(sink)
    try:
        yield source
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(source)


def record(words: str) -> logging.LogRecord:
    return logging.LogRecord("secretd", logging.INFO, "", 0, words, None, None)


def test_a_pipe_that_is_full_loses_lines_and_says_so_later() -> None:
    """Nothing waits; the first lines are kept."""
    with stderr_pipe() as pipe:
        handler = LogHandler()
        for number in range(2000):
            handler.emit(record(f"{number} {'x' * 100}"))
        assert handler.lost > 0
        read = os.read(pipe, 1 << 16)
        handler.flush()
        handler.emit(record("after"))
        lines = (read + os.read(pipe, 1 << 16)).decode().splitlines()
        handler.close()
        assert lines[0].startswith("secretd: 0 ")
        numbers = [int(line.split()[1]) for line in lines if line.endswith("xxx")]
        assert numbers == list(range(len(numbers)))
        assert 2000 - len(numbers) == handler.lost
        assert lines[-2:] == [
            "secretd: after",
            f"secretd: {handler.lost} lines of the log were lost, since stderr took none",
        ]


def test_a_line_waits_for_another_writers_line() -> None:
    """The audit's, where both go to stderr."""
    with stderr_pipe() as pipe:
        handler = LogHandler()
        handler.is_held = lambda: True
        handler.emit(record("held"))
        os.set_blocking(pipe, False)
        with pytest.raises(BlockingIOError):
            os.read(pipe, 10)
        handler.is_held = lambda: False
        handler.flush()
        assert os.read(pipe, 100) == b"secretd: held\n"
        handler.close()


def test_a_reader_that_has_gone_is_no_error() -> None:
    """Lines are counted; long ones are cut."""
    with stderr_pipe() as pipe:
        handler = LogHandler()
        handler.emit(record("y" * 10_000))
        assert len(os.read(pipe, 1 << 16)) == LINE_BYTES + 1
        devnull = os.open(os.devnull, os.O_RDONLY)
        os.dup2(devnull, pipe)
        os.close(devnull)
        handler.emit(record("x"))
        assert handler.lost == 1
        assert not handler._waiting
        assert KEPT_LINES
        handler.close()


def test_without_a_stderr_nothing_is_written() -> None:
    """Nor kept."""
    saved = os.dup(2)
    os.close(2)
    try:
        handler = LogHandler()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    handler.emit(record("x"))
    assert not handler._waiting
    handler.close()


def test_what_found_no_room_is_written_when_there_is_some() -> None:
    """Without another line to the log."""

    async def written() -> bytes:
        with stderr_pipe() as pipe:
            handler = LogHandler(retry_seconds=0.001)
            for number in range(700):
                handler.emit(record(f"{number} {'x' * 100}"))
            read = os.read(pipe, 1 << 16)
            turns = itertools.takewhile(lambda _: handler._waiting, itertools.count())
            for _ in turns:
                await asyncio.sleep(0)
            handler.close()
            return read + os.read(pipe, 1 << 16)

    lines = asyncio.run(written()).decode().splitlines()
    assert lines[-2].startswith("secretd: ")
    assert any(line.endswith("xxx") for line in lines)
