# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts as network namespaces of this machine, with a cable to the first one, and ssh from there.

In each a secretd runs under a uid of its own. What stands for ssh passes the standard descriptors
of a command to the other host.
"""

import array
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.e2e.test_docs import Block

GID = 5000

SSH = """#!{python}
import array, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect({path!r})
host, *words = sys.argv[1:]
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
sock.sendmsg([f"{{host}} {{' '.join(words)}}".encode()], rights)
sys.exit(int(sock.recv(100) or b"255"))
"""


class Host:
    """A network namespace with a daemon; ``options`` are the daemon's."""

    def __init__(
        self, name: str, number: int, directory: Path, installed: Path, options: Sequence[str]
    ) -> None:
        self.name, self.uid, self.address = name, 5000 + number, f"192.0.2.{number}"
        self.home = directory / name
        self.home.mkdir()
        os.chown(self.home, self.uid, GID)
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
        self._options = options
        self._daemon: subprocess.Popen[bytes] | None = None

    def command(self, words: Sequence[str]) -> list[str]:
        """A command on this host, as its user."""
        return [
            "nsenter", f"--target={self.pid}", "--net", "--mount", "--",
            "setpriv", f"--reuid={self.uid}", f"--regid={GID}", "--clear-groups", "--",
            "env", f"HOME={self.home}", f"SECRETD_SOCKET={self.home}/control.sock",
            f"PATH={self.directory}/bin:/usr/bin:/bin:/usr/sbin", *words,
        ]  # fmt: skip

    def start(self) -> None:
        """Start the daemon."""
        words = ["secretd", "--control", f"{self.home}/control.sock", "--audit", "none"]
        self._daemon = subprocess.Popen(
            self.command([*words, *self._options]), stderr=subprocess.PIPE
        )
        while not (self.home / "control.sock").exists():
            assert self._daemon.poll() is None, self._daemon.communicate()

    def ip(self, *words: str) -> None:
        """Configure its network."""
        inside = ["nsenter", f"--target={self.pid}", "--net", "--", "ip"]
        subprocess.run([*inside, *words], check=True)

    def type(self, block: Block, directory: Path) -> None:
        """Type a block of a page; what it prints must be what the page shows."""
        code = f"umask 0007; cd {directory}\n{block.code}"
        done = subprocess.run(
            self.command(["bash", "-o", "pipefail", "-euc", code]),
            capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        printed = done.stdout + done.stderr
        assert done.returncode == 0, f"{block.code}\n{printed}"
        for wanted in block.prints:
            assert wanted in printed, f"{block.code}\n{wanted!r} is not in\n{printed}"

    def close(self) -> None:
        """End everything of this host."""
        subprocess.run(["pkill", "-9", "-u", str(self.uid)], check=False)
        if self._daemon is not None:
            self._daemon.wait()
            assert self._daemon.stderr is not None
            self._daemon.stderr.close()
        self._anchor.kill()
        self._anchor.wait()


@contextlib.contextmanager
def network(
    names: Sequence[str], directory: Path, installed: Path, options: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Host]]:
    """Hosts with cables to a bridge in the first one, from which ssh reaches all."""
    (directory / "bin").mkdir()
    made: dict[str, Host] = {}
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        for number, name in enumerate(names, 1):
            made[name] = Host(name, number, directory, installed, options.get(name, ()))
        first = made[names[0]]
        first.ip("link", "add", "bridge", "type", "bridge")
        first.ip("addr", "add", f"{first.address}/24", "dev", "bridge")
        first.ip("link", "set", "bridge", "up")
        first.ip("link", "set", "lo", "up")
        for number, host in enumerate(list(made.values())[1:]):
            link = f"sd{os.getpid() % 100_000}-{number}"
            subprocess.run(
                ["ip", "link", "add", link, "netns", str(first.pid), "type", "veth", "peer",
                 "name", link, "netns", str(host.pid)],
                check=True,
            )  # fmt: skip
            first.ip("link", "set", link, "master", "bridge")
            first.ip("link", "set", link, "up")
            host.ip("addr", "add", f"{host.address}/24", "dev", link)
            host.ip("link", "set", link, "up")
            host.ip("link", "set", "lo", "up")
        for host in made.values():
            host.start()
        path = str(directory / "sshd")
        listener.bind(path)
        os.chmod(path, 0o777)
        listener.listen()
        ssh = directory / "bin" / "ssh"
        ssh.write_text(SSH.format(python="/usr/bin/python3", path=path))
        ssh.chmod(0o755)
        threading.Thread(target=_serve, args=(listener, made), daemon=True).start()
        yield made
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for host in made.values():
            host.close()


def _serve(listener: socket.socket, hosts: Mapping[str, Host]) -> None:
    """Run what ssh asks for."""
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_carry_out, args=(sock, hosts), daemon=True).start()


def _carry_out(sock: socket.socket, hosts: Mapping[str, Host]) -> None:
    """Run one command with the descriptors of its ssh."""
    with sock:
        data, rights, _, _ = sock.recvmsg(1 << 16, 1024)
        fds = array.array("i")
        for _, _, content in rights:
            fds.frombytes(content)
        name, _, command = data.decode().partition(" ")
        host = hosts[name]
        words = host.command(["sh", "-c", f"umask 0007; cd {host.home}; {command}"])
        status = subprocess.call(words, stdin=fds[0], stdout=fds[1], stderr=fds[2])
        for fd in fds:
            os.close(fd)
        sock.send(str(status).encode())
