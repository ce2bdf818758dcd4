# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's memory files: how a file begins, and the encoding of a record's properties.

journal.journal calls this module; layout has the formats.
"""

import json
import mmap
import os
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from secretd.errors import StateError
from secretd.journal.layout import FILE, FORMAT, LEVELS, Header, latest
from secretd.memory.arena import Arena


class ObjectRecord(NamedTuple):
    """An object as the journal holds it.

    ``type``: its type's number; ``size``: bytes of its plaintext; ``uid``: the uid that added it.
    """

    id: str
    type: int
    size: int
    slot: int
    properties: dict[str, object]
    uid: int


class JournalFiles(NamedTuple):
    """The file and its mapping."""

    fd: int
    mapping: mmap.mmap


def new_file() -> int:
    """Return the descriptor of an empty memory file, which the caller closes. Raises OSError."""
    return os.memfd_create("secretd-journal", os.MFD_CLOEXEC)


def open_files(arena_fd: int, journal_fds: Sequence[int]) -> tuple[Header, JournalFiles]:
    """Open an earlier process's file.

    Earlier releases had two; the one of the later generation counts, and the others are emptied.
    Takes over the descriptors of the journal. Raises StateError; then all descriptors are closed,
    and the files are unchanged.
    """
    try:
        header, fd = latest(journal_fds)
        if header.inode != os.fstat(arena_fd).st_ino:
            raise StateError("the journal belongs to another arena")
        mapping = mmap.mmap(fd, os.fstat(fd).st_size)
    except BaseException:
        for each in (arena_fd, *journal_fds):
            os.close(each)
        raise
    for other in journal_fds:
        if other != fd:
            os.ftruncate(other, 0)
            os.close(other)
    return header, JournalFiles(fd, mapping)


def begin(fd: int, size: int, arena: Arena) -> mmap.mmap:
    """Start a file of ``size`` bytes, without its magic, and map it. Raises OSError."""
    os.ftruncate(fd, size)
    mapping = mmap.mmap(fd, size)
    mapping[: FILE.size] = FILE.pack(
        b"",
        FORMAT,
        FILE.size,
        1,
        os.fstat(arena.fileno()).st_ino,
        arena.window,
        LEVELS.index(arena.level),
        0,
        0,
        FILE.size,
    )
    return mapping


def encode_properties(properties: dict[str, object]) -> bytes:
    """Return properties as JSON."""
    try:
        return msgspec.json.encode(properties)
    except UnicodeEncodeError:  # from a file name on a command line that is not UTF-8
        return json.dumps(properties).encode()


def decode_properties(text: bytes) -> dict[str, object]:
    """Return the properties that `encode_properties` wrote."""
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError:
        properties: dict[str, object] = json.loads(text)
        return properties
