# SPDX-License-Identifier: LGPL-2.1-or-later
"""The human monitor: what is our own of it, the rest is in the transcripts."""

import os
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.qmp import Client


def hmp(qmp: Client, line: str) -> str:
    return str(qmp.ok("human-monitor-command", {"command-line": line}))


def test_help_lists_what_there_is(qmp: Client) -> None:
    """In QEMU's form, which qmp-shell -H reads for its completion."""
    lines = hmp(qmp, "help").split("\r\n")
    assert lines == [
        "help|? [cmd] -- show the help",
        "info [subcommand] -- show various information about the system state",
        "object_add [qom-type=]type,id=str[,prop=value][,...] -- create QOM object",
        "object_del id -- destroy QOM object",
        "quit|q  -- quit secretd",
        "",
    ]
    assert hmp(qmp, "?") == hmp(qmp, "help")
    about = "info name  -- show the current VM name\r\ninfo secrets  -- show the secrets\r\n"
    assert hmp(qmp, "info") == hmp(qmp, "help info") == hmp(qmp, "info  ")
    assert hmp(qmp, "info").startswith(about)
    assert hmp(qmp, "help info secrets") == "info secrets  -- show the secrets\r\n"
    assert hmp(qmp, "help q") == "quit|q  -- quit secretd\r\n"


@pytest.mark.slow
def test_secrets_are_shown_without_their_content(qmp: Client) -> None:
    """One line for each, any number of them."""
    assert hmp(qmp, "info secrets") == ""
    for number in range(600):
        qmp.add(f"s{number:03}", data="letmein")
    lines = hmp(qmp, "info secrets").split("\r\n")
    assert len(lines) == 601
    for number in range(600, 1100):
        qmp.add(f"s{number:04}", data="letmein")
    assert hmp(qmp, "info secrets") == (
        "Error: There are more secrets than the limit of 1000; "
        "query-secrets lists any number in pieces\r\n"
    )
    assert lines[0].startswith("s000: secret, 7 bytes, memory ")
    assert lines[599].startswith("s599: secret, 7 bytes, memory ")


def test_a_secret_from_a_line_is_what_stands_there(qmp: Client) -> None:
    """Blanks and all, with doubled commas made single, and as JSON."""
    assert hmp(qmp, "object_add secret,data=let, me in") != ""
    assert hmp(qmp, "object_add secret,data=let,,me in \\n,id=a") == ""
    assert qmp.read("a") == b"let,me in \\n"
    assert hmp(qmp, "object_add {'qom-type': 'secret', 'id': 'b', 'data': 'x\\n'}") == ""
    assert qmp.read("b") == b"x\n"
    assert hmp(qmp, "object_add secret,id=c,data=") == ""
    assert qmp.read("c") == b""


def test_odd_lines_are_answered_as_qemu_does(qmp: Client) -> None:
    """NULs, keys without end, numbers without end."""
    assert hmp(qmp, "object_add authz-simple,id=a,identity=x\0y") == ""
    assert qmp.ok("qom-get", {"path": "a", "property": "identity"}) == "x\0y"
    assert hmp(qmp, "un\0abc") == "unknown command: 'un\0abc'\r\n"
    assert hmp(qmp, "object_del a\0b") == "Error: object 'a\0b' not found\r\n"
    number = "9" * 5000
    assert hmp(qmp, f"object_add secret_keyring,id=k,serial={number}") == (
        "Error: Parameter 'serial' expects integer\r\n"
    )
    key = ".".join("a" * 20_000)
    assert hmp(qmp, f"object_add secret,id=a,{key}=1") == (
        "Error: Parameter 'a.a.…' has more than the limit of 16 fragments\r\n"
    )
    assert hmp(qmp, 'object_del "' + "x" * 100_000) == (
        'object_del: string expected\r\nTry "help object_del" for more information\r\n'
    )


def test_a_line_may_have_to_wait(daemon: Daemon, qmp: Client, tmp_path: Path) -> None:
    """For a file as for a FIFO; an error is printed then too."""
    (tmp_path / "f").write_bytes(b"letmein")
    assert hmp(qmp, f"object_add secret,id=f,file={tmp_path}/f") == ""
    assert qmp.read("f") == b"letmein"
    assert hmp(qmp, f"object_add secret,id=g,file={tmp_path}/nope") == (
        f"Error: Unable to read {tmp_path}/nope: Failed to open file “{tmp_path}/nope”: "
        "No such file or directory\r\n"
    )
    os.mkfifo(tmp_path / "fifo")
    line = f'"object_add secret,id=h,file={tmp_path}/fifo"'
    qmp.send(
        b'{"execute": "human-monitor-command", "arguments": {"command-line": %s}}' % line.encode()
    )
    with open(tmp_path / "fifo", "wb") as writer:
        writer.write(b"x")
    assert qmp.reply() == {"return": ""}


def test_an_error_quotes_little_of_a_line(qmp: Client) -> None:
    """A comma that was not doubled makes a part of a secret look like a key."""
    assert hmp(qmp, "object_add secret,id=s,data=let,me in then") == (
        "Error: Invalid parameter 'me i…'\r\n"
    )
    assert hmp(qmp, "object_add secret,id=s,data=let,me-in-then") == (
        "Error: Expected '=' after parameter 'me-i…'\r\n"
    )
    assert hmp(qmp, "object_add secret,id=s,data=let,me-in-then==") == (
        "Error: Parameter 'me-i…' is unexpected\r\n"
    )
    assert hmp(qmp, "object_add secret,id=s,secret-part=1,secret-part.x=1") == (
        "Error: Parameters 'secr….*' used inconsistently\r\n"
    )
    assert hmp(qmp, "object_add authz-list,id=a,rules.1.match=x") == (
        "Error: Parameter 'rules.0' missing\r\n"
    )
    assert hmp(qmp, "object_add {'data': 'let me in") == (
        "Error: JSON parse error, stray ''let…'\r\n"
    )


def test_versions_help_on_types_and_the_end(qmp: Client) -> None:
    """Words of QEMU's where it has them."""
    assert hmp(qmp, "info version") == "10.0.0secretd test\r\n"
    assert hmp(qmp, "object_add help").startswith(
        "List of user creatable objects:\r\n  authz-list\r\n"
    )
    assert hmp(qmp, "object_add authz-listfile,help") == (
        "authz-listfile options:\r\n  filename=<string>\r\n  refresh=<bool>\r\n"
    )
    assert hmp(qmp, "quit now") == (
        "quit|q: extraneous characters at the end of line\r\n"
        'Try "help quit" for more information\r\n'
    )
    assert hmp(qmp, "info version x").startswith("version: extraneous characters")
    qmp.send(b'{"execute": "human-monitor-command", "arguments": {"command-line": "q"}}')
    assert qmp.reply()["event"] == "SHUTDOWN"
    assert qmp.reply() == {"return": ""}
