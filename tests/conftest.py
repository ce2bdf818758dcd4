# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests share: an arena, a running server, a raw QMP client, and what real parts there are."""

import asyncio
import contextlib
import gc
import os
import resource
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from secretd.limits import Tuning
from secretd.memory.arena import Arena
from secretd.net.loop import Loop
from tests.support.async_qmp import AsyncClient
from tests.support.cgroups import cgroup
from tests.support.credentials import SLICE
from tests.support.daemon import Daemon
from tests.support.in_loop import Served, served
from tests.support.needs import ARENA_LEVEL, need_root
from tests.support.qmp import Client

# As the daemon does: 1024 descriptors, the usual soft limit, are few where messages bring 253.
_hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


resource.setrlimit(resource.RLIMIT_NOFILE, (_hard_limit, _hard_limit))


settings.register_profile("secretd", deadline=None)  # no timing assertions


settings.load_profile("secretd")


def pytest_collection_modifyitems(items: "list[pytest.Item]") -> None:
    """The tests that need no other process come first, so that progress shows from the first
    seconds.
    """
    items.sort(key=lambda item: "/e2e/" in str(item.path))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count what was skipped by reason."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    )
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {count:4}: {reason}")


def open_fds() -> set[str]:
    """The descriptors of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return found


@pytest.fixture(autouse=True)
def _no_leaked_fds() -> Iterator[None]:
    before = open_fds()
    yield
    if open_fds() - before:
        gc.collect()  # what only waits for it is no leak of the product
    leaked = open_fds() - before
    leaked = {name for name in leaked if "/.coverage" not in name and "/.hypothesis" not in name}
    assert not leaked


@pytest.fixture
def arena() -> Iterator[Arena]:
    """An arena in the best memory there is; it must be empty at the end."""
    made = Arena(ARENA_LEVEL)
    yield made
    held = made.held
    made.close()
    assert held == 0


def pytest_asyncio_loop_factories(
    config: pytest.Config,
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Asynchronous tests run on the daemon's own event loop."""
    return {"secretd": Loop}


@pytest.fixture
def tuning(request: pytest.FixtureRequest) -> Tuning:
    """The times and sizes that the test's marker `tuning` asks for."""
    marker = request.node.get_closest_marker("tuning")
    return Tuning(**marker.kwargs) if marker else Tuning()


@pytest.fixture
async def in_loop(tmp_path: Path, tuning: Tuning) -> AsyncIterator[Served]:
    """A running server in the test's own loop."""
    async with served(tmp_path, tuning) as running:
        yield running


@pytest.fixture
async def aqmp(in_loop: Served) -> AsyncClient:
    """A client on the control socket of `in_loop`."""
    return await in_loop.connect()


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that every uid reaches. Each start of pytest closes its own to other uids."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


@pytest.fixture
def daemon(tmp_path: Path, tuning: Tuning) -> Iterator[Daemon]:
    """A running server."""
    made = Daemon(tmp_path, tuning=tuning)
    yield made
    made.stop()


@pytest.fixture
def qmp(daemon: Daemon) -> Client:
    """A client on the control socket."""
    return daemon.connect()


@pytest.fixture
def app(tmp_path: Path) -> Iterator[str]:
    """The cgroup of app.service."""
    need_root()
    with cgroup(f"{SLICE}/app.service") as path:
        yield path
