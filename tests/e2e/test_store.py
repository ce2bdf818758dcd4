# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store of a real daemon: the order of its system calls, kills, and disks that are full, slow,
read-only or taken.
"""

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from secretd.memory.arena import Arena
from secretd.store.disk import Disk
from secretd.store.rows import unpack
from tests.e2e.conftest import SECRETD, Process
from tests.support.needs import need_program, need_root
from tests.support.scan import parts, secret

KEY = secret(777).encode()


def declared(directory: Path, name: str = "store") -> list[str]:
    """The options of a daemon with a store."""
    (directory / "key").write_bytes(KEY)
    store = f"secret-store,id=store,path={directory}/{name},keyid=store.key,create=on"
    return ["--object", f"secret,id=store.key,file={directory}/key", "--object", store]


def request(command: str, number: int, **arguments: object) -> bytes:
    """A request with an id."""
    text = json.dumps({"execute": command, "arguments": arguments, "id": number})
    return text.encode() + b"\n"


def addition(object_id: str, text: str, number: int = 0) -> bytes:
    """A request that adds a secret."""
    options = {"qom-type": "secret", "id": object_id, "data": text}
    return request("object-add", number, **options)


def rows(path: Path) -> dict[str, str]:
    """What a store has, that no process has open."""
    arena = Arena("none")
    key = arena.allocate(len(KEY))
    key.view[:] = KEY
    disk = Disk(str(path), key, arena)
    key.free()
    found = {}
    try:
        disk.verify()
        for chunk in disk.living():
            for row in chunk:
                with disk.opened(row) as content:
                    stored, plaintext = unpack(content.view)
                    found[stored.id] = bytes(plaintext).decode()
    finally:
        disk.close()
        arena.close()
    return found


# --- the order of system calls

CALL = re.compile(r"^(\d+) +(\w+)\((\d+)<(.*?)>([,)].*) += (-?\d+)")
UNFINISHED = re.compile(r"^(\d+) (.*) <unfinished \.\.\.>$")
RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")
STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


class Recorded:
    """The files of a store as a recording of system calls wrote them, and what of them would be
    left after a power failure.
    """

    def __init__(self, path: str, start: dict[str, bytes]) -> None:
        self._path = path
        self._written = {name: bytearray(content) for name, content in start.items()}
        self.synced = dict(start)

    def call(self, name: str, file: str, rest: str, result: int) -> None:
        """Carry out a call on a file."""
        short = os.path.basename(file)
        if not file.startswith(self._path) or result < 0:
            return
        content = self._written.setdefault(short, bytearray())
        if name == "pwrite64":
            match = STRING.search(rest)
            assert match is not None
            data = bytes.fromhex(match[1].replace("\\x", ""))
            assert len(data) == result
            at = int(rest.rstrip(")").rsplit(", ", 1)[1])
            content.extend(bytes(max(0, at + len(data) - len(content))))
            content[at : at + len(data)] = data
        elif name == "ftruncate":
            del content[int(rest.rstrip(")").rsplit(", ", 1)[1]) :]
        elif name in ("fdatasync", "fsync"):
            self.synced[short] = bytes(content)

    def left(self, directory: Path) -> dict[str, str]:
        """What opens after a power failure now."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(0o700)
        for name, content in self.synced.items():
            (directory / name).write_bytes(content)
            os.chmod(directory / name, 0o600)
        return rows(directory)


def lines(trace: Path) -> Iterator[str]:
    """The calls of a recording, each in one line, at its end."""
    begun: dict[str, str] = {}
    for line in trace.read_text().splitlines():
        unfinished, resumed = UNFINISHED.match(line), RESUMED.match(line)
        if unfinished is not None:
            begun[unfinished[1]] = line.removesuffix(" <unfinished ...>")
        elif resumed is not None:
            yield begun.pop(resumed[1]) + resumed[2]
        else:
            yield line


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_reply_leaves_before_the_disk_has_it(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    """Whatever was written is cut at the last fdatasync(2) before each reply, and opens to exactly
    what was acknowledged; with a window of requests, to at least that and no hole.
    """
    need_program("strace")
    trace = tmp_path / "trace"
    strace = [
        "strace", "-D", "-f", "-yy", "-xx", "-s", "200000", "-o", str(trace),
        "-e", "trace=pwrite64,ftruncate,fdatasync,fsync,sendto,unlink", SECRETD,
    ]  # fmt: skip
    process = start(*declared(tmp_path), "--audit", "none", command=strace)
    client = process.connect()
    store = tmp_path / "store"
    begin = {name: (store / name).read_bytes() for name in os.listdir(store)}
    model: dict[str, str] = {}
    states = [dict(model)]
    for number in range(40):
        object_id = f"s{number % 9}"
        if object_id in model and number % 3:
            assert client.cmd("object-del", {"id": object_id}) == {"return": {}}
            del model[object_id]
        elif object_id in model:
            replaced = {"qom-type": "secret", "id": object_id, "data": f"new {number}"}
            assert client.cmd("secret-replace", replaced) == {"return": {}}
            model[object_id] = f"new {number}"
        else:
            assert client.add(object_id, data=f"value {number}") == {"return": {}}
            model[object_id] = f"value {number}"
        states.append(dict(model))
    client.sock.sendall(b"".join(addition(f"w{n}", "x" * 500) for n in range(100)))
    for number in range(100):
        assert client.reply() == {"return": {}, "id": 0}
        states.append(states[-1] | {f"w{number}": "x" * 500})
    pid = process.pid
    process.stop()
    ended = re.compile(rf"^{pid} +\+\+\+ exited", re.MULTILINE)
    while not ended.search(trace.read_text()):
        pass

    recorded = Recorded(str(store), begin)
    acknowledged = checked = 0
    negotiated = False  # files are as at its beginning
    for line in lines(trace):
        match = CALL.match(line)
        if match is None:
            continue
        _, name, _, hexadecimal, rest, result = match.groups()
        file = re.sub(r"\\x([0-9a-f]{2})", lambda digits: chr(int(digits[1], 16)), hexadecimal)
        if name != "sendto":
            if negotiated:
                recorded.call(name, file, rest, int(result))
            continue
        string = STRING.search(rest)
        if string is None or "UNIX-STREAM" not in file:
            continue
        sent = bytes.fromhex(string[1].replace("\\x", "")).count(b'{"return": {}')
        if not negotiated or not sent:
            negotiated = negotiated or sent > 0
            continue
        acknowledged += sent
        left = recorded.left(tmp_path / "cut")
        if acknowledged <= 40:
            assert left == states[acknowledged]
        else:
            assert left in states[acknowledged:]
        checked += 1
    assert acknowledged == 140
    assert checked > 41


# --- kills


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_was_acknowledged_survives_kills_of_all_memory(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    """20 times kill -9 at random moments with windows of changes in flight; nothing goes with the
    process, since it has no service manager.
    """
    rng = random.Random(3)
    model: dict[str, str] = {}
    uncertain: set[str] = set()
    number = 0
    for _ in range(20):
        process = start(*declared(tmp_path), "--audit", "none")
        client = process.connect()
        held = {each["id"] for each in client.secrets()} - {"store.key"}
        for object_id in uncertain:  # not acknowledged: there or not
            if object_id in held:
                model[object_id] = client.read(object_id).decode()
            else:
                model.pop(object_id, None)
        assert held == model.keys()
        for object_id in rng.sample(sorted(model), min(20, len(model))):
            assert client.read(object_id).decode() == model[object_id]
        uncertain = set()
        flight: list[tuple[str, str | None]] = []
        for _ in range(rng.randrange(20, 150)):
            number += 1
            if model and rng.random() < 0.3:
                object_id = rng.choice(sorted(set(model) - {each for each, _ in flight}) or [""])
                if object_id:
                    flight.append((object_id, None))
            else:
                flight.append((f"s{number}", f"value {number}"))
        client.sock.sendall(
            b"".join(
                request("object-del", 0, id=object_id)
                if text is None
                else addition(object_id, text)
                for object_id, text in flight
            )
        )
        for _ in range(rng.randrange(len(flight))):
            assert client.reply() == {"return": {}, "id": 0}
            object_id, text = flight.pop(0)
            if text is None:
                del model[object_id]
            else:
                model[object_id] = text
        process.popen.kill()
        process.popen.wait()
        process.popen.stderr.close()
        client.close()
        uncertain = {object_id for object_id, _ in flight}
        os.unlink(process.control)
    assert len(model) > 100


# --- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 800 KiB."""
    need_root()
    place = tmp_path / "disk"
    place.mkdir(0o700)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=800k,mode=0700", "tmpfs", str(place)], check=True
    )
    yield place
    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_refuses_additions_and_keeps_deletions(
    start: Callable[..., Process], tmp_path: Path, small_disk: Path
) -> None:
    """In words, while other clients are served; deleted stays deleted, over restarts."""
    (tmp_path / "key").write_bytes(KEY)
    options = declared(tmp_path, "disk/store")
    process = start(*options)
    client, other = process.connect(), process.connect()
    for number in range(20):
        assert client.add(f"s{number}", data="x" * 1000) == {"return": {}}
    with open(small_disk / "fill", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    kept = {f"s{number}" for number in range(20)}
    for number in range(200):
        reply = client.add(f"t{number}", data="y" * 2000)
        if "error" in reply:
            break
        kept.add(f"t{number}")
    words = f"Unable to write {small_disk}/store: database or disk is full"
    assert reply["error"]["desc"] == words
    assert other.add("t999", data="y" * 2000)["error"]["desc"] == words
    assert other.cmd("query-name") == {"return": {}}
    assert other.read("s0") == b"x" * 1000
    for number in range(10):
        assert client.cmd("object-del", {"id": f"s{number}"}) == {"return": {}}
        kept.discard(f"s{number}")
    process.stop()
    process = start(*options)
    client = process.connect()
    assert {s["id"] for s in client.secrets()} == kept | {"store.key"}
    assert client.ok("query-secret-store")[0]["state"] == "open"
    assert "error" in client.add("u", data="y" * 100_000)
    os.unlink(small_disk / "fill")
    assert client.add("s0", data="again") == {"return": {}}
    assert client.ok("secret-store-verify", {"id": "store"}) == {"rows": len(kept) + 1}
    process.stop()
    process = start(*options)
    assert f"store              {small_disk}/store (open; keeps *)\n" in process.said
    assert process.connect().read("s0") == b"again"


def test_a_read_only_disk_loses_nothing(
    start: Callable[..., Process], tmp_path: Path, small_disk: Path
) -> None:
    """The store fails in words, and opens once the disk can be written."""
    options = declared(tmp_path, "disk/store")
    process = start(*options)
    client = process.connect()
    assert client.add("s", data="letmein") == {"return": {}}
    # What is open for writing would keep the file system from it; a fault of the disk does not ask.
    subprocess.run(["mount", "-o", "remount,size=4k", str(small_disk)], check=False)
    with (
        open(small_disk / "fill", "wb", buffering=0) as file,
        pytest.raises(OSError, match="space"),
    ):
        while True:
            file.write(bytes(4096))
    process.stop()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    process = start(*options)
    client = process.connect()
    (info,) = client.ok("query-secret-store")
    assert info["state"] == "failed"
    assert "store.db" in info["reason"]
    words = client.add("t", data="x")["error"]["desc"]
    assert words == f"Store 'store' has failed: {info['reason']}"
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert client.ok("secret-store-unlock", {"id": "store"}) == {}
    assert client.read("s") == b"letmein"


def test_a_store_belongs_to_one_process(start: Callable[..., Process], tmp_path: Path) -> None:
    """The second daemon runs, and says why it has no store."""
    process = start(*declared(tmp_path))
    other_place = tmp_path / "other"
    other_place.mkdir()
    second = Process(other_place, *declared(tmp_path))
    try:
        (info,) = second.connect().ok("query-secret-store")
        assert info["reason"] == f"{tmp_path}/store/store.db: it is in use by another process"
        process.stop()
        assert second.connect().ok("secret-store-unlock", {"id": "store"}) == {}
    finally:
        second.stop()


@pytest.mark.slow
def test_a_disk_that_takes_ten_seconds_holds_up_only_its_changes(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    """Its fdatasync(2) does; others read, list and are refused meanwhile, and nothing is lost."""
    need_program("strace")
    seconds = 10
    strace = [
        "strace", "-D", "-f", "-o", "/dev/null", "-e", "trace=fdatasync",
        "-e", f"inject=fdatasync:delay_enter={seconds}s:when=8+", SECRETD,
    ]  # fmt: skip
    start(*declared(tmp_path)).stop()
    process = start(*declared(tmp_path), "--audit", "none", command=strace)
    slow, other = process.connect(), process.connect()
    fast = 0
    slow.sock.settimeout(60)
    while True:
        slow.sock.sendall(addition(f"s{fast}", "x"))
        slow.sock.settimeout(2)
        try:
            assert slow.reply() == {"return": {}, "id": 0}
        except TimeoutError:
            break
        fast += 1
    served = 0
    slow.sock.settimeout(0.001)
    while True:
        assert other.cmd("query-name") == {"return": {}}
        served += 1
        try:
            assert slow.reply() == {"return": {}, "id": 0}
        except TimeoutError:
            continue
        break
    assert served > 100
    assert other.read(f"s{fast}") == b"x"
    process.popen.kill()
    process.popen.wait()
    process.popen.stderr.close()
    for client in process._clients:
        client.close()


# --- what the files show


def test_no_file_shows_a_secret_or_an_id(start: Callable[..., Process], tmp_path: Path) -> None:
    """Database, WAL, tombstones, backup; while it is open and afterwards; after every command."""
    process = start("--audit", "none")
    client = process.connect()
    assert client.add("store.key", data=KEY.decode()) == {"return": {}}
    store = {"qom-type": "secret-store", "id": "store", "path": f"{tmp_path}/store"}
    client.ok("object-add", {**store, "keyid": "store.key", "create": True})
    client.ok("secret-store-unlock", {"id": "store"})
    names = {f"canary-{number}" for number in range(200)}

    def check() -> None:
        for directory, _, files in os.walk(tmp_path / "store"):
            for name in files:
                content = Path(directory, name).read_bytes()
                assert not parts(content), name
                assert b"canary" not in content

    for number, name in enumerate(sorted(names)):
        assert client.add(name, data=secret(number)) == {"return": {}}
    check()
    with open(tmp_path / "store/copy", "wb") as file:
        client.ok("getfd", {"fdname": "f"}, (file.fileno(),))
        client.ok("secret-store-backup", {"id": "store", "fdname": "f"})
    check()
    for name in sorted(names)[::2]:
        assert client.cmd("object-del", {"id": name}) == {"return": {}}
    client.ok("secret-generate", {"id": "store.key.new", "size": 32})
    client.ok("secret-store-rekey", {"id": "store", "keyid": "store.key.new", "data": True})
    check()
    assert process.stop().endswith("stopped; memory is wiped, and the store keeps 100 objects\n")
    check()
