# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUKS disks whose passphrase is rotated: by qemu-img, and in running QEMUs 7.2 and 10 that read
and write meanwhile; killed before each step.

After each kill some version that secretd holds opens the disk; run again, the rotation ends with
one keyslot, and only the current version opens it.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from secretd.ctl import luks_canary
from secretd.errors import UsageError
from tests.e2e.conftest import SECRETCTL, Process
from tests.e2e.test_qemu import passphrase
from tests.e2e.test_store import declared
from tests.support.needs import need_program, need_root
from tests.support.qmp import Client
from tests.support.real_qemu import QEMU10, need_qemu

BUSY = "Unable to get accurate CPU usage"
QUICK = "iter-time=10"

# It was killed before it had begun, or after the retirement had.
WHY_NOT_BACK = re.compile("no rotation of 'd' is under way|so there is no way back")

# Kill secretctl before the Nth step that is seen outside of it: a request that changes something in
# secretd or QEMU, or a run of one of QEMU's tools.
KILLED = """
import os, subprocess, sys
from secretd.client.channel import Channel
from secretd.ctl.main import main
left = int(sys.argv.pop(1))
def step():
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), 9)
exchange, send, run = Channel.exchange, Channel.send, subprocess.run
def exchanged(channel, command, *arguments):
    if command in ("secret-alias-set", "secret-alias-convert", "object-add", "object-del",
                   "secret-generate", "x-blockdev-amend"):
        step()
    return exchange(channel, command, *arguments)
def ran(words, **options):
    if "amend" in words:
        step()
    return run(words, **options)
Channel.exchange, subprocess.run = exchanged, ran
sys.argv[0] = "secretctl"
sys.exit(main())
"""


class Disk(NamedTuple):
    """An encrypted image, and how QEMU opens it."""

    path: str
    format: str

    def node(self, secret: str) -> dict:
        """The options of its node."""
        file = {"driver": "file", "filename": self.path}
        key: dict = {"key-secret": secret}
        if self.format == "qcow2":
            key = {"encrypt": {"format": "luks", **key}}
        return {"driver": self.format, "file": file, **key}

    def slots(self) -> int:
        """The number of active keyslots."""
        done = subprocess.run(
            ["qemu-img", "info", "-U", "--output=json", self.path],
            capture_output=True, check=True, text=True,
        )  # fmt: skip
        data = json.loads(done.stdout)["format-specific"]["data"]
        return sum(slot["active"] for slot in data.get("encrypt", data)["slots"])

    def opens(self, client: Client, version: str) -> bool:
        """True if a version opens it."""
        fd = os.memfd_create("key")
        try:
            client.ok("secret-read", {"id": version}, (fd,))
            opened = f"json:{json.dumps(self.node('s'))}"
            done = subprocess.run(
                ["qemu-io", "-U", "-r", "--object", f"secret,id=s,file=/dev/fd/{fd}",
                 "-c", "quit", opened],
                capture_output=True, check=False, text=True, pass_fds=(fd,),
            )  # fmt: skip
        finally:
            os.close(fd)
        assert not done.returncode or "Invalid password" in done.stderr, done.stderr
        return not done.returncode


def versions(client: Client) -> set[str]:
    """The secrets that may open the disk."""
    return {each["id"] for each in client.secrets() if each["qom-type"] == "secret"}


@pytest.fixture
def disk(secretd: Process, tmp_path: Path, request: pytest.FixtureRequest) -> Disk:
    """A disk whose passphrase is the secret d."""
    need_program("qemu-img", "qemu-io")
    made = Disk(str(tmp_path / "a,b=c.img"), request.param)
    client = secretd.connect()
    client.add("d", data=passphrase())
    prefix = "" if made.format == "luks" else "encrypt.format=luks,encrypt."
    options = f"{prefix}key-secret=k,{prefix.rpartition(',')[2]}{QUICK}"
    for _ in range(20):
        done = subprocess.run(
            [SECRETCTL, "--socket", secretd.control, "run", "--secret", "d", "--", "qemu-img",
             "create", "-q", "--object", "secret,id=k,file={d}", "-f", made.format,
             "-o", options, made.path, "4M"],
            capture_output=True, check=False, text=True,
        )  # fmt: skip
        if BUSY not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return made


def rotate(
    secretd: Process, *words: str, killed: int = 0, version: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run secretctl rotate d, and kill it before a step; beside QEMU 10, with its libraries."""
    command = [SECRETCTL] if not killed else [sys.executable, "-c", KILLED, str(killed)]
    if version == "qemu10":
        command = [str(QEMU10), "run", *command]
    return subprocess.run(
        [*command, "--socket", secretd.control, "rotate", "d", *words,
         *(["--iter-time", "10"] if "--luks" in words else [])],
        capture_output=True, check=False, text=True, timeout=120,
    )  # fmt: skip


def check_held(client: Client, disk: Disk) -> None:
    """A version that secretd holds opens the disk, and so does the one that readers get."""
    held = versions(client)
    assert any(disk.opens(client, each) for each in held)
    assert disk.opens(client, "d")


def check_whole(client: Client, disk: Disk) -> None:
    """One version is left, and it is the only one with a keyslot."""
    assert len(versions(client)) == 1
    assert disk.opens(client, "d")
    assert disk.slots() == 1


# --- without a guest


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("direction", "disk"), [("forward", "luks"), ("back", "qcow2")], indirect=["disk"]
)
def test_an_image_is_rotated_whatever_is_killed(
    secretd: Process, disk: Disk, direction: str
) -> None:
    """Before each step; then it goes on, or back."""
    client = secretd.connect()
    words = ["--generate", "8", "--luks", disk.path]
    for step in range(1, 20):
        done = rotate(secretd, *words, killed=step)
        check_held(client, disk)
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 0, done.stderr
            assert step > 6
            break
        back = ["--rollback"] if direction == "back" else []
        done = rotate(secretd, *words, *back)
        if back and done.returncode and WHY_NOT_BACK.search(done.stderr):
            done = rotate(secretd, *words)
        assert done.returncode == 0, done.stderr
        check_whole(client, disk)
    check_whole(client, disk)


@pytest.mark.parametrize("disk", ["luks"], indirect=True)
def test_what_is_no_disk_of_this_passphrase_is_refused(
    secretd: Process, disk: Disk, tmp_path: Path
) -> None:
    """In words, and before anything is committed."""
    client = secretd.connect()
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(1 << 20))
    for path, words in (
        (str(raw), "it is neither a luks image nor qcow2 with LUKS"),
        ("/nope", "No such file or directory"),
        (str(tmp_path), "to be a regular file"),
    ):
        done = rotate(secretd, "--generate", "8", "--luks", path)
        assert (done.returncode, words in done.stderr) == (1, True), done.stderr
    # It was rotated without its disk: neither text nor bytes open that.
    for more in (["--text"], []):
        assert rotate(secretd, "--generate", "64", *more).returncode == 0
        current = client.ok("query-secret-alias")[0]["current"]
        done = rotate(secretd, "--generate", "8", "--luks", disk.path)
        assert done.returncode == 1
        assert f"'{current}' does not open it; nothing was removed" in done.stderr
        assert client.ok("query-secret-alias")[0]["current"] == current
        assert rotate(secretd, "--rollback").returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rotation_goes_on_after_the_loss_of_all_memory(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    """With a store: kill -9 of both programs at each step, and nothing is stored by systemd."""
    process = start(*declared(tmp_path))
    client = process.connect()
    client.add("d", data="first")
    ended = False
    for step in range(1, 20):
        done = rotate(process, "--generate", "8", killed=step)
        process.popen.kill()
        process.popen.wait()
        process.popen.stderr.close()
        client.close()
        os.unlink(process.control)
        process = start(*declared(tmp_path))
        client = process.connect()
        assert len(client.read("d")) in (5, 8)
        if done.returncode == 0:
            ended = True
            break
        done = rotate(process, "--generate", "8")
        assert done.returncode == 0, done.stderr
        current = client.ok("query-secret-alias")[0]["current"]
        assert {each["id"] for each in client.secrets()} == {"d", current, "store.key"}
    assert ended


def opened_by(disk: Disk, passphrases: list[str], tmp_path: Path) -> list[bool]:
    """Which passphrases open a disk."""
    found = []
    for text in passphrases:
        (tmp_path / "phrase").write_text(text)
        done = subprocess.run(
            ["qemu-io", "-U", "-r", "--object", f"secret,id=s,file={tmp_path}/phrase", "-c", "quit",
             f"json:{json.dumps(disk.node('s'))}"],
            capture_output=True, check=False,
        )  # fmt: skip
        found.append(not done.returncode)
    return found


@pytest.mark.parametrize("disk", ["luks"], indirect=True)
def test_a_recovery_passphrase_stays(secretd: Process, disk: Disk, tmp_path: Path) -> None:
    """It has a keyslot of its own: it is no new value, and rotations and ways back leave it."""
    client = secretd.connect()
    (tmp_path / "recovery").write_text("recovery")
    for _ in range(20):
        done = subprocess.run(
            [SECRETCTL, "--socket", secretd.control, "run", "--secret", "d", "--", "qemu-img",
             "amend", "--object", "secret,id=k,file={d}", "--object",
             f"secret,id=r,file={tmp_path}/recovery", "-o",
             f"state=active,new-secret=r,{QUICK}", f"json:{json.dumps(disk.node('k'))}"],
            capture_output=True, check=False, text=True,
        )  # fmt: skip
        if BUSY not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    recovery = ["--file", str(tmp_path / "recovery"), "--luks", disk.path]
    done = rotate(secretd, *recovery)
    assert "opens the disk already: it is the passphrase of another keyslot" in done.stderr
    rotate(secretd, "--rollback")
    assert opened_by(disk, ["recovery"], tmp_path) == [True]
    assert rotate(secretd, "--generate", "8", "--luks", disk.path).returncode == 0
    assert opened_by(disk, ["recovery"], tmp_path) == [True]
    assert disk.opens(client, "d")
    assert disk.slots() == 2
    # A value that can be no passphrase is refused, and does not stay in the way.
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    done = rotate(secretd, "--file", str(tmp_path / "bytes"), "--luks", disk.path)
    assert "is not valid UTF-8" in done.stderr
    done = rotate(secretd, "--rollback", "--luks", disk.path)
    assert done.returncode == 0, done.stderr
    assert (disk.slots(), disk.opens(client, "d")) == (2, True)


@pytest.mark.parametrize("disk", ["luks"], indirect=True)
def test_the_alias_remembers_the_disk(secretd: Process, disk: Disk, tmp_path: Path) -> None:
    """So the way on and the way back need no option, and another disk is refused."""
    client = secretd.connect()
    words = ["--generate", "8", "--luks", disk.path]
    for step in range(5, 12):
        done = rotate(secretd, *words, killed=step)
        if done.returncode != -signal.SIGKILL:
            break
        (found,) = client.ok("query-secret-alias")
        if "staged" in found or "previous" in found:
            done = rotate(secretd, "--luks", str(tmp_path / "other.img"))
            assert "end it first" in done.stderr
            assert disk.path in rotate(secretd, "--status").stdout
        done = rotate(secretd, "--rollback")
        if done.returncode:
            assert WHY_NOT_BACK.search(done.stderr), done.stderr
            assert rotate(secretd, "--generate", "8").returncode == 0
        check_held(client, disk)
        assert disk.slots() == 1


# --- with a guest


class Qemu:
    """A QEMU with a disk, to which it writes all the time."""

    def __init__(self, version: str, disk: Disk, client: Client, directory: Path) -> None:
        self.path = str(directory / f"{version}.sock")
        wrapper = [str(QEMU10), "run"] if version == "qemu10" else []
        self._process = subprocess.Popen(
            [*wrapper, "qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none",
             "-chardev", f"socket,id=a,path={self.path},server=on,wait=off",
             "-mon", "chardev=a,mode=control",
             "-chardev", f"socket,id=b,path={self.path}2,server=on,wait=off",
             "-mon", "chardev=b,mode=control"],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while True:  # QEMU binds its socket before it listens
            assert self._process.poll() is None
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                self.monitor = Client(f"{self.path}2")
                break
        data = client.read("d").decode()
        self.monitor.ok("object-add", {"qom-type": "secret", "id": "q", "data": data})
        node = disk.node("q")
        self.monitor.ok("blockdev-add", {**node, "node-name": "n"})
        # The guest: writes through an NBD export, as a virtio disk would.
        self.nbd = f"{self.path}.nbd"
        address = {"type": "unix", "data": {"path": self.nbd}}
        self.monitor.ok("nbd-server-start", {"addr": address})
        export = {"type": "nbd", "id": "e", "node-name": "n", "writable": True}
        self.monitor.ok("block-export-add", export)
        self.written = 0
        self._stop = threading.Event()
        self._guest = threading.Thread(target=self._write)
        self._guest.start()

    def _write(self) -> None:
        while not self._stop.is_set():
            done = subprocess.run(
                ["qemu-io", "-f", "raw", "-c", "write -P 0x5a 0 64k", "-c", "read -P 0x5a 0 64k",
                 f"nbd+unix:///n?socket={self.nbd}"],
                capture_output=True, check=False, text=True,
            )  # fmt: skip
            if done.returncode or "failed" in done.stdout:
                self.failure = done.stdout + done.stderr
                return
            self.written += 1

    failure = ""

    def works(self) -> None:
        """The guest goes on: it writes once more."""
        before = self.written
        while self.written == before:
            assert not self.failure, self.failure
            assert self._process.poll() is None
            time.sleep(0.01)

    def close(self) -> str:
        """End it; return what it has said."""
        self._stop.set()
        self._guest.join()
        self.monitor.close()
        self._process.kill()
        _, said = self._process.communicate()
        return str(said)


@pytest.fixture
def running(secretd: Process, disk: Disk, tmp_path: Path) -> Iterator[Callable[[str], Qemu]]:
    """Start a QEMU with the disk."""
    made: list[Qemu] = []

    def start(version: str) -> Qemu:
        need_qemu(version)
        made.append(Qemu(version, disk, secretd.connect(), tmp_path))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("version", "disk"),
    [("qemu7", "luks"), ("qemu7", "qcow2"), ("qemu10", "qcow2")],
    indirect=["disk"],
)
def test_a_running_disk_is_rotated_whatever_is_killed(
    secretd: Process, disk: Disk, running: Callable[[str], Qemu], version: str
) -> None:
    """Before each step; the guest writes on, and a retry leaves no second keyslot."""
    qemu = running(version)
    client = secretd.connect()
    client.add("m", data="k" * 32)
    qemu.monitor.ok("object-add", {"qom-type": "secret", "id": "m", "data": "k" * 32})
    for step in range(1, 30):
        # With a master key and without one, in turn.
        master = ",master=m" if step % 2 else ""
        words = ["--generate", "8", "--luks", f"qmp={qemu.path},node=n{master}"]
        done = rotate(secretd, *words, killed=step, version=version)
        check_held(client, disk)
        qemu.works()
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 0, done.stderr
            break
        back = ["--rollback"] if step % 3 == 0 else []
        done = rotate(secretd, *words, *back, version=version)
        if back and done.returncode and WHY_NOT_BACK.search(done.stderr):
            done = rotate(secretd, *words, version=version)
        assert done.returncode == 0, done.stderr
        assert versions(client) - {"m"} == {client.ok("query-secret-alias")[0]["current"]}
        assert disk.slots() == 1
    assert step > 10
    qemu.works()
    # QEMU has the passphrase under the id that the node knows, and no other one.
    objects = {each["name"] for each in qemu.monitor.ok("qom-list", {"path": "/objects"})}
    assert objects == {"type", "q", "m"}
    assert disk.slots() == 1
    assert disk.opens(client, "d")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("disk", ["luks"], indirect=True)
def test_a_qemu_that_would_abort_is_left_alone(
    secretd: Process, disk: Disk, running: Callable[[str], Qemu]
) -> None:
    """QEMU 10.0 with a luks disk: a trial of the same binary ends, and the guest goes on."""
    qemu = running("qemu10")
    words = ["--generate", "8", "--luks", f"qmp={qemu.path},node=n"]
    done = rotate(secretd, *words, version="qemu10")
    if done.returncode == 0:
        pytest.skip("this QEMU 10 has the fix: it survives")
    assert "this QEMU must not change the keyslots of a running luks disk" in done.stderr
    assert re.search(r"Assertion .* failed", done.stderr)
    assert "nothing was changed, shut the guest down and use --luks IMAGE" in done.stderr
    qemu.works()
    client = secretd.connect()
    assert client.ok("query-secret-alias")[0]["current"] == "d.v1"
    assert disk.opens(client, "d")
    # Without QEMU 10's libraries the trial cannot even start.
    done = rotate(secretd, *words)
    assert "a trial of the same binary ended" in done.stderr
    done = rotate(secretd, "--rollback", version="qemu10")  # the alias knows the disk
    assert done.returncode == 0, done.stderr
    done = rotate(secretd, "--luks", disk.path, "--generate", "8")
    assert "while a guest uses it, --luks qmp=SOCKET,node=NODE changes it" in done.stderr


@pytest.mark.parametrize("disk", ["qcow2"], indirect=True)
def test_a_wrong_node_or_socket_is_named(
    secretd: Process, disk: Disk, running: Callable[[str], Qemu], tmp_path: Path
) -> None:
    """In words that say what there is; nothing is committed."""
    qemu = running("qemu7")
    at = f"qmp={qemu.path}"
    expected = "expected qmp=SOCKET,node=NODE[,secret=ID][,master=ID][,pid=N]"
    listener = str(tmp_path / "silent")
    for options, words in (
        (f"{at}", expected),
        (f"{at},node=n,else=1", expected),
        (f"{at},node=n,pid=x", expected),
        (f"{at},node=nope", "QEMU has no node 'nope'; it has "),
        (f"{at},node=n,secret=nope", "QEMU has no secret 'nope'; secret=ID names the one"),
        (f"{at},node=n,master=nope", "No secret with id 'nope'"),
        (f"{at},node=n,pid={os.getpid()}", "which is no QEMU; name QEMU's process with pid=N"),
        (f"{at},node=n,pid=4194304", "cannot be looked at (No such file or directory)"),
        ("qmp=/nope,node=n", "/nope: No such file or directory; is QEMU running?"),
        (f"qmp={secretd.control},node=n", "The command query-named-block-nodes has not been found"),
        (f"qmp={listener},node=n", "is QEMU running?"),
    ):
        done = rotate(secretd, "--generate", "8", "--luks", options)
        assert (done.returncode, words in done.stderr) == (1, True), (options, done.stderr)
        rotate(secretd, "--rollback")
    # Another disk with the same secret would lose its passphrase.
    copy = Disk(str(tmp_path / "copy"), "qcow2")
    shutil.copy(disk.path, copy.path)
    qemu.monitor.ok("blockdev-add", {**copy.node("q"), "node-name": "twin"})
    done = rotate(secretd, "--generate", "8", "--luks", f"{at},node=n")
    assert "QEMU opened 'twin' with the same secret 'q' as 'n'" in done.stderr
    qemu.monitor.ok("blockdev-del", {"node-name": "twin"})
    file = {"driver": "file", "filename": str(tmp_path / "plain"), "node-name": "plain"}
    (tmp_path / "plain").write_bytes(bytes(4096))
    qemu.monitor.ok("blockdev-add", file)
    done = rotate(secretd, "--generate", "8", "--luks", f"{at},node=plain")
    assert "node 'plain' is neither luks nor qcow2 with LUKS" in done.stderr
    rotate(secretd, "--rollback")
    qemu.works()
    client = secretd.connect()
    assert disk.opens(client, "d")


# --- what answers as a QEMU

FAKE = """
import json, os, socket, sys, time
how = sys.argv[1]
number = next(int(w.split("fd=")[1]) for w in sys.argv if "fd=" in w)
sock = socket.socket(fileno=number)
if how == "silent":
    time.sleep(600)
sock.sendall(b'{"QMP": {"version": {}}}\\n')
while True:
    asked = sock.recv(4096)
    if how == "flood":
        while True:
            sock.sendall(b'{"event": "X"}\\n' * 100)
    if how == "odd":
        sock.sendall(b'{"return": 7}\\n')
    if how == "forks":
        if not os.fork():
            time.sleep(600)
        os.write(2, b"a \\x1b[31m line\\n")
        os._exit(3)
"""


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("silent", "a trial of the same binary ended (exit status -9)"),
        ("flood", "a trial of the same binary ended (exit status -9)"),
        ("odd", "a trial of the same binary does not answer as a QEMU does"),
        ("forks", "a trial of the same binary ended (a ?[31m line)"),
    ],
)
def test_a_hostile_binary_is_refused(
    reachable: Path, monkeypatch: pytest.MonkeyPatch, how: str, words: str
) -> None:
    """It has some seconds, no terminal, no root, and nothing that is secret."""
    need_root()
    monkeypatch.setattr(luks_canary, "TRIAL_SECONDS", 1.0)
    binary = reachable / "qemu-fake"
    script = reachable / "fake.py"
    script.write_text(FAKE)
    shutil.copy(os.path.realpath("/usr/bin/python3"), binary)
    hostile = subprocess.Popen([str(binary), "-c", "import time; time.sleep(60)"], user=4711)
    real = subprocess.Popen
    seen: list[tuple[int, int, bool]] = []

    def popen(command: list[str], **options: Any) -> Any:
        process = real([command[0], str(script), how, *command[1:]], **options)
        status = Path(f"/proc/{process.pid}/status").read_text()
        uid = int(re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)[1])
        caps = int(re.search(r"^CapEff:\s+(\w+)", status, re.MULTILINE)[1], 16)
        seen.append((uid, caps, os.getsid(process.pid) == process.pid))
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    try:
        with pytest.raises(UsageError, match=re.escape(words)):
            luks_canary.check_survives(hostile.pid, "luks")
    finally:
        monkeypatch.undo()
        hostile.kill()
        hostile.wait()
        subprocess.run(["pkill", "-9", "-u", "4711"], check=False)
    assert seen == [(4711, 0, True)]


def test_what_is_no_qemu_is_not_run() -> None:
    """By its name; and nothing is run for a process that has ended."""
    with pytest.raises(UsageError, match="which is no QEMU; name QEMU's process with pid=N"):
        luks_canary.check_survives(os.getpid(), "luks")
    with pytest.raises(UsageError, match="cannot be looked at"):
        luks_canary.check_survives(1 << 22, "luks")
