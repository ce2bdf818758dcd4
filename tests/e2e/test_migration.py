# SPDX-License-Identifier: LGPL-2.1-or-later
"""docs/howto/migrate-vm.md as it stands there: two hosts, and a guest that moves.

The hosts are two network namespaces with a cable between them. In each a secretd runs under a uid
of its own. What stands for ssh passes the standard descriptors of a command to the other host.
"""

import array
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.box import ROOT, installed
from tests.e2e.test_docs import Block, blocks
from tests.support.needs import need_program, need_root

__all__ = ["installed"]

PAGE = ROOT / "docs/howto/migrate-vm.md"
UIDS = {"alpha": 5001, "beta": 5002}
ADDRESSES = {"alpha": "192.0.2.1", "beta": "192.0.2.2"}

SSH = """#!{python}
import array, socket, sys
host, *words = sys.argv[1:]
sock = socket.socket(socket.AF_UNIX)
sock.connect({path!r})
command = " ".join(words).encode()
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
sock.sendmsg([command], rights)
sys.exit(int(sock.recv(100) or b"255"))
"""


class Host:
    """A network namespace with a daemon."""

    def __init__(self, name: str, directory: Path, installed: Path) -> None:
        self.name = name
        self.home = directory / name
        self.home.mkdir()
        os.chown(self.home, UIDS[name], 5000)
        # Installed, as the users here cannot read the environment of the tests.
        mount = f"mount -t overlay overlay -o lowerdir={installed}/usr:/usr /usr"
        self._anchor = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", f"{mount} && exec sleep infinity"]
        )
        self.pid = self._anchor.pid
        seen = Path("/proc", str(self.pid), "root", "usr", "bin", "secretd")
        while not seen.exists():
            assert self._anchor.poll() is None
        self.directory = directory
        self._daemon: subprocess.Popen[bytes] | None = None

    def command(self, words: list[str]) -> list[str]:
        """A command on this host, as its user."""
        uid = UIDS[self.name]
        return [
            "nsenter", f"--target={self.pid}", "--net", "--mount", "--",
            "setpriv", f"--reuid={uid}", "--regid=5000", "--clear-groups", "--",
            "env", f"HOME={self.home}", f"SECRETD_SOCKET={self.home}/control.sock",
            f"PATH={self.directory}/bin:/usr/bin:/bin:/usr/sbin", *words,
        ]  # fmt: skip

    def start(self) -> None:
        """Start the daemon."""
        words = ["secretd", "--control", f"{self.home}/control.sock", "--audit", "none"]
        self._daemon = subprocess.Popen(self.command(words), stderr=subprocess.PIPE)
        while not (self.home / "control.sock").exists():
            assert self._daemon.poll() is None, self._daemon.communicate()

    def close(self) -> None:
        """End everything of this host."""
        subprocess.run(["pkill", "-9", "-u", str(UIDS[self.name])], check=False)
        if self._daemon is not None:
            self._daemon.wait()
            assert self._daemon.stderr is not None
            self._daemon.stderr.close()
        self._anchor.kill()
        self._anchor.wait()


@pytest.fixture
def hosts(reachable: Path, installed: Path) -> Iterator[dict[str, Host]]:
    """Alpha and beta, with a cable; and ssh from alpha to beta."""
    need_root()
    need_program("ip", "nsenter", "setpriv", "socat", "jq", "qemu-system-x86_64", "openssl")
    (reachable / "bin").mkdir()
    made: dict[str, Host] = {}
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        for name in UIDS:
            made[name] = Host(name, reachable, installed)
        link = f"sd{os.getpid() % 100_000}"
        subprocess.run(
            ["ip", "link", "add", link, "netns", str(made["alpha"].pid), "type", "veth", "peer",
             "name", link, "netns", str(made["beta"].pid)],
            check=True,
        )  # fmt: skip
        for name, host in made.items():
            inside = ["nsenter", f"--target={host.pid}", "--net", "--", "ip"]
            for words in (
                ["addr", "add", f"{ADDRESSES[name]}/24", "dev", link], ["link", "set", link, "up"],
                ["link", "set", "lo", "up"],
            ):  # fmt: skip
                subprocess.run([*inside, *words], check=True)
            host.start()
        path = str(reachable / "sshd")
        listener.bind(path)
        os.chmod(path, 0o777)
        listener.listen()
        ssh = reachable / "bin" / "ssh"
        text = SSH.format(python="/usr/bin/python3", path=path)
        ssh.write_text(text.replace("socket.AF_UNIX)", "socket.AF_UNIX, socket.SOCK_SEQPACKET)"))
        ssh.chmod(0o755)
        threading.Thread(target=serve, args=(listener, made["beta"]), daemon=True).start()
        yield made
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for host in made.values():
            host.close()


def serve(listener: socket.socket, beta: Host) -> None:
    """Run what ssh asks for, on beta."""
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=carry_out, args=(sock, beta), daemon=True).start()


def carry_out(sock: socket.socket, beta: Host) -> None:
    """Run one command with the descriptors of its ssh."""
    with sock:
        data, rights, _, _ = sock.recvmsg(1 << 16, 1024)
        fds = array.array("i")
        for _, _, content in rights:
            fds.frombytes(content)
        words = beta.command(["sh", "-c", f"umask 0007; {data.decode()}"])
        status = subprocess.call(words, stdin=fds[0], stdout=fds[1], stderr=fds[2])
        for fd in fds:
            os.close(fd)
        sock.send(str(status).encode())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_guest_and_its_secrets_move_to_another_host(
    hosts: dict[str, Host], reachable: Path
) -> None:
    """Every block of the page, and what it prints; then the disk's passphrase is on beta only."""
    shared = reachable / "shared"
    shared.mkdir()
    os.chown(shared, 5001, 5000)
    os.chmod(shared, 0o770)
    alpha = hosts["alpha"]
    found = blocks(PAGE)
    assert len(found) > 5
    for block in found:
        check(alpha, block, shared)
    listed = subprocess.run(
        alpha.command(["secretctl", "list", "-q"]), capture_output=True, text=True, check=True
    )
    assert listed.stdout == "host.key\n"
    listed = subprocess.run(
        hosts["beta"].command(["secretctl", "list", "-q"]),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listed.stdout == "host.key\nvm1.disk\n"


def check(alpha: Host, block: Block, directory: Path) -> None:
    """Type a block on alpha."""
    code = f"umask 0007; cd {directory}\n{block.code}"
    done = subprocess.run(
        alpha.command(["bash", "-o", "pipefail", "-euc", code]),
        capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == 0, f"{block.code}\n{printed}"
    for wanted in block.prints:
        assert wanted in printed, f"{block.code}\n{wanted!r} is not in\n{printed}"
