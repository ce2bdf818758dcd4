# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watching directories."""

import os
import resource
import select
from pathlib import Path

import pytest

from secretd.linux.inotify import DirectoryWatch


def test_a_file_that_is_removed_is_noticed_once(tmp_path: Path) -> None:
    """Until the next one."""
    watch = DirectoryWatch()
    watch.add(str(tmp_path))
    watch.add(str(tmp_path / "none"))
    for name in ("a", "b"):
        (tmp_path / name).touch()
        assert select.select([watch], [], [], 0)[0] == []
        (tmp_path / name).unlink()
        assert select.select([watch], [], [], 20)[0] == [watch]
        watch.clear()
    watch.close()


def test_without_a_descriptor_left_it_is_an_error() -> None:
    """In the system's words."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest:
        free = lowest.fileno() + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            held = []
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    held.append(DirectoryWatch())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for watch in held:
                watch.close()
