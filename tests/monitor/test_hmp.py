# SPDX-License-Identifier: LGPL-2.1-or-later
"""The human monitor: what is our own of it, the rest is in the transcripts."""

import asyncio
import os
from pathlib import Path

import pytest

from tests.support.async_qmp import AsyncClient
from tests.support.in_loop import Served


async def hmp(aqmp: AsyncClient, line: str) -> str:
    return str(await aqmp.ok("human-monitor-command", {"command-line": line}))


async def test_help_lists_what_there_is(aqmp: AsyncClient) -> None:
    """In QEMU's form, which qmp-shell -H reads for its completion."""
    lines = (await hmp(aqmp, "help")).split("\r\n")
    assert lines == [
        "help|? [cmd] -- show the help",
        "info [subcommand] -- show various information about the system state",
        "object_add [qom-type=]type,id=str[,prop=value][,...] -- create QOM object",
        "object_del id -- destroy QOM object",
        "quit|q  -- quit secretd",
        "",
    ]
    assert await hmp(aqmp, "?") == await hmp(aqmp, "help")
    about = "info name  -- show the current VM name\r\ninfo secrets  -- show the secrets\r\n"
    assert await hmp(aqmp, "info") == await hmp(aqmp, "help info") == await hmp(aqmp, "info  ")
    assert (await hmp(aqmp, "info")).startswith(about)
    assert await hmp(aqmp, "help info secrets") == "info secrets  -- show the secrets\r\n"
    assert await hmp(aqmp, "help q") == "quit|q  -- quit secretd\r\n"


@pytest.mark.slow
async def test_secrets_are_shown_without_their_content(aqmp: AsyncClient) -> None:
    """One line for each, any number of them."""
    assert await hmp(aqmp, "info secrets") == ""
    for number in range(600):
        await aqmp.add(f"s{number:03}", data="letmein")
    lines = (await hmp(aqmp, "info secrets")).split("\r\n")
    assert len(lines) == 601
    for number in range(600, 1100):
        await aqmp.add(f"s{number:04}", data="letmein")
    assert await hmp(aqmp, "info secrets") == (
        "Error: There are more secrets than the limit of 1000; "
        "query-secrets lists any number in pieces\r\n"
    )
    assert lines[0].startswith("s000: secret, 7 bytes, memory ")
    assert lines[599].startswith("s599: secret, 7 bytes, memory ")


async def test_a_secret_from_a_line_is_what_stands_there(aqmp: AsyncClient) -> None:
    """Blanks and all, with doubled commas made single, and as JSON."""
    assert await hmp(aqmp, "object_add secret,data=let, me in") != ""
    assert await hmp(aqmp, "object_add secret,data=let,,me in \\n,id=a") == ""
    assert await aqmp.read("a") == b"let,me in \\n"
    assert await hmp(aqmp, "object_add {'qom-type': 'secret', 'id': 'b', 'data': 'x\\n'}") == ""
    assert await aqmp.read("b") == b"x\n"
    assert await hmp(aqmp, "object_add secret,id=c,data=") == ""
    assert await aqmp.read("c") == b""


async def test_odd_lines_are_answered_as_qemu_does(aqmp: AsyncClient) -> None:
    """NULs, keys without end, numbers without end."""
    assert await hmp(aqmp, "object_add authz-simple,id=a,identity=x\0y") == ""
    assert await aqmp.ok("qom-get", {"path": "a", "property": "identity"}) == "x\0y"
    assert await hmp(aqmp, "un\0abc") == "unknown command: 'un\0abc'\r\n"
    assert await hmp(aqmp, "object_del a\0b") == "Error: object 'a\0b' not found\r\n"
    number = "9" * 5000
    assert await hmp(aqmp, f"object_add secret_keyring,id=k,serial={number}") == (
        "Error: Parameter 'serial' expects integer\r\n"
    )
    key = ".".join("a" * 20_000)
    assert await hmp(aqmp, f"object_add secret,id=a,{key}=1") == (
        "Error: Parameter 'a.a.…' has more than the limit of 16 fragments\r\n"
    )
    assert await hmp(aqmp, 'object_del "' + "x" * 100_000) == (
        'object_del: string expected\r\nTry "help object_del" for more information\r\n'
    )


async def test_a_line_may_have_to_wait(in_loop: Served, aqmp: AsyncClient, tmp_path: Path) -> None:
    """For a file as for a FIFO; an error is printed then too."""
    (tmp_path / "f").write_bytes(b"letmein")
    assert await hmp(aqmp, f"object_add secret,id=f,file={tmp_path}/f") == ""
    assert await aqmp.read("f") == b"letmein"
    assert await hmp(aqmp, f"object_add secret,id=g,file={tmp_path}/nope") == (
        f"Error: Unable to read {tmp_path}/nope: Failed to open file “{tmp_path}/nope”: "
        "No such file or directory\r\n"
    )
    os.mkfifo(tmp_path / "fifo")
    line = f'"object_add secret,id=h,file={tmp_path}/fifo"'
    await aqmp.send(
        b'{"execute": "human-monitor-command", "arguments": {"command-line": %s}}' % line.encode()
    )
    await asyncio.to_thread((tmp_path / "fifo").write_bytes, b"x")
    assert await aqmp.reply() == {"return": ""}


async def test_an_error_quotes_little_of_a_line(aqmp: AsyncClient) -> None:
    """A comma that was not doubled makes a part of a secret look like a key."""
    assert await hmp(aqmp, "object_add secret,id=s,data=let,me in then") == (
        "Error: Invalid parameter 'me i…'\r\n"
    )
    assert await hmp(aqmp, "object_add secret,id=s,data=let,me-in-then") == (
        "Error: Expected '=' after parameter 'me-i…'\r\n"
    )
    assert await hmp(aqmp, "object_add secret,id=s,data=let,me-in-then==") == (
        "Error: Parameter 'me-i…' is unexpected\r\n"
    )
    assert await hmp(aqmp, "object_add secret,id=s,secret-part=1,secret-part.x=1") == (
        "Error: Parameters 'secr….*' used inconsistently\r\n"
    )
    assert await hmp(aqmp, "object_add authz-list,id=a,rules.1.match=x") == (
        "Error: Parameter 'rules.0' missing\r\n"
    )
    assert await hmp(aqmp, "object_add {'data': 'let me in") == (
        "Error: JSON parse error, stray ''let…'\r\n"
    )


async def test_versions_help_on_types_and_the_end(aqmp: AsyncClient) -> None:
    """Words of QEMU's where it has them."""
    assert await hmp(aqmp, "info version") == "10.0.0secretd test\r\n"
    assert (await hmp(aqmp, "object_add help")).startswith(
        "List of user creatable objects:\r\n  authz-list\r\n"
    )
    assert await hmp(aqmp, "object_add authz-listfile,help") == (
        "authz-listfile options:\r\n  filename=<string>\r\n  refresh=<bool>\r\n"
    )
    assert await hmp(aqmp, "quit now") == (
        "quit|q: extraneous characters at the end of line\r\n"
        'Try "help quit" for more information\r\n'
    )
    assert (await hmp(aqmp, "info version x")).startswith("version: extraneous characters")
    await aqmp.send(b'{"execute": "human-monitor-command", "arguments": {"command-line": "q"}}')
    assert (await aqmp.reply())["event"] == "SHUTDOWN"
    assert await aqmp.reply() == {"return": ""}
