# SPDX-License-Identifier: LGPL-2.1-or-later
"""--object-dir, --check-config and --memory: what an administrator configures."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from secretd.daemon import inherited
from secretd.daemon.inherited import InheritedDescriptors
from secretd.daemon.object_files import read_directory
from secretd.errors import MemoryLockError, UsageError
from secretd.journal.journal import Journal
from secretd.memory.arena import SCRATCH_WINDOW, Arena
from secretd.memory.level import choose_level
from tests.support.needs import ARENA_LEVEL
from tests.support.secretctl import SECRETCTL

SECRETD = str(Path(sys.executable).parent / "secretd")


@pytest.fixture
def scratch() -> Iterator[Arena]:
    made = Arena(ARENA_LEVEL, window=SCRATCH_WINDOW)
    yield made
    assert made.held == 0
    made.close()


def check(directory: Path, *words: str) -> tuple[int, str]:
    """Run --check-config; return its status and what it prints."""
    done = subprocess.run(
        [SECRETD, "--check-config", f"--object-dir={directory}", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_objects_are_read_in_the_order_of_the_files(tmp_path: Path, scratch: Arena) -> None:
    """One object, several one after the other, or an array; with the lines at which they begin."""
    authz = {"qom-type": "authz-simple", "id": "a", "identity": "uid:1"}
    many = [{**authz, "id": name} for name in ("b", "c")]
    (tmp_path / "1.json").write_text(json.dumps(authz, indent=2) + "\n")
    (tmp_path / "2.json").write_text("\n".join(map(json.dumps, many)))
    (tmp_path / "3.json").write_text("[\n " + ",\n ".join(map(json.dumps, many)) + "\n]\n")
    (tmp_path / "4.json").write_text(" \n")
    (tmp_path / "5.json").write_text("[]")
    for ignored in ("x.json~", ".x.json", "README"):
        (tmp_path / ignored).write_text("nothing")
    found = [(str(place), options.id) for place, options in read_directory(str(tmp_path), scratch)]
    assert found == [
        (f"{tmp_path}/1.json:1", "a"),
        (f"{tmp_path}/2.json:1", "b"),
        (f"{tmp_path}/2.json:2", "c"),
        (f"{tmp_path}/3.json:2", "b"),
        (f"{tmp_path}/3.json:3", "c"),
    ]
    assert list(read_directory(str(tmp_path / "absent"), scratch)) == []


OBJECT = '{"qom-type": "authz-simple", "id": "a", "identity": "uid:1"}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('\n{"qom-type": "authz-simple",\n', ":2: the object that begins here has no end"),
        ("\n\n7", ":3: a JSON object is expected, with the arguments of object-add"),
        ("[7]", ":1: a JSON object is expected"),
        (f"[{OBJECT}\n", ":2: the array has no end"),
        (f"[{OBJECT}\n{OBJECT}]", ":2: a comma or the end of the array is expected"),
        (f"[{OBJECT},\n]", ":2: an object is expected after the comma"),
        (f"[{OBJECT}]\nx", ":2: nothing is expected after the array"),
        ('{"qom-type": %}', ":1: JSON parse error, stray"),
        ('{"qom-type": "nope", "id": "a"}', ":1: Parameter 'qom-type' does not accept value"),
        ('{"qom-type": "authz-simple", "id": "a"}', ":1: Parameter 'identity' is missing"),
        (
            '{"qom-type": "secret", "id": "s", "data": "hunter2"}',
            ":1: the value of 's' must not be in this file",
        ),
    ],
)
def test_a_fault_is_named_by_file_and_line(
    tmp_path: Path, scratch: Arena, text: str, words: str
) -> None:
    """Without what may be a value."""
    (tmp_path / "o.json").write_text(text)
    with pytest.raises(UsageError) as caught:
        list(read_directory(str(tmp_path), scratch))
    assert str(caught.value).startswith(f"{tmp_path}/o.json{words}")
    assert "hunter2" not in str(caught.value)


def test_a_file_that_others_can_change_is_refused(tmp_path: Path, scratch: Arena) -> None:
    """So is one that cannot be read."""
    path = tmp_path / "o.json"
    path.write_text(OBJECT)
    path.chmod(0o666)
    with pytest.raises(UsageError, match="other users can change it .uid .*, mode 0666."):
        list(read_directory(str(tmp_path), scratch))
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="o.json.*: Is a directory"):
        list(read_directory(str(tmp_path), scratch))
    path.rmdir()
    path.symlink_to("nowhere")
    with pytest.raises(UsageError, match="o.json: No such file"):
        list(read_directory(str(tmp_path), scratch))
    with pytest.raises(UsageError, match=r"--object-dir .*: Not a directory"):
        list(read_directory("/dev/null", scratch))


def test_a_configuration_is_checked_without_serving(tmp_path: Path) -> None:
    """With the files that it names; secretctl finds the program."""
    value = tmp_path / "value"
    value.write_text("hunter2")
    path = tmp_path / "o.json"
    path.write_text(json.dumps({"qom-type": "secret", "id": "s", "file": str(value)}))
    assert check(tmp_path) == (0, "the configuration is valid: 1 object\n")
    assert check(tmp_path, "--object", "secret,help")[1].startswith("secret options:")
    command = [SECRETCTL, "check-config", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "the configuration is valid: 1 object\n"
    for wrong, words in ((tmp_path / "no", "No such file or directory"), (path, "Not a directory")):
        done = subprocess.run(
            [SECRETCTL, "check-config", str(wrong)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (1, f"secretctl: {wrong}: {words}\n")
    value.unlink()
    status, said = check(tmp_path)
    assert status == 1
    assert f"secretd: {path}:1: Unable to read {value}" in said


def test_objects_of_a_directory_are_there_from_the_start(tmp_path: Path) -> None:
    """After those of --object; --object-policy=best-effort starts without a broken one."""
    path = tmp_path / "o.json"
    path.write_text(OBJECT + '\n{"qom-type": "secret", "id": "s", "file": "/nowhere"}')
    words = ["--control", str(tmp_path / "c"), f"--object-dir={tmp_path}", "--audit=none"]
    done = subprocess.run([SECRETD, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{path}:2: Unable to read /nowhere" in done.stderr
    with subprocess.Popen(
        [SECRETD, *words, "--object-policy=best-effort"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        while "try: " not in said:
            said += process.stderr.readline()
        assert f"{path}:2: Unable to read" in said
        assert "started without it" in said
        assert "1 object" in said
        process.terminate()


# --- memory


def test_a_level_can_be_chosen() -> None:
    """Mlock where secretmem would keep the machine from hibernating."""
    assert choose_level(require=False, choice="mlock") in ("mlock", "none")
    code = (
        "import resource; from secretd.memory.level import choose_level\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))\n"
        "choose_level(require=False, choice='secretmem')\n"
    )
    # As root without its rights, which has no limit otherwise.
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", code]
    if os.getuid() == 0:
        command[1:1] = ["--reuid=1234", "--clear-groups"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HOME": "/"}
    )
    assert "MemoryLockError: --memory=secretmem was given" in done.stderr


def test_memory_of_an_earlier_process_stays(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning says until when."""
    arena = Arena("none")
    journal = Journal(arena)
    left = [os.dup(arena.fileno())], [os.dup(journal.fileno())]
    journal.leave()
    found = InheritedDescriptors([], left[0], left[1], [])
    again, restored = inherited.open_journal(found, require_lock=False, memory="mlock")
    assert restored
    assert "stay in none memory until 'systemctl stop'" in caplog.text
    again.close()
    again.arena.close()
    with pytest.raises(MemoryLockError, match="secretmem"):
        monkeypatch.setattr("secretd.memory.level.Arena", _no_arena)
        choose_level(require=False, choice="secretmem")


def _no_arena(*_args: object, **_named: object) -> Arena:
    raise OSError


# --- the terminal


def test_connections_do_not_flood_a_terminal(tmp_path: Path) -> None:
    """It says where the audit is, and shows uses of secrets only."""
    ours, theirs = pty.openpty()
    path = str(tmp_path / "c")
    with subprocess.Popen([SECRETD, "--control", path], stderr=theirs, stdout=theirs) as process:
        os.close(theirs)
        seen = b""
        while b"try: " not in seen:
            seen += os.read(ours, 1000)
        subprocess.run([SECRETCTL, "--socket", path, "generate", "k"], check=True)
        while b'"event":"add"' not in seen:
            seen += os.read(ours, 1000)
        process.terminate()
        try:
            while chunk := os.read(ours, 1000):
                seen += chunk
        except OSError:
            pass
    os.close(ours)
    assert b"audit              here, a line of JSON for each use of a secret" in seen
    assert b'"event":"connect"' not in seen


def test_the_audits_place_is_told(tmp_path: Path) -> None:
    """A file with the command that reads it."""
    for audit, words in (
        (f"--audit={tmp_path}/a", f"{tmp_path}/a (secretctl audit show {tmp_path}/a)"),
        ("--audit=none", "none"),
        ("--audit=-", "stderr, a line of JSON for each event"),
    ):
        with subprocess.Popen(
            [SECRETD, "--control", str(tmp_path / "c"), audit], stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            said = ""
            while "try: " not in said:
                said += process.stderr.readline()
            process.terminate()
        assert f"audit              {words}\n" in said
