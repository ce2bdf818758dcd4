# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretctl in this process, as a fixture."""

import pytest

from secretd.ctl import verb
from tests.support.daemon import Daemon
from tests.support.secretctl import Ctl


@pytest.fixture
def run(daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Ctl:
    monkeypatch.setattr(verb, "forbid_dumps", lambda: None)
    return Ctl(daemon, monkeypatch, capfd)
