# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretctl import, export and watch, against a running server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from secretd.client.batch import Batch
from secretd.ctl import import_lines
from tests.support.daemon import Daemon
from tests.support.needs import need_locked_memory
from tests.support.qmp import Client
from tests.support.secretctl import SECRETCTL, Ctl, in_terminal

pytestmark = pytest.mark.slow  # it starts processes, or tries many cases

LIMITED: dict[str, Any] = {"expires-in": 5000, "qom-type": "secret"}


def line(object_id: str, data: str = "letmein", **more: Any) -> str:
    """A line of import."""
    return json.dumps({"id": object_id, "data": data, **more}) + "\n"


def test_many_secrets_are_imported_from_a_file_or_a_pipe(
    run: Ctl, qmp: Client, tmp_path: Path, daemon: Daemon
) -> None:
    """Raw and base64, with a lifetime, over blank lines, with or without a newline at the end."""
    path = tmp_path / "s.jsonl"
    text = line("a") + "\n  \n" + line("b", "bGV0bWVpbg==", format="base64")
    path.write_text(text + line("c", **LIMITED).rstrip("\n"))
    assert run("import", str(path)) == ("3 added\n", "")
    assert [qmp.read(i) for i in "abc"] == [b"letmein"] * 3
    assert 4990 < qmp.ok("query-secrets")[2]["expires-in"] <= 5000
    done = subprocess.run(
        [SECRETCTL, "--socket", daemon.control, "import", "--json"],
        input=line("d") + line("e"), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == {"added": 2, "skipped": 0}
    assert qmp.read("e") == b"letmein"


def test_lines_longer_than_a_read_are_put_together(run: Ctl, qmp: Client, tmp_path: Path) -> None:
    """Up to the largest secret; what is longer is refused."""
    need_locked_memory(16 << 20)
    path = tmp_path / "s.jsonl"
    path.write_text("".join(line(f"l{n}", "x" * (1 << 20)) for n in range(2)) + line("last"))
    assert run("import", str(path))[0] == "3 added\n"
    assert len(qmp.read("l1")) == 1 << 20
    path.write_text("".join(line(f"m{n}", "x" * 50_000) for n in range(9)))
    assert run("import", str(path))[0] == "9 added\n"
    assert qmp.read("m8") == b"x" * 50_000
    path.write_text(line("long", "x" * (import_lines.LINE_BYTES + 1)))
    assert "a line has more than 2097152 bytes" in run("import", str(path), status=1)[1]
    path.write_text("x" * (import_lines.LINE_BYTES + 1))  # nor does it end
    assert "a line has more than 2097152 bytes" in run("import", str(path), status=1)[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a secret: a JSON object is expected"),
        ('[{"id": "n"}]', "not a secret: a JSON object is expected"),
        ('{"id": "n"}', "the member 'data' is missing"),
        ('{"data": "hunter2"}', "the member 'id' is missing"),
        ('{"id": 7, "data": "hunter2"}', "the member 'id' must be a string"),
        ('{"id": "n", "data": "", "expires-in": "1"}', "'expires-in' must be a number of seconds"),
        ('{"id": "n", "data": "", "expires-in": 1.5}', "a member has a value that cannot be read"),
        ('{"id": "n", "data": "", "format": "hex"}', "format must be raw or base64"),
        ('{"id": "n", "data": "", "qom-type": "x"}', "qom-type must be secret"),
        ('{"id": "n", "data": 7}', "data must be a string"),
        ('{"id": "n", "data": "hunter2\udcff"}', "data is not valid JSON text in UTF-8"),
        ('{"id": "n", "data": "hunter2\t"}', "a JSON object is expected"),
        ('{"id": "n", "data": "hunter2\\q"}', "a JSON object is expected"),
        ('{"id": "n", "data": "hunter2\\\\\\u0000"}', "data has a \\u0000, which QMP cannot carry"),
        (
            '{"id": "n", "data": "hunter2", "more": 1}',
            "the member 'more' is unexpected; a line has",
        ),
        ('{"id": "n", "data": "", "%s": 1}' % ("hunter2" * 5), "the member '?' is unexpected"),
        ('{"id": "1", "data": "hunter2"}', "Parameter 'id' expects an identifier (1 added before"),
        ('{"id": "a", "data": "hunter2"}', "attempt to add duplicate property 'a'"),
    ],
)
def test_the_first_line_that_is_wrong_is_named_and_ends_it(
    run: Ctl, qmp: Client, tmp_path: Path, text: str, words: str
) -> None:
    """Without what stands in it; those before it are there, those behind it are not."""
    path = tmp_path / "s.jsonl"
    path.write_text(line("a") + text + "\n" + line("z"), errors="surrogateescape")
    _, err = run("import", str(path), status=1)
    assert f"{path}:2: " in err
    assert words in err
    assert "hunter2" not in err
    assert [s["id"] for s in qmp.ok("query-secrets")] == ["a"]


def test_what_other_programs_write_is_taken(run: Ctl, qmp: Client, tmp_path: Path) -> None:
    """A byte order mark, and JSON escapes, which secretd decodes in locked memory."""
    path = tmp_path / "s.jsonl"
    values = {"a": 'quote " backslash \\ slash', "b": "umlaut ä\n\ttab", "c": "\\u0000", "d": "🔑"}
    lines = "".join(
        json.dumps({"id": name, "data": value}) + "\r\n" for name, value in values.items()
    )
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert run("import", str(path))[0] == "4 added\n"
    assert {name: qmp.read(name).decode() for name in values} == values
    path.write_text(lines, "utf-16")
    assert "the lines are in UTF-16; UTF-8 is expected" in run("import", str(path), status=1)[1]
    path.write_bytes(b"\xef")
    assert f"{path}:1: not a secret" in run("import", str(path), status=1)[1]


@pytest.mark.parametrize("refused", [1, 32, 33, 65, 190, 200])
def test_lines_under_way_behind_a_refused_one_are_undone(
    run: Ctl, qmp: Client, tmp_path: Path, refused: int
) -> None:
    """Many are under way at a time, and the line that is named is still the last one."""
    path = tmp_path / "s.jsonl"
    path.write_text("".join(line(f"n{number:03}") for number in range(1, 201)))
    taken = f"n{refused:03}"
    qmp.add(taken, data="first")
    _, err = run("import", str(path), status=1)
    assert f"{path}:{refused}: " in err
    assert f"({refused - 1} added before it)" in err
    ids = [each["id"] for each in qmp.ok("query-secrets")]
    assert ids == [f"n{number:03}" for number in range(1, refused + 1)]
    assert qmp.read(taken) == b"first"
    assert run("import", "--skip-existing", str(path))[0] == (
        f"{200 - refused} added, {refused} exist already\n"
    )


def test_only_the_first_refused_line_is_named(run: Ctl, qmp: Client, tmp_path: Path) -> None:
    """Others behind it may be refused, too; what they name stays."""
    path = tmp_path / "s.jsonl"
    path.write_text("".join(line(f"n{number}") for number in range(9)))
    qmp.add("n3", data="first")
    qmp.add("n5", data="first")
    _, err = run("import", str(path), status=1)
    assert f"{path}:4: " in err
    assert [each["id"] for each in qmp.ok("query-secrets")] == ["n0", "n1", "n2", "n3", "n5"]


def test_a_secret_whose_lifetime_is_refused_is_not_added(
    run: Ctl, qmp: Client, tmp_path: Path
) -> None:
    """A line is one thing; an existing secret keeps its own lifetime."""
    path = tmp_path / "s.jsonl"
    path.write_text(line("a") + line("b", **(LIMITED | {"expires-in": -1})) + line("c"))
    _, err = run("import", str(path), status=1)
    assert f"{path}:2: " in err
    assert "(1 added before it)" in err
    assert [each["id"] for each in qmp.ok("query-secrets")] == ["a"]
    path.write_text(line("a", **LIMITED) + line("b"))
    assert run("import", "--skip-existing", str(path))[0] == "1 added, 1 exist already\n"
    assert "expires-in" not in qmp.ok("query-secrets")[0]


def test_a_lost_connection_names_the_lines_without_an_answer(
    run: Ctl, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import can go on with --skip-existing."""
    path = tmp_path / "s.jsonl"
    path.write_text("".join(line(f"n{number:03}") for number in range(1, 201)))
    original = Batch.put

    def put(self: Batch, pieces: Any) -> Any:
        if b"n100" in pieces[0]:
            daemon.call(lambda: [each.transport.close() for each in list(daemon.server.sessions)])
        return original(self, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "put", put)
        _, err = run("import", str(path), status=1)
    assert err.startswith(f"secretctl: {path}: ")
    assert f"to {path}:" in err
    added = len(run("list")[0].splitlines()) - 1
    out, _ = run("import", "--skip-existing", str(path))
    assert out == f"{200 - added} added, {added} exist already\n"


def test_what_is_there_already_can_be_skipped(run: Ctl, qmp: Client, tmp_path: Path) -> None:
    """So that an import that was broken off can go on."""
    qmp.add("a", data="first")
    path = tmp_path / "s.jsonl"
    path.write_text(line("a") + line("b"))
    assert run("import", "--skip-existing", str(path))[0] == "1 added, 1 exist already\n"
    assert qmp.read("a") == b"first"


def test_what_is_exported_is_sealed_and_can_be_imported(
    run: Ctl, qmp: Client, tmp_path: Path
) -> None:
    """All but the key, or those that are named; with what is left of their lifetimes."""
    qmp.ok("secret-generate", {"id": "master", "size": 32})
    for name in ("a", "b"):
        qmp.add(name, data="letmein")
    qmp.ok("secret-expire", {"id": "b", "after": 5000})
    out, err = run("export", "--keyid", "master")
    assert "letmein" not in out + err
    lines = [json.loads(text) for text in out.splitlines()]
    assert [entry["id"] for entry in lines] == ["a", "b"]
    assert "expires-in" not in lines[0]
    assert 4990 < lines[1]["expires-in"] <= 5000
    assert len(run("export", "--keyid", "master", "b")[0].splitlines()) == 1
    assert "No secret with id 'no'" in run("export", "--keyid", "master", "no", status=1)[1]
    assert run("export", "--keyid", "no", status=1)[1].count("No secret with id 'no'") == 1
    _, err = run("export", "--keyid", "a", status=1)
    assert err == "secretctl: --keyid a: a key has 32 bytes, and this secret has 7\n"
    for name in ("a", "b"):
        qmp.ok("object-del", {"id": name})
    path = tmp_path / "s.jsonl"
    path.write_text(out)
    assert run("import", str(path))[0] == "2 added\n"
    assert qmp.read("b") == b"letmein"
    # Each line is what QEMU's object-add takes.
    arguments = {n: value for n, value in lines[0].items() if n != "expires-in"}
    qmp.ok("object-del", {"id": "a"})
    qmp.ok("object-add", arguments)
    assert qmp.read("a") == b"letmein"


def test_progress_is_shown_on_a_terminal(daemon: Daemon, qmp: Client, tmp_path: Path) -> None:
    """And gone at the end."""
    path = tmp_path / "s.jsonl"
    path.write_text("".join(line(f"p{n}") for n in range(50)))
    status, seen = in_terminal(
        ["--socket", daemon.control, "import", str(path)], b"", expect=b"importing"
    )
    assert status == 0
    assert b"importing" in seen
    assert b"50 added" in seen


def test_events_are_printed_as_they_happen(daemon: Daemon, qmp: Client) -> None:
    """With the peer for people, as JSON for programs; the end of the pipe ends it."""
    for words in ([], ["--json"]):
        process = subprocess.Popen(
            [SECRETCTL, "--socket", daemon.control, "watch", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with process:
            while not daemon.call(lambda: list(daemon.server.core.broadcaster.subscribers)):
                pass
            qmp.add("a", data="letmein")
            assert process.stdout is not None
            assert process.stderr is not None
            told = process.stdout.readline()
            process.stdout.close()
            while process.poll() is None:  # until it finds that the reader has gone
                qmp.add("b", data="x")
                qmp.ok("object-del", {"id": "b"})
            assert process.returncode == 1
            assert process.stderr.read() == ""
        qmp.ok("object-del", {"id": "a"})
        if words:
            assert json.loads(told)["event"] == "SECRET_ADDED"
            assert json.loads(told)["peer"]["uid"] == os.getuid()
        else:
            assert told[8:].startswith("  SECRET_ADDED        a  by ")
            assert f"pid {os.getpid()}" in told


def test_watching_tells_how_to_end_it_and_can_end_itself(daemon: Daemon, qmp: Client) -> None:
    """On a terminal; after one event. An event about no secret shows its data."""
    command = [sys.executable, SECRETCTL, "--socket", daemon.control, "watch", "--once"]
    ours, theirs = os.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = os.read(ours, 1000)
        assert b"Ctrl-C ends it" in seen
        while not daemon.call(lambda: list(daemon.server.core.broadcaster.subscribers)):
            pass

        def lose() -> None:
            for session in daemon.server.sessions:
                session.lose(7)

        daemon.call(lose)
        while b'SECRET_EVENTS_LOST  {"count": 7}' not in seen:
            seen += os.read(ours, 1000)
        assert process.wait(10) == 0
    os.close(ours)


def subscribers(daemon: Daemon) -> list[Any]:
    """The sessions that get events."""
    found = daemon.call(lambda: [*daemon.server.core.broadcaster.subscribers])
    assert isinstance(found, list)
    return found


def test_watching_goes_on_after_a_restart_and_says_so(daemon: Daemon, qmp: Client) -> None:
    """Grants are named with the ids that they are for; the gap is told on stderr."""
    for words in ([], ["--json"]):
        process = subprocess.Popen(
            [SECRETCTL, "--socket", daemon.control, "watch", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with process:
            assert process.stdout is not None
            assert process.stderr is not None
            while not (before := subscribers(daemon)):
                pass
            daemon.call(before[0].transport.close)
            while subscribers(daemon) in ([], before):
                pass
            options = {"qom-type": "secret-grant", "id": "g", "secret": "web.*", "authz": "a"}
            qmp.ok("object-add", options)
            told = process.stdout.readline()
            qmp.ok("object-del", {"id": "g"})
            process.terminate()
            errors = process.stderr.read()
        if words:
            assert json.loads(told)["secret"] == "web.*"
        else:
            assert "SECRET_GRANTED      g for web.*  by " in told
        assert "secretd went away; events until it is back are missing\n" in errors
        assert "secretd is back\n" in errors
