# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is released: the wheel in an empty environment on every Python here, sdist, SBOM, Debian
package.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.e2e.box import ROOT, Box, once, wheels
from tests.support.needs import need, need_program

pytestmark = pytest.mark.xdist_group("package")

LOCK = (ROOT / "requirements.lock").read_text().partition("# fleet")[0]
LOCKED = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK, re.MULTILINE))


def pythons() -> list[str]:
    """Each Python from 3.11 on, one of a version."""
    places = os.get_exec_path() + [
        str(path) for path in sorted(Path.home().glob(".pyenv/versions/*/bin"))
    ]
    found: dict[str, str] = {}
    for place in places:
        for path in sorted(Path(place).glob("python3.[0-9][0-9]")):
            code = "import sys; print('%d.%d' % sys.version_info[:2])"
            done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
            version = done.stdout.strip()
            if re.fullmatch(r"3\.\d\d", version) and int(version[2:]) >= 11:
                found.setdefault(version, str(path))
    return sorted(found.values()) or [sys.executable]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What scripts/dev/package has built twice, of a copy of this checkout."""
    with once(tmp_path_factory, "dist") as directory:
        if not directory.exists():
            copy = Path(f"{directory}.copy")
            files = subprocess.run(
                ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
                cwd=ROOT, capture_output=True, text=True, check=False,
            ).stdout.split("\n")  # fmt: skip
            need(bool(files[0]), "this is no git checkout")
            for name in filter(None, files):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
            (copy / ".venv").symlink_to(ROOT / ".venv")
            done = subprocess.run(
                [copy / "scripts/dev/package", "--check"],
                env=os.environ | {"SOURCE_DATE_EPOCH": "1790000000"},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            assert "built twice, the same bytes" in done.stderr
            (copy / "dist").rename(directory)
    return directory


@pytest.mark.parametrize("python", pythons(), ids=lambda path: Path(path).name)
def test_the_wheel_works_with_what_it_says_it_needs(
    dist: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, python: str
) -> None:
    """In an empty environment, without this checkout: daemon, tool, client, and the types of its
    users.
    """
    version = Path(python).name.removeprefix("python")
    (wheel,) = dist.glob("*.whl")
    environment = tmp_path / "env"
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    subprocess.run(
        [
            environment / "bin/python", "-m", "pip", "install", "--quiet",
            "--disable-pip-version-check", "--no-index",
            f"--find-links={wheels(tmp_path_factory, version)}", str(wheel),
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    listed = json.loads(
        subprocess.run(
            [
                environment / "bin/python", "-m", "pip", "list", "--format=json",
                "--disable-pip-version-check",
            ],
            check=True, capture_output=True,
        ).stdout
    )  # fmt: skip
    names = {entry["name"].lower().replace("_", "-").replace(".", "-") for entry in listed}
    assert names - {"pip", "setuptools"} == {"secretd", *LOCKED}
    clean = {"PATH": f"{environment}/bin:{os.defpath}", "HOME": str(tmp_path)}
    socket = str(tmp_path / "s")
    daemon = subprocess.Popen(
        [environment / "bin/secretd", "--control", socket, "--audit=none"],
        env=clean, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with daemon:
        assert daemon.stderr is not None
        while "control socket" not in daemon.stderr.readline():
            pass
        tool = [str(environment / "bin/secretctl"), "--socket", socket]
        subprocess.run([*tool, "add", "a", "--stdin"], input=b"letmein", env=clean, check=True)
        read = subprocess.run([*tool, "read", "a"], env=clean, check=True, capture_output=True)
        assert read.stdout == b"letmein"
        code = (
            "import sys; from secretd.client import SyncClient\n"
            "with SyncClient(sys.argv[1]) as c, c.read('a') as s: print(len(s.view))"
        )
        used = subprocess.run(
            [environment / "bin/python", "-I", "-c", code, socket], check=True, capture_output=True
        )
        assert used.stdout == b"7\n"
        daemon.terminate()
        assert "stopped" in daemon.stderr.read()
    assert daemon.returncode == 0
    # The types are those of the installed package (py.typed).
    (tmp_path / "uses.py").write_text((ROOT / "tests/typing/uses.py").read_text())
    checked = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file=",
            f"--python-executable={environment}/bin/python", "uses.py",
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout


def test_the_sdist_has_all_that_is_needed_to_go_on(dist: Path) -> None:
    """Docs, units, scripts and tests; nothing that was built. The wheel says what it is."""
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for wanted in (
        "docs/tutorial.md", "docs/howto/luks.md", "docs/conf.py", "systemd/system/secretd.service",
        "systemd/user/secretd.service", "systemd/sysusers.d/secretd.conf", "scripts/install",
        "tests/memory/test_memory.py", "tests/vectors", "requirements.lock", "SECURITY.md",
        "LICENSE",
        ".ci/run",
    ):  # fmt: skip
        assert any(n == wanted or n.startswith(f"{wanted}/") for n in names), wanted
    assert not [n for n in names if re.search(r"__pycache__|_build|node_modules|\.venv", n)]


def test_the_sbom_lists_what_the_lock_file_has(dist: Path) -> None:
    """Each package that is needed to run, with its version and hashes."""
    bom = json.loads((dist / "secretd.cdx.json").read_text())
    assert bom["bomFormat"] == "CycloneDX"
    assert {c["name"]: c["version"] for c in bom["components"]} == LOCKED
    assert all(c["hashes"] for c in bom["components"])
    assert bom["metadata"]["component"]["name"] == "secretd"


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package, built twice."""
    need_program("dpkg-deb", "gcc")
    packages: list[Path] = []
    for _ in range(2):
        directory = tmp_path_factory.mktemp("deb")
        done = subprocess.run(
            [ROOT / "scripts/dev/package-deb", str(directory)],
            env=os.environ | {"SOURCE_DATE_EPOCH": "1790000000"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        packages += directory.glob("*.deb")
    # What is in it first, so that a difference is seen by its name.
    assert contents(packages[0]) == contents(packages[1])
    assert len({hashlib.sha256(package.read_bytes()).digest() for package in packages}) == 1
    return packages[0]


def contents(package: Path) -> tuple[str, ...]:
    """The control file, the digest of each file, and what tar says of each."""
    return tuple(
        subprocess.run(["dpkg-deb", *options], check=True, capture_output=True, text=True).stdout
        for options in (
            ["--field", str(package)],
            ["--info", str(package), "md5sums"],
            ["--contents", str(package)],
        )
    )


@pytest.mark.timeout(400)  # two builds, one upgrade: 90 s where nothing else runs
def test_the_debian_package_is_installed_upgraded_and_purged(deb: Path) -> None:
    """Its units are enabled and its user is made; an upgrade keeps the secrets, a purge leaves
    nothing.
    """
    box = Box(f"secretd-deb-{os.getpid()}")
    try:
        # Images for containers forbid packages to start anything.
        box.run("rm", "-f", "/usr/sbin/policy-rc.d")
        before = files(box)
        shutil.copy(deb, box.path("/srv/secretd.deb"))
        box.run("dpkg", "--install", "/srv/secretd.deb")
        for unit in ("control", "client", "credentials"):
            shown = box.run("systemctl", "is-enabled", f"secretd-{unit}.socket").stdout
            assert shown == "enabled\n"
            assert box.run("systemctl", "is-active", f"secretd-{unit}.socket").stdout == "active\n"
        assert box.run("id", "-u", "secretd").returncode == 0
        box.run("secretctl", "add", "a", "--stdin", input="letmein")
        assert box.run("secretctl", "read", "a").stdout == "letmein"
        box.run("test", "-s", "/usr/share/man/man8/secretd.8.gz")
        script = "/usr/share/bash-completion/completions/secretctl"
        typed = f"source {script} && complete -p secretctl"
        assert "secretctl" in box.run("bash", "-c", typed).stdout
        # The same version again is what an upgrade is.
        box.run("dpkg", "--install", "/srv/secretd.deb")
        assert box.run("secretctl", "read", "a").stdout == "letmein"
        box.run("dpkg", "--remove", "secretd")
        assert box.run("systemctl", "is-active", "secretd.service", check=False).returncode
        box.run("dpkg", "--purge", "secretd")
        box.run("rm", "/srv/secretd.deb")
        assert box.run("id", "-u", "secretd", check=False).returncode
        assert files(box) - before == set()
    finally:
        box.close()


def files(box: Box) -> set[str]:
    """All files that a package may leave."""
    return set(
        box.run(
            "find",
            "/etc",
            "/usr",
            "/var/lib/systemd",
            "/var/log",
            "-name",
            "*secretd*",
            "-o",
            "-name",
            "*secretctl*",
        ).stdout.split("\n")
    )
