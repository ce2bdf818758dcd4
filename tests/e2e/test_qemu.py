# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real QEMU: disks whose passphrase only secretd holds, and sealed secrets pushed into a running
QEMU.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import SECRETCTL, Process
from tests.support.needs import need_program
from tests.support.qmp import Client

PATTERN = "0x5a"


def passphrase() -> str:
    """What QEMU takes for LUKS must be UTF-8, so not just any bytes."""
    return os.urandom(20).hex()


def luks_image(secretd: Process, tmp_path: Path, object_id: str) -> str:
    """An encrypted image made with a secret that only secretd holds."""
    image = str(tmp_path / f"{object_id}.luks")
    command = [
        "qemu-img", "create", "-q", "--object", f"secret,id=sec0,file={{{object_id}}}", "-f",
        "luks",
        "-o", "key-secret=sec0,iter-time=100", image, "4M",
    ]  # fmt: skip
    # QEMU's PBKDF timing now and then says "Unable to get accurate CPU usage" on small machines.
    for _attempt in range(20):
        done = run(secretd, "memfd", object_id, command)
        if done.returncode == 0:
            return image
        assert "CPU usage" in done.stderr, done.stderr
    raise AssertionError("qemu-img could not time its key derivation in 20 attempts")


def run(
    secretd: Process, via: str, object_id: str, command: list[str]
) -> subprocess.CompletedProcess:
    """Run a command through `secretctl run`."""
    return subprocess.run(
        [SECRETCTL, "--socket", secretd.control, "run", "--via", via, "--secret", object_id, "--",
        *command],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def qemu_io(object_id: str, image: str, action: str) -> list[str]:
    """qemu-io on an encrypted image."""
    return [
        "qemu-io", "--object", f"secret,id=sec0,file={{{object_id}}}", "--image-opts",
        f"driver=luks,key-secret=sec0,file.filename={image}", "-c", action,
    ]  # fmt: skip


@pytest.mark.parametrize("via", ["memfd", "pipe"])
def test_qemu_uses_a_disk_whose_passphrase_secretd_holds(
    secretd: Process, tmp_path: Path, via: str
) -> None:
    """Unmodified qemu-img and qemu-io; the wrong secret fails."""
    need_program("qemu-img", "qemu-io")
    client = secretd.connect()
    client.add("disk0", data=passphrase())
    client.add("other", data=passphrase())
    image = luks_image(secretd, tmp_path, "disk0")
    done = run(secretd, via, "disk0", qemu_io("disk0", image, f"write -P {PATTERN} 0 64k"))
    assert done.returncode == 0, done.stderr
    done = run(secretd, via, "disk0", qemu_io("disk0", image, f"read -P {PATTERN} 0 64k"))
    assert done.returncode == 0, done.stderr
    assert "Pattern verification failed" not in done.stdout
    done = run(secretd, via, "other", qemu_io("other", image, "read 0 64k"))
    assert done.returncode != 0
    assert "Invalid password, cannot unlock any keyslot" in done.stderr


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Callable[..., Client]]:
    """Start qemu-system with a QMP socket; returns a client of it."""
    need_program("qemu-system-x86_64")
    processes, clients = [], []

    def start(*options: str) -> Client:
        path = str(tmp_path / "qemu.sock")
        process = subprocess.Popen(
            ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none",
             "-qmp", f"unix:{path},server=on,wait=off", *options],
            stderr=subprocess.PIPE,
        )  # fmt: skip
        processes.append(process)
        while process.poll() is None:
            try:
                clients.append(Client(path))
            except (FileNotFoundError, ConnectionRefusedError):
                continue
            return clients[-1]
        raise AssertionError(process.stderr.read())

    yield start
    for client in clients:
        client.close()
    for process in processes:
        process.terminate()
        process.wait(20)
        process.stderr.close()


def test_a_running_qemu_opens_a_disk_with_a_sealed_secret(
    secretd: Process, tmp_path: Path, qemu: Callable[..., Client]
) -> None:
    """The same master key in both; the plaintext never leaves secretd."""
    need_program("qemu-img", "qemu-io", "openssl")
    key = tmp_path / "key.b64"
    key.write_bytes(
        subprocess.run(["openssl", "rand", "-base64", "32"], stdout=-1, check=True).stdout
    )
    client = secretd.connect()
    assert client.add("master", file=str(key), format="base64") == {"return": {}}
    client.add("disk0", data=passphrase())
    image = luks_image(secretd, tmp_path, "disk0")
    client.add("wrong", data=passphrase())
    monitor = qemu("-object", f"secret,id=master0,format=base64,file={key}")
    monitor.close()
    push = ["push", "disk0", "--keyid", "master", "--qmp", str(tmp_path / "qemu.sock")]
    secretd.ctl(*push, "--as", "disk", "--qemu-keyid", "master0")
    secretd.ctl("push", "wrong", *push[2:], "--qemu-keyid", "master0")
    again = Client(str(tmp_path / "qemu.sock"))
    try:

        def open_disk(name: str, secret: str) -> dict:
            return again.cmd(
                "blockdev-add",
                {"driver": "luks", "node-name": name, "key-secret": secret,
                 "file": {"driver": "file", "filename": image, "locking": "off"}},
            )  # fmt: skip

        assert open_disk("d0", "disk") == {"return": {}}
        words = open_disk("d1", "wrong")["error"]["desc"]
        assert words == "Invalid password, cannot unlock any keyslot"
    finally:
        again.close()
