# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store's key under a TPM2 (swtpm), by the real systemd-creds.

It is opened, refused after a change of a PCR or a clear, and recovered with age.
"""

import contextlib
import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import SECRETCTL, Process
from tests.support.needs import need_program, need_root


def two_ports() -> int:
    """The first of two free ports: clients expect the control channel behind the other one."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port: int = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                two.bind(("127.0.0.1", port + 1))
                return port


class TPM:
    """A TPM2 of its own."""

    def __init__(self, directory: Path) -> None:
        need_root()
        need_program("swtpm", "tpm2_flushcontext", "tpm2_pcrextend", "tpm2_clear", "systemd-creds")
        directory.mkdir()
        self._port = two_ports()
        self._process = subprocess.Popen(
            [
                "swtpm", "socket", "--tpm2", f"--tpmstate=dir={directory}",
                f"--server=type=tcp,port={self._port}", f"--ctrl=type=tcp,port={self._port + 1}",
                "--flags=not-need-init,startup-clear",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.name = f"swtpm:host=127.0.0.1,port={self._port}"
        while self.call("tpm2_getcap", "properties-fixed") != 0:
            assert self._process.poll() is None

    def call(self, *words: str) -> int:
        """A tool of tpm2-tools; its exit status. No session stays open: there is no manager."""
        code = 1
        for each in (words, ("tpm2_flushcontext", "-t"), ("tpm2_flushcontext", "-l")):
            done = subprocess.run(
                [*each, "-T", self.name], capture_output=True, check=False, timeout=30
            )
            code = done.returncode if each is words else code
        return code

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@pytest.fixture
def tpm(tmp_path: Path) -> Iterator[TPM]:
    """A new TPM."""
    made = TPM(tmp_path / "tpm")
    yield made
    made.close()


def ctl(process: Process, *words: str, status: int = 0, stdin: bytes = b"") -> str:
    """What secretctl prints, on both."""
    done = subprocess.run(
        [SECRETCTL, "--socket", process.control, *words],
        input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=60,
    )  # fmt: skip
    said = done.stdout.decode(errors="replace")
    assert done.returncode == status, said
    return said


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_store_under_a_tpm_opens_until_its_machine_changes(
    start: Callable[..., Process], tmp_path: Path, tpm: TPM
) -> None:
    """Bound to a PCR; secretd runs on in each case, and the escrow key brings everything back."""
    need_program("age", "age-keygen")
    escrow = str(tmp_path / "escrow")
    subprocess.run(["age-keygen", "-o", escrow], check=True, capture_output=True)
    public = subprocess.run(
        ["age-keygen", "-y", escrow], check=True, capture_output=True, text=True
    ).stdout.strip()
    under = ("--with-key=tpm2", "--tpm2-pcrs=16", f"--tpm2-device={tpm.name}")
    place = str(tmp_path / "store")
    process = start()
    said = ctl(
        process, "store", "init", place, "--systemd", *under, "--age", public, "--identity", escrow
    )
    assert "sealed its key for systemd (tried)\nsealed its key for age (tried)\n" in said
    tpm.call("tpm2_getcap", "properties-fixed")
    ctl(process, "add", "disk0", "--stdin", stdin=b"letmein")

    def lock() -> None:
        client = process.connect()
        client.ok("object-del", {"id": "store.key"})

    # 1. As after a boot.
    lock()
    ctl(process, "store", "unlock", *under)
    tpm.call("tpm2_getcap", "properties-fixed")
    ctl(process, "store", "recipient", "test", "systemd")
    tpm.call("tpm2_getcap", "properties-fixed")
    assert "disk0" in ctl(process, "list")
    doctor = json.loads(ctl(process, "doctor", "--json", status=1 if _failed(process) else 0))
    assert {"ok"} == {each["state"] for each in doctor if each["check"] in ("store", "recipients")}
    tpm.call("tpm2_getcap", "properties-fixed")
    ctl(process, "store", "rekey", "--identity", escrow)
    tpm.call("tpm2_getcap", "properties-fixed")

    # 2. A PCR changes, then the whole TPM is another one.
    def sealed_again() -> None:
        with open(f"{place}/recipients/age", "rb") as file:
            key = subprocess.run(
                ["age", "-d", "-i", escrow], stdin=file, check=True, capture_output=True
            ).stdout
        ctl(process, "store", "unlock", "--stdin", stdin=key)
        tpm.call("tpm2_getcap", "properties-fixed")
        ctl(process, "store", "recipient", "add", "systemd", *under)
        tpm.call("tpm2_getcap", "properties-fixed")

    digest = "16:sha256=" + "ab" * 32
    for change in (("tpm2_pcrextend", digest), ("tpm2_clear",)):
        assert tpm.call(*change) == 0
        lock()
        said = ctl(process, "store", "unlock", *under, status=1)
        tpm.call("tpm2_getcap", "properties-fixed")
        assert "recipient 'systemd': systemd-creds decrypt: " in said
        doctor = json.loads(ctl(process, "doctor", "--json", status=1))
        tpm.call("tpm2_getcap", "properties-fixed")
        (found,) = (each for each in doctor if each["check"] == "recipients")
        assert "systemd's cannot be opened any more" in found["found"]
        assert "the host key, machine id, TPM or PCRs have changed" in found["mend"]
        sealed_again()
        lock()
        ctl(process, "store", "unlock", *under)
        tpm.call("tpm2_getcap", "properties-fixed")
        assert process.connect().read("disk0") == b"letmein"

    # 3. systemd 252 seals without any PCR, and cannot open that: it is refused when it is made.
    said = ctl(
        process, "store", "recipient", "add", "systemd", "--with-key=tpm2", "--tpm2-pcrs=",
        f"--tpm2-device={tpm.name}", status=1,
    )  # fmt: skip
    assert "recipient 'systemd': systemd-creds decrypt: " in said
    tpm.call("tpm2_getcap", "properties-fixed")
    lock()
    ctl(process, "store", "unlock", *under)


def _failed(process: Process) -> bool:
    """Whether doctor finds a fault that is none of the store's."""
    done = subprocess.run(
        [SECRETCTL, "--socket", process.control, "doctor", "--json"],
        capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode != 0
