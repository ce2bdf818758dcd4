# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ids that stay sorted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secretd.qom.sorted_ids import SortedIds


@pytest.mark.slow
@given(
    st.sets(st.text("abc", max_size=3)),
    st.lists(st.text("abc", max_size=3)),
    st.text("abc", max_size=3),
    st.integers(1, 9),
)
def test_it_is_as_a_sorted_list(
    first: set[str], changes: list[str], after: str, count: int
) -> None:
    """Whatever comes and goes, with blocks of two."""
    ids, model = SortedIds(first, block_ids=2), set(first)
    for each in changes:
        if each in model:
            ids.remove(each)
        else:
            ids.add(each)
        model ^= {each}
    expected = sorted(model)
    assert ids.after(after, count) == [i for i in expected if i > after][:count]
    assert ids.after(after, count, included=True) == [i for i in expected if i >= after][:count]
