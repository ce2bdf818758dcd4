# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's start, where it needs no process of its own: the default sockets."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from secretd import __version__, daemon, paths
from secretd.access import Door
from secretd.errors import UsageError
from secretd.memory import Arena
from secretd.qom.object import ObjectTree
from secretd.qom.types import TYPES
from secretd.state import Journal
from secretd.wire import encode
from tests.conftest import ARENA_LEVEL


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default directory, which does not exist yet."""
    made = tmp_path / "secretd"
    monkeypatch.setattr(paths, "default_directory", lambda: str(made))
    return made


def test_without_options_both_doors_open_in_the_default_directory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is made, open to others where the client door is to be reached, else private."""
    monkeypatch.setattr(paths, "has_runtime_directory", lambda: True)
    for _again in range(2):
        assert [(s.door, s.path, s.mode) for s in daemon._default_doors()] == [
            (Door.CONTROL, str(directory / "control.sock"), 0o600),
            (Door.CLIENT, str(directory / "client.sock"), 0o666),
        ]
    assert directory.stat().st_mode & 0o777 == 0o755
    directory.rmdir()
    monkeypatch.setattr(paths, "has_runtime_directory", lambda: False)
    daemon._default_doors()
    assert directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o755)
    with pytest.raises(UsageError, match="others may enter it; run 'chmod 700"):
        daemon._default_doors()


def test_a_default_directory_that_is_not_ours_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link, a file, or in no directory at all."""
    directory.symlink_to("/tmp")
    with pytest.raises(UsageError, match="is not a directory of uid"):
        daemon._default_doors()
    monkeypatch.setattr(paths, "default_directory", lambda: str(directory / "no" / "no"))
    directory.unlink()
    with pytest.raises(UsageError, match="No such file or directory"):
        daemon._default_doors()


def test_what_to_type_next_works_as_it_is_printed(
    tmp_path: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With secretctl's path where a shell would not find it, and the socket where it is not the default."""
    journal = Journal(arena)
    tree = ObjectTree(journal, arena, TYPES)
    doors = [daemon.door_spec(Door.CONTROL, str(tmp_path / "c"))]
    for found, shown in (
        ("/usr/bin/secretctl", "secretctl"),
        (None, f"{Path(sys.executable).parent}/secretctl"),
    ):
        monkeypatch.setattr(shutil, "which", lambda _name, found=found: found)
        daemon._say_ready(tree, doors)
        said = capsys.readouterr().err
        assert f"try: {shown} --socket {tmp_path}/c add disk0 --prompt   or: {shown} --help" in said
        assert f"version {__version__}, 0 objects" in said
    journal.close()


def test_only_a_client_door_is_fine(tmp_path: Path) -> None:
    """There is nothing to type next, then; a second door that fails closes the first."""
    secretd = os.path.join(os.path.dirname(sys.executable), "secretd")
    process = subprocess.Popen(
        [secretd, "--client", str(tmp_path / "c")], stderr=subprocess.PIPE, text=True
    )
    said = ""
    while "memory" not in said:
        said += process.stderr.readline()
    process.terminate()
    said += process.stderr.read()
    process.stderr.close()
    assert process.wait(10) == 0
    assert "client socket   " in said
    assert "try:" not in said
    assert said.endswith("secretd: stopped; all secrets are wiped\n")
    done = subprocess.run(
        [secretd, "--client", str(tmp_path / "c"), "--client", "/nope/c"],
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert done.returncode == 1
    assert not (tmp_path / "c").exists()


def test_help_on_objects_ends_the_start(tmp_path: Path) -> None:
    """With QEMU's lists, before anything is opened; objects named before it are checked."""
    secretd = os.path.join(os.path.dirname(sys.executable), "secretd")
    (tmp_path / "list").write_text("{}")

    def run(*words: str) -> subprocess.CompletedProcess:
        options = ["--control", str(tmp_path / "c"), *words]
        return subprocess.run(
            [secretd, *options], capture_output=True, text=True, check=False, timeout=20
        )

    done = run("--object", "help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "List of user creatable objects:\n"
        "  authz-list\n  authz-listfile\n  authz-simple\n  secret\n  secret_keyring\n"
    )
    made = f"authz-listfile,id=a,filename={tmp_path}/list"
    done = run("--object", made, "-object", "secret_keyring,help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("secret_keyring options:\n  format=<QCryptoSecretFormat>\n")
    done = run("--object", made, "--object", made, "--object", "help")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"secretd: --object {made}: attempt to add duplicate property 'a' to object (type 'container')\n"
    )
    done = run("--object", "secret,id=1,file=/dev/null")
    assert done.stderr == (
        "secretd: --object secret,id=1,file=/dev/null: Parameter 'id' expects an identifier\n"
        "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.\n"
    )


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    """On a command line they are bytes; what shows them shows U+FFFD."""
    name = os.fsencode(tmp_path) + b"/\xff"
    with open(name, "wb") as file:
        file.write(b"letmein")
    journal = Journal(Arena(ARENA_LEVEL))
    scratch = Arena(ARENA_LEVEL)
    tree = ObjectTree(journal, scratch, TYPES)
    daemon.add_object(tree, "secret,id=s,file=" + os.fsdecode(name))
    assert tree.get("s", "file") == os.fsdecode(name)
    assert bytes(journal.plaintext("s")) == b"letmein"
    assert encode.value(tree.get("s", "file")).endswith('/\\uFFFD"')
    journal.close()
    journal.arena.close()
    scratch.close()
