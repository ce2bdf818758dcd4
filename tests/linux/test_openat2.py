# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opening paths without magic links, by the system call and by hand, which must be the same."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from secretd.linux import openat2
from tests.support.needs import need_root

READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "file").write_text("letmein")
    (tmp_path / "to-file").symlink_to("d/file")
    (tmp_path / "to-dir").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "up").symlink_to("../to-dir/e/../file")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("nothing")
    (tmp_path / "slash").symlink_to("d/file/")
    for number in range(45):
        target = f"n{number - 1}" if number else "d/file"
        (tmp_path / f"n{number}").symlink_to(target)
    return tmp_path


PATHS = (
    "d/file", "d//file", "./d/./e/../file", "to-file", "to-dir/file", "d/up", "d", "d/", ".", "..",
    "/",
    "d/file/", "d/file/x", "loop", "nowhere", "nothing", "slash", "n38", "n39", "n40", "n44",
    "to-dir/",
    "to-dir/e/..",
    "/proc/self/status", "/proc/self/fd/{fd}", "/proc/self/exe", "/proc/self/cwd/d/file",
    "/proc/mounts",
    "/proc/{pid}/root", "/dev/fd/{fd}", "", "x" * 300,
)  # fmt: skip


def outcome(opener: Callable[[bytes, int], int], path: str, flags: int) -> object:
    """What is opened, or the error."""
    try:
        fd = opener(path.encode(), flags)
    except OSError as error:
        return error.errno
    try:
        status = os.fstat(fd)
        return status.st_dev, status.st_mode, status.st_ino if "/proc" not in path else 0
    finally:
        os.close(fd)


@pytest.mark.parametrize("path", PATHS)
def test_by_hand_is_as_by_the_kernel(
    tree: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative and absolute, to read or only to look at, with every kind of link."""
    monkeypatch.chdir(tree)
    fd = os.open("d/file", os.O_RDONLY)
    path = path.format(fd=fd, pid=os.getpid())
    paths = [path] if path.startswith("/") or not path else [path, f"{tree}/{path}"]
    for each in paths:
        for flags in (READ, openat2._O_PATH | os.O_CLOEXEC):
            assert outcome(openat2.walk, each, flags) == outcome(
                openat2.open_without_magic_links, each, flags
            )
    os.close(fd)


def test_where_the_call_is_refused_the_path_is_walked(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a unit with RestrictSUIDSGID=; here by a number that no kernel knows."""
    monkeypatch.setattr(openat2, "_SYS_OPENAT2", 9999)
    fd = openat2.open_without_magic_links(bytes(tree / "to-file"), READ)
    assert os.read(fd, 10) == b"letmein"
    os.close(fd)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        openat2.open_without_magic_links(b"/proc/self/fd/0", READ)


def test_a_look_at_the_file_system_that_fails_is_an_error() -> None:
    """Rather than a guess."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        openat2._check_link(-1, -1)


def test_links_of_others_in_a_directory_for_all_are_not_followed(tree: Path) -> None:
    """As the kernel has it with protected_symlinks; ours are, and those of whose directory it
    is.
    """
    need_root()
    shared = tree / "shared"
    shared.mkdir()
    (shared / "link").symlink_to(tree / "d" / "file")
    os.close(openat2.walk(bytes(shared / "link"), READ))
    os.chown(shared / "link", 1001, -1, follow_symlinks=False)
    os.close(openat2.walk(bytes(shared / "link"), READ))
    shared.chmod(0o1777)
    with pytest.raises(PermissionError):
        openat2.walk(bytes(shared / "link"), READ)
    os.chown(shared, 1001, -1)
    os.close(openat2.walk(bytes(shared / "link"), READ))


def test_a_mount_without_links_has_none(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nosymfollow; here every mount is one."""
    monkeypatch.setattr(openat2, "_ST_NOSYMFOLLOW", -1)
    with pytest.raises(OSError, match="Too many levels"):
        openat2.walk(bytes(tree / "to-file"), READ)
    os.close(openat2.walk(bytes(tree / "d" / "file"), READ))


def test_without_descriptors_none_is_closed_twice(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may have the number by then."""
    (tree / "absolute").symlink_to(tree / "d" / "file")
    before = set(os.listdir("/proc/self/fd"))
    opened = openat2._open_directory
    calls = iter((opened, None))

    def none(path: bytes) -> int:
        function = next(calls)
        if function is None:
            raise OSError(24, "Too many open files")
        return function(path)

    monkeypatch.setattr(openat2, "_open_directory", none)
    with pytest.raises(OSError, match="Too many open files"):
        openat2.walk(bytes(tree / "absolute"), READ)
    assert set(os.listdir("/proc/self/fd")) == before
