# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading a journal's file: in runs of records that are alike, and one by one."""

import struct
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secretd.errors import StateError
from secretd.journal.layout import (
    CHECKED,
    FILE,
    GONE,
    LIVE,
    NO_SLOT,
    RECORD,
    UNCHECKED,
    WRITTEN,
)
from secretd.journal.load_result import LoadResult
from secretd.journal.loader import read


def record(
    object_id: bytes, slot: int = 64, state: int = LIVE, kind: int = 1, uid: int = 0,
    properties: bytes = b"", id_length: int | None = None,
) -> bytes:  # fmt: skip
    """As the journal writes it."""
    content = object_id + properties
    rest = (RECORD.size + len(content) + 7 & ~7) - RECORD.size
    size = len(object_id) if id_length is None else id_length
    checked = struct.pack(CHECKED.format(rest), kind, size, 32, slot, uid, content)
    return UNCHECKED.pack(RECORD.size + rest, crc32(checked), state) + checked


def outcome(data: bytes) -> object:
    """All that was found, or that it was refused."""
    loaded = LoadResult({})
    try:
        read(loaded, bytes(FILE.size) + data)
    except StateError:
        return "refused"
    survey = loaded.survey
    return (
        loaded.offsets, loaded.buffers, loaded.superseded, loaded.dead, loaded.end,
        dict(survey.by_type), survey.described, dict(survey.held),
    )  # fmt: skip


def one_by_one(data: bytes) -> object:
    """The same without runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secretd.journal.bulk_loader._RUN", 0)
        return outcome(data)


ALIKE = st.builds(
    lambda n, name, properties, dead: [
        record(name % i, i, GONE if dead >> i % 8 & 1 else LIVE, properties=properties)
        for i in range(n)
    ],
    st.integers(0, 30),
    st.sampled_from(
        [b"alike%04d", b"n%d", b"n%o.of.one.length", b"\xc3\xa4%04d", b"%04d\xc3", b"%d\n", b"\0%d"]
    ),
    st.sampled_from([b"", b"{}", b'{"format":"raw"}', b"\xff"]),
    st.sampled_from([0, 0b00000001, 0b01010101, 0b11111110, 0b11111111]),
)
IDS = st.sampled_from([b"a", b"alike0003", b"much-longer-than-that", b"\xff"])
ONE = st.builds(
    record,
    IDS,
    st.sampled_from([64, NO_SLOT]),
    st.sampled_from([LIVE, LIVE, LIVE, GONE, WRITTEN]),
    st.integers(1, 2),
    st.integers(0, 1),
    st.sampled_from([b"", b'{"format":"raw"}']),
)
ODD = st.lists(ONE | st.just(record(b"alike0050", uid=7)), max_size=12)


@pytest.mark.slow
@given(st.lists(ALIKE | ODD, max_size=5), st.binary(max_size=40), st.integers(0, 2000))
def test_runs_are_read_as_one_by_one(parts: list[list[bytes]], tail: bytes, damaged: int) -> None:
    """Whatever stands there: ids twice, what is gone, other kinds, rubbish, a byte that is
    wrong.
    """
    data = bytearray(b"".join(b"".join(part) for part in parts) + tail)
    assert outcome(bytes(data)) == one_by_one(bytes(data))
    if data:
        data[damaged % len(data)] ^= 1
        assert outcome(bytes(data)) == one_by_one(bytes(data))


def test_a_record_in_the_place_of_another_counts_instead_of_it() -> None:
    """The process ended between writing the one and burying the other, though many are alike."""
    many = [record(b"alike%04d" % number, 64 * number) for number in range(600)]
    loaded = LoadResult({})
    read(loaded, bytes(FILE.size) + b"".join(many) + record(b"alike0007", 64 * 7))
    assert loaded.offsets["alike0007"] == FILE.size + 600 * len(many[0])
    assert loaded.superseded == [FILE.size + 7 * len(many[0])]
    assert len(loaded.offsets) == len(loaded.buffers[32]) == loaded.survey.count == 600
    assert sorted(loaded.survey.by_type[1]) == sorted(loaded.offsets)


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("wrong", [record(b"\xff\xfe"), record(b"a", id_length=99)])
def test_an_id_that_is_none_is_refused(count: int, wrong: bytes) -> None:
    """Though the checksum is right."""
    with pytest.raises(StateError, match="a record's id is damaged"):
        read(LoadResult({}), bytes(FILE.size) + wrong * count)
