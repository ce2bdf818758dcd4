# SPDX-License-Identifier: LGPL-2.1-or-later
"""README, tutorial and how-to pages: their commands are typed as they stand there, on a machine
with systemd.

A block ``sh`` is executed; a block ``text`` behind it shows what it prints: each of its lines must
be part of a line of that. Blocks ``python`` are checked by mypy.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.box import ROOT, Box, installed
from tests.support.needs import need_program

__all__ = ["installed"]

pytestmark = pytest.mark.xdist_group("docs")

ELSEWHERE = ("reboot.md", "recover.md", "migrate-vm.md", "fleet.md")
"""These reboot the machine or need several: test_store_boxed, test_migration, test_fleet_docs."""

PAGES = [
    path.relative_to(ROOT / "docs")
    for path in [
        ROOT / "docs/tutorial.md",
        ROOT / "docs/jsonrpc.md",
        *sorted(path for path in (ROOT / "docs/howto").glob("*.md") if path.name not in ELSEWHERE),
    ]
]


# Where the tests' own programs stand, before those of the machine.
SEARCH_PATH = f"/srv/bin:{os.defpath}:/usr/sbin:/sbin"

# QEMU 7.2 at times finds the clock of the processor too coarse to time its key derivation, and says
# so. howto/luks.md tells the reader to type the command again; this program does it.
PATIENT_QEMU_IMG = """\
#!/bin/sh
for attempt in $(seq 20); do
    /usr/bin/qemu-img "$@" 2>/run/qemu-img.stderr && code=0 || code=$?
    grep -q "Unable to get accurate CPU usage" /run/qemu-img.stderr || break
done
cat /run/qemu-img.stderr >&2
exit "$code"
"""


class Block(NamedTuple):
    """A block of code, and the lines that it prints."""

    code: str
    prints: list[str]


def blocks(page: Path) -> list[Block]:
    """What is to be typed on a page."""
    found: list[Block] = []
    for kind, code in re.findall(
        r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE
    ):
        if kind == "sh":
            found.append(Block(code, []))
        elif kind == "text":
            found[-1].prints.extend(code.splitlines())
    return found


@pytest.fixture(scope="module")
def booted(installed: Path) -> Iterator[Box]:
    """One machine for all pages."""
    need_program("qemu-system-x86_64", "qemu-img", "qemu-io", "socat", "jq", "openssl")
    need_program("virsh", "libvirtd", "podman", "cryptsetup", "logrotate")
    box = Box(f"secretd-pages-{os.getpid()}", installed)
    try:
        box.run("systemd-sysusers")
        box.run("systemctl", "daemon-reload")
        box.run("mkdir", "-p", "/srv/bin")
        box.write("/srv/bin/qemu-img", PATIENT_QEMU_IMG)
        box.run("chmod", "755", "/srv/bin/qemu-img")
        # The box itself is an overlay, on which podman cannot make another one.
        box.run("mkdir", "-p", "/etc/containers")
        box.write(
            "/etc/containers/storage.conf",
            '[storage]\ndriver = "vfs"\nrunroot = "/run/containers/storage"\n'
            'graphroot = "/var/lib/containers/storage"\n',
        )
        yield box
    finally:
        box.close()


@pytest.fixture
def box(booted: Box) -> Iterator[Box]:
    """As a new user finds it: nothing is started and nothing held."""
    booted.run("systemctl", "start", "secretd-control.socket", "secretd-client.socket")
    yield booted
    booted.run("sh", "-c", "rm -f /etc/systemd/system/app.service; systemctl daemon-reload")
    booted.run("sh", "-c", "systemctl stop 'secretd-*.socket' secretd.service", check=False)


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_what_a_page_says_works_as_it_stands_there(box: Box, page: Path, terminal: bool) -> None:
    """All blocks, one after the other, in one directory; each prints what the page shows, in a pipe
    and in a terminal, where tables are drawn and progress is shown.
    """
    found = blocks(ROOT / "docs" / page)
    assert found
    for block in found:
        check(box, block, f"/srv/{page.stem}-{terminal}", terminal=terminal)


def check(box: Box, block: Block, directory: str, *, terminal: bool = False) -> None:
    """Type a block in a directory; what it prints must be what the page shows."""
    box.run("mkdir", "-p", directory)
    words = [
        "env", "HOME=/root", f"PATH={SEARCH_PATH}", "TERM=xterm",
        "bash", "-o", "pipefail", "-euc",
    ]  # fmt: skip
    if terminal:
        box.write("/run/typed", f"stty cols 200\ncd {directory}\n{block.code}")
        words = ["script", "-qec", shlex.join([*words, ". /run/typed"]), "/dev/null"]
        done = box.run(*words, check=False)
    else:
        done = box.run(*words, f"cd {directory}\n{block.code}", check=False)
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout + done.stderr)
    assert done.returncode == 0, f"{block.code}\n{printed}"
    lines = [" ".join(line.split()) if terminal else line for line in printed.splitlines()]
    for shown in block.prints:
        wanted = " ".join(shown.split()) if terminal else shown
        assert any(wanted in line for line in lines), (
            f"{block.code}\n{wanted!r} is not in\n{printed}"
        )


def test_what_the_readme_says_works_in_one_terminal(box: Box) -> None:
    """Its blocks follow each other, and find the programs where scripts/run puts them; those that
    ask for more find the end of what is typed.
    """
    box.run("mkdir", "-p", "/srv/readme/.venv")
    box.run("ln", "-s", "/usr/lib/secretd/bin", "/srv/readme/.venv/bin")
    found = blocks(ROOT / "README.md")
    code = "".join(block.code for block in found)
    done = box.run(
        "env", "HOME=/root", "USER=root", f"PATH={SEARCH_PATH}",
        "bash", "-o", "pipefail", "-euc", f"cd /srv/readme; {code}",
        check=False,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    for wanted in (
        *(line for block in found for line in block.prints),
        "wrote 65536/65536 bytes",
        "Connected to QEMU",
        "unit:backup.service may read 'disk0': yes",
    ):
        assert wanted in printed, (wanted, printed)


def test_the_python_on_the_pages_is_right(tmp_path: Path) -> None:
    """By mypy: names, arguments and types."""
    code = ""
    for page in [*PAGES, Path("reference/client.md")]:
        text = (ROOT / "docs" / page).read_text()
        code += "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert "Client" in code
    (tmp_path / "pages.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-incremental", "--config-file=", "pages.py"],
        env=os.environ | {"MYPYPATH": str(ROOT)}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
