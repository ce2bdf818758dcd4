# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/howto/migrate-vm.md as it stands there: two hosts, and a guest that moves."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.box import ROOT, installed
from tests.e2e.netns import GID, Host, network
from tests.e2e.test_docs import blocks
from tests.support.needs import need_program, need_root

__all__ = ["installed"]

PAGE = ROOT / "docs/howto/migrate-vm.md"


@pytest.fixture
def hosts(reachable: Path, installed: Path) -> Iterator[dict[str, Host]]:
    """Alpha and beta, with a cable; and ssh from alpha to beta."""
    need_root()
    need_program("ip", "nsenter", "setpriv", "socat", "jq", "qemu-system-x86_64", "openssl")
    with network(["alpha", "beta"], reachable, installed, {}) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_guest_and_its_secrets_move_to_another_host(
    hosts: dict[str, Host], reachable: Path
) -> None:
    """Every block of the page, and what it prints; then the disk's passphrase is on beta only."""
    shared = reachable / "shared"
    shared.mkdir()
    alpha = hosts["alpha"]
    os.chown(shared, alpha.uid, GID)
    os.chmod(shared, 0o770)
    found = blocks(PAGE)
    assert len(found) > 5
    for block in found:
        alpha.type(block, shared)
    listed = subprocess.run(
        alpha.command(["secretctl", "list", "-q"]), capture_output=True, text=True, check=True
    )
    assert listed.stdout == "host.key\n"
    listed = subprocess.run(
        hosts["beta"].command(["secretctl", "list", "-q"]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listed.stdout == "host.key\nvm1.disk\n"
