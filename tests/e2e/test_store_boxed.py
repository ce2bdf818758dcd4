# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store on a machine with systemd that really reboots: the pages about it, and what they leave
out.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.box import ROOT, Box, installed
from tests.e2e.test_docs import Block, blocks, check
from tests.support.needs import need_program

__all__ = ["installed"]

CREDENTIALS = "/run/secretd/credentials.sock"


@pytest.fixture
def box(installed: Path) -> Iterator[Box]:
    """A machine on which secretd was installed, and nothing else was done."""
    need_program("age", "age-keygen", "systemd-creds")
    box = Box(f"secretd-store-{os.getpid()}", installed)
    try:
        box.run("systemd-sysusers")
        box.run("systemctl", "daemon-reload")
        yield box
    finally:
        box.close()


def follow(box: Box, page: str) -> int:
    """Do what a page says, reboots included; return the number of commands up to the first one."""
    commands = 0
    rebooted = False
    for block in blocks(ROOT / "docs/howto" / page):
        code = block.code.replace("\\\n", "")
        if not rebooted:
            commands += len(code.splitlines())
        if code.endswith("systemctl reboot\n"):
            rebooted = True
            rest = code.removesuffix("systemctl reboot\n")
            if rest:
                check(box, Block(rest, []), "/srv")
            boot_id = box.boot_id()
            box.reboot()
            assert box.boot_id() != boot_id
            box.run("systemctl", "start", "secretd.service")
            # It begins when secretd is ready: until then it is inactive, with a job.
            box.wait(
                "sh", "-c", "! systemctl list-jobs --no-legend | grep secretd-unlock && "
                "systemctl show -P ActiveState secretd-unlock | grep -v activating",
            )  # fmt: skip
        else:
            check(box, block, "/srv")
    return commands


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_pages_lead_over_reboots_and_losses(box: Box) -> None:
    """Six commands to a secret that survives; a lost host key, and the way back; then a unit that
    needs a secret at boot, and what the pattern leaves out.
    """
    assert follow(box, "reboot.md") == 6
    grant = json.loads(box.run("secretctl", "grants", "disk0", "--json").stdout)[0]
    assert grant["reads-left"] == 5
    # Nothing came from systemd's descriptor store: a boot begins with an empty one.
    assert not any("kept from before" in line for line in box.journal("secretd", "--boot"))
    follow(box, "recover.md")

    # Reads and lifetimes go on where they were.
    box.run(
        "secretctl", "grant", "disk0", "--to", "uid:65534", "--id", "nobody", "--max-reads", "3"
    )
    box.run("secretctl", "add", "short", "--file", "/etc/hostname", "--expires", "1h")
    read = ("setpriv", "--reuid=65534", "--clear-groups", "secretctl", "--socket",
            "/run/secretd/client.sock", "read", "disk0")  # fmt: skip
    assert box.run(*read).stdout == "letmein"

    # A unit that is started at boot waits for the store.
    box.write(
        "/etc/systemd/system/backup.service",
        "[Service]\nType=oneshot\nRemainAfterExit=yes\n"
        f"LoadCredential=disk0:{CREDENTIALS}\n"
        "ExecStart=sh -c 'cp $CREDENTIALS_DIRECTORY/disk0 /srv/got'\n"
        "[Install]\nWantedBy=basic.target\n",
    )
    box.run("systemctl", "enable", "backup.service", "secretd-credentials.socket")
    box.reboot()
    box.wait("systemctl", "is-active", "backup.service")
    assert box.run("cat", "/srv/got").stdout == "letmein"
    assert not any("kept from before" in line for line in box.journal("secretd", "--boot"))
    secrets = json.loads(box.run("secretctl", "list", "--json").stdout)
    (short,) = (each for each in secrets if each["id"] == "short")
    assert 3000 < short["expires-in"] < 3600
    (grant,) = (
        each
        for each in json.loads(box.run("secretctl", "grants", "--json").stdout)
        if each["id"] == "nobody"
    )
    assert grant["reads-left"] == 2
    for _ in range(2):
        assert box.run(*read).stdout == "letmein"
    assert "not permitted" in box.run(*read, check=False).stderr

    # For systemd-creds a new machine id is another machine.
    box.run("systemctl", "disable", "backup.service")
    box.write("/etc/machine-id", "0123456789abcdef0123456789abcdef\n")
    box.reboot()
    box.run("systemctl", "start", "secretd.service")
    box.wait("systemctl", "is-failed", "secretd-unlock.service")
    assert box.run("systemctl", "is-active", "secretd.service").stdout == "active\n"
    doctor = box.run("secretctl", "doctor", check=False).stdout
    assert "systemd's cannot be opened any more" in doctor
    assert "systemctl status secretd-unlock, or age -d -i KEYFILE" in doctor
    box.run("secretctl", "store", "recipient", "remove", "systemd", "--yes")
    words = box.run("secretctl", "add", "x", "--file", "/etc/hostname", check=False).stderr
    assert "Store 'store' is locked; add its key 'store.key' first" in words
    assert "'secretctl store unlock' opens it" in words
    assert "only age: after a reboot a person" in box.run("secretctl", "doctor", check=False).stdout

    # The end of a store is the end of its secrets.
    box.run(
        "sh", "-c",
        "age -d -i /srv/escrow.txt /var/lib/secretd/store/recipients/age"
        " | secretctl store unlock --stdin",
    )  # fmt: skip
    box.run("secretctl", "store", "destroy", "--yes")
    assert box.run("ls", "-A", "/var/lib/secretd/store").stdout == ""
    assert box.run("secretctl", "list", "--quiet").stdout == ""
    box.run("systemctl", "restart", "secretd.service")
    assert "secretd has no store" in box.run("secretctl", "store", "status", check=False).stderr
