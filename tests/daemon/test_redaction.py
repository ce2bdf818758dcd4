# SPDX-License-Identifier: LGPL-2.1-or-later
"""What errors about --object show of its text."""

import pytest

from secretd.daemon.redaction import SENSITIVE, is_unfinished_value, parts, shown, with_file


def test_the_schema_says_which_members_are_sensitive() -> None:
    """It is data alone."""
    assert frozenset({"data"}) == SENSITIVE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("secret,id=s,file=/x", "secret,id=s,file=/x"),
        ("qom-type=secret,id=s", "qom-type=secret,id=s"),
        ("secret,id=s,data=let,,me,format=raw", "secret,id=s,data=…,format=raw"),
        ("secret,id=s,data=hun,ter=two", "secret,id=s,data=…,ter=…"),
        ("secret,id=s,data=hunter,2", "secret,id=s,data=…,…"),
        ("secret,id=s,dat=letmein", "secret,id=s,dat=…"),
        ("secret,id=s,file=/dev/fd/7,format=raw", "secret,id=s,data=…,format=raw"),
        ("authz-list,id=a,rules.0.match=x", "authz-list,id=a,rules.0.match=x"),
        ("", ""),
        ('{"id": "s", "data": "let\\"me", "iv": "x"}', '{"id": "s", "data": …, "iv": "x"}'),
        ('{"id": "s", "data": 12}', '{"id": "s", "data": …}'),
        ('{"d\\u0061ta": "letmein"}', '{"d\\u0061ta": …}'),
        ('{"id": "s", "file": "/dev/fd/7"}', '{"id": "s", "data": …}'),
        ('{"id": "s", "data": "letmein"', "{…"),
        ("{'data': 'letmein'}", "{…"),
    ],
)
def test_only_values_that_may_carry_a_secret_are_hidden(text: str, expected: str) -> None:
    """Those of sensitive members, and of members that the schema does not know."""
    assert shown(text, ["/dev/fd/7"]) == expected


def test_the_comma_hint_needs_a_missing_comma() -> None:
    """A part without an equals sign behind the value of a sensitive member."""
    assert is_unfinished_value("secret,id=s,data=hunter,2")
    for text in ("secret,id=s,data=x,bogus=1", "secret,id=s,2", '{"data": "x"}', "secret"):
        assert not is_unfinished_value(text)


def test_commas_that_are_doubled_cut_nothing() -> None:
    """As in QEMU's keyval."""
    assert [part.text for part in parts("secret,id=a,,b,data=,,,x=")] == [
        "secret", "id=a,,b", "data=,,", "x=",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"data": "x", "id": "s"}', '{"file": "/f", "id": "s"}'),
        ('{"data": "x", "data": "y"}', None),
        ('{"id": "s"}', None),
        ('{"data": "x", }', None),
        ('{"data": "x", "d\\u0061ta": "y"}', None),
    ],
)
def test_a_file_takes_the_place_of_the_data(text: str, expected: str | None) -> None:
    """Where it is certain which text is the value."""
    assert with_file(text, "/f") == expected
