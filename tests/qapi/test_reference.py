# SPDX-License-Identifier: LGPL-2.1-or-later
"""The generated reference: its examples are what the schema accepts."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from secretd.monitor.commands import COMMANDS
from secretd.qapi.command import check
from secretd.wire import jsonrpc
from secretd.wire.connection import Connection
from secretd.wire.messages import Request

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts/dev/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_example_is_accepted_by_the_schema(reference: Any) -> None:
    """Of every command and every type of objects."""
    shown = []
    for command in COMMANDS.by_name.values():
        for tag, struct in command.arguments.items():
            shown.append((command, reference.example(command.name, struct, tag)))
    assert len(shown) > len(COMMANDS.by_name)
    for command, text in shown:
        line = memoryview(bytearray(text.encode() + b"\n"))
        codec: Any = jsonrpc.Connection if command.name == "rpc.discover" else Connection
        _, request = codec(lambda _line: None).next(line, 0, len(line))
        assert isinstance(request, Request), text
        assert request.command == command.name
        check(command, request.arguments)


def test_an_argument_without_a_meaning_is_an_error(reference: Any) -> None:
    """So no table of the reference has an empty cell."""
    assert reference.meaning("secret-expire", "after") == "seconds from now"
    with pytest.raises(KeyError):
        reference.meaning("secret-expire", "nothing")


def test_the_tables_are_made_as_they_are_committed(reference: Any, tmp_path: Path) -> None:
    """A reader on GitHub sees what the code says."""
    reference.write(tmp_path)
    for made in tmp_path.iterdir():
        committed = ROOT / "docs/reference/generated" / made.name
        assert committed.read_text() == made.read_text(), made.name
    assert json.loads(reference.example("quit", COMMANDS.by_name["quit"].arguments[""])) == {
        "execute": "quit"
    }
