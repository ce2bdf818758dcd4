# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files of a store: what is noticed, what is refused, and what a failed write leaves."""

import contextlib
import os
import random
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from secretd.crypto import aead
from secretd.crypto.aead import OpenError, seal, unseal
from secretd.errors import CommandError, StoreError
from secretd.memory.arena import Arena, LockedBuffer
from secretd.store import database, directory
from secretd.store.commit import Commit
from secretd.store.disk import WRAPS, Change, Disk
from secretd.store.rows import Stored, pack, unpack

KEY = bytes(range(32))


class Files:
    """A store in a directory of its own, opened anew whenever a test wants it."""

    def __init__(self, path: Path, arena: Arena) -> None:
        self.path, self.arena = path / "store", arena
        self.disk = Disk.create(str(self.path), self.key(), arena)

    def key(self, content: bytes = KEY) -> LockedBuffer:
        """A key in locked memory."""
        buffer = self.arena.allocate(len(content))
        buffer.view[:] = content
        self._keys = [*getattr(self, "_keys", []), buffer]
        return buffer

    def open(self, content: bytes = KEY) -> Disk:
        """Open it again."""
        self.disk = Disk(str(self.path), self.key(content), self.arena)
        return self.disk

    def change(self, object_id: str, text: str | None) -> Change:
        """A row to write, or to delete."""
        if text is None:
            return Change(object_id, 0, None, Commit())
        content = pack(Stored(object_id, 0, {"n": 1}), memoryview(text.encode()), self.arena)
        return Change(object_id, 1, content, Commit())

    def write(self, **rows: str | None) -> list[str]:
        """Write rows in one transaction; the errors, "" for none."""
        batch = [self.change(object_id, text) for object_id, text in rows.items()]
        return ["" if error is None else error.desc for error in self.disk.write(batch)]

    def read(self) -> dict[str, str]:
        """All rows."""
        found = {}
        for chunk in self.disk.living():
            for row in chunk:
                with self.disk.opened(row) as content:
                    stored, plaintext = unpack(content.view)
                    found[stored.id] = bytes(plaintext).decode()
        return found

    def edit(self, *statements: str) -> None:
        """Change the closed file behind its back."""
        connection = sqlite3.connect(self.path / "store.db", isolation_level=None)
        for statement in statements:
            connection.execute(statement)
        connection.close()

    def end(self) -> None:
        """Close everything."""
        for buffer in self._keys:
            buffer.free()
        self.disk.close()


@pytest.fixture
def files(tmp_path: Path, arena: Arena) -> Iterator[Files]:
    """An empty store."""
    made = Files(tmp_path, arena)
    yield made
    made.end()


def test_rows_are_there_again_after_a_reopening(files: Files) -> None:
    """Added, replaced and deleted; the number of transactions goes up."""
    assert files.write(a="one", b="two") == ["", ""]
    assert files.write(a="three", b=None, c="x" * 100_000) == ["", "", ""]
    assert (files.disk.sequence, files.disk.rows) == (2, 2)
    files.disk.close()
    assert files.open().verify() == 2
    assert files.read() == {"a": "three", "c": "x" * 100_000}
    assert files.disk.sequence == 2


def test_the_files_are_private_and_show_nothing(files: Files) -> None:
    """Neither ids nor content, in any file; and no other process may have it open."""
    files.write(disk0="letmein-letmein")
    names = sorted(os.listdir(files.path))
    assert names == ["store.db", "store.db-wal", "tombstones"]
    for name in names:
        path = files.path / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not any(part in path.read_bytes() for part in (b"letmein", b"disk0", KEY[:8]))
    with pytest.raises(StoreError, match="in use by another process"):
        Disk(str(files.path), files.key(), files.arena)


def test_another_key_opens_nothing(files: Files) -> None:
    """And the store can still be opened by the right one."""
    files.disk.close()
    with pytest.raises(StoreError, match="the key is not this store's"):
        files.open(bytes(32))
    files.open()


def swap(files: Files) -> None:
    (one, two) = (row for chunk in _rows(files) for row in chunk)
    connection = sqlite3.connect(files.path / "store.db", isolation_level=None)
    connection.execute("UPDATE rows SET box = ? WHERE key = ?", (two.box, one.key))
    connection.execute("UPDATE rows SET box = ? WHERE key = ?", (one.box, two.key))
    connection.close()


def _rows(files: Files) -> list[list[database.Row]]:
    found = database.Database(str(files.path))
    try:
        return list(found.rows())
    finally:
        found.close()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ("DELETE FROM rows LIMIT 1", "has 1 rows, and its head says 2"),
        ("UPDATE rows SET box = zeroblob(60)", "was changed, or moved from elsewhere"),
        ("UPDATE rows SET kind = 2", "was changed, or moved from elsewhere"),
        ("UPDATE rows SET box = x''", "was changed, or moved from elsewhere"),
    ],
)
def test_rows_that_were_changed_are_noticed(files: Files, edit: str, words: str) -> None:
    """Missing ones, too."""
    files.write(a="one", b="two")
    files.disk.close()
    if "LIMIT" in edit:
        edit = "DELETE FROM rows WHERE key = (SELECT key FROM rows LIMIT 1)"
    files.edit(edit)
    files.open()
    with pytest.raises(StoreError, match=words):
        files.disk.verify()


def test_swapped_rows_are_noticed(files: Files) -> None:
    """Each is sealed with its own place."""
    files.write(a="one", b="two")
    files.disk.close()
    swap(files)
    files.open()
    with pytest.raises(StoreError, match="was changed, or moved from elsewhere"):
        files.read()


def test_a_row_that_returned_is_noticed(files: Files) -> None:
    """An earlier box of the same id opens, but the head knows better."""
    files.write(a="one", b="two")
    files.disk.close()
    old = [row for chunk in _rows(files) for row in chunk]
    files.open()
    files.write(a="three", b="four")
    files.disk.close()
    connection = sqlite3.connect(files.path / "store.db", isolation_level=None)
    connection.execute("UPDATE rows SET box = ? WHERE key = ?", (old[0].box, old[0].key))
    connection.close()
    files.open()
    with pytest.raises(StoreError, match="some of its rows are not those of its last change"):
        files.disk.verify()


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        (["UPDATE head SET state = zeroblob(84)"], "its head was changed"),
        (["UPDATE head SET uuid = zeroblob(16)"], "the key is not this store's"),
        (["DELETE FROM head"], "its head is missing or damaged"),
        (["UPDATE head SET state = 'x'"], "its head is missing or damaged"),
        (["DELETE FROM wraps"], "the key is not this store's"),
        (["PRAGMA user_version = 9"], "has format 9, not 1"),
        (["PRAGMA application_id = 9"], "is not a store"),
        (["DROP TABLE head"], "no such table: head"),
    ],
)
def test_a_changed_head_is_refused(files: Files, edits: list[str], words: str) -> None:
    """With the reason."""
    files.disk.close()
    files.edit(*edits)
    with pytest.raises(StoreError, match=words):
        files.open()
    shutil.rmtree(files.path)
    files.disk = Disk.create(str(files.path), files.key(), files.arena)


def test_damaged_files_are_refused_or_are_a_prefix(files: Files, tmp_path: Path) -> None:
    """500 damaged or cut WALs: what opens is the state after some transaction, never another."""
    states: list[dict[str, str]] = [{}]
    for number in range(60):
        files.write(**{f"s{number % 7}": f"value {number}"})
        states.append(states[-1] | {f"s{number % 7}": f"value {number}"})
    log = (files.path / "store.db-wal").read_bytes()
    main = (files.path / "store.db").read_bytes()
    tombstones = (files.path / "tombstones").read_bytes()
    files.disk.close()
    rng = random.Random(7)
    opened = 0
    for number in range(500):
        damaged = bytearray(log)
        at = rng.randrange(len(log))
        if number % 2:
            del damaged[at:]
        else:
            size = rng.choice((1, 512, 4096))
            damaged[at : at + size] = rng.randbytes(min(size, len(log) - at))
        for name, content in (
            ("store.db", main), ("store.db-wal", bytes(damaged)), ("tombstones", tombstones),
        ):  # fmt: skip
            (files.path / name).write_bytes(content)
        try:
            files.open()
        except StoreError:
            continue
        found, sequence = files.read(), files.disk.sequence
        assert found == states[sequence]
        assert files.disk.verify() == len(found)
        files.disk.close()
        opened += 1
    assert opened > 400
    files.open()


def refuse(disk: Disk, *, tombstones: bool) -> Callable[[], None]:
    """Have SQLite fail as on a full disk, and with ``tombstones`` the reserved space, too."""
    limit = disk._database._connection.execute("PRAGMA page_count").fetchone()[0]
    disk._database._connection.execute(f"PRAGMA max_page_count = {limit}").fetchone()
    trigger = "CREATE TEMP TRIGGER full BEFORE {} ON rows BEGIN SELECT RAISE(ABORT, 'full'); END"
    disk._database._connection.execute(trigger.format("DELETE"))
    disk._database._connection.execute(
        trigger.format("INSERT").replace("full BEFORE", "full2 BEFORE")
    )
    if tombstones:
        os.close(disk._tombstones._fd)
        disk._tombstones._fd = os.open("/dev/full", os.O_RDWR)

    def repair() -> None:
        for name in ("full", "full2"):
            disk._database._connection.execute(f"DROP TRIGGER {name}")

    return repair


def test_a_full_disk_takes_no_addition_and_every_deletion(files: Files) -> None:
    """The tombstone counts at once, after a reopening, and once there is room again."""
    files.write(a="one", b="two")
    repair = refuse(files.disk, tombstones=False)
    assert files.write(a=None, c="three") == ["", f"Unable to write {files.path}: full"]
    assert files.read() == {"b": "two"}
    assert files.disk.sequence == 2
    repair()
    files.disk.close()
    files.open()
    assert files.read() == {"b": "two"}
    assert files.disk.verify() == 1
    assert files.write(a="four") == [""]
    files.disk.close()
    assert files.open().verify() == 2
    assert files.read() == {"a": "four", "b": "two"}


def test_a_deletion_that_cannot_be_recorded_is_reported(files: Files) -> None:
    """Beside deletions of other rows that were in the same transaction."""
    files.write(a="one", b="two")
    repair = refuse(files.disk, tombstones=True)
    (words,) = files.write(a=None)
    assert words == (
        f"object 'a' is deleted, but its row in {files.path} remains: No space left on device"
    )
    repair()
    assert files.write(b=None) == [""]
    assert files.read() == {"a": "one"}


def test_the_reserved_space_has_an_end(files: Files) -> None:
    """1,024 tombstones, and then the words say so."""
    files.write(**{f"s{number}": "x" for number in range(1025)})
    repair = refuse(files.disk, tombstones=False)
    assert files.write(**{f"s{number}": None for number in range(1024)}) == [""] * 1024
    (words,) = files.write(s1024=None)
    assert words.endswith("No space left on device") or "space for tombstones" in words
    repair()
    files.disk.close()
    assert files.open().verify() == 1


def test_forged_and_void_tombstones_delete_nothing(files: Files) -> None:
    """Their authentication and their numbers decide."""
    files.write(a="one")
    row_key = files.disk._keys.row_key("a")
    mac = files.disk._keys.mac(row_key + (1).to_bytes(8))
    void = directory._TOMBSTONE.pack(row_key, 1, mac)
    forged = directory._TOMBSTONE.pack(row_key, 9, bytes(24))
    files.disk.close()
    with open(files.path / "tombstones", "r+b") as file:
        file.write(void + forged)
    files.open()
    assert files.read() == {"a": "one"}


def test_keys_are_added_and_replaced(files: Files) -> None:
    """Both open it until one is named as the only one; its log keeps no earlier wrap."""
    files.write(a="one")
    new = bytes(reversed(KEY))
    before = files.disk._database.head().wraps[0]
    files.disk.rewrap(files.key(new), only=False)
    for content in (new, KEY):
        files.disk.close()
        assert files.open(content).verify() == 1
    files.disk.rewrap(files.key(new), only=True)
    for name in os.listdir(files.path):
        assert before not in (files.path / name).read_bytes()
    files.disk.close()
    with pytest.raises(StoreError, match="the key is not"):
        files.open()
    files.open(new)
    for _ in range(WRAPS - 1):
        files.disk.rewrap(files.key(new), only=False)
    with pytest.raises(StoreError, match="8 keys open it"):
        files.disk.rewrap(files.key(new), only=False)


def test_everything_is_encrypted_anew(files: Files) -> None:
    """Not a row, wrap or row key of before is left in a file; a failure changes nothing."""
    files.write(a="one", b="two")
    before = [row for chunk in files.disk._database.rows() for row in chunk]
    new = bytes(reversed(KEY))
    repair = refuse(files.disk, tombstones=False)
    with pytest.raises(sqlite3.Error):
        files.disk.reencrypt(files.key(new))
    repair()
    assert files.disk.verify() == 2
    files.disk.reencrypt(files.key(new))
    assert files.read() == {"a": "one", "b": "two"}
    for name in os.listdir(files.path):
        content = (files.path / name).read_bytes()
        assert not any(row.box in content or row.key in content for row in before)
    assert files.write(a=None, c="three") == ["", ""]
    files.disk.close()
    assert files.open(new).verify() == 2


def test_a_copy_is_a_store(files: Files, tmp_path: Path) -> None:
    """As it was at one moment; the copy has no name in the store's directory."""
    files.write(a="one")
    copy = files.disk.copy()
    files.write(b="two")
    assert sorted(os.listdir(files.path)) == ["store.db", "store.db-wal", "tombstones"]
    other = tmp_path / "other"
    other.mkdir(0o700)
    with open(copy, "rb") as source:
        (other / "store.db").write_bytes(source.read())
    (other / "tombstones").write_bytes(bytes(directory.TOMBSTONES_BYTES))
    for name in ("store.db", "tombstones"):
        os.chmod(other / name, 0o600)
    files.disk.close()
    files.path = other
    assert files.open().verify() == 1
    (other / "backup").mkdir()
    with pytest.raises(StoreError, match="File exists"):
        files.disk.copy()
    (other / "backup").rmdir()
    # What an interrupted copy has left goes at the next opening, and with the store.
    (other / "backup").write_bytes(b"left over")
    files.disk.close()
    files.open()
    assert "backup" not in os.listdir(other)


def test_a_destroyed_store_leaves_no_file(files: Files) -> None:
    """Its keys were overwritten before."""
    files.write(a="one")
    files.disk.close()
    inode = os.open(files.path / "store.db", os.O_RDONLY)
    database.destroy(str(files.path))
    assert os.listdir(files.path) == []
    assert not any(os.pread(inode, 1 << 20, 0))
    os.close(inode)
    with pytest.raises(StoreError, match="there is no store; secretctl store init makes one"):
        files.open()
    files.disk = Disk.create(str(files.path), files.key(), files.arena)
    with pytest.raises(StoreError, match=r"store\.db exists"):
        Disk.create(str(files.path), files.key(), files.arena)


@pytest.mark.parametrize("at", range(1, 12))
def test_an_interrupted_creation_leaves_no_store(
    files: Files, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Or the whole one; and another attempt succeeds."""
    files.disk.close()
    shutil.rmtree(files.path)
    count = 0

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal count
            count += 1
            if count == at:
                raise OSError(5, "Input/output error")
            return real(*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "fsync", "pwrite"):
            patch.setattr(os, name, failing(getattr(os, name)))
        with contextlib.suppress(StoreError):
            files.disk = Disk.create(str(files.path), files.key(), files.arena)
            files.disk.close()
    if (files.path / "store.db").exists():
        files.open()
    else:
        files.disk = Disk.create(str(files.path), files.key(), files.arena)
    assert files.write(a="one") == [""]


def test_places_that_others_prepared_are_refused(files: Files, tmp_path: Path) -> None:
    """Symlinks, foreign owners, modes, and what is no directory or no plain file."""
    for path, words in (
        ("store", "its path is not absolute"),
        (f"{tmp_path}/none", "No such file or directory"),
        (f"{files.path}/store.db", "is not a directory"),
        ("/dev/shm", r"belongs to uid|has mode 1777"),
    ):
        with pytest.raises(StoreError, match=words):
            directory.check_directory(path)
    (tmp_path / "link").symlink_to(files.path)
    with pytest.raises(StoreError, match=r"link is a symlink"):
        directory.check_directory(f"{tmp_path}/link")
    os.chmod(files.path, 0o710)
    with pytest.raises(StoreError, match="has mode 0710; mode 0700 is needed"):
        directory.check_directory(str(files.path))
    os.chmod(files.path, 0o700)
    os.chmod(tmp_path, 0o770)
    with pytest.raises(StoreError, match="has mode 0770; others can write to it"):
        directory.check_directory(str(files.path))
    os.chmod(tmp_path, 0o700)
    files.disk.close()
    database_file = files.path / "store.db"
    os.chmod(database_file, 0o640)
    with pytest.raises(StoreError, match="has mode 0640 and 1 links"):
        files.open()
    os.chmod(database_file, 0o600)
    os.link(database_file, tmp_path / "second")
    with pytest.raises(StoreError, match="and 2 links"):
        files.open()
    os.unlink(tmp_path / "second")
    database_file.rename(tmp_path / "moved")
    database_file.symlink_to(tmp_path / "moved")
    with pytest.raises(StoreError, match="is not a plain file"):
        files.open()
    database_file.unlink()
    (tmp_path / "moved").rename(database_file)
    (files.path / "tombstones").rename(tmp_path / "t")
    with pytest.raises(StoreError, match="there is no store"):
        files.open()
    (tmp_path / "t").rename(files.path / "tombstones")
    database_file.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        files.open()
    shutil.rmtree(files.path)
    files.disk = Disk.create(str(files.path), files.key(), files.arena)


def test_boxes_open_with_their_key_and_purpose_only(arena: Arena) -> None:
    """And a failure keeps no memory."""
    key = memoryview(KEY)
    box = seal(b"letmein", key, b"purpose")
    with unseal(box, key, b"purpose", arena) as opened:
        assert bytes(opened.view) == b"letmein"
    other = memoryview(bytes(32))
    changed = bytes([box[0] ^ 1]) + box[1:]
    for wrong in (
        (box, other, b"purpose"), (box, key, b"other"), (changed, key, b"purpose"),
        (box[:-1], key, b"purpose"), (b"", key, b"purpose"),
    ):  # fmt: skip
        with pytest.raises(OpenError):
            unseal(*wrong, arena)


def test_damaged_contents_are_refused() -> None:
    """They cannot come out of a box, but nothing relies on that."""
    for content in (b"", b"\1\0\0", b"\x05\0\0\0{]", b"\x02\0\0\0{}"):
        with pytest.raises(ValueError, match="too short|header is damaged"):
            unpack(memoryview(content))


async def test_a_commit_tells_all_who_wait() -> None:
    """Before and after its end; a callback that fails makes it fail."""
    commit, seen = Commit(3), []
    commit.then(lambda error: seen.append(("before", error)))
    commit.finish(None)
    commit.then(lambda error: seen.append(("after", error)))
    await commit
    assert seen == [("before", None), ("after", None)]
    failed = Commit()
    failed.then(lambda _error: failed.fail(CommandError("no room")))
    failed.finish(None)
    with pytest.raises(CommandError, match="no room"):
        await failed
    broken = Commit()
    broken.then(lambda _error: {}["secret"])
    broken.finish(None)
    with pytest.raises(CommandError, match="Internal error"):
        await broken


def test_faults_of_the_system_are_reported_in_words(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each place where a file is opened, read, copied or removed."""

    def fail(*_args: object, **_named: object) -> None:
        raise OSError(5, "Input/output error")

    def fail_sqlite(*_args: object, **_named: object) -> None:
        raise sqlite3.OperationalError("unable to open")

    files.write(a="one")
    files.disk._database.rollback()  # there is nothing to undo
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail)
        with pytest.raises(StoreError, match="Input/output error"):
            files.disk.copy()
        with pytest.raises(StoreError, match="Input/output error"):
            directory.Tombstones(str(files.path), files.disk._keys.mac)
    files.disk.close()
    with pytest.raises(StoreError, match="closed database"):
        list(files.disk._database.rows())
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", fail_sqlite)
        with pytest.raises(StoreError, match="unable to open"):
            files.open()
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        with pytest.raises(StoreError, match="Input/output error"):
            database.destroy(str(files.path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(StoreError, match="belongs to uid"):
            directory.check_directory(str(files.path))
        with pytest.raises(StoreError, match="/etc/passwd belongs to uid 0, not to uid 12345"):
            directory.check_file("/etc/passwd")
    with pytest.raises(StoreError, match="Not a directory"):
        directory.check_file("/etc/passwd/x")
    shutil.rmtree(files.path)
    files.disk = Disk.create(str(files.path), files.key(), files.arena)


def test_a_row_with_the_id_of_another_is_noticed(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it was sealed for its place; and a failure of the cipher keeps no memory."""
    keys = files.disk._keys
    row_key = keys.row_key("a")
    change = files.change("b", "value")
    assert change.content is not None
    with change.content as content:
        row = database.Row(row_key, 1, keys.seal_row(row_key, 1, content.view))
    with pytest.raises(StoreError, match="was changed, or moved from elsewhere"):
        files.disk.opened(row)

    def fail(_key: object) -> None:
        raise MemoryError

    held = files.arena.held
    monkeypatch.setattr(aead, "_aes_gcm", lambda: fail)
    with pytest.raises(MemoryError):
        keys.open_row(row.key, 1, row.box)
    assert files.arena.held == held
