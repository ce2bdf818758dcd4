# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `secretctl`: secretd from a shell.

Opens files and passes their descriptors, so that plaintext goes past this process where it can. What
it must hold for a moment (a prompt, a pipe it looks into) lies in locked memory.

Exit status: 0 done; 1 secretd or the system refused, the reason is on stderr (or `explain` said no, or
`audit verify` found something); 2 wrong usage; for `run` the status of the command that was run (126 or
127 if it could not be started).
"""

import argparse
import asyncio
import errno
import json
import os
import resource
import shutil
import signal
import stat
import sys
import termios
from collections.abc import Awaitable, Callable

from qemu.qmp import QMPClient, QMPError

from secretd import __version__, ctl_access
from secretd.client import (
    Client,
    ConnectError,
    Encoding,
    ExecuteError,
    Format,
    SecretInfo,
    default_socket,
    readable,
)
from secretd.ctl_access import client_of
from secretd.errors import SecretdError, UsageError
from secretd.memory import LockedBuffer, forbid_dumps
from secretd.options import QuietParser

_STDIN_BYTES = 2 << 20
_PROMPT_BYTES = 4096
_PIPE_BYTES = 64 << 10
"""What a pipe holds at first (pipe(7))."""


def main() -> int:
    """Run `secretctl`; return the exit status."""
    options = _parser().parse_args()
    options.core_limit = resource.getrlimit(resource.RLIMIT_CORE)
    forbid_dumps()
    try:
        verb: Callable[[argparse.Namespace], Awaitable[int | None]] | None = options.verb
        if verb is None:
            return shell(options)
        return asyncio.run(_with_errors(verb, options)) or 0
    except KeyboardInterrupt:
        return 130
    except SecretdError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


async def _with_errors(
    verb: Callable[[argparse.Namespace], Awaitable[int | None]], options: argparse.Namespace
) -> int | None:
    try:
        return await verb(options)
    except ConnectError as error:
        return _cannot_connect(error, options)
    except ExecuteError as error:
        return _fail(str(error))
    except QMPError as error:
        return _fail(f"the connection was lost: {error}")


def _cannot_connect(error: ConnectError, options: argparse.Namespace) -> int:
    qemu: str | None = getattr(options, "connecting", None)
    cause = error.exc
    reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else cause
    absent = isinstance(cause, (FileNotFoundError, ConnectionRefusedError))
    path = qemu or options.socket or default_socket()
    _fail(f"cannot connect to {path}: {reason}{'; is it running?' if absent else ''}")
    if absent and qemu is None:
        _fail("start it with 'secretd', or name its socket with --socket")
    return 1


def _fail(message: str) -> int:
    print(f"secretctl: {message}", file=sys.stderr)
    return 1


def _warn(message: str) -> None:
    print(f"secretctl: warning: {message}", file=sys.stderr)


# --- add


async def add(options: argparse.Namespace) -> None:
    """Add a secret from a file, a descriptor, stdin or a prompt."""
    if options.iv is not None and options.keyid is None:
        raise UsageError("--iv goes with --keyid, the secret that it is encrypted under")
    async with client_of(options) as client:
        encoding = Encoding(options.format, options.keyid, options.iv)
        if options.file is not None:
            fd = os.open(options.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                await _add_fd(client, options, fd, encoding)
            finally:
                os.close(fd)
        elif options.prompt or (options.fd is None and not options.stdin and sys.stdin.isatty()):
            with await _prompt(client, f"Secret {options.id}: ") as typed:
                end = _find_newline(typed.view)
                if not end:
                    raise UsageError("nothing was typed")
                await client.add_bytes(options.id, typed.view[:end], encoding)
        else:
            await _add_fd(client, options, 0 if options.fd is None else options.fd, encoding)


async def _add_fd(client: Client, options: argparse.Namespace, fd: int, encoding: Encoding) -> None:
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise UsageError(f"descriptor {fd}: {error.strerror}") from None
    if stat.S_ISREG(status.st_mode):
        last = os.pread(fd, 1, max(0, status.st_size - 1))
        _check_end(last[0] if last else None, options.format)
        await client.add(options.id, fd, encoding)
        return
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{options.file or f'descriptor {fd}'}: {os.strerror(errno.EISDIR)}")
    # A pipe can be read only once: look at its end here, in locked memory.
    with client.buffer(_STDIN_BYTES + 1) as buffer:
        fill = 0
        while True:
            await readable(fd)
            count = os.readv(fd, [buffer.view[fill:]])
            if not count:
                break
            fill += count
            if fill > _STDIN_BYTES:
                raise UsageError(f"more than {_STDIN_BYTES} bytes were given")
        _check_end(buffer.view[fill - 1] if fill else None, options.format)
        await client.add_bytes(options.id, buffer.view[:fill], encoding)


def _check_end(last: int | None, format: Format) -> None:  # noqa: A002
    """Warn of what is probably not meant; ``last`` is the last byte, None if there is none."""
    if last is None:
        _warn("the secret is empty")
    elif last == 0x0A and format == "raw":
        _warn("the secret ends in a newline, which is kept; 'printf %s' writes none")


async def _prompt(client: Client, text: str) -> LockedBuffer:
    """Read a line from the terminal without echo."""
    fd = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        before = termios.tcgetattr(fd)
        silent = termios.tcgetattr(fd)
        silent[3] &= ~termios.ECHO
        buffer = client.buffer(_PROMPT_BYTES)
        # First, since it drops what was typed so far, even an interrupt on its way.
        termios.tcsetattr(fd, termios.TCSAFLUSH, silent)
        try:
            os.write(fd, text.encode())
            await readable(fd)
            os.readv(fd, [buffer.view])
        finally:
            termios.tcsetattr(fd, termios.TCSAFLUSH, before)
            os.write(fd, b"\n")
        return buffer
    finally:
        os.close(fd)


def _find_newline(view: memoryview) -> int:
    return next((i for i, byte in enumerate(view) if byte in (0x0A, 0)), len(view))


# --- read, list, status, del, seal, generate


async def read(options: argparse.Namespace) -> None:
    """Write a secret to stdout."""
    if os.isatty(1) and not options.force:
        raise UsageError(
            "stdout is a terminal; send the secret to a pipe or a file, or use --force"
        )
    async with client_of(options) as client:
        with await client.read(options.id, format=options.format) as secret:
            rest = secret.view
            while rest:
                rest = rest[os.write(1, rest) :]


async def list_secrets(options: argparse.Namespace) -> None:
    """List the secrets."""
    async with client_of(options) as client:
        secrets = await client.list()
    if options.json:
        print(json.dumps([_info(s) for s in secrets]))
    else:
        print(_table(secrets))


def _info(secret: SecretInfo) -> dict[str, object]:
    """The words of query-secrets."""
    return {
        name.replace("_", "-"): value
        for name, value in secret._asdict().items()
        if value is not None
    }


def _table(secrets: list[SecretInfo]) -> str:
    rows = [("ID", "TYPE", "BYTES", "MEMORY", "EXPIRES IN")]
    rows += [(s.id, s.qom_type, str(s.size), s.memory, _duration(s.expires_in)) for s in secrets]
    if not any(s.expires_in is not None for s in secrets):
        rows = [(*row[:4], "") for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{i:<{widths[0]}}  {t:<{widths[1]}}  {n:>{widths[2]}}  {m:<{widths[3]}}  {e}".rstrip()
        for i, t, n, m, e in rows
    )


def _duration(seconds: int | None) -> str:
    """Two of days, hours, minutes and seconds: 2d 3h."""
    if seconds is None:
        return "-"
    parts = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "0s"


async def status(options: argparse.Namespace) -> None:
    """Tell who answers, how many secrets it holds and how they are protected."""
    async with client_of(options) as client:
        secrets = await client.list()
        facts = {
            "daemon": await client.version(),
            "socket": client.path,
            "secrets": len(secrets),
            "bytes": sum(s.size for s in secrets),
            "memory": ", ".join(sorted({s.memory for s in secrets})) or "-",
        }
    if options.json:
        print(json.dumps(facts))
    else:
        print("\n".join(f"{name:<8} {value}" for name, value in facts.items()))


async def delete(options: argparse.Namespace) -> None:
    """Remove a secret."""
    async with client_of(options) as client:
        await client.delete(options.id)


async def seal(options: argparse.Namespace) -> None:
    """Print a secret encrypted under another."""
    async with client_of(options) as client:
        sealed = await client.seal(options.id, options.keyid)
    print(json.dumps(sealed._asdict()))


async def generate(options: argparse.Namespace) -> None:
    """Add a secret of random bytes."""
    async with client_of(options) as client:
        await client.generate(options.id, options.bytes)


async def push(options: argparse.Namespace) -> None:
    """Seal a secret and add it to a running QEMU."""
    async with client_of(options) as client:
        sealed = await client.seal(options.id, options.keyid)
    options.connecting = options.qmp
    qemu = QMPClient("qemu")
    await qemu.connect(options.qmp)
    try:
        await qemu.execute(
            "object-add",
            {
                "qom-type": "secret",
                "id": options.as_name or options.id,
                "keyid": options.qemu_keyid or options.keyid,
                "data": sealed.data,
                "iv": sealed.iv,
                "format": "base64",
            },
        )
    except ExecuteError as error:
        raise UsageError(f"QEMU says: {error}") from None
    finally:
        await qemu.disconnect()


# --- run, shell


async def run(options: argparse.Namespace) -> int:
    """Run a command with {NAME} replaced by a /dev/fd/N that reads as the secret."""
    fds: dict[str, int] = {}
    async with client_of(options) as client:
        for wanted in options.secret:
            object_id, _, name = wanted.partition("=")
            via = _via_memfd if options.via == "memfd" else _via_pipe
            name = name or object_id
            if all(f"{{{name}}}" not in word for word in options.command):
                raise UsageError(f"{{{name}}} does not stand in the command")
            fds[name] = await via(client, object_id)
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
        _fail(f"{command[0]}: {error.strerror}")
        return 127 if error.errno == errno.ENOENT else 126


async def _via_memfd(client: Client, object_id: str) -> int:
    fd = os.memfd_create("secret", os.MFD_CLOEXEC)
    await client.read_into(object_id, fd)
    return fd


async def _via_pipe(client: Client, object_id: str) -> int:
    """The whole secret waits in the pipe, so that the command can simply replace this process."""
    import fcntl

    source, sink = os.pipe2(os.O_CLOEXEC)
    try:
        size = next((s.size for s in await client.list() if s.id == object_id), 0)
        if size > _PIPE_BYTES:
            fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, size)
        await client.read_into(object_id, sink)
    finally:
        os.close(sink)
    return source


def shell(options: argparse.Namespace) -> int:
    """Become qmp-shell on the socket."""
    # Of an environment, of what scripts/install has made, or of the system.
    places = (sys.executable, os.path.join(os.path.dirname(__file__), "..", "bin", "here"))
    beside = [os.path.join(os.path.dirname(place), "qmp-shell") for place in places]
    program = next((p for p in beside if os.access(p, os.X_OK)), shutil.which("qmp-shell"))
    if program is None:
        return _fail("qmp-shell was not found; it comes with the Python package qemu.qmp")
    return os.execv(program, [program, *options.arguments, options.socket or default_socket()])


# --- the command line


def _parser() -> QuietParser:
    parser = QuietParser(
        prog="secretctl",
        description="Add secrets to a running secretd, and hand them on without showing them.",
        epilog="'secretctl VERB --help' tells more of each.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="secretd's socket (default: $SECRETD_SOCKET, else the control or client socket)",
    )
    parser.add_argument("--version", action="version", version=f"secretctl {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(
        name: str, function: Callable[..., Awaitable[int | None]] | None, text: str
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(verb=function)
        sub.add_argument(
            "--socket", metavar="PATH", default=argparse.SUPPRESS, help="as before the verb"
        )
        return sub

    sub = verb("add", add, "add a secret; asks for it on the terminal if no source is given")
    sub.add_argument("id", metavar="ID")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--file", metavar="PATH", help="read it from a file or <(command)")
    source.add_argument("--fd", metavar="N", type=int, help="read it from an inherited descriptor")
    source.add_argument("--stdin", action="store_true", help="read it from standard input")
    source.add_argument("--prompt", action="store_true", help="ask for it on the terminal")
    sub.add_argument("--format", choices=("raw", "base64"), default="raw", help="how it is encoded")
    sub.add_argument("--keyid", metavar="K", help="the secret it is encrypted under (AES-256-CBC)")
    sub.add_argument("--iv", metavar="B64", help="its initialisation vector in base64")

    sub = verb("read", read, "write a secret to standard output")
    sub.add_argument("id", metavar="ID")
    sub.add_argument("--format", choices=("raw", "base64"), default="raw", help="how to write it")
    sub.add_argument("--force", action="store_true", help="even if that is a terminal")

    for name, function, text in (
        ("list", list_secrets, "list the secrets"),
        ("status", status, "tell who answers and how secrets are protected"),
    ):
        sub = verb(name, function, text)
        sub.add_argument("--json", action="store_true", help="for programs")

    sub = verb("del", delete, "remove a secret")
    sub.add_argument("id", metavar="ID")

    sub = verb("seal", seal, "print a secret encrypted under another, as QEMU takes it")
    sub.add_argument("id", metavar="ID")
    sub.add_argument("--keyid", metavar="K", required=True, help="the secret to encrypt it under")

    sub = verb("push", push, "seal a secret and object-add it into a running QEMU")
    sub.add_argument("id", metavar="ID")
    sub.add_argument("--keyid", metavar="K", required=True, help="the master key both hold")
    sub.add_argument("--qmp", metavar="SOCKET", required=True, help="QEMU's QMP socket")
    sub.add_argument("--as", dest="as_name", metavar="NAME", help="its id in QEMU (default: ID)")
    sub.add_argument("--qemu-keyid", metavar="NAME", help="the key's id in QEMU (default: K)")

    sub = verb("run", run, "run a command with {NAME} replaced by a /dev/fd/N that is the secret")
    sub.add_argument(
        "--via", choices=("memfd", "pipe"), default="memfd", help="a pipe can be read only once"
    )
    sub.add_argument(
        "--secret", action="append", metavar="ID[=NAME]", required=True, help="for {NAME}, or {ID}"
    )
    sub.add_argument("command", nargs="+", metavar="CMD", help="after --, with its arguments")

    sub = verb("generate", generate, "add a secret of random bytes that nobody has seen")
    sub.add_argument("id", metavar="ID")
    sub.add_argument("--bytes", type=int, default=32, metavar="N", help="its size (default: 32)")

    ctl_access.add_verbs(verb)

    sub = verb("shell", None, "qmp-shell on secretd's socket")
    sub.add_argument("arguments", nargs=argparse.REMAINDER, help="options of qmp-shell, such as -H")
    return parser


if __name__ == "__main__":
    sys.exit(main())
