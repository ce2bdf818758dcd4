# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb libvirt: it feeds libvirt's secrets, by virsh, without holding a value itself.

secretd writes the value into a pipe that virsh reads.
"""

import os
import re
import subprocess
from typing import Final

from secretd import client as api
from secretd.ctl.connection import client_of
from secretd.ctl.output import Common, confirm, done, fail
from secretd.ctl.verb import argument, option, verb
from secretd.errors import UsageError

_VALUE_BYTES: Final = 768
"""Bytes of a value: virsh reads 1,024 of its base64."""

_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


@verb(
    "libvirt", argument("action", type=("set",)),
    argument("secret", metavar="UUID|USAGE"),
    argument("object_id", metavar="ID", completes="secrets"),
    option("--connect", "-c", metavar="URI", help="libvirt's URI (default: virsh's own)"),
    examples=(
        "secretctl libvirt set 'ceph client.admin' ceph.admin",
        "secretctl libvirt set 2ec115d7-3a88-3ceb-bc12-0ac909a6fd87 disk0 -c qemu:///system",
    ),
)  # fmt: skip
def libvirt(
    common: Common,
    *,
    action: str,  # noqa: ARG001 - there is only one
    secret: str,
    object_id: str,
    connect: str | None,
) -> int:
    """Set the value of a secret of libvirt.

    'virsh secret-define' defines it; UUID or USAGE, such as 'ceph client.admin', names it. The
    value goes through a pipe from secretd to virsh, and never through an argument or a file.
    """
    virsh = ["virsh", "--quiet", *(["--connect", connect] if connect is not None else [])]
    try:
        uuid = secret if _UUID.fullmatch(secret) else _by_usage(virsh, secret)
        return _set(common, virsh, uuid, object_id)
    except FileNotFoundError:
        return fail("virsh was not found; on Debian: apt install libvirt-clients")


def _by_usage(virsh: list[str], usage: str) -> str:
    """Return the UUID of the secret with a usage, with or without its type."""
    listed = subprocess.run(
        [*virsh, "secret-list"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if listed.returncode:
        raise UsageError(f"virsh says: {_words(listed.stderr)}")
    found = []
    for line in listed.stdout.splitlines():
        uuid, _, use = line.strip().partition(" ")
        if _UUID.fullmatch(uuid) and usage in (use.strip(), use.strip().partition(" ")[2]):
            found.append(uuid)
    if len(found) != 1:
        many = "several secrets have" if found else "no secret has"
        raise UsageError(f"libvirt: {many} the usage '{usage}'; 'virsh secret-list' shows them")
    return found[0]


def _set(common: Common, virsh: list[str], uuid: str, object_id: str) -> int:
    with client_of(common) as client:
        info = client.info(object_id)
        if info is not None and info.size > _VALUE_BYTES:
            raise UsageError(
                f"'{object_id}' has {info.size:,} bytes, and virsh takes {_VALUE_BYTES}"
            )
        source, sink = os.pipe2(os.O_CLOEXEC)
        try:
            process = subprocess.Popen(
                [*virsh, "secret-set-value", "--secret", uuid, "--file", "/dev/stdin"],
                stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
        except BaseException:
            os.close(sink)
            raise
        finally:
            os.close(source)
        refused: Exception | None = None
        try:
            client.read_into(object_id, sink, format="base64")
        except api.QMPError as error:
            refused = error
            # Without a value virsh must not set one, not even an empty one.
            process.kill()
        finally:
            os.close(sink)
        _, errors = process.communicate()
    if refused is not None and not (process.returncode > 0 and errors.strip()):
        raise refused
    if process.returncode:
        return fail(f"virsh says: {_words(errors)}")
    confirm(common, f"libvirt has the value of {object_id}")
    done(common, id=object_id, uuid=uuid)
    return 0


def _words(text: str) -> str:
    """Return an error of virsh in one line."""
    return " ".join(line.removeprefix("error: ") for line in text.strip().splitlines())
