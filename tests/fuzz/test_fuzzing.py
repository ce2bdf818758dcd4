# SPDX-License-Identifier: LGPL-2.1-or-later
"""The corpora of scripts/dev/fuzz, and some hundred inputs made of them."""

from pathlib import Path

import pytest

from tests.fuzz import parsers

pytestmark = pytest.mark.slow  # it starts processes, or tries many cases

FILES = sorted(path for name in parsers.TARGETS for path in (parsers.CORPORA / name).iterdir())


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_what_is_in_the_corpora_does_no_harm(path: Path) -> None:
    """Whole, and cut in pieces."""
    for cuts in ([], [1, 7, 50], list(range(0, 400, 3))):
        parsers.TARGETS[path.parent.name](path.read_bytes(), cuts)


@pytest.mark.parametrize("name", parsers.TARGETS)
def test_mutations_of_it_do_none_either(name: str) -> None:
    """Others each time."""
    parsers.fuzz(name, 150)


def test_a_target_that_fails_is_noticed() -> None:
    """The smallest input that shows it is in the error."""
    with pytest.MonkeyPatch.context() as patch:

        def broken(data: bytes, _cuts: list[int]) -> None:
            assert b"x" not in data

        patch.setitem(parsers.TARGETS, "wire", broken)
        with pytest.raises(AssertionError) as caught:
            parsers.fuzz("wire", 500, 1)
        assert any(
            "Failing test case" in note or "Falsifying" in note for note in caught.value.__notes__
        )
