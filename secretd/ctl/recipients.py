# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recipients of a store's key: copies of the key that only some machine or person can open.

Two kinds: ``systemd`` (systemd-creds(1): this machine, by its host key or TPM) and ``age``
(age(1): whoever has the identity, kept off the machine). They lie in the directory ``recipients``
of the store. The key goes through pipes, and is compared in locked memory. The verb store calls
this module.
"""

import contextlib
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple

from secretd import client as api
from secretd.client import SyncClient
from secretd.errors import UsageError
from secretd.memory.arena import LockedBuffer

Kind = Literal["systemd", "age"]
KINDS: Final[tuple[Kind, ...]] = ("systemd", "age")

CREDENTIAL: Final = "store-key"
"""The name of the key among the credentials of secretd-unlock.service."""

KEY_BYTES: Final = 32

_HOW: Final = ".how"
"""The end of the name of the file that says how a recipient was made: age's public keys, or options
of systemd-creds.
"""

_PROGRAMS: Final = {"systemd": "systemd-creds", "age": "age"}
_PACKAGES: Final = {"systemd": "systemd", "age": "age"}


class Sealing(NamedTuple):
    """How a recipient is made and opened.

    ``to``: public keys of age(1); ``options``: further options of systemd-creds(1); ``identity``:
    a file of age(1), None where it is elsewhere.
    """

    to: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    identity: str | None = None


class Recipients:
    """The recipients of the store in ``path``."""

    def __init__(self, path: str) -> None:
        self.directory = os.path.join(path, "recipients")

    def file(self, kind: str) -> str:
        """Return the path of a recipient's file."""
        return os.path.join(self.directory, kind)

    def present(self) -> list[Kind]:
        """Return the kinds that exist. Raises UsageError if this user may not look."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(f"{self.directory}: {error.strerror}") from None
        return [kind for kind in KINDS if kind in names]

    def sealing(self, kind: Kind, how: Sealing) -> Sealing:
        """Return how to seal for a recipient again: as before, where ``how`` does not say."""
        try:
            with open(f"{self.file(kind)}{_HOW}") as file:
                before = tuple(file.read().split())
        except OSError:
            return how
        if kind == "age":
            return how._replace(to=how.to or before)
        return how._replace(options=how.options or before)

    def add(
        self, client: SyncClient, key_id: str, kind: Kind, how: Sealing, name: str = ""
    ) -> bool:
        """Seal the key for a recipient, and open it again if this machine can.

        ``name``: the file's name, by default the kind. Returns False if it was not opened, since
        the identity is elsewhere. Raises UsageError, and then the earlier file stays.
        """
        sealed = _sealed(client, key_id, kind, how)
        tested = kind == "systemd" or how.identity is not None
        if tested:
            self._compare(client, key_id, kind, sealed, how)
        if os.path.islink(self.directory):
            raise UsageError(f"{self.directory} is a symlink")
        os.makedirs(self.directory, 0o700, exist_ok=True)
        _replace(self.file(name or kind), sealed)
        given = how.to if kind == "age" else how.options
        _replace(f"{self.file(name or kind)}{_HOW}", "\n".join((*given, "")).encode())
        return tested

    def test(self, client: SyncClient, key_id: str, kind: Kind, how: Sealing) -> None:
        """Open a recipient's file, and compare the key with the one in use. Raises UsageError."""
        with open(self.file(kind), "rb") as file:
            self._compare(client, key_id, kind, file.read(), self.sealing(kind, how))

    def rename(self, kind: Kind, name: str) -> None:
        """Give a recipient's file ``name`` the place of the earlier one."""
        for end in ("", _HOW):
            os.rename(self.file(name) + end, self.file(kind) + end)

    def remove(self, kind: Kind) -> None:
        """Remove a recipient."""
        for end in ("", _HOW):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.file(kind) + end)

    def remove_all(self) -> None:
        """Remove all recipients and their directory."""
        for kind in self.present():
            self.remove(kind)
        with contextlib.suppress(OSError):
            os.rmdir(self.directory)

    def _compare(
        self, client: SyncClient, key_id: str, kind: Kind, sealed: bytes, how: Sealing
    ) -> None:
        with client.read(key_id) as key, client.buffer(KEY_BYTES + 1) as opened:
            size = _opened(kind, sealed, how, opened)
            if opened.view[:size] != key.view:
                raise UsageError(f"recipient '{kind}' opens, and has another key")


def opens(recipients: Recipients) -> None:
    """Open the systemd recipient and drop the key. Raises UsageError if this machine cannot."""
    how = recipients.sealing("systemd", Sealing())
    with open(recipients.file("systemd"), "rb") as file:
        process = _start(
            "systemd", _open_command("systemd", how), file.fileno(), subprocess.DEVNULL
        )
    _end("systemd", process)


@contextlib.contextmanager
def opening(kind: Kind, path: str, how: Sealing) -> Iterator[int]:
    """Yield a pipe from which the key of a recipient's file can be read. Raises UsageError."""
    with open(path, "rb") as file:
        process = _start(kind, _open_command(kind, how), file.fileno(), subprocess.PIPE)
        assert process.stdout is not None
        try:
            yield process.stdout.fileno()
        finally:
            process.stdout.close()
            _end(kind, process)


def _sealed(client: SyncClient, key_id: str, kind: Kind, how: Sealing) -> bytes:
    """Return the key as a recipient gets it; secretd writes it into the program's pipe."""
    source, sink = os.pipe2(os.O_CLOEXEC)
    try:
        process = _start(kind, _seal_command(kind, how), source, subprocess.PIPE)
    except BaseException:
        os.close(sink)
        raise
    finally:
        os.close(source)
    try:
        client.read_into(key_id, sink)
    except BaseException as error:
        process.kill()  # without the key it must not seal anything
        _, said = process.communicate()
        if isinstance(error, api.QMPError) and process.returncode > 0 and said:
            raise _failed(kind, process, said) from None  # it ended before it had read the key
        raise
    finally:
        os.close(sink)
    assert process.stdout is not None
    sealed = process.stdout.read()
    process.stdout.close()
    _end(kind, process)
    return sealed


def _opened(kind: Kind, sealed: bytes, how: Sealing, into: LockedBuffer) -> int:
    """Open a sealed key into locked memory; return its size in bytes. Raises UsageError."""
    source, sink = os.pipe2(os.O_CLOEXEC)
    os.write(sink, sealed)  # a few hundred bytes
    os.close(sink)
    try:
        process = _start(kind, _open_command(kind, how), source, subprocess.PIPE)
    finally:
        os.close(source)
    assert process.stdout is not None
    size = 0
    while got := os.readv(process.stdout.fileno(), [into.view[size:]]):
        size += got
    process.stdout.close()
    _end(kind, process)
    return size


def _seal_command(kind: Kind, how: Sealing) -> list[str]:
    if kind == "systemd":
        return ["systemd-creds", "encrypt", f"--name={CREDENTIAL}", *how.options, "-", "-"]
    if not how.to:
        raise UsageError("age needs a public key: store recipient add age age1…")
    return ["age", *(word for key in how.to for word in ("-r", key))]


def _open_command(kind: Kind, how: Sealing) -> list[str]:
    if kind == "systemd":
        options = [each for each in how.options if each.startswith("--tpm2-device")]
        return ["systemd-creds", "decrypt", f"--name={CREDENTIAL}", *options, "-", "-"]
    if how.identity is None:
        raise UsageError("age needs --identity FILE, which has the private key")
    return ["age", "-d", "-i", how.identity]


def _start(
    kind: Kind, command: Sequence[str], stdin: int, stdout: int
) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise UsageError(
            f"{_PROGRAMS[kind]} was not found; on Debian: apt install {_PACKAGES[kind]}"
        ) from None


def _end(kind: Kind, process: "subprocess.Popen[bytes]") -> None:
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    if process.wait():
        raise _failed(kind, process, said)


def _failed(kind: Kind, process: "subprocess.Popen[bytes]", said: bytes) -> UsageError:
    name = shlex.join(list(map(str, process.args))[:2])  # type: ignore[arg-type]
    words = " ".join(said.decode(errors="replace").split())
    return UsageError(f"recipient '{kind}': {name}: {words or process.returncode}")


def _replace(path: str, content: bytes) -> None:
    """Write a file in one step; on return it is on the disk."""
    fresh = f"{path}.writing"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    # The directory may be another user's: never follow a link that lies there.
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(fresh, path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
