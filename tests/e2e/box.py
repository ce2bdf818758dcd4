# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real systemd as PID 1, to be thrown away: systemd-nspawn boots an overlay of this machine in a
second.

In it everything is as on this machine (the same Python, the same packages), but /run is empty,
there is no network but loopback, cgroups are version 2 only, and what is written vanishes. secretd
is installed in it as scripts/install does it, under /usr; this checkout is there too, as /secretd.
Root only.

With a root file system of another Debian (scripts/dev/trixie) it is that one's systemd, Python and
packages.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.needs import need, need_program, need_root
from tests.support.qmp import Client

ROOT = Path(__file__).parent.parent.parent
BOOT_SECONDS = 60
SECRETD = ("secretd",)
SECRETCTL = ("secretctl",)
TRIXIE = ROOT / ".trixie"
"""Where scripts/dev/trixie puts Debian 13's root file system."""

# Units of this machine that have no business in the box.
MASKED = ("systemd-modules-load.service", "apt-daily.timer", "apt-daily-upgrade.timer",
          "e2scrub_all.timer", "fstrim.timer", "man-db.timer")  # fmt: skip

INSIDE = """
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs "$STATE"
mkdir "$STATE/upper" "$STATE/work" "$STATE/tree"
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$STATE/upper,workdir=$STATE/work" \
    "$STATE/tree"
[ -z "$INSTALLED" ] || cp -R "$INSTALLED/." "$STATE/tree"
: > "$STATE/tree/etc/machine-id"
rm -rf "$STATE/tree/var/log/journal" "$STATE/tree/var/lib/systemd/credential.secret"
for unit in $MASKED; do ln -sf /dev/null "$STATE/tree/etc/systemd/system/$unit"; done
boot() {
    for d in $CGROUPS; do mkdir -p "$d"; echo "$BASHPID" > "$d/cgroup.procs"; done
    exec systemd-nspawn --quiet --boot --register=no --keep-unit --private-network \
        --link-journal=no --machine="$NAME" --directory="$STATE/tree" --console=pipe \
        --kill-signal=SIGRTMIN+3 --capability=all \
        --system-call-filter="@keyring memfd_secret bpf" --resolv-conf=off --timezone=off \
        --bind-ro="$CHECKOUT:/secretd" ${WHEELS:+--bind-ro="$WHEELS:/wheels"} \
        -- systemd.unit=basic.target systemd.log_target=journal-or-kmsg
}
# nspawn ends with 133 for a reboot; this mount namespace keeps what was written.
code=133
while [ "$code" = 133 ]; do
    boot &
    nspawn=$!
    trap 'kill -TERM "$nspawn"' TERM
    code=0
    wait "$nspawn" || code=$?
    while kill -0 "$nspawn" 2>/dev/null; do code=0; wait "$nspawn" || code=$?; done
done
exit "$code"
"""


def _hierarchies() -> list[str]:
    """The host's cgroup directories that systemd needs one of its own in."""
    paths = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd", "/sys/fs/cgroup")
    return [path for path in paths if os.access(f"{path}/cgroup.procs", os.W_OK)]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where secretd was installed as for a package, under /usr; once for all workers."""
    need_root()
    with once(tmp_path_factory, "installed") as directory:
        if not directory.exists():
            subprocess.run(
                [str(ROOT / "scripts/install"), "--prefix=/usr", "--fleet"],
                env=os.environ | {"DESTDIR": f"{directory}.new"},
                check=True, capture_output=True, timeout=300,
            )  # fmt: skip
            os.rename(f"{directory}.new", directory)
    return directory


@contextlib.contextmanager
def once(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A path that all workers share, and that one of them makes while the others wait."""
    shared = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    with open(shared / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield shared / name


def wheels(factory: pytest.TempPathFactory, version: str) -> Path:
    """Where the packages lie that secretd needs, for a Python of that version; none is built."""
    with once(factory, f"wheels-{version}") as directory:
        if not directory.exists():
            lock = (ROOT / "requirements.lock").read_text().partition("# development")[0]
            wanted = Path(f"{directory}.txt")
            wanted.write_text(lock)
            subprocess.run(
                [
                    str(ROOT / ".venv/bin/python"), "-m", "pip", "download", "--quiet", "--no-deps",
                    "--require-hashes", "--only-binary=:all:", f"--python-version={version}",
                    f"--dest={directory}.new", f"--requirement={wanted}",
                ],
                check=True, capture_output=True, timeout=300,
            )  # fmt: skip
            os.rename(f"{directory}.new", directory)
    return directory


def _children(pid: int | str) -> list[str]:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()
    return []


class Box:
    """A booted system; ``installed`` is copied over its root file system ``root``, and ``wheels``
    lie in /wheels. Close it, whatever happens.
    """

    def __init__(
        self,
        name: str,
        installed: Path | None = None,
        root: Path = Path("/"),
        wheels: Path | None = None,
    ) -> None:
        need_root()
        need_program("systemd-nspawn", "unshare", "nsenter")
        self._clients: list[Client] = []
        self._cgroups = [f"{path}/{name}" for path in _hierarchies()]
        need(bool(self._cgroups), "no cgroup can be made for a box")
        self._state = tempfile.mkdtemp(prefix="secretd-box-", dir="/tmp")
        self._log = open(f"{self._state}.log", "wb+")  # noqa: SIM115 - closed in close()
        self._nspawn = subprocess.Popen(
            ["unshare", "--mount", "bash", "-c", INSIDE],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {
                "CGROUPS": " ".join(self._cgroups), "STATE": self._state, "NAME": name,
                "MASKED": " ".join(MASKED), "CHECKOUT": str(ROOT),
                "LOWER": str(root), "INSTALLED": str(installed or ""), "WHEELS": str(wheels or ""),
                "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "SYSTEMD_NSPAWN_LOCK": "0",
            },
        )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < deadline:
            if self._nspawn.poll() is not None:
                break
            state = (
                self.run("systemctl", "is-system-running", check=False) if self._init() else None
            )
            if state is not None and state.stdout.strip() in ("running", "degraded"):
                return
        self._log.seek(0)
        raise AssertionError(f"the box did not boot:\n{self._log.read().decode(errors='replace')}")

    def _init(self) -> str:
        """The host's number of the box's PID 1; "" while there is none."""
        for pid in _children(self._nspawn.pid):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as comm:
                if comm.read().strip() == "systemd-nspawn":
                    return (_children(pid) or [""])[0]
        return ""

    def run(
        self,
        *words: str,
        check: bool = True,
        input: bytes | str | None = None,  # noqa: A002
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in the box, in no unit of it."""
        namespaces = ["-m", "-u", "-i", "-n", "-p", "-C"]
        done = subprocess.run(
            ["nsenter", "-t", self._init(), *namespaces, "--", *words],
            capture_output=True, text=True, check=False, timeout=60, input=input,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{words}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def reboot(self) -> None:
        """Reboot, and wait for the next boot, which has another boot id and an empty /run."""
        self.hang_up()
        before = self._init()
        self.run("systemctl", "--no-block", "reboot")
        deadline = time.monotonic() + BOOT_SECONDS
        # Nothing is run in it meanwhile: nsenter(1) would hang in namespaces that end.
        while self._init() in ("", before):
            assert time.monotonic() < deadline, "the box did not reboot"
        self._wait()

    def boot_id(self) -> str:
        """The boot id."""
        return self.run("cat", "/proc/sys/kernel/random/boot_id").stdout.strip()

    def path(self, path: str) -> str:
        """What a path of the box is called outside."""
        return f"/proc/{self._init()}/root{path}"

    def processes(self, unit: str) -> list[int]:
        """The processes of a unit, by their numbers outside."""
        for cgroup in self._cgroups:
            with contextlib.suppress(OSError):
                with open(f"{cgroup}/payload/system.slice/{unit}/cgroup.procs") as file:
                    return [int(line) for line in file]
        return []

    def qmp(self, role: str = "control") -> Client:
        """A client of the box's secretd from outside; `hang_up` closes it at the latest."""
        client = Client(self.path(f"/run/secretd/{role}.sock"))
        self._clients.append(client)
        return client

    def hang_up(self) -> None:
        """Close all clients."""
        while self._clients:
            self._clients.pop().close()

    def wait(self, *words: str, seconds: float = 30) -> None:
        """Wait until a command succeeds."""
        deadline = time.monotonic() + seconds
        while self.run(*words, check=False).returncode:
            assert time.monotonic() < deadline, words

    def write(self, path: str, text: str) -> None:
        """Write a file, and the directories that it is in."""
        self.run("mkdir", "-p", os.path.dirname(path))
        self.run("tee", path, input=text)

    def journal(self, unit: str, *options: str) -> list[str]:
        """What a unit has logged, a line each."""
        self.run("journalctl", "--sync")
        words = ("journalctl", "--no-pager", "--quiet", "--output=cat", f"--unit={unit}", *options)
        return self.run(*words).stdout.splitlines()

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def unit(
        self, *words: str, name: str, properties: tuple[str, ...] = (), check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command as a unit of the system manager, to its end."""
        options = [f"--property={each}" for each in properties]
        return self.run(
            "systemd-run", "--quiet", "--wait", "--pipe", "--collect", f"--unit={name}", *options,
            "--", *words, check=check,
        )  # fmt: skip

    def close(self) -> None:
        """Halt it; nothing stays behind."""
        self.hang_up()
        if self._nspawn.poll() is None:
            self._nspawn.send_signal(signal.SIGTERM)
            try:
                self._nspawn.wait(15)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        for cgroup in self._cgroups:
            with contextlib.suppress(OSError), open(f"{cgroup}/cgroup.kill", "w") as file:
                file.write("1")
        for cgroup in self._cgroups:
            deadline = time.monotonic() + 10
            while os.path.isdir(cgroup) and time.monotonic() < deadline:
                for directory, _, _ in os.walk(cgroup, topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(directory)
        self._log.close()
        os.unlink(f"{self._state}.log")
        os.rmdir(self._state)
