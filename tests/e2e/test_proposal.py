# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every example of the proposal that brought `secret` to QEMU, with secretd in QEMU's place."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import SECRETD, Process
from tests.support.needs import need_program, need_root

PREPARE = r"""
set -eu
printf letmein > mypasswd.txt
printf letmein | base64 > mykey.b64
openssl rand -base64 32 > key.b64
openssl rand -base64 16 > iv.b64
KEY=$(base64 -d key.b64 | od -An -v -tx1 | tr -d ' \n')
IV=$(base64 -d iv.b64 | od -An -v -tx1 | tr -d ' \n')
printf letmein | openssl enc -aes-256-cbc -a -K $KEY -iv $IV > secret.b64
printf letmein | openssl enc -aes-256-cbc -K $KEY -iv $IV -out pw.aes
"""
EXAMPLES = {
    "data": "--object secret,id=sec0,data=letmein",
    "file": "--object secret,id=sec0,file=mypasswd.txt",
    "base64": "--object secret,id=sec0,file=mykey.b64,format=base64",
    "AES inline": "--object secret,id=secmaster0,format=base64,file=key.b64 "
    "--object secret,id=sec0,keyid=secmaster0,format=base64,data=$(<secret.b64),iv=$(<iv.b64)",
    "AES file": "--object secret,id=secmaster0,format=base64,file=key.b64 "
    "--object secret,id=sec0,keyid=secmaster0,file=pw.aes,iv=$(<iv.b64)",
    "process substitution": "--object secret,id=sec0,file=<(printf letmein)",
    "JSON": """--object '{"qom-type": "secret", "id": "sec0", "data": "letmein"}'""",
    "one dash": "-object secret,id=sec0,data=letmein",
    "equals sign": "--object=secret,id=sec0,file=mypasswd.txt",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_proposal_run(
    start: Callable[..., Process], tmp_path: Path, name: str
) -> None:
    """Secretctl read prints the secret."""
    need_program("openssl", "bash")
    subprocess.run(["bash", "-c", PREPARE], cwd=tmp_path, check=True)
    script = f'exec "$0" "$@" {EXAMPLES[name]}'
    process = start(command=["bash", "-c", script, SECRETD])
    assert process.ctl("read", "sec0") == b"letmein"
    assert process.connect().ok("qom-get", {"path": "sec0", "property": "type"}) == "secret"


def test_a_command_line_value_is_gone_once_the_daemon_runs(
    start: Callable[..., Process],
) -> None:
    """From /proc/PID/cmdline, with a warning that says what to use; the process stays the same."""
    process = start(
        "--object",
        "secret,id=sec0,data=letmein",
        "--object={'qom-type':'secret','id':'s1','data':'letmein'}",
    )
    cmdline = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert b"letmein" not in cmdline
    assert b"secret,id=sec0,file=/dev/fd/" in cmdline
    assert "warning: --object with data= shows the secret to every user" in process.said
    assert "use file= instead" in process.said
    client = process.connect()
    assert client.read("sec0") == client.read("s1") == b"letmein"
    assert client.ok("qom-get", {"path": "sec0", "property": "file"}) == ""


def test_a_values_memfd_is_closed_and_the_environment_clean(
    start: Callable[..., Process],
) -> None:
    """Only root sees that of a process that is not dumpable."""
    need_root()
    process = start("--object", "secret,id=sec0,data=letmein")
    assert b"letmein" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    links = [Path(f"/proc/{process.pid}/fd/{n}") for n in range(3, 40)]
    assert not [p for p in links if p.is_symlink() and "secretd-argv" in str(p.readlink())]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--object", "secret,id=s"], "--object secret,id=s: Either 'file' or 'data' must be "
                                      "provided"),
        (["--object", "secret,id=s,file=/nope"],
         "--object secret,id=s,file=/nope: Unable to read /nope: Failed to open file “/nope”: "
         "No such file or directory"),
        (["--object", "nope,id=s"],
         "--object nope,id=s: Parameter 'qom-type' does not accept value 'nope'"),
        (["--object", "secret,id=s,data=x,file=y"],
         "--object secret,id=s,data=…,file=y: 'file' and 'data' are mutually exclusive"),
        (["--object", "secret,id=s,data=hunter,2"],
         "--object secret,id=s,data=…,…: Invalid parameter '2'; "
         "a comma in a value is written twice"),
        (["--object", "secret,id=s,data=hunter,two"],
         "--object secret,id=s,data=…,…: Expected '=' after parameter 'two'; "
         "a comma in a value is written twice"),
        (["--object", '{"qom-type":"secret","id":"s","data":12345678}'],
         '--object {"qom-type":"secret","id":"s","data":…}: Invalid parameter type '
         "for 'data', "
         "expected: string"),
        (["--object", "secret,id=s,data=hun,ter=two2"],
         "--object secret,id=s,data=…,ter=…: Parameter 'ter' is unexpected"),
        (["--object", "secret,id=s,data=x,keyid=zz"],
         "--object secret,id=s,data=…,keyid=zz: No secret with id 'zz'"),
        (["--object", "secret,id=s,dat=hunter2"],
         "--object secret,id=s,dat=…: Parameter 'dat' is unexpected"),
        (["--control", "/nope/s"], "/nope/s: No such file or directory"),
        (["--control", ",mode=0600"], "--control ,mode=0600: the path of the socket is missing"),
        (["--control", "x,mode=abc"],
         "--control x,mode=abc: mode expects an octal number such as 0660"),
        (["--control", "x,group=no-such-group"],
         "--control x,group=no-such-group: there is no group 'no-such-group'"),
        (["--control", "x,what=1"], "--control x,what=1: Parameter 'what' is unexpected"),
        (["--control", "x,1"], "--control x,1: Invalid parameter '1'"),
    ],
)  # fmt: skip
def test_a_start_that_cannot_be_carried_out_says_why(
    tmp_path: Path, options: list[str], words: str
) -> None:
    """One line, exit status 1, no socket left, no secret shown."""
    done = subprocess.run(
        [SECRETD, *(options if "--control" in options else ["--control", "s", *options])],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"secretd: {words}"
    assert "Traceback" not in done.stderr
    assert "two2" not in done.stderr
    assert "hunter" not in done.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["-objekt=secret,id=s,data=letmein"],
            "unknown option -objekt (secrets are not given as arguments)",
        ),
        (["letmein"], "unknown argument (secrets are not given as arguments)"),
        (["--object"], "argument --object: expected one argument"),
    ],
)
def test_a_wrong_option_is_named_without_its_value(
    tmp_path: Path, options: list[str], words: str
) -> None:
    """A secret in a mistyped option does not get printed."""
    done = subprocess.run(
        [SECRETD, *options], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"error: {words}")
    assert "letmein" not in done.stderr


def test_a_live_socket_is_not_taken_over(secretd: Process) -> None:
    """A second daemon names the conflict; the first continues."""
    done = subprocess.run(
        [SECRETD, "--control", secretd.control],
        capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        f"secretd: {secretd.control}: another process is listening there; stop it or choose "
        "another path\n"
    )
    assert secretd.connect().cmd("query-name") == {"return": {}}


def test_help_and_version(tmp_path: Path) -> None:
    """They teach and exit 0."""
    for option, words in (("--help", "examples:"), ("--version", "secretd 0.")):
        done = subprocess.run([SECRETD, option], capture_output=True, text=True, check=True)
        assert words in done.stdout
