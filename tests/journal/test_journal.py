# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal: the objects' properties, and their plaintext's slots."""

import os
import random
import struct
import zlib

import pytest

from secretd.errors import StateError
from secretd.journal.files import ObjectRecord
from secretd.journal.journal import Journal
from secretd.limits import Tuning
from secretd.memory.arena import SECRET_WINDOW, Arena
from tests.support.journals import put


def test_objects_are_kept_with_properties_and_plaintext(arena: Arena) -> None:
    """What was added is read back, whole."""
    journal = Journal(arena)
    put(journal, "a", b"letmein", format="base64", file="/x\u20ac")
    put(journal, "b", b"")
    journal.add("rule", 9, {"policy": "deny"}, None, 7)
    assert list(journal) == ["a", "b", "rule"]
    assert len(journal) == 3
    assert "a" in journal
    assert "c" not in journal
    record = journal.get("a")
    assert record is not None
    assert record == ObjectRecord(
        "a", 1, 7, record.slot, {"format": "base64", "file": "/x\u20ac"}, 7
    )
    assert bytes(journal.plaintext("a")) == b"letmein"
    assert bytes(journal.plaintext("b")) == b""
    assert journal.summary("rule") == (9, 0)
    assert journal.get("c") is None
    assert journal.summary("c") is None
    journal.set_properties("a", {"file": "y"})
    assert journal.get("a").properties == {"file": "y"}
    assert bytes(journal.plaintext("a")) == b"letmein"
    journal.remove("rule")
    journal.remove("a")
    assert list(journal) == ["b"]
    journal.close()


def test_the_journal_holds_no_plaintext_and_valid_checksums(arena: Arena) -> None:
    """The documented layout, read by other code than the journal's."""
    journal = Journal(arena)
    for number in range(20):
        put(journal, f"s{number}", b"plaintext" + bytes([number]), keyid="k")
    journal.remove("s3")
    data = journal._map[: journal.size]
    assert b"plaintext" not in data
    magic, version, offset, generation, inode, window, level, windows, _, end = struct.unpack_from(
        "<8sIIQQIIIIQ", data
    )
    assert (magic, version, generation, end) == (b"secretd\0", 1, 1, len(data))
    assert inode == os.fstat(arena.fileno()).st_ino
    assert (window, windows) == (SECRET_WINDOW, 1)
    assert level == ["secretmem", "mlock", "none"].index(arena.level)
    live = []
    while offset < len(data):
        length, crc, alive, kind, id_length, size, _slot, uid = struct.unpack_from(
            "<IIBBHIQI", data, offset
        )
        # The checksum leaves out the state byte, which changes.
        assert zlib.crc32(data[offset + 9 : offset + length]) == crc
        assert (kind, size, uid) == (1, 10, 7)
        if alive == 1:
            live.append(data[offset + 28 : offset + 28 + id_length].decode())
        offset += length
    assert live == [f"s{number}" for number in range(20) if number != 3]
    journal.close()


def test_the_journal_is_compacted_when_most_of_it_is_dead(arena: Arena) -> None:
    """It does not grow with the number of changes, and nothing is lost."""
    journal = Journal(arena, tuning=Tuning(dead_bytes=1 << 12))
    rng = random.Random(2)
    expected: dict[str, bytes] = {}
    for number in range(6000):
        if expected and rng.random() < 0.49:
            object_id = rng.choice(list(expected))
            assert bytes(journal.plaintext(object_id)) == expected.pop(object_id)
            journal.remove(object_id)
        elif expected and rng.random() < 0.2:
            object_id = rng.choice(list(expected))
            journal.set_properties(object_id, {"file": object_id})
            assert journal.get(object_id).properties == {"file": object_id}
        else:
            content = rng.randbytes(rng.choice([0, 32, 100]))
            put(journal, f"s{number}", content, keyid="k" * rng.randrange(50))
            expected[f"s{number}"] = content
    assert set(journal) == set(expected)
    for object_id, content in expected.items():
        assert bytes(journal.plaintext(object_id)) == content
        assert journal.get(object_id).id == object_id
    assert journal.size < 100 * len(expected) + (1 << 16)
    journal.close()


def test_repeated_property_changes_keep_objects_whole(arena: Arena) -> None:
    """Compaction in the middle of a change does not spoil another record."""
    journal = Journal(arena, tuning=Tuning(dead_bytes=1 << 10))
    for number in range(50):
        put(journal, f"s{number}", b"%d" % number, iv="x" * number)
    rng = random.Random(4)
    for step in range(3000):
        journal.set_properties(f"s{rng.randrange(50)}", {"iv": "y" * (step % 90)})
    for number in range(50):
        assert bytes(journal.plaintext(f"s{number}")) == b"%d" % number
        assert set(str(journal.get(f"s{number}").properties["iv"])) <= {"x", "y"}
    assert journal.size < 20000
    journal.close()


def test_an_id_is_stored_once(arena: Arena) -> None:
    """A second object of the same id would leave the first one's plaintext behind."""
    journal = Journal(arena)
    put(journal, "a", b"1")
    with pytest.raises(ValueError, match="the id is taken"):
        journal.add("a", 1, {}, None, 7)
    journal.close()


def test_a_journal_that_cannot_be_mapped_leaves_no_descriptor(arena: Arena) -> None:
    """The failure is passed on; the leak check of the suite sees the rest."""
    with pytest.raises((OSError, ValueError)):
        Journal(arena, tuning=Tuning(journal_bytes=-1))


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (32, b"\1\0\0\0"),
        (32, b"\3\0\1\0"),
        (36, b"\7"),
        (40, b"\xff\xff\xff\xff"),
        (48, b"\xff" * 6),
    ],
)
def test_a_damaged_header_is_refused(offset: int, value: bytes) -> None:
    """Window, level, windows, end: none of these can be. Found by scripts/dev/fuzz."""
    journal = Journal(Arena("none"))
    data = bytearray(os.pread(journal.fileno(), 4096, 0))
    arena = os.dup(journal.arena.fileno())
    journal.close()
    journal.arena.close()
    data[offset : offset + len(value)] = value
    file = os.memfd_create("journal")
    os.pwrite(file, data, 0)
    with pytest.raises(StateError, match="header is damaged"):
        Journal.restore(arena, [file])


def test_a_journal_that_ends_in_its_header_is_none() -> None:
    """Found by scripts/dev/fuzz, too."""
    arena = os.memfd_create("arena")
    file = os.memfd_create("journal")
    os.pwrite(file, b"secretd\0\1\0\0\0", 0)
    with pytest.raises(StateError, match="there is no journal"):
        Journal.restore(arena, [file])


def test_records_of_many_lengths_are_all_whole(arena: Arena) -> None:
    """How they are packed is known for some lengths at a time."""
    journal = Journal(arena)
    for length in (*range(1, 800, 7), 1):
        journal.add("x" * length + f"-{len(journal)}", 1, {}, None, 0)
    copies = [os.dup(journal.fileno())]
    other = Journal.restore(os.dup(arena.fileno()), copies)
    assert list(other) == list(journal)
    other.leave()
    journal.close()
