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
    """Both files, the second -1 if there is none, and the mapping of the first."""

    fd: int
    spare: int
    mapping: mmap.mmap


def new_file() -> int:
    """Return the descriptor of an empty memory file, which the caller closes. Raises OSError."""
    return os.memfd_create("secretd-journal", os.MFD_CLOEXEC)


def open_files(arena_fd: int, journal_fds: Sequence[int]) -> tuple[Header, JournalFiles]:
    """Open an earlier process's files: the one that counts, and another to compact into.

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
    others = [other for other in journal_fds if other != fd]
    spare = others.pop() if others else -1
    for other in others:
        os.close(other)
    return header, JournalFiles(fd, spare, mapping)


def begin(fd: int, size: int, generation: int, windows: int, arena: Arena) -> mmap.mmap:
    """Start a file of ``size`` bytes, without its magic, and map it. Raises OSError.

    ``windows``: the number of the arena's windows that were ever used.
    """
    os.ftruncate(fd, 0)
    os.ftruncate(fd, size)
    mapping = mmap.mmap(fd, size)
    mapping[: FILE.size] = FILE.pack(
        b"",
        FORMAT,
        FILE.size,
        generation,
        os.fstat(arena.fileno()).st_ino,
        arena.window,
        LEVELS.index(arena.level),
        windows,
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
