# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examples of docs/reference/client.md run as they stand there."""

import asyncio
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon
from tests.support.qmp import Client

PAGE = Path(__file__).parent.parent.parent / "docs/reference/client.md"
VALUE = "a passphrase"


@pytest.fixture
def examples(daemon: Daemon, qmp: Client, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The names that each block defines, with the sockets of a daemon that has disk0."""
    monkeypatch.setenv("SECRETD_SOCKET", daemon.control)
    qmp.add("disk0", data=VALUE)
    found = []
    page = PAGE.read_text().replace("/run/secretd/client.sock", daemon.control)
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        names: dict[str, Any] = {"__name__": "example"}
        exec(compile(code, str(PAGE), "exec"), names)
        found.append(names)
    return found


def named(examples: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The block that defines a function."""
    (found,) = [names for names in examples if name in names]
    return found


def test_a_secret_is_read(
    examples: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Into locked memory."""
    asyncio.run(named(examples, "unlock")["unlock"]("disk0"))
    assert capsys.readouterr().out == f"{len(VALUE)}\n"


def test_a_program_gets_a_descriptor(
    examples: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cryptsetup's place is taken by a program that reads the same argument."""
    seen = []
    real = subprocess.run

    def run(words: list[str], **options: Any) -> object:
        path = words[2].removeprefix("--key-file=")
        done = real(["cat", path], capture_output=True, **options)
        seen.append(done.stdout)
        return done

    monkeypatch.setattr(subprocess, "run", run)
    named(examples, "run_with_secret")["run_with_secret"]("disk0")
    assert seen == [VALUE.encode()]


def test_events_are_noticed(
    examples: list[dict[str, Any]], daemon: Daemon, qmp: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until the task is cancelled."""

    async def main() -> None:
        watching = asyncio.create_task(named(examples, "watch")["watch"]())
        while not daemon.call(lambda: list(daemon.server.core.broadcaster.subscribers)):
            await asyncio.sleep(0.01)
        await asyncio.to_thread(qmp.add, "new", data="x")
        printed = ""
        while "SECRET_ADDED new" not in printed:
            await asyncio.sleep(0.01)
            printed += capsys.readouterr().out
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(main())


def test_a_unit_is_let_read(
    examples: list[dict[str, Any]], qmp: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the grant is gone at the end."""
    named(examples, "let_read")["let_read"]("disk0", "app.service")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "grant-disk0-unit_app.service ['unit:app.service'] 3600",
        "True",
        "0",
    ]
    assert qmp.ok("query-secret-grants") == []
