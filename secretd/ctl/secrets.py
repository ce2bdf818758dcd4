# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs about secrets: add, read, list, del, generate and expire.

They open files and pass the descriptors on, so that plaintext bypasses this process where possible.
Plaintext that the process must hold for a moment (a prompt, a pipe whose end it examines) lies in
locked memory.
"""

import errno
import json
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple

from secretd.client import Encoding, Format, SecretInfo, SyncClient
from secretd.ctl.connection import client_of
from secretd.ctl.globs import chosen, is_pattern, pattern
from secretd.ctl.output import (
    DONE,
    Common,
    agreed,
    at_and_in,
    confirm,
    count,
    done,
    duration,
    fail,
    note,
    table,
    warn,
)
from secretd.ctl.prompt import ask_twice
from secretd.ctl.times import TIME, seconds
from secretd.ctl.verb import PATH, WrongUsage, argument, flag, option, verb
from secretd.errors import UsageError

_STDIN_BYTES = 2 << 20

_ENCODINGS = ("raw", "base64")

# --- add


@verb(
    "add",
    argument("object_id", metavar="ID"),
    option("--file", metavar="FILE", type=PATH, help="read it from a file or <(command)"),
    option("--fd", metavar="N", type=int, help="read it from an inherited descriptor"),
    flag("--stdin", help="read it from standard input"),
    flag("--prompt", help="ask for it on the terminal"),
    option("--format", "form", type=_ENCODINGS, default="raw", help="how it is encoded"),
    option(
        "--keyid",
        metavar="K",
        help="the secret it is encrypted under (AES-256-CBC)",
        completes="secrets",
    ),
    option("--iv", metavar="B64", help="its initialisation vector in base64"),
    flag("--replace", help="replace an existing secret of that id, in one step"),
    option("--expires", metavar="TIME", help=f"wipe it {TIME}"),
    examples=(
        "secretctl add disk0 --prompt",
        "openssl rand -hex 32 | tr -d '\\n' | secretctl add disk0 --stdin",
        "secretctl add ceph --file /etc/ceph/client.key --format base64",
        "secretctl add token --file token --replace --expires 8h",
    ),
)
def add(
    common: Common,
    *,
    object_id: str,
    file: str | None,
    fd: int | None,
    stdin: bool,
    prompt: bool,
    form: Format,
    keyid: str | None,
    iv: str | None,
    replace: bool,
    expires: str | None,
) -> None:
    """Add a secret.

    Without a source it is read from standard input, or asked for if that is a terminal. The content
    comes from a file, a descriptor, standard input or a prompt, raw or in base64, in clear or
    encrypted under another secret. It is never an argument, which every user could read.
    """
    if sum((file is not None, fd is not None, stdin, prompt)) > 1:
        raise WrongUsage("--file, --fd, --stdin and --prompt exclude each other")
    if iv is not None and keyid is None:
        raise UsageError("--iv needs --keyid, the secret that it is encrypted under")
    lifetime = None if expires is None else seconds(expires)
    with client_of(common) as client:
        adding = Adding(client, object_id, Encoding(form, keyid, iv), replace)
        if file is not None:
            opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                adding.from_fd(opened, file)
            finally:
                os.close(opened)
        elif prompt or (fd is None and not stdin and os.isatty(0)):
            with ask_twice(client, f"Secret {object_id}: ") as typed:
                adding.from_memory(typed.view)
        else:
            number = 0 if fd is None else fd
            adding.from_fd(number, f"descriptor {number}")
        if lifetime is not None:
            client.expire(object_id, lifetime)
        added = client.info(object_id)
    size = None if added is None else added.size
    if common.json:
        done(common, id=object_id, size=size)
    else:
        words = "" if size is None else f", {count(size, 'byte')}"
        words += "" if lifetime is None else f"; it will be wiped {at_and_in(lifetime)}"
        print(f"added {object_id}{words}")


class Adding(NamedTuple):
    """A secret on its way into secretd."""

    client: SyncClient
    object_id: str
    encoding: Encoding
    replace: bool

    def from_memory(self, plaintext: memoryview) -> None:
        """Add it from locked memory."""
        self.client.add_bytes(self.object_id, plaintext, self.encoding, replace=self.replace)

    def from_fd(self, fd: int, where: str) -> None:
        """Add it from a descriptor; ``where``: its name in errors."""
        _add_fd(self, fd, where)


def _add_fd(adding: Adding, fd: int, where: str) -> None:
    client, encoding = adding.client, adding.encoding
    try:
        status = os.fstat(fd)
    except OSError as error:
        raise UsageError(f"descriptor {fd}: {error.strerror}") from None
    if stat.S_ISREG(status.st_mode):
        last = os.pread(fd, 1, max(0, status.st_size - 1))
        _check_end(last[0] if last else None, encoding.format)
        client.add(adding.object_id, fd, encoding, replace=adding.replace)
        return
    if stat.S_ISDIR(status.st_mode):
        raise UsageError(f"{where}: {os.strerror(errno.EISDIR)}")
    # A pipe can be read only once: check its end here, in locked memory.
    with client.buffer(_STDIN_BYTES + 1) as buffer:
        fill = 0
        while got := _read(fd, buffer.view[fill:]):
            fill += got
            if fill > _STDIN_BYTES:
                raise UsageError(
                    f"more than {_STDIN_BYTES:,} bytes were given, and a secret may have 1,048,576"
                )
        _check_end(buffer.view[fill - 1] if fill else None, encoding.format)
        adding.from_memory(buffer.view[:fill])


def _read(fd: int, view: memoryview) -> int:
    try:
        return os.readv(fd, [view])
    except OSError as error:
        name = "standard input" if fd == 0 else f"descriptor {fd}"
        raise UsageError(f"{name}: {error.strerror}") from None


def _check_end(last: int | None, format: Format) -> None:  # noqa: A002
    """Warn of a probable mistake; ``last``: the last byte, None if there is none."""
    if last is None:
        warn("the secret is empty")
    elif last == 0x0A and format == "raw":
        warn("the secret ends in a newline, which is kept; 'printf %s' writes none")


# --- read, list, del, generate, expire


@verb(
    "read",
    argument("object_id", metavar="ID", completes="secrets"),
    option("--format", "form", type=_ENCODINGS, default="raw", help="how to write it"),
    flag("--force", help="also to a terminal"),
    examples=("secretctl read disk0 | cryptsetup open --key-file=- /dev/vdb data",),
)
def read(common: Common, object_id: str, form: Format, force: bool) -> None:
    """Write a secret to standard output.

    With --json it is a line of JSON that holds the secret in base64.
    """
    if os.isatty(1) and not force:
        raise UsageError(
            "stdout is a terminal; send the secret to a pipe or a file, or use --force"
        )
    encoding: Format = "base64" if common.json else form
    with client_of(common) as client, client.read(object_id, format=encoding) as secret:
        if common.json:
            os.write(1, f'{{"id": {json.dumps(object_id)}, "format": "base64", "data": "'.encode())
        rest = secret.view
        while rest:
            rest = rest[os.write(1, rest) :]
        if common.json:
            os.write(1, b'"}\n')


@verb(
    "list",
    argument("patterns", nargs=-1, metavar="PATTERN", completes="secrets"),
    flag("--quiet", "-q", help="print ids only"),
    examples=("secretctl list 'vm1.*'", "secretctl list --json | jq -r '.[].id'"),
)
def list_secrets(common: Common, patterns: tuple[str, ...], quiet: bool) -> None:
    """List the secrets.

    The list has ids, types, sizes, the protection of their memory, and the remaining time; on the
    client socket only secrets that the caller may read. PATTERN has * for any text and ? for a
    character.
    """
    with client_of(common) as client:
        secrets = client.list()
    if patterns:
        fits = [pattern(each).fullmatch for each in patterns]
        secrets = [s for s in secrets if any(matches(s.id) for matches in fits)]
    if quiet:
        print("".join(f"{s.id}\n" for s in secrets), end="")
    elif common.json:
        print(json.dumps([secret_members(s) for s in secrets]))
    else:
        limited = any(s.expires_in is not None for s in secrets)
        head = ("ID", "TYPE", "BYTES", "MEMORY", "EXPIRES IN")[: 5 if limited else 4]
        rows = (
            (s.id, f"{s.qom_type} of {s.version}" if s.version else s.qom_type, str(s.size),
             s.memory, duration(s.expires_in))
            for s in secrets
        )  # fmt: skip
        table(head, (row[: len(head)] for row in rows), right=(2,))


def secret_members(secret: SecretInfo) -> dict[str, object]:
    """Return a secret in the words of query-secrets."""
    return {
        name.replace("_", "-"): value
        for name, value in secret._asdict().items()
        if value is not None and (value or name != "version")
    }


@verb(
    "del",
    argument("ids", nargs=-1, required=True, metavar="ID", completes="secrets"),
    flag("--yes", "-y", help="delete what a pattern matches without asking"),
    examples=("secretctl del disk0", "secretctl del 'vm1.*'"),
)
def delete(common: Common, ids: tuple[str, ...], yes: bool) -> int:
    """Delete secrets or other objects; secrets are wiped.

    ID may be a pattern of secrets with * and ?. You are asked before they are deleted,
    or agree with --yes.
    """
    with client_of(common) as client:
        patterns = any(map(is_pattern, ids))
        wanted = chosen(ids, (s.id for s in client.list())) if patterns else list(ids)
        if patterns and not yes and not agreed(f"Delete {_few(wanted)}?"):
            return fail("nothing was deleted")
        for number, object_id in enumerate(wanted):
            try:
                client.delete(object_id)
            except Exception:
                if number:
                    note(f"deleted before: {', '.join(wanted[:number])}")
                raise
    confirm(common, f"deleted {_few(wanted)}")
    done(common, id=wanted[0], **({"ids": wanted} if len(wanted) > 1 else {}))
    return DONE


def _few(ids: Sequence[str]) -> str:
    """Return ids in words, at most five of them."""
    more = f" and {len(ids) - 5:,} more" if len(ids) > 5 else ""
    return ", ".join(ids[:5]) + more


@verb(
    "generate",
    argument("object_id", metavar="ID"),
    option(
        "--bytes", "size", type=int, default=32, show_default=True, metavar="N", help="its size"
    ),
)
def generate(common: Common, object_id: str, size: int) -> None:
    """Add a secret of random bytes, generated inside secretd.

    For keys: a LUKS passphrase must be UTF-8 text, which random bytes are not.
    """
    with client_of(common) as client:
        client.generate(object_id, size)
    confirm(common, f"generated {object_id}, {count(size, 'byte')}")
    done(common, id=object_id, size=size)


@verb(
    "expire", argument("object_id", metavar="ID", completes="secrets"),
    option("--after", metavar="TIME", help=f"wipe it {TIME}"),
    flag("--never", help="remove the lifetime: the secret stays until it is deleted"),
    examples=("secretctl expire disk0 --after 8h", "secretctl expire disk0 --never"),
)  # fmt: skip
def expire(common: Common, object_id: str, after: str | None, never: bool) -> None:
    """Wipe a secret after some time from now."""
    if (after is None) == (not never):
        raise WrongUsage("give either --after TIME or --never")
    limit = None if after is None else seconds(after)
    with client_of(common) as client:
        client.expire(object_id, limit)
    if common.json:
        done(common, id=object_id, after=limit)
    elif limit is None:
        print(f"{object_id} will not expire")
    else:
        print(f"{object_id} will be wiped {at_and_in(limit)}")
