# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretctl libvirt, with a real libvirtd."""

import base64
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import SECRETCTL, Process
from tests.support.needs import need_program, need_root
from tests.support.qmp import Client

pytestmark = pytest.mark.xdist_group("libvirt")

XML = """
<secret ephemeral='yes' private='no'>
  <usage type='{kind}'><{tag}>{name}</{tag}></usage>
</secret>
"""


@pytest.fixture
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a libvirtd of the test's own."""
    need_root()
    need_program("libvirtd", "virsh")
    directory = tmp_path_factory.mktemp("libvirt")
    (directory / "libvirtd.conf").write_text(
        f'unix_sock_dir = "{directory}"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n'
    )
    # Its state is in memory of its own: nothing stays on this machine, and another one may run.
    private = "".join(
        f"mkdir -p {each} && mount -t tmpfs tmpfs {each} && "
        for each in ("/run", "/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt")
    )
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c",
         f"{private} exec libvirtd -f {directory}/libvirtd.conf -p {directory}/pid"],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    found = f"qemu:///system?socket={directory}/libvirt-sock"
    version = ["virsh", "-c", found, "version"]
    try:
        while subprocess.run(version, capture_output=True, check=False).returncode:
            assert process.poll() is None
            time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.wait()


def virsh(uri: str, *words: str) -> str:
    """What virsh prints."""
    return subprocess.run(
        ["virsh", "-q", "-c", uri, *words], capture_output=True, text=True, check=True
    ).stdout.strip()


def define(uri: str, tmp_path: Path, kind: str, tag: str, name: str) -> str:
    """Define a secret; return its UUID."""
    (tmp_path / "secret.xml").write_text(XML.format(kind=kind, tag=tag, name=name))
    command = ["virsh", "-c", uri, "secret-define", str(tmp_path / "secret.xml")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1]


def test_a_secret_of_libvirt_is_set_by_uuid_and_usage(
    uri: str, secretd: Process, tmp_path: Path
) -> None:
    """Any bytes; what is wrong is told in the words of virsh or secretd, and sets nothing."""
    value = bytes(range(256)) * 3
    qmp = Client(secretd.control)
    qmp.ok("object-add", {"qom-type": "secret", "id": "ceph", "format": "base64",
                          "data": base64.b64encode(value).decode()})  # fmt: skip
    qmp.add("other", data="letmein")
    qmp.add("large", data="x" * 769)
    qmp.close()
    uuid = define(uri, tmp_path, "ceph", "name", "client.admin secret")
    volume = define(uri, tmp_path, "volume", "volume", "/var/lib/disk0.luks")

    def run(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            [SECRETCTL, "--socket", secretd.control, "libvirt", "set", *words, "-c", uri],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, done
        return done.stdout + done.stderr

    assert run(uuid, "ceph") == ""
    assert base64.b64decode(virsh(uri, "secret-get-value", uuid)) == value
    for usage in ("client.admin secret", "ceph client.admin secret"):
        assert json.loads(run(usage, "other", "--json")) == {"id": "other", "uuid": uuid}
        assert base64.b64decode(virsh(uri, "secret-get-value", uuid)) == b"letmein"
    assert "'large' has 769 bytes, and virsh takes 768" in run(volume, "large", status=1)
    assert "no secret has the usage 'nope'" in run("nope", "other", status=1)
    assert "No secret with id 'missing'" in run(volume, "missing", status=1)
    assert "virsh says: failed to get secret" in run(
        "00000000-0000-0000-0000-000000000000", "other", status=1
    )
    command = ["virsh", "-c", uri, "secret-get-value", volume]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "does not have a value" in done.stderr


def test_a_missing_virsh_or_libvirtd_is_told(secretd: Process) -> None:
    """With what to install."""
    need_program("virsh")
    words = [SECRETCTL, "--socket", secretd.control, "libvirt", "set", "x", "s"]
    done = subprocess.run(
        [*words, "-c", "qemu:///system?socket=/nowhere"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "virsh says: failed to connect to the hypervisor" in done.stderr
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={"PATH": "/nowhere"}
    )
    assert "virsh was not found; on Debian: apt install libvirt-clients" in done.stderr
