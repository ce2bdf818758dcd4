# SPDX-License-Identifier: LGPL-2.1-or-later
"""What others can hand to secretd, made at random: messages, --object texts, a journal, addresses.

hypothesis makes the input, mostly by mutating what lies in tests/corpora, and makes it small where
something is wrong. scripts/dev/fuzz runs it for any time; tests/fuzz/test_fuzzing.py runs the
corpora and some hundred more at each check. Each finding is added to the corpora.
"""

import argparse
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from secretd.errors import LockedMemoryExhausted, StateError, UsageError
from secretd.journal import layout
from secretd.journal.journal import Journal
from secretd.linux import locked_pages
from secretd.memory.arena import Arena
from secretd.monitor.commands import COMMANDS
from secretd.qapi import keyval
from secretd.qapi.fast_decoder import FastDecoder
from secretd.systemd.credential_address import credential_address
from secretd.wire.connection import Connection
from secretd.wire.lexer import NeedData
from secretd.wire.messages import Malformed, Request
from secretd.wire.parser import Number, Text

CORPORA: Final = Path(__file__).parent.parent / "corpora"
_REQUESTS: Final = {
    c.request: [*c.arguments.values()] for c in COMMANDS.by_name.values() if c.request
}
_FAST: Final = FastDecoder(_REQUESTS).decode
_MESSAGE_BYTES: Final = 2000
_WINDOW: Final = 4096
_INODE_OFFSET: Final = 24


# --- what is tried


def _plain(value: Any) -> Any:
    """Return a parsed value in Python's own, to compare."""
    if isinstance(value, Text):
        return value.to_str()
    if isinstance(value, Number):
        return repr(value.value())
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_plain(element) for element in value]
    return value


def _read(data: bytes, cuts: list[int], *, fast: bool) -> list[object]:
    """Return what a connection reads of bytes that come in pieces."""
    connection = Connection(_FAST if fast else lambda _line: None, _MESSAGE_BYTES)
    connection.oob = True
    view = memoryview(bytearray(data))
    position = 0
    found: list[object] = []
    for end in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        while True:
            position, message = connection.next(view, position, end)
            assert connection.first_needed(position) <= position <= end
            if isinstance(message, NeedData):
                break
            if isinstance(message, Request):
                found.append((message.command, _plain(message.arguments), message.id))
            elif isinstance(message, Malformed):
                quote = message.fault.quote
                found.append((message.fault.before, quote and bytes(quote), message.id))
            else:
                # What the fast decoder took, the reference reads in the same way.
                found.append(type(message).__struct_config__.tag)
    return found


def _name(found: Any) -> object:
    """Return what was found, by what both ways have."""
    return found if isinstance(found, str) else found[0]


def wire(data: bytes, cuts: list[int]) -> None:
    """Messages: the pieces in which they come make no difference, nor does the fast decoder."""
    whole = _read(data, [], fast=False)
    assert _read(data, cuts, fast=False) == whole
    if len(data) <= _MESSAGE_BYTES:  # the fast decoder's limit is that of a read
        assert list(map(_name, _read(data, cuts, fast=True))) == list(map(_name, whole))


def options(data: bytes, _cuts: list[int]) -> None:
    """--object: understood, or refused in words."""
    try:
        text = data.decode(errors="surrogateescape")
        given_ = keyval.arguments(keyval.buffer(text.replace("\0", "")))
        _plain(given_.members)
    except UsageError:
        pass


def address(data: bytes, _cuts: list[int]) -> None:
    """The address of a LoadCredential= connection: read, or none; no name holds a slash or NUL."""
    found = credential_address(data)
    if found is not None:
        assert data.startswith(b"\0")
        assert "/" not in found.unit + found.credential
        assert "\0" not in found.unit + found.credential
        assert found.unit
        assert found.credential


def left(data: bytes, _cuts: list[int]) -> None:
    """A journal that an earlier process left, with any content: taken over, or refused, and then
    works.
    """
    arena = os.memfd_create("fuzz")
    os.ftruncate(arena, locked_pages.FILE_BYTES)
    inode = struct.pack("<Q", os.fstat(arena).st_ino)
    file = os.memfd_create("fuzz")
    whole = len(data) > _INODE_OFFSET + 8
    os.pwrite(file, data[:_INODE_OFFSET] + inode + data[_INODE_OFFSET + 8 :] if whole else data, 0)
    try:
        journal = Journal.restore(arena, [file, os.memfd_create("fuzz")])
    except (StateError, LockedMemoryExhausted):
        return
    try:
        for object_id in list(journal):
            assert journal.get(object_id) is not None
            journal.remove(object_id)
        journal.add("new", 1, {}, None, 0)
    finally:
        journal.close()
        journal.arena.close()


def journal_file() -> bytes:
    """A journal with some objects, as a process leaves it."""
    journal = Journal(Arena("none", window=_WINDOW))
    try:
        for number in range(6):
            plaintext = journal.arena.allocate(10 + 100 * number)
            journal.add(f"s{number}", 1, {"format": "raw"} if number % 2 else {}, plaintext, 0)
        journal.add("rule", 5, {"identity": "uid:1"}, None, 0)
        journal.set_properties("s1", {"format": "base64"})
        journal.remove("s2")
        return os.pread(journal.fileno(), layout.FILE.size + 600, 0)
    finally:
        journal.close()
        journal.arena.close()


TARGETS: Final[dict[str, Callable[[bytes, list[int]], None]]] = {
    "wire": wire,
    "keyval": options,
    "state": left,
    "address": address,
}
"""What is fuzzed, by the name of its corpus."""


# --- what it is tried with


def corpus(name: str) -> list[bytes]:
    """Return the content of the files of a corpus."""
    return [path.read_bytes() for path in sorted((CORPORA / name).iterdir())]


@st.composite
def mutated(draw: Callable[[Any], Any], seeds: list[bytes]) -> bytes:
    """A file of the corpus with some changes, two of them joined, or anything."""
    data = bytearray(draw(st.sampled_from(seeds)) if seeds else b"")
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            data[at : at + draw(st.integers(1, 20))] = b""
        elif kind == 1:
            data[at:at] = draw(st.binary(max_size=12))
        elif kind == 2 and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 3:
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
        elif kind == 4 and seeds:
            other = draw(st.sampled_from(seeds))
            data[at:] = other[draw(st.integers(0, len(other))) :]
        else:
            data[at : at + 4] = struct.pack("<I", draw(st.integers(0, 2**32 - 1)))
    return bytes(data)


def fuzz(name: str, examples: int, number: int | None = None) -> None:
    """Try a target with so many inputs; raises what is wrong, with the smallest input that shows
    it.
    """

    @settings(
        max_examples=examples, deadline=None, database=None, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(mutated(corpus(name)), st.lists(st.integers(0, 5000), max_size=4))
    def attempt(data: bytes, cuts: list[int]) -> None:
        TARGETS[name](data, cuts)

    (attempt if number is None else seed(number)(attempt))()


def main() -> int:
    """Fuzz for some time; return 1 if something was found."""
    parser = argparse.ArgumentParser(
        prog="scripts/dev/fuzz", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=60, help="for each target (default: 60)")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    options_ = parser.parse_args()
    for name in options_.targets or TARGETS:
        print(f"scripts/dev/fuzz: {name}: {TARGETS[name].__doc__} ...", file=sys.stderr)
        ends, tried = time.monotonic() + options_.seconds, 0
        while time.monotonic() < ends:
            fuzz(name, 500)
            tried += 500
        print(f"scripts/dev/fuzz: {name}: {tried} inputs, nothing found", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
