# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs that hand secrets over: run, push and seal."""

import errno
import fcntl
import json
import os
import resource
import signal

from secretd.client import SyncClient
from secretd.client.channel import Channel, Lost, Refused
from secretd.ctl.connection import client_of, say_waiting
from secretd.ctl.output import NOT_EXECUTABLE, NOT_FOUND, Common, done, fail
from secretd.ctl.verb import COMMAND, PATH, argument, option, verb
from secretd.errors import UsageError

_PIPE_BYTES = 64 << 10
"""The initial capacity of a pipe in bytes (pipe(7))."""

_KEYID = {"metavar": "K", "required": True, "completes": "secrets"}


@verb(
    "seal",
    argument("object_id", metavar="ID", completes="secrets"),
    option("--keyid", help="the secret to encrypt it under", **_KEYID),
)
def seal(common: Common, object_id: str, keyid: str) -> None:
    """Print a secret sealed under another, as QEMU takes it.

    A JSON object with data and iv, both in base64, for an object-add with keyid and format=base64.
    """
    with client_of(common) as client:
        sealed = client.seal(object_id, keyid)
    print(json.dumps(sealed._asdict()))


@verb(
    "push",
    argument("object_id", metavar="ID", completes="secrets"),
    option("--keyid", help="the master key that secretd and QEMU both hold", **_KEYID),
    option(
        "--qmp",
        metavar="SOCKET",
        required=True,
        help="QEMU's QMP socket",
        type=PATH,
    ),
    option("--as", "as_name", metavar="NAME", help="its id in QEMU (default: ID)"),
    option("--qemu-keyid", metavar="NAME", help="the key's id in QEMU (default: K)"),
    examples=("secretctl push disk0 --keyid master0 --qmp qemu.sock",),
)
def push(
    common: Common,
    *,
    object_id: str,
    keyid: str,
    qmp: str,
    as_name: str | None,
    qemu_keyid: str | None,
) -> int:
    """Seal a secret and add it to a running QEMU.

    Only ciphertext is on the way.
    """
    # 1. Seal it in secretd.
    with client_of(common) as client:
        sealed = client.seal(object_id, keyid)
    arguments = {
        "qom-type": "secret",
        "id": as_name or object_id,
        "keyid": qemu_keyid or keyid,
        "data": sealed.data,
        "iv": sealed.iv,
        "format": "base64",
    }
    # 2. Add the ciphertext in QEMU, which decrypts it with the key that it holds.
    try:
        qemu = Channel(qmp, common.timeout, say_waiting)
    except Refused as error:
        raise UsageError(f"{qmp}: {error}") from None
    except (Lost, TimeoutError) as error:
        raise UsageError(f"{qmp}: {error}") from None
    except OSError as error:
        return fail(f"cannot connect to {qmp}: {error.strerror}; is QEMU running?")
    try:
        reply = qemu.exchange("object-add", arguments)
    except (Lost, TimeoutError) as error:
        raise UsageError(f"QEMU did not answer: {error}; it may have the secret") from None
    finally:
        qemu.close()
    if "error" in reply:
        raise UsageError(f"QEMU says: {reply['error'].get('desc')}")
    done(common, id=as_name or object_id)
    return 0


@verb(
    "run",
    option(
        "--secret",
        multiple=True,
        metavar="ID[=NAME]",
        required=True,
        help="the secret for {NAME} in the command (default: {ID})",
        completes="secrets",
    ),
    option(
        "--via",
        type=("memfd", "pipe"),
        default="memfd",
        help="a pipe can be read only once",
    ),
    argument("command", nargs=-1, required=True, type=COMMAND),
    examples=(
        "secretctl run --secret disk0 -- qemu-img info --object secret,id=s,file={disk0} ...",
    ),
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
)
def run(common: Common, secret: tuple[str, ...], via: str, command: tuple[str, ...]) -> int:
    """Run a command that gets secrets as descriptors.

    {NAME} in its words becomes a /dev/fd/N that reads as the secret. The command replaces
    secretctl, and its exit status is the command's. sudo and ssh close descriptors before they
    start: type 'sudo secretctl run …', and not 'secretctl run … -- sudo …'.
    """
    fds: dict[str, int] = {}
    with client_of(common) as client:
        for wanted in secret:
            object_id, _, name = wanted.partition("=")
            read = as_memfd if via == "memfd" else _via_pipe
            name = name or object_id
            if all(f"{{{name}}}" not in word for word in command):
                raise UsageError(f"{{{name}}} does not occur in the command")
            fds[name] = read(client, object_id)
    words = []
    for word in command:
        for name, fd in fds.items():
            word = word.replace(f"{{{name}}}", f"/dev/fd/{fd}")  # noqa: PLW2901
        words.append(word)
    for fd in fds.values():
        os.set_inheritable(fd, True)
    # The command starts as from a shell: Python ignores these signals, and secretctl forbade core
    # files.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, common.core_limit)
    try:
        os.execvp(words[0], words)
    except OSError as error:
        fail(f"{words[0]}: {error.strerror}")
        return NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE


def as_memfd(client: SyncClient, object_id: str) -> int:
    """Return a memfd with the secret that only the command's own user may open, and that cannot be
    changed.
    """
    fd = os.memfd_create("secret", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o600)
    client.read_into(object_id, fd)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd


def _via_pipe(client: SyncClient, object_id: str) -> int:
    """Return a pipe that holds the whole secret, so that the command can replace this process."""
    source, sink = os.pipe2(os.O_CLOEXEC)
    try:
        found = client.info(object_id)
        if found is not None and found.size > _PIPE_BYTES:
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, found.size)
        client.read_into(object_id, sink)
    finally:
        os.close(sink)
    return source
