# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors: their owners and kinds."""

import os
import socket

import pytest

from secretd.descriptors import kinds
from secretd.descriptors.fd import Fd
from secretd.descriptors.kinds import Kind, classify
from secretd.net import control_messages


def test_an_fd_is_closed_once_and_given_away_once() -> None:
    """-1 from then on, so that a reused number is never touched."""
    number = os.memfd_create("x")
    fd = Fd(number)
    assert repr(fd) == f"<Fd {number}>"
    assert fd.fileno() == number
    fd.close()
    fd.close()
    assert fd.fileno() == -1
    other = Fd(os.memfd_create("x"))
    number = other.take()
    other.close()
    os.close(number)


def test_a_forgotten_fd_warns_and_is_closed() -> None:
    """A leak fails the suite, since warnings are errors there."""
    fd = Fd(os.memfd_create("x"))
    with pytest.warns(ResourceWarning, match="unclosed descriptor"):
        fd.__del__()
    assert fd.fileno() == -1


def test_what_came_by_scm_rights_is_found() -> None:
    """Among other ancillary data."""
    number = (7).to_bytes(4, "little")
    assert control_messages.received(
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, number * 2 + b"x")]
    ) == [7, 7]
    assert control_messages.received([(socket.SOL_SOCKET, 2, number), (1, 1, b"")]) == [7] * 0


def test_a_socket_whose_peer_cannot_be_asked_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ENOTCONN means that it is not connected."""

    class Broken(socket.socket):
        def getpeername(self) -> object:
            raise OSError(5, "x")

    ours, theirs = socket.socketpair()
    monkeypatch.setattr(kinds.socket, "socket", Broken)
    with pytest.raises(OSError, match="x"):
        classify(ours.fileno())
    monkeypatch.undo()
    assert classify(ours.fileno()) is Kind.SOCKET
    ours.close()
    theirs.close()
