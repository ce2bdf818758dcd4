# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object type `secret`: QEMU's crypto/secret.c and secret_common.c.

From ``data`` or ``file``, raw or base64, in clear or encrypted under another secret, to plaintext in
the arena. It opens nothing itself (qom.source does). The tree calls it.
"""

import os
from collections.abc import Awaitable
from typing import Final, Literal

from msgspec import UNSET, Raw, Struct, UnsetType

from secretd import crypto
from secretd.errors import CommandError
from secretd.memory import LockedBuffer
from secretd.qom.object import ObjectTree, ReadSource, TypeInfo
from secretd.schema import check_enum, check_string
from secretd.state import Record
from secretd.wire.parser import JSON, Text

SECRET_BYTES: Final = 1 << 20
"""Bytes of one secret: the most that systemd takes as a credential. QEMU: no limit."""

Format = Literal["raw", "base64"]
_FORMATS: Final = ("raw", "base64")
_ANCESTORS: Final = ("secret_common", "object", "user-creatable", "interface")
_COMMON: Final = (
    ("type", "string"),
    ("iv", "string"),
    ("keyid", "string"),
    ("format", "QCryptoSecretFormat"),
)

SECRET_COMMON: Final = TypeInfo("secret_common", "object", True, _ANCESTORS, _COMMON)


class SecretOptions(
    Struct,
    tag_field="qom-type",
    tag="secret",
    forbid_unknown_fields=True,
    omit_defaults=True,
    kw_only=True,
):
    """SecretProperties of qapi/crypto.json with the base of ObjectOptions, in schema order."""

    id: str
    format: Format | UnsetType = UNSET
    keyid: str | UnsetType = UNSET
    iv: str | UnsetType = UNSET
    data: Raw | UnsetType = UNSET
    file: str | UnsetType = UNSET


class Secret:
    """The type; see `qom.object.ObjectType`."""

    info = TypeInfo(
        "secret",
        "secret_common",
        False,
        ("secret", *_ANCESTORS),
        (*_COMMON, ("file", "string"), ("data", "string")),
    )
    number = 1
    options: type[Struct] = SecretOptions

    def create(
        self, tree: ObjectTree, options: Struct, read: ReadSource
    ) -> LockedBuffer | Awaitable[LockedBuffer]:
        """qcrypto_secret_complete(): load, then decrypt or decode."""
        assert isinstance(options, SecretOptions)
        if options.file is not UNSET:
            if options.data is not UNSET:
                raise CommandError("'file' and 'data' are mutually exclusive")
            content = read(options.file)
            if isinstance(content, LockedBuffer):
                with content:
                    return _decode(tree, options, content.view)
            return self._create_later(tree, options, content)
        if options.data is UNSET:
            raise CommandError("Either 'file' or 'data' must be provided")
        return _decode(tree, options, memoryview(options.data))

    async def _create_later(
        self, tree: ObjectTree, options: SecretOptions, content: Awaitable[LockedBuffer]
    ) -> LockedBuffer:
        with await content as buffer:
            return _decode(tree, options, buffer.view)

    def stored(self, options: Struct) -> dict[str, object]:
        """All that was given but ``data``: the journal is not locked memory."""
        assert isinstance(options, SecretOptions)
        return {
            name: value
            for name in ("format", "keyid", "iv", "file")
            if (value := getattr(options, name)) is not UNSET
        }

    def get(self, record: Record, name: str) -> object:
        """What the client gave; ``data`` is write-only, unlike in QEMU."""
        if name == "data":
            raise CommandError("Property 'secret.data' is not readable")
        return record.properties.get(name, "raw" if name == "format" else "")

    def set(self, name: str, value: JSON) -> dict[str, object]:
        """Any of the client's properties; a new ``data`` is checked for type and not kept."""
        if name == "data" and isinstance(value, Text):
            return {}
        text = check_string(name, value)
        return {name: check_enum(name, text, _FORMATS) if name == "format" else text}


def secret_plaintext(tree: ObjectTree, object_id: str, loading: str | None = None) -> memoryview:
    """Return a secret's plaintext, borrowed; qcrypto_secret_lookup(). Raises CommandError.

    ``loading`` is the id of an object that exists but has no content yet.
    """
    kind = tree.type_of(object_id)
    if kind is None:
        if object_id == loading:
            raise CommandError(f"Secret with id '{object_id}' has no data")
        raise CommandError(f"No secret with id '{object_id}'")
    if "secret_common" not in kind.info.ancestors:  # pragma: no cover - no other types yet
        raise CommandError(f"Object with id '{object_id}' is not a secret")
    return tree.journal.plaintext(object_id)


def generate(tree: ObjectTree, object_id: str, size: int) -> None:
    """Add a secret of ``size`` random bytes; raises CommandError."""
    if not 1 <= size <= SECRET_BYTES:
        raise CommandError(f"Parameter 'size' expects a value between 1 and {SECRET_BYTES}")
    tree.check_new(object_id)
    plaintext = tree.journal.arena.allocate(size)
    # urandom(4) straight into locked memory; os.urandom() would leave a copy in the heap.
    fd = os.open("/dev/urandom", os.O_RDONLY | os.O_CLOEXEC)
    try:
        filled = 0
        while filled < size:
            filled += os.readv(fd, [plaintext.view[filled:]])
    except BaseException:
        plaintext.free()
        raise
    finally:
        os.close(fd)
    tree.store(SecretOptions(id=object_id), plaintext)


def _decode(tree: ObjectTree, options: SecretOptions, quoted: memoryview) -> LockedBuffer:
    """Return the plaintext of the input between the quotes."""
    if options.keyid is not UNSET:
        key = secret_plaintext(tree, options.keyid, options.id)
        crypto.check_key(key)
        if options.iv is UNSET:
            raise CommandError("IV is required to decrypt secret")
        iv = crypto.decode_iv(options.iv)
        if options.format != "base64":
            return _limited(crypto.decrypt(quoted[1:-1], key, iv, tree.scratch, tree.journal.arena))
        with crypto.decode_base64(quoted, tree.scratch, tree.scratch) as ciphertext:
            return _limited(
                crypto.decrypt(ciphertext.view, key, iv, tree.scratch, tree.journal.arena)
            )
    if options.format == "base64":
        return _limited(crypto.decode_base64(quoted, tree.scratch, tree.journal.arena))
    plaintext = tree.journal.arena.allocate(_within_limit(len(quoted) - 2))
    plaintext.view[:] = quoted[1:-1]
    return plaintext


def _within_limit(size: int) -> int:
    if size > SECRET_BYTES:
        raise CommandError(
            f"The secret has {size} bytes, more than the limit of {SECRET_BYTES} bytes"
        )
    return size


def _limited(plaintext: LockedBuffer) -> LockedBuffer:
    try:
        _within_limit(len(plaintext))
    except CommandError:
        plaintext.free()
        raise
    return plaintext
