# SPDX-License-Identifier: LGPL-2.1-or-later
"""Grants to systemd units, with a real systemd: each gets its own secrets, whatever users call
theirs.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.box import SECRETCTL, SECRETD, Box

CONTROL, CLIENT, AUDIT = "/run/control.sock", "/run/client.sock", "/run/audit.log"
READ = (*SECRETCTL, "--socket", CLIENT, "read", "web.key")
CTL = (*SECRETCTL, "--socket", CONTROL)
DENIED = (
    "secretctl: Reading secret 'web.key' is not permitted\n"
    "secretctl: root can permit it: secretctl grant web.key --to user:NAME\n"
)


@pytest.fixture(scope="module")
def box(installed: Path) -> Iterator[Box]:
    """A box with a running daemon that holds web.key, granted to unit:webtest.service."""
    made = Box(f"secretd-units-{os.getpid()}", installed)
    try:
        made.run(
            "systemd-run", "--quiet", "--collect", "--unit=secretd-test", "--",
            *SECRETD, "--control", CONTROL, "--client", CLIENT, "--audit", AUDIT,
        )  # fmt: skip
        while made.run("test", "-S", CLIENT, check=False).returncode:
            pass
        made.run(*CTL, "add", "web.key", "--stdin", input="letmein")
        out = made.run(*CTL, "grant", "web.*", "--to", "unit:webtest").stdout
        assert out == "grant-web._-unit_webtest.service\n"
        yield made
    finally:
        made.close()


def user_run(box: Box, *words: str, name: str) -> str:
    """What a command prints that a user's own service manager runs as a unit."""
    box.run("systemctl", "start", "user@65534")
    done = box.run(
        "env", "XDG_RUNTIME_DIR=/run/user/65534", "setpriv", "--reuid", "65534", "--regid", "65534",
        "--clear-groups", "systemd-run", "--user", "--quiet", "--wait", "--pipe", "--collect",
        f"--unit={name}", "--", *words, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_the_unit_that_is_named_reads_and_no_other(box: Box) -> None:
    """Root's, or a dynamic user's; the same user outside of it is not it."""
    read = READ
    assert box.unit(*read, name="webtest").stdout == "letmein"
    assert box.unit(*read, name="webtest", properties=("DynamicUser=yes",)).stdout == "letmein"
    refused = box.unit(*read, name="othertest", check=False)
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", DENIED)
    assert box.run(*read, check=False).stderr == DENIED
    in_slice = box.unit(*read, name="webtest", properties=("Slice=web.slice",))
    assert in_slice.stdout == "letmein"


def test_a_users_own_unit_of_that_name_is_not_it(box: Box) -> None:
    """`systemd-run --user --unit=webtest` is not webtest; what it is can be granted too."""
    assert user_run(box, *READ, name="webtest") == DENIED
    to = "user-unit:65534/webtest"
    box.run(*CTL, "grant", "web.*", "--to", to, "--id", "theirs")
    assert user_run(box, *READ, name="webtest") == "letmein"
    assert user_run(box, *READ, name="othertest") == DENIED
    box.run(*CTL, "revoke", "theirs")
    assert user_run(box, *READ, name="webtest") == DENIED


def test_the_audit_says_which_unit_it_was(box: Box) -> None:
    """And is whole."""
    box.unit(*READ, name="webtest")
    lines = [json.loads(line) for line in box.run("cat", AUDIT).stdout.splitlines()]
    last = [line for line in lines if line["event"] == "read"][-1]
    assert last["peer"]["unit"] == "unit:webtest.service"
    assert last["rule"] == "grant grant-web._-unit_webtest.service"
    out = box.run(*CTL, "audit", "verify", AUDIT, "--live").stdout
    assert "records; the last is record" in out
    assert "missing" not in out


def test_explain_says_the_same_as_a_real_try(box: Box) -> None:
    """For those that may and those that may not."""
    for unit, allowed in (("webtest", True), ("othertest", False)):
        words = (*CTL, "explain", "web.key", "--as", f"unit:{unit}")
        assert (box.run(*words, check=False).returncode == 0) is allowed
