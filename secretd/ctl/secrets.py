# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `secretctl`: secretd from a shell.

Opens files and passes their descriptors, so that plaintext goes past this process where it can.
What it must hold for a moment (a prompt, a pipe it looks into) lies in locked memory.

The command line, errors and what is printed are in ctl_frame, with what the exit statuses mean;
other verbs in ctl_access, ctl_bulk and ctl_doctor.
"""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import stat
import sys

import click

from secretd.client import Encoding, Format, SecretInfo, SyncClient, default_socket
from secretd.client.channel import Channel, Lost, Refused
from secretd.ctl import access, bulk, doctor
from secretd.ctl.prompt import ask_twice
from secretd.ctl.verb import (
    NOT_EXECUTABLE,
    NOT_FOUND,
    Options,
    argument,
    client_of,
    complete_ids,
    count,
    done,
    duration,
    fail,
    flag,
    main,
    option,
    say_waiting,
    table,
    verb,
    warn,
)
from secretd.errors import UsageError

_STDIN_BYTES = 2 << 20
_PIPE_BYTES = 64 << 10
"""What a pipe holds at first (pipe(7))."""

_ENCODINGS = click.Choice(("raw", "base64"))

# --- add


@verb(
    "add",
    argument("id"),
    option("--file", metavar="PATH", help="read it from a file or <(command)"),
    option("--fd", metavar="N", type=int, help="read it from an inherited descriptor"),
    flag("--stdin", help="read it from standard input"),
    flag("--prompt", help="ask for it on the terminal"),
    option("--format", type=_ENCODINGS, default="raw", help="how it is encoded"),
    option(
        "--keyid",
        metavar="K",
        help="the secret it is encrypted under (AES-256-CBC)",
        shell_complete=complete_ids,
    ),
    option("--iv", metavar="B64", help="its initialisation vector in base64"),
    examples=(
        "secretctl add disk0 --prompt",
        "openssl rand -hex 32 | tr -d '\\n' | secretctl add disk0 --stdin",
        "secretctl add ceph --file /etc/ceph/client.key --format base64",
    ),
)
def add(options: Options) -> None:
    """Add a secret.

    It is asked for on the terminal if no source is given. Its content comes from a file, a
    descriptor, standard input or a prompt, raw or in base64, in clear or encrypted under another
    secret. It never stands in an argument, where everybody could read it.
    """
    given = (options.file is not None, options.fd is not None, options.stdin, options.prompt)
    if sum(given) > 1:
        raise click.UsageError("--file, --fd, --stdin and --prompt exclude each other")
    if options.iv is not None and options.keyid is None:
        raise UsageError("--iv goes with --keyid, the secret that it is encrypted under")
    with client_of(options) as client:
        encoding = Encoding(options.format, options.keyid, options.iv)
        if options.file is not None:
            fd = os.open(options.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _add_fd(client, options, fd, encoding)
            finally:
                os.close(fd)
        elif options.prompt or (options.fd is None and not options.stdin and os.isatty(0)):
            with ask_twice(client, f"Secret {options.id}: ") as typed:
                client.add_bytes(options.id, typed.view, encoding)
        else:
            _add_fd(client, options, 0 if options.fd is None else options.fd, encoding)
        added = client.info(options.id)
    size = None if added is None else added.size
    if options.json:
        done(options, id=options.id, size=size)
    else:
        print(f"added {options.id}" + ("" if size is None else f", {count(size, 'byte')}"))


def _add_fd(client: SyncClient, options: Options, fd: int, encoding: Encoding) -> None:
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise UsageError(f"descriptor {fd}: {error.strerror}") from None
    if stat.S_ISREG(status.st_mode):
        last = os.pread(fd, 1, max(0, status.st_size - 1))
        _check_end(last[0] if last else None, options.format)
        client.add(options.id, fd, encoding)
        return
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{options.file or f'descriptor {fd}'}: {os.strerror(errno.EISDIR)}")
    # A pipe can be read only once: look at its end here, in locked memory.
    with client.buffer(_STDIN_BYTES + 1) as buffer:
        fill = 0
        while got := _read(fd, buffer.view[fill:]):
            fill += got
            if fill > _STDIN_BYTES:
                raise UsageError(
                    f"more than {_STDIN_BYTES:,} bytes were given, and a secret may have 1,048,576"
                )
        _check_end(buffer.view[fill - 1] if fill else None, options.format)
        client.add_bytes(options.id, buffer.view[:fill], encoding)


def _read(fd: int, view: memoryview) -> int:
    try:
        return os.readv(fd, [view])
    except OSError as error:
        name = "standard input" if fd == 0 else f"descriptor {fd}"
        raise UsageError(f"{name}: {error.strerror}") from None


def _check_end(last: int | None, format: Format) -> None:  # noqa: A002
    """Warn of what is probably not meant; ``last`` is the last byte, None if there is none."""
    if last is None:
        warn("the secret is empty")
    elif last == 0x0A and format == "raw":
        warn("the secret ends in a newline, which is kept; 'printf %s' writes none")


# --- read, list, status, del, seal, generate


@verb(
    "read",
    argument("id", shell_complete=complete_ids),
    option("--format", type=_ENCODINGS, default="raw", help="how to write it"),
    flag("--force", help="even if that is a terminal"),
    examples=("secretctl read disk0 | cryptsetup open --key-file=- /dev/vdb data",),
)
def read(options: Options) -> None:
    """Write a secret to standard output.

    With --json it is a line of JSON that holds it in base64.
    """
    if os.isatty(1) and not options.force:
        raise UsageError(
            "stdout is a terminal; send the secret to a pipe or a file, or use --force"
        )
    with client_of(options) as client:
        form: Format = "base64" if options.json else options.format
        with client.read(options.id, format=form) as secret:
            if options.json:
                os.write(
                    1, f'{{"id": {json.dumps(options.id)}, "format": "base64", "data": "'.encode()
                )
            rest = secret.view
            while rest:
                rest = rest[os.write(1, rest) :]
            if options.json:
                os.write(1, b'"}\n')


@verb("list", examples=("secretctl list --json | jq -r '.[].id'",))
def list_secrets(options: Options) -> None:
    """List the secrets.

    Their ids, types, sizes, how well their memory is protected, and the time they have left; on the
    client socket those that the caller may read.
    """
    with client_of(options) as client:
        secrets = client.list()
    if options.json:
        print(json.dumps([_info(s) for s in secrets]))
    else:
        limited = any(s.expires_in is not None for s in secrets)
        head = ("ID", "TYPE", "BYTES", "MEMORY", "EXPIRES IN")[: 5 if limited else 4]
        rows = ((s.id, s.qom_type, str(s.size), s.memory, duration(s.expires_in)) for s in secrets)
        table(head, (row[: len(head)] for row in rows), right=(2,))


def _info(secret: SecretInfo) -> dict[str, object]:
    """The words of query-secrets."""
    return {
        name.replace("_", "-"): value
        for name, value in secret._asdict().items()
        if value is not None
    }


@verb("status")
def status(options: Options) -> None:
    """Tell who answers and how secrets are protected."""
    with client_of(options) as client:
        secrets = client.list()
        facts = {
            "daemon": client.version(),
            "socket": client.path,
            "secrets": len(secrets),
            "bytes": sum(s.size for s in secrets),
            "memory": ", ".join(sorted({s.memory for s in secrets})) or "-",
        }
    if options.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name:<8} {value}" for name, value in facts.items()))


@verb("del", argument("id", shell_complete=complete_ids))
def delete(options: Options) -> None:
    """Remove a secret or another object; a secret is wiped."""
    with client_of(options) as client:
        client.delete(options.id)
    done(options, id=options.id)


_KEYID = {"metavar": "K", "required": True, "shell_complete": complete_ids}


@verb(
    "seal",
    argument("id", shell_complete=complete_ids),
    option("--keyid", help="the secret to encrypt it under", **_KEYID),
)
def seal(options: Options) -> None:
    """Print a secret sealed under another, as QEMU takes it.

    A JSON object with data and iv, both in base64, for an object-add with keyid and format=base64.
    """
    with client_of(options) as client:
        sealed = client.seal(options.id, options.keyid)
    print(json.dumps(sealed._asdict()))


@verb(
    "generate",
    argument("id"),
    option("--bytes", type=int, default=32, show_default=True, metavar="N", help="its size"),
)
def generate(options: Options) -> None:
    """Add a secret of random bytes nobody has seen.

    For keys: a LUKS passphrase must be UTF-8 text, which random bytes are not.
    """
    with client_of(options) as client:
        client.generate(options.id, options.bytes)
    done(options, id=options.id, size=options.bytes)


@verb(
    "push",
    argument("id", shell_complete=complete_ids),
    option("--keyid", help="the master key that both hold", **_KEYID),
    option(
        "--qmp",
        metavar="SOCKET",
        required=True,
        help="QEMU's QMP socket",
        type=click.Path(readable=False),
    ),
    option("--as", "as_name", metavar="NAME", help="its id in QEMU (default: ID)"),
    option("--qemu-keyid", metavar="NAME", help="the key's id in QEMU (default: K)"),
    examples=("secretctl push disk0 --keyid master0 --qmp qemu.sock",),
)
def push(options: Options) -> int:
    """Seal a secret and add it to a running QEMU.

    Nobody between sees it in clear.
    """
    with client_of(options) as client:
        sealed = client.seal(options.id, options.keyid)
    arguments = {
        "qom-type": "secret",
        "id": options.as_name or options.id,
        "keyid": options.qemu_keyid or options.keyid,
        "data": sealed.data,
        "iv": sealed.iv,
        "format": "base64",
    }
    options.connecting = options.qmp
    try:
        qemu = Channel(options.qmp, options.timeout, say_waiting)
    except Refused as error:
        raise UsageError(f"{options.qmp}: {error}") from None
    except TimeoutError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        return fail(f"cannot connect to {options.qmp}: {error.strerror}; is QEMU running?")
    try:
        reply = qemu.exchange("object-add", arguments)
    except (Lost, TimeoutError) as error:
        raise UsageError(f"QEMU did not answer: {error}; it may have the secret") from None
    finally:
        qemu.close()
    if "error" in reply:
        raise UsageError(f"QEMU says: {reply['error'].get('desc')}")
    done(options, id=options.as_name or options.id)
    return 0


# --- run, shell


@verb(
    "run",
    option(
        "--secret",
        multiple=True,
        metavar="ID[=NAME]",
        required=True,
        help="for {NAME}, or {ID}",
        shell_complete=complete_ids,
    ),
    option(
        "--via",
        type=click.Choice(("memfd", "pipe")),
        default="memfd",
        help="a pipe can be read only once",
    ),
    argument("command", nargs=-1, required=True, type=click.UNPROCESSED),
    examples=(
        "secretctl run --secret disk0 -- qemu-img info --object secret,id=s,file={disk0} ...",
    ),
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
)
def run(options: Options) -> int:
    """Run a command that gets secrets as descriptors.

    {NAME} in its words becomes a /dev/fd/N that reads as the secret. The command takes the place of
    secretctl, and its exit status is the command's.
    """
    fds: dict[str, int] = {}
    with client_of(options) as client:
        for wanted in options.secret:
            object_id, _, name = wanted.partition("=")
            via = _via_memfd if options.via == "memfd" else _via_pipe
            name = name or object_id
            if all(f"{{{name}}}" not in word for word in options.command):
                raise UsageError(f"{{{name}}} does not stand in the command")
            fds[name] = via(client, object_id)
    command = []
    for word in options.command:
        for name, fd in fds.items():
            word = word.replace(f"{{{name}}}", f"/dev/fd/{fd}")  # noqa: PLW2901
        command.append(word)
    for fd in fds.values():
        os.set_inheritable(fd, True)
    # The command starts as from a shell: Python ignores these signals, we forbade core files.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, options.core_limit)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        fail(f"{command[0]}: {error.strerror}")
        return NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE


def _via_memfd(client: SyncClient, object_id: str) -> int:
    """Others than the command's own user may not open it; the command may not change it."""
    fd = os.memfd_create("secret", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o600)
    client.read_into(object_id, fd)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return fd


def _via_pipe(client: SyncClient, object_id: str) -> int:
    """The whole secret waits in the pipe, so that the command can simply replace this process."""
    source, sink = os.pipe2(os.O_CLOEXEC)
    try:
        found = client.info(object_id)
        if found is not None and found.size > _PIPE_BYTES:
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, found.size)
        client.read_into(object_id, sink)
    finally:
        os.close(sink)
    return source


@verb(
    "shell",
    argument("arguments", nargs=-1, type=click.UNPROCESSED),
    context_settings={"ignore_unknown_options": True},
)
def shell(options: Options) -> int:
    """Become qmp-shell on secretd's socket.

    ARGUMENTS are its options, such as -H. It keeps what is typed in ~/.qmp-shell_history: type no
    secrets there.
    """
    # Of an environment, of what scripts/install has made, or of the system.
    places = (sys.executable, os.path.join(os.path.dirname(__file__), "..", "bin", "here"))
    beside = [os.path.join(os.path.dirname(place), "qmp-shell") for place in places]
    program = next((p for p in beside if os.access(p, os.X_OK)), shutil.which("qmp-shell"))
    if program is None:
        return fail("qmp-shell was not found; it comes with the Python package qemu.qmp")
    return os.execv(program, [program, *options.arguments, options.socket or default_socket()])


__all__ = ["access", "bulk", "doctor", "main"]

if __name__ == "__main__":
    sys.exit(main())
