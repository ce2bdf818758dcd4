# SPDX-License-Identifier: LGPL-2.1-or-later
"""Another process goes on with what one has left, wherever that one was killed.

What is left is looked at before each bytecode of the modules that write it, which is where a kill
can fall as far as Python goes; from each such moment the state is restored and compared with what
it may be.
"""

import base64
import json
import os
import random
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import pytest

from secretd.errors import LockedMemoryExhausted, StateError
from secretd.journal import bulk_loader, compaction, files, journal, layout, load_result, loader
from secretd.journal.journal import Journal
from secretd.limits import Tuning
from secretd.linux import locked_pages
from secretd.linux.locked_pages import Level
from secretd.memory import arena, takeover, wipe
from secretd.memory.arena import Arena
from tests.support.journals import put
from tests.support.memfds import memfd
from tests.support.needs import need_level

WINDOW = 4096

VECTORS = Path(__file__).parent.parent / "vectors"


INODE_OFFSET = 24


LEVELS: tuple[Level, ...] = ("secretmem", "mlock", "none")


class Left(NamedTuple):
    """What a process that was killed has left: the contents of the arena's and the journal's
    files.
    """

    arena: bytes
    journals: tuple[bytes, ...]


def left(journal: Journal) -> Left:
    """What there would be, were this process killed now."""
    windows = len(journal.arena._taken)
    contents = os.pread(journal.arena.fileno(), windows * WINDOW, 0)
    fd = journal.fileno()
    return Left(contents, (os.pread(fd, os.fstat(fd).st_size, 0),))


def restored(was: Left) -> Journal:
    """Restore copies of what was left."""
    arena = memfd(was.arena, locked_pages.FILE_BYTES)
    inode = struct.pack("<Q", os.fstat(arena).st_ino)
    files = [
        memfd(file[:INODE_OFFSET] + inode + file[INODE_OFFSET + 8 :] if len(file) > 40 else file)
        for file in was.journals
    ]
    return Journal.restore(arena, files)


def content(journal: Journal) -> dict[str, tuple[bytes, dict[str, object]]]:
    """All objects: plaintext and properties."""
    found = {}
    for object_id in journal:
        record = journal.get(object_id)
        assert record is not None
        plain = b"" if record.slot == layout.NO_SLOT else bytes(journal.plaintext(object_id))
        found[object_id] = (plain, record.properties)
    return found


def check_unused_is_wiped(journal: Journal) -> None:
    """Not a byte of the arena's file is left but what is in use."""
    data = bytearray(os.pread(journal.arena.fileno(), len(journal.arena._taken) * WINDOW, 0))
    for object_id in journal:
        record = journal.get(object_id)
        assert record is not None
        if record.slot != layout.NO_SLOT:
            data[record.slot : record.slot + record.size] = bytes(record.size)
    assert not any(data)


def discard(journal: Journal) -> None:
    journal.close()
    journal.arena.close()


WATCHED: frozenset[str] = frozenset(
    str(module.__file__)
    for module in (
        arena,
        takeover,
        wipe,
        locked_pages,
        journal,
        files,
        compaction,
        loader,
        bulk_loader,
        load_result,
    )
)


def moments(action: Callable[[], object], look: Callable[[], object]) -> Iterator[object]:
    """Carry out ``action``; return what ``look`` sees before each of its bytecodes."""
    seen: list[object] = []

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        code: CodeType = frame.f_code
        if code.co_filename not in WATCHED:
            return None
        frame.f_trace_opcodes = True
        now = look()
        if not seen or seen[-1] != now:
            seen.append(now)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return iter(seen)


@pytest.fixture
def small() -> Journal:
    """A journal that grows and is compacted often, over an arena of small windows."""
    tuning = Tuning(dead_bytes=1 << 8, journal_bytes=1 << 9)
    return Journal(Arena("none", window=WINDOW), tuning=tuning)


@pytest.mark.slow
def test_at_every_moment_each_object_is_whole_or_absent(small: Journal) -> None:
    """Adding, changing and removing, over growth of both, and compaction."""
    journal = small
    rng = random.Random(5)
    model: dict[str, tuple[bytes, dict[str, object]]] = {}
    looked, passes, sizes = 0, 0, [0, 1, 60, 64, 65, 300, WINDOW - 1, WINDOW, 3 * WINDOW + 5]
    for number in range(200):
        object_id = rng.choice([*model, "x"])
        kind = rng.choice(["add", "remove", "set", "set", "set"])
        before = dict(model)
        if kind == "add" or object_id not in model:
            object_id = f"s{number}"
            plain = rng.randbytes(rng.choice(sizes)) if rng.random() < 0.9 else None
            properties: dict[str, object] = {"file": "f" * rng.randrange(40)}
            model[object_id] = (plain or b"", properties)

            def action(i: str = object_id, p: bytes | None = plain, q: dict = properties) -> None:
                if p is None:
                    journal.add(i, 3, q, None, 7)
                else:
                    put(journal, i, p, **q)

        elif kind == "remove":
            del model[object_id]

            def action(i: str = object_id) -> None:  # type: ignore[misc]
                journal.remove(i)

        else:
            properties = {"file": "g" * rng.randrange(40)}
            model[object_id] = (model[object_id][0], properties)

            def action(i: str = object_id, q: dict = properties) -> None:  # type: ignore[misc]
                journal.set_properties(i, q)

        size = journal.size
        for was in moments(action, lambda: left(journal)):
            assert isinstance(was, Left)
            other = restored(was)
            assert content(other) in (before, model)
            check_unused_is_wiped(other)
            if looked % 40 == 0:
                # It goes on as if nothing had been.
                put(other, "after", b"after")
                assert bytes(other.plaintext("after")) == b"after"
                other.remove(next(iter(other)))
            discard(other)
            looked += 1
        assert content(journal) == model
        passes += journal.size < size
    assert passes > 2
    assert len(journal.arena._taken) > 8
    assert looked > 500
    discard(journal)


def test_a_torn_rewrite_is_still_a_dead_record(small: Journal) -> None:
    """A new object takes a dead record's place; the kernel may kill in the middle of the copy."""
    journal = small
    for name in ("kept1", "first", "kept2"):
        put(journal, name, name.encode(), file="x" * 9)
    journal.remove("first")
    before, size = content(journal), journal.size
    seen = [
        was
        for was in moments(
            lambda: put(journal, "other", b"other", iv="y" * 11), lambda: left(journal)
        )
        if isinstance(was, Left)
    ]
    assert journal.size == size  # it took the place
    old = seen[0].journals[0]
    (new,) = {was.journals[0] for was in seen} - {old, left(journal).journals[0]}
    changed = [index for index in range(size) if old[index] != new[index]]
    assert len(changed) > 20
    for index in changed:
        for torn in (old[:index] + new[index:], new[:index] + old[index:]):
            other = restored(Left(seen[-1].arena, (torn,)))
            assert content(other) == before
            assert other.size == size
            check_unused_is_wiped(other)
            discard(other)
    discard(journal)


def test_a_kill_while_restoring_loses_nothing_either(small: Journal) -> None:
    """Nor a second one."""
    journal = small
    for number in range(90):
        put(journal, f"s{number}", b"%d" % number * 9, file="x" * (number % 7))
    for number in range(0, 90, 3):
        journal.remove(f"s{number}")
    journal.set_properties("s1", {"file": "changed"})
    expected = content(journal)
    # Written, and not in the journal.
    buffers = [journal.arena.allocate(size) for size in (60, 60, 60, 100, 2 * WINDOW, 200)]
    for buffer in buffers:
        buffer.view[:] = b"y" * len(buffer)
    torn = left(journal)
    end = journal.size
    # A record that was begun, and a file that compaction had begun.
    first = torn.journals[0]
    torn = Left(torn.arena, (first[:end] + b"\x40\0\0\0rubbish" + first[end + 11 :], b"\0" * 512))
    looked = 0
    made: list[Journal] = []
    original = Journal._load

    def load(self: Journal, end: int) -> dict[int, list[int]]:
        made.append(self)
        return original(self, end)

    Journal._load = load  # type: ignore[method-assign]
    try:
        seen = moments(
            lambda: restored(torn), lambda: left(made[0]) if made and made[0].arena._taken else None
        )
        for was in seen:
            if not isinstance(was, Left):
                continue
            other = restored(was)
            assert content(other) == expected
            check_unused_is_wiped(other)
            discard(other)
            looked += 1
    finally:
        Journal._load = original  # type: ignore[method-assign]
    assert looked > 5
    discard(made[0])
    for buffer in buffers:
        buffer.free()
    discard(journal)


@pytest.mark.parametrize("level", LEVELS)
def test_descriptors_are_enough_to_go_on(level: Level) -> None:
    """At each level of memory; what one process has left to the other stays when it is closed."""
    need_level(level)
    journal = Journal(Arena(level))
    for number in range(200):
        put(journal, f"s{number}", b"%d" % number, file="f")
    put(journal, "large", b"x" * 600_000)
    journal.remove("s7")
    fds = [os.dup(fd) for fd in (journal.arena.fileno(), journal.fileno())]
    expected = content(journal)
    needed = journal.arena.mapped - journal.arena.spare
    journal.leave()
    other = Journal.restore(fds[0], fds[1:])
    assert other.arena.mapped == needed
    assert other.arena.level == level
    assert content(other) == expected
    assert other.get("s9").uid == 7
    put(other, "s7", b"again")
    assert bytes(other.plaintext("s7")) == b"again"
    for object_id in list(other):
        other.remove(object_id)
    assert other.arena.held == 0
    discard(other)


def test_a_record_that_was_finished_but_not_counted_is_there(small: Journal) -> None:
    """Its state byte decides."""
    put(small, "a", b"1")
    end = small.size
    put(small, "b", b"2")
    was = left(small)
    first = was.journals[0]
    counted = first[:48] + struct.pack("<Q", end) + first[56:]
    other = restored(Left(was.arena, (counted,)))
    assert set(other) == {"a", "b"}
    assert other.size == small.size
    discard(other)
    discard(small)


def test_what_cannot_be_gone_on_with_is_refused(small: Journal) -> None:
    """With the reason; nothing is changed."""
    for number in range(70):
        put(small, f"s{number}", b"%d" % number)
    put(small, "large", b"x" * WINDOW)
    was = left(small)
    first = was.journals[0]
    header, head = 56, 36

    def refused(words: str, *journals: bytes, error: type[Exception] = StateError) -> None:
        with pytest.raises(error, match=words):
            restored(Left(was.arena, journals))

    def with_slot(number: int, slot: int) -> bytes:
        """The same with another slot in the record of that number, and a good checksum."""
        data, offset = bytearray(first), header
        for _ in range(number):
            offset += struct.unpack_from("<I", data, offset)[0]
        length = struct.unpack_from("<I", data, offset)[0]
        struct.pack_into("<Q", data, offset + 16, slot)
        struct.pack_into("<I", data, offset + 4, zlib.crc32(data[offset + 9 : offset + length]))
        return bytes(data)

    refused("there is no journal", b"", b"\0" * 300)
    refused("has format 7, not 1", first[:8] + b"\7" + first[9:])
    refused("has format 7, not 1", first, first[:8] + b"\7" + first[9:])
    refused("checksum is wrong", first[: header + head] + b"?" + first[header + head + 1 :])
    refused("end too early", first[:header] + b"\3\0\0\0" + first[header + 4 :])
    refused("end too early", first[:header] + bytes(len(first) - header))
    refused("two secrets lie in one place", with_slot(1, 0))
    refused("two secrets lie in one place", with_slot(1, 65))
    refused("two secrets lie in one place", with_slot(70, 0))
    refused("two secrets lie in one place", with_slot(70, 5))
    refused("two secrets lie in one place", with_slot(70, 900 * WINDOW))
    arena = memfd(was.arena, locked_pages.FILE_BYTES)
    with pytest.raises(StateError, match="belongs to another arena"):
        Journal.restore(arena, [memfd(first)])
    other = restored(was)
    assert content(other) == content(small)
    discard(other)
    discard(small)


def test_full_windows_are_gone_on_with(small: Journal) -> None:
    """Slots are taken from others, and given back to these."""
    slots = WINDOW // 64
    for number in range(2 * slots):
        put(small, f"s{number}", b"%d" % number)
    other = restored(left(small))
    other.remove("s0")
    put(other, "more", b"more")
    for number in range(1, 2 * slots):
        assert bytes(other.plaintext(f"s{number}")) == b"%d" % number
        other.remove(f"s{number}")
    assert content(other) == {"more": (b"more", {})}
    check_unused_is_wiped(other)
    discard(other)
    discard(small)


@pytest.mark.parametrize("path", sorted(VECTORS.glob("state-*.json")), ids=lambda path: path.stem)
def test_the_state_of_an_earlier_release_is_taken_over_whole(path: Path) -> None:
    """Its files are recorded; objects, grants, counts and deadlines are properties in them."""
    vector = json.loads(path.read_text())
    arena, *journals = (
        zlib.decompress(base64.b64decode(text)) for text in (vector["arena"], *vector["journals"])
    )
    expected = {i: (text.encode(), made) for i, (_, text, made) in vector["objects"].items()}
    journal = restored(Left(arena, tuple(journals)))
    assert content(journal) == expected
    for object_id, (kind, _, _) in vector["objects"].items():
        record = journal.get(object_id)
        assert record is not None
        assert (record.type, record.uid) == (kind, 7 if kind == 1 else 0)
    check_unused_is_wiped(journal)
    # It goes on with them, and the next process finds everything.
    rng = random.Random(6)
    for number in range(3000):
        object_id = rng.choice(sorted(expected)[:50] if number % 3 else [*expected])
        if number % 3:
            properties: dict[str, object] = {"file": "x" * rng.randrange(60)}
            journal.set_properties(object_id, properties)
            expected[object_id] = (expected[object_id][0], properties)
        else:
            journal.remove(object_id)
            del expected[object_id]
            put(journal, f"new{number}", b"%d" % number)
            expected[f"new{number}"] = (b"%d" % number, {})
    other = restored(left(journal))
    assert content(other) == expected
    discard(other)
    discard(journal)


def test_an_earlier_release_may_have_left_several_files(small: Journal) -> None:
    """The one of the latest generation counts; the others are emptied and closed."""
    put(small, "a", b"1")
    was = left(small)
    first = was.journals[0]
    second = first[:16] + struct.pack("<Q", 2) + first[24:]
    stale = first.replace(b"a\0", b"z\0")
    for journals in ((second, stale), (stale, second), (second, b"", b"")):
        other = restored(Left(was.arena, journals))
        assert content(other) == {"a": (b"1", {})}
        put(other, "b", b"2")
        again = restored(left(other))
        assert set(again) == {"a", "b"}
        discard(again)
        discard(other)
    discard(small)


def test_an_arena_that_cannot_be_mapped_stays_as_it_is(
    small: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LimitMEMLOCK may be less than before; with more it is all there again."""
    put(small, "a", b"1")
    was = left(small)

    def none(_self: Arena, _index: int, _count: int) -> memoryview:
        raise LockedMemoryExhausted("No locked memory left")

    with monkeypatch.context() as patched:
        patched.setattr(Arena, "_map", none)
        with pytest.raises(LockedMemoryExhausted):
            restored(was)
    other = restored(was)
    assert content(other) == {"a": (b"1", {})}
    discard(other)
    discard(small)
