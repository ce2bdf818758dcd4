# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's orders.

That they are QEMU's is shown by the transcripts, which were recorded; here is how.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secretd.wire import encoder
from secretd.wire.hash_order import KNOWN_NAMES, GHashTable, qdict_bucket, qdict_items

NAMES = st.lists(st.text(max_size=5), unique=True, max_size=60)


def test_members_come_by_bucket_and_in_a_bucket_the_latest_first() -> None:
    """The buckets are those of tdb_hash()."""
    assert encoder.value({"b": 1, "a": 2}) == '{"a": 2, "b": 1}'
    assert [name for name, _ in qdict_items({"id": 1, "return": 2, "error": 3})] == [
        "return", "id", "error"
    ]  # fmt: skip
    first: dict[int, str] = {}
    for number in range(600):
        name = f"n{number}"
        other = first.setdefault(qdict_bucket(name), name)
        if other != name:
            assert [n for n, _ in qdict_items({other: 1, name: 2})] == [name, other]
            break
    else:
        raise AssertionError("600 names in 512 buckets, and no two in one")


@pytest.mark.slow
@given(NAMES)
def test_a_hash_table_lists_what_is_in_it(names: list[str]) -> None:
    """Each once, whatever size it grows to."""
    assert sorted(GHashTable(names)) == sorted(names)


@pytest.mark.slow
@given(NAMES, st.data())
def test_what_is_removed_is_not_listed_and_the_others_are(
    names: list[str], data: st.DataObject
) -> None:
    """Also while the table shrinks."""
    table = GHashTable(names)
    kept = list(names)
    while kept:
        name = data.draw(st.sampled_from(kept))
        kept.remove(name)
        table.remove(name)
        assert sorted(table) == sorted(kept)


KNOWN = st.dictionaries(
    st.sampled_from(sorted(KNOWN_NAMES)),
    st.integers() | st.text() | st.booleans() | st.none() | st.just({"id": [1]}),
)


@given(st.lists(KNOWN))
def test_known_members_are_written_as_any_others(members: list[dict[str, object]]) -> None:
    """Lists of them have a fast path: its text is that of name and value, one by one."""
    by_hand = [
        "{"
        + ", ".join(f'"{name}": {encoder.value(member)}' for name, member in qdict_items(each))
        + "}"
        for each in members
    ]
    assert encoder.value(members) == "[" + ", ".join(by_hand) + "]"
