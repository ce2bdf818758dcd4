# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading usual command lines without click: what is accepted, click reads in the same way."""

import contextlib
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secretd.ctl import frame, words
from secretd.ctl.output import Common
from secretd.ctl.verb import Verb
from secretd.ctl.verbs import MODULES, find

PARAMETERS = [each for name in MODULES for each in find(name).parameters]
OPTIONS = sorted({name for each in PARAMETERS for name in each.options})
WORDS = st.sampled_from([*OPTIONS, "--json", "--socket", "--timeout", "--", "-h", "--help"])
VALUES = st.sampled_from(
    ["", "a", "x.sock", "raw", "base64", "memfd", "verify", "7", "0", "007", "-1", "1.5", "nan",
     "-", "--id=x", "--js", "uid:1", "8h"]
)  # fmt: skip
LINES = st.builds(
    lambda before, verb, after: [*before, verb, *after],
    st.lists(st.sampled_from(["--socket", "x.sock", "--timeout", "2", "--json"]), max_size=4),
    st.sampled_from([*MODULES, "completion", "nothing"]),
    st.lists(WORDS | VALUES | VALUES, max_size=7),
)


def by_click(line: list[str]) -> tuple[str, dict[str, Any], Common] | str:
    """What click reads."""
    read: list[tuple[str, dict[str, Any], Common]] = []

    def note(verb: Verb, given: dict[str, Any], common: Common) -> int:
        read.append((verb.name, given, common))
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame, "carry_out", note)
        with contextlib.suppress(SystemExit, click.exceptions.Exit):
            try:
                frame.cli.main(line, prog_name="secretctl", standalone_mode=False)
            except click.UsageError as error:
                return str(error)
    return read[0] if read else "help"


@pytest.mark.slow
@given(LINES)
def test_what_is_accepted_click_reads_in_the_same_way(line: list[str]) -> None:
    """Anything may be declined, but nothing may be read otherwise."""
    usual = words.read(line)
    if usual is not None:
        verb, values, common = usual
        assert (verb.name, values, common) == by_click(line), line


@pytest.mark.parametrize(
    "line",
    [
        "list", "list --json", "--socket s list", "--timeout 3 list --socket t --json", "read a",
        "read a --format base64 --force", "add a --file f --keyid k --iv i", "add a --fd 7",
        "generate a --bytes 64", "grant a --to uid:1 --to unit:b.service --max-reads 3",
        "export --keyid k", "export --keyid k a b", "import", "import f --skip-existing",
        "audit verify f g --live", "status", "expire a --after 8h", "revoke g",
    ],
)  # fmt: skip
def test_usual_command_lines_need_no_click(line: str) -> None:
    """And mean the same."""
    usual = words.read(line.split())
    assert usual is not None
    assert (usual[0].name, *usual[1:]) == by_click(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "", "nothing", "read", "read a b", "read --format text a", "read a --format=raw", "read -h",
        "add a --fd seven", "list --timeout 0", "list --timeout x", "list --socket", "--socket",
        "--socket a --socket b list", "read a --format raw --format raw", "export a", "seal a",
        "audit verify", "run -- true", "read -- a", "export --keyid", "import -",
    ],
)  # fmt: skip
def test_other_command_lines_are_for_click(line: str) -> None:
    """It says what is wrong, or knows what is meant."""
    assert words.read(line.split()) is None


def test_an_empty_value_is_for_click() -> None:
    """So are values that begin with a dash."""
    assert words.read(["read", ""]) is None
    assert words.read(["--socket", "", "list"]) is None
    assert words.read(["add", "a", "--file", "-x"]) is None
