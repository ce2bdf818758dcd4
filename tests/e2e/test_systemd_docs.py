# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/systemd.md: its commands are typed as they stand there, on a machine that has nothing of
secretd.
"""

import os
import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.e2e.box import ROOT, Box, wheels
from tests.e2e.test_systemd import CREDENTIALS

PAGE = (ROOT / "docs/systemd.md").read_text()


def blocks(heading: str, kind: str) -> list[str]:
    """The code blocks of a section."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """Nothing is installed in it; what pip fetches lies there, since there is no network."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.run(
        ["/usr/bin/python3", "-c", code], capture_output=True, check=True, text=True
    ).stdout.strip()
    box = Box(f"secretd-docs-{os.getpid()}", wheels=wheels(tmp_path_factory, version))
    try:
        yield box
    finally:
        box.close()


def shell(box: Box, command: str) -> str:
    """What a command prints that is typed in the checkout."""
    setting = "export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels; cd /secretd && "
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return box.run("env", f"PATH={path}", "bash", "-o", "pipefail", "-ec", setting + command).stdout


def test_five_commands_lead_from_nothing_to_a_units_first_secret(box: Box) -> None:
    """And the rest of the page works on what they made."""
    (block,) = blocks("From nothing to a unit's first secret", "sh")
    commands = block.replace("\\\n", "").splitlines()
    assert len(commands) == 5
    *before, last = commands
    for command in before:
        shell(box, command)
    secret = shell(box, last)
    assert re.fullmatch(r"[0-9a-f]{64}", secret)
    assert shell(box, "secretctl read db.password") == secret
    # The unit file.
    (unit,) = blocks("From nothing to a unit's first secret", "ini")
    assert f"LoadCredential=db.password:{CREDENTIALS}" in unit
    box.write(
        "/etc/systemd/system/hello.service",
        unit.replace("/usr/bin/myapp --password-file", "/usr/bin/cat").replace(
            "[Service]\n", "[Service]\nType=oneshot\n"
        ),
    )
    shell(box, "systemctl daemon-reload && systemctl start hello")
    assert secret in box.journal("hello")
    # The audit in the journal.
    (verify,) = blocks("The units", "sh")
    assert "records; the last is record" in shell(box, f"cd /run && {verify}")
    # The master key.
    (make,) = blocks("A master key of the host", "sh")
    (drop_in,) = blocks("A master key of the host", "ini")
    shell(box, make)
    box.write("/etc/systemd/system/secretd.service.d/test.conf", drop_in)
    shell(box, "systemctl daemon-reload && systemctl restart secretd")
    assert "master0" in shell(box, "secretctl list")
    assert shell(box, "secretctl read db.password") == secret
    # Options.
    (options,) = blocks("The units", "ini")
    box.write("/etc/systemd/system/secretd.service.d/test.conf", options)
    shell(box, "systemctl daemon-reload && systemctl restart secretd && secretctl list")
    assert shell(box, "secretctl audit verify /var/log/secretd/audit --live")
    # And back.
    shell(
        box,
        "systemctl disable --now secretd-{control,client,credentials}.socket secretd.service",
    )
    shell(box, "scripts/install --uninstall")
    left = shell(
        box, "find /usr/local /etc/systemd -name '*secretd*' -not -path '*/secretd.service.d*'"
    )
    assert left == ""


def test_the_page_explains_only_messages_of_the_code() -> None:
    """Its tables quote secretd word for word."""
    code = "".join(path.read_text() for path in sorted((ROOT / "secretd").rglob("*.py")))
    code = re.sub(r'"\s*f?"', "", code)  # strings that go on in the next line
    explained = re.findall(
        r"^\| `([^`]+)` \|", PAGE.partition("## When something fails")[2], re.MULTILINE
    )
    assert len(explained) > 12
    systemds = ("secretd.service: ", "Failed to start", "status=", "Start operation")
    for words in explained:
        if words.startswith(systemds):
            continue
        parts = [
            p
            for p in re.split(r"…|unit:U|[0-9]+|'[A-Zm][a-z-]*'|\b[ABUVNM]\b|[:;,]", words)
            if len(p.strip()) > 8
        ]
        assert parts, words
        for part in parts:
            assert part.strip() in code, (words, part)
