# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/howto/fleet.md as it stands there: four hosts, one of which runs etcd."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.box import ROOT, installed
from tests.e2e.netns import Host, network
from tests.e2e.test_docs import blocks
from tests.support.needs import need_program, need_root

__all__ = ["installed"]

PAGE = ROOT / "docs/howto/fleet.md"
NAMES = ["pub", "h1", "h2", "h3"]


@pytest.fixture
def hosts(reachable: Path, installed: Path) -> Iterator[dict[str, Host]]:
    """Hosts that have a store, as the page says."""
    need_root()
    need_program("ip", "nsenter", "setpriv", "openssl", "etcd")
    options = {}
    for name in NAMES:
        key = reachable / f"{name}.key"
        key.write_bytes(os.urandom(32))
        key.chmod(0o644)
        where = f"path={reachable}/{name}/store,keyid=store.key,create=on"
        options[name] = [
            "--object", f"secret,id=store.key,file={key}", "--object", f"secret-store,id=s,{where}",
        ]  # fmt: skip
    with network(NAMES, reachable, installed, options) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_secret_reaches_three_hosts_and_is_rotated_there(hosts: dict[str, Host]) -> None:
    """Every block of the page, and what it prints; the first dozen commands get there."""
    pub = hosts["pub"]
    found = blocks(PAGE)
    commands = re.findall(
        r"^ *(?:for .* do )?((?:ssh|secretctl|secretd-fleet|etcd|openssl) .*)",
        "".join(block.code for block in found),
        re.MULTILINE,
    )
    assert len(commands) <= 15
    assert "status" in commands[11]
    for block in found:
        pub.type(block, pub.home)
