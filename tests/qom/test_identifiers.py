# SPDX-License-Identifier: LGPL-2.1-or-later
"""Identifiers of objects, as util/id.c of QEMU has them."""

import pytest

from secretd.errors import CommandError
from secretd.qom.identifiers import ID_BYTES, check_identifier, with_hint


@pytest.mark.parametrize("good", ["a", "A.b-c_9", "x" * ID_BYTES])
def test_identifiers_begin_with_a_letter(good: str) -> None:
    """Letters, digits and three marks follow."""
    check_identifier(good)


@pytest.mark.parametrize("bad", ["", "1", "_a", "a b", "a\u00e9", "a\n"])
def test_what_is_no_identifier_is_refused_in_qemus_words(bad: str) -> None:
    """People get a hint, programs do not."""
    with pytest.raises(CommandError, match="Parameter 'id' expects an identifier") as caught:
        check_identifier(bad)
    assert with_hint(caught.value.desc).endswith("starting with a letter.")


def test_an_identifier_that_is_too_long_is_refused() -> None:
    """QEMU has no limit."""
    with pytest.raises(CommandError, match="longer than the limit of 4096 bytes"):
        check_identifier("x" * (ID_BYTES + 1))
    assert with_hint("other words") == "other words"
