# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line's objects: keyval and JSON."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secretd.errors import UsageError
from secretd.journal.journal import Journal
from secretd.memory.arena import Arena
from secretd.qapi import keyval
from secretd.qom.registry import TYPES
from secretd.qom.tree import ObjectTree
from tests.support.daemon import add_object
from tests.support.needs import ARENA_LEVEL
from tests.support.transcript import Option, load_options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("secret,id=x,data=y", {"qom-type": "secret", "id": "x", "data": "y"}),
        ("id=x,qom-type=secret", {"id": "x", "qom-type": "secret"}),
        ("secret,data=a,,,format=raw", {"qom-type": "secret", "data": "a,", "format": "raw"}),
        ("secret,data=a=b,id=x,", {"qom-type": "secret", "data": "a=b", "id": "x"}),
        ("secret,id=x,id=y", {"qom-type": "secret", "id": "y"}),
        ("secret,data=,id=x", {"qom-type": "secret", "data": "", "id": "x"}),
        ("", {}),
    ],
)
def test_keyval_is_read_as_qemu_does(text: str, expected: dict[str, str]) -> None:
    """Doubled commas, equals signs in values, the last of a key, a comma at the end."""
    assert keyval.parse(text, "qom-type") == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("secret,data", "Expected '=' after parameter 'data'"),
        ("secret,data,id=x", "Expected '=' after parameter 'data'"),
        ("secret,da ta=x", "Invalid parameter 'da ta'"),
        ("secret,=x", "Invalid parameter ''"),
        ("sec,,ret", "Invalid parameter ''"),
        ("secret,id=x,!", "Invalid parameter '!'"),
        ("secret,id.x=x", "Parameters 'id.*' are unexpected"),
    ],
)
def test_bad_keyval_is_named_in_qemus_words(text: str, words: str) -> None:
    """Programs match on them here too."""
    with pytest.raises(UsageError) as caught:
        keyval.parse(text, "qom-type")
    assert str(caught.value) == words


def test_json_and_keyval_give_the_same_arguments() -> None:
    """A brace at the start decides."""
    for text in ("secret,id=x,file=a,,b", "{'qom-type': 'secret', 'id': 'x', 'file': 'a,b'}"):
        given = keyval.arguments(keyval.buffer(text)).members
        assert {k: v.to_str() for k, v in given.items()} == (
            {"qom-type": "secret", "id": "x", "file": "a,b"}
        )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{'id': 1", "JSON parse error, premature EOI"),
        ("{'id': nope}", "JSON parse error, invalid keyword 'nope'"),
        ("{]", "JSON parse error, expecting value"),
        ("{} {}", "Expecting at most one JSON value"),
    ],
)
def test_bad_json_is_named_in_qemus_words(text: str, words: str) -> None:
    """As on the wire, and what only a command line can have."""
    with pytest.raises(UsageError) as caught:
        keyval.arguments(keyval.buffer(text))
    assert str(caught.value) == words


@pytest.mark.slow
@given(
    st.dictionaries(st.sampled_from(["qom-type", "id", "file"]), st.text(max_size=9), min_size=1)
)
def test_composing_and_parsing_are_inverse(members: dict[str, str]) -> None:
    """So that a rewritten command line means the same."""
    assert keyval.parse(keyval.compose(members), "qom-type") == members


@pytest.mark.parametrize("option", load_options(), ids=lambda option: option.text[:60])
def test_the_object_option_is_answered_as_by_qemu(
    option: Option, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word what qemu-storage-daemon says, as it was recorded."""
    scratch = Arena(ARENA_LEVEL)
    journal = Journal(Arena(ARENA_LEVEL))
    tree = ObjectTree(journal, scratch, TYPES)
    try:
        words = ""
        try:
            add_object(tree, option.text)
        except UsageError as error:
            words = str(error)
        assert words == option.expected
        assert capsys.readouterr().out == option.printed
        assert len(journal) == (not words and not option.printed)
    finally:
        journal.close()
        journal.arena.close()
        scratch.close()
