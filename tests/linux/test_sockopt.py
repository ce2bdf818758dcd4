# SPDX-License-Identifier: LGPL-2.1-or-later
"""Questions to sockets that never wait."""

import os
import socket

import pytest

from secretd.descriptors import threads
from secretd.linux import sockopt


def test_the_family_is_asked_of_the_kernel_alone() -> None:
    """Whatever socket it is; what is none is an error."""
    for family in (socket.AF_UNIX, socket.AF_INET):
        with socket.socket(family) as sock:
            assert sockopt.domain(sock.fileno()) == family
    source, sink = os.pipe()
    with pytest.raises(OSError, match="Socket operation on non-socket"):
        sockopt.domain(source)
    os.close(source)
    os.close(sink)


def test_descriptors_are_found_wherever_they_lie_unread() -> None:
    """Behind any number of bytes; they stay where they are."""
    for before in (0, 1, 5000, 70_000):
        ours, theirs = socket.socketpair()
        with ours, theirs, open(os.devnull) as null:
            theirs.setblocking(False)
            if before:
                assert theirs.send(b"x" * before) == before
            scratch = memoryview(bytearray(4096))
            assert not sockopt.holds_descriptors(ours, scratch)
            socket.send_fds(theirs, [b"y"], [null.fileno()])
            assert sockopt.holds_descriptors(ours, scratch)
            assert sockopt.unread_bytes(ours.fileno()) == before + 1
            ours.shutdown(socket.SHUT_RDWR)
            assert sockopt.holds_descriptors(ours, scratch)


def test_a_socket_that_was_reset_may_hold_descriptors() -> None:
    """The reset that a peer leaves which closes with something unread is no error here."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.send(b"unread")
        theirs.send(b"x")
        theirs.close()
        assert sockopt.holds_descriptors(ours, memoryview(bytearray(4096)))


def test_a_peek_finds_bytes_and_descriptors() -> None:
    """And the end; where there is nothing it says so."""
    ours, theirs = socket.socketpair()
    view = memoryview(bytearray(10))
    with ours, open(os.devnull) as null:
        with pytest.raises(BlockingIOError):
            sockopt.peek(ours, view)
        theirs.send(b"abc")
        assert sockopt.peek(ours, view) == (3, False)
        socket.send_fds(theirs, [b"d"], [null.fileno()])
        assert sockopt.peek(ours, view) == (4, True)
        theirs.close()
        ours.recv(10)
        assert sockopt.peek(ours, view) == (0, False)


def test_an_urgent_byte_stays_in_line() -> None:
    """With its descriptor: the kernel neither skips the one nor closes the other."""
    ours, theirs = socket.socketpair()
    with ours, theirs, open(os.devnull) as null:
        sockopt.keep_urgent_inline(ours)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, null.fileno().to_bytes(4, "little"))]
        theirs.sendmsg([b"u"], rights, socket.MSG_OOB)
        theirs.send(b"x")
        data, fds, _, _ = socket.recv_fds(ours, 10, 1)
        assert data == b"u"
        os.close(fds[0])
        assert ours.recv(10) == b"x"


def test_old_kernels_close_sockets_in_threads() -> None:
    """Before 6.8 closing one may close what others have passed in circles."""
    major, minor = sockopt.kernel_version()
    assert os.uname().release.startswith(f"{major}.{minor}")
    assert ((major, minor) < (6, 8)) == threads.CLOSE_COLLECTS_GARBAGE


def test_bytes_without_end_may_hide_descriptors() -> None:
    """No more is looked at than a few thousand bytes at a time, a bounded number of times."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                theirs.send(b"x" * 1000)
        assert sockopt.holds_descriptors(ours, memoryview(bytearray(1)))
