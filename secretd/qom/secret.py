# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object types `secret` and `secret_keyring`: QEMU's crypto/secret*.c.

From ``data``, ``file`` or a key, raw or base64, in clear or encrypted under another secret, to plaintext in
the arena. It opens nothing itself (qom.source does). The tree calls it.
"""

import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, Literal

from msgspec import UNSET, Raw, UnsetType

from secretd.crypto import base64, cipher
from secretd.errors import AccessDenied, CommandError, LimitReached
from secretd.journal.journal import Record
from secretd.memory.arena import LockedBuffer
from secretd.qapi.visitor import JSON_VISITOR, Int32
from secretd.qom.loading import SourceReader, printable, use_content
from secretd.qom.object_type import (
    ObjectOptions,
    ObjectType,
    StoredInvalidValue,
    TypeInfo,
)
from secretd.qom.tree import ObjectTree
from secretd.wire.parser import JSON

SECRET_BYTES: Final = 1 << 20
"""Bytes of one secret: the most that systemd takes as a credential. QEMU: no limit."""

Format = Literal["raw", "base64"]
_ANCESTORS: Final = ("secret_common", "object", "user-creatable", "interface")
_COMMON: Final = (
    ("type", "string"),
    ("iv", "string"),
    ("keyid", "string"),
    ("format", "QCryptoSecretFormat"),
)

_DEFAULTS: Final = {"format": "raw", "keyid": "", "iv": ""}

SECRET_COMMON: Final = TypeInfo("secret_common", "object", True, _ANCESTORS, _COMMON)


class SecretCommonOptions(ObjectOptions, omit_defaults=True, kw_only=True):
    """SecretCommonProperties of qapi/crypto.json, in schema order."""

    format: Format | UnsetType = UNSET
    keyid: str | UnsetType = UNSET
    iv: str | UnsetType = UNSET


class SecretOptions(SecretCommonOptions, tag="secret", omit_defaults=True, kw_only=True):
    """SecretProperties."""

    data: Raw | UnsetType = UNSET
    file: str | UnsetType = UNSET


class SecretKeyringOptions(
    SecretCommonOptions, tag="secret_keyring", omit_defaults=True, kw_only=True
):
    """SecretKeyringProperties."""

    serial: Int32


class Secret(ObjectType):
    """A secret that is given inline or in a file."""

    info = TypeInfo(
        "secret",
        "secret_common",
        False,
        ("secret", *_ANCESTORS),
        (*_COMMON, ("file", "string"), ("data", "string")),
    )
    number = 1
    options = SecretOptions
    defaults: Mapping[str, object] = _DEFAULTS | {"file": ""}

    def create(
        self, tree: ObjectTree, options: Any, sources: SourceReader
    ) -> LockedBuffer | Awaitable[LockedBuffer | None] | None:
        """qcrypto_secret_complete(): load, then decrypt or decode."""
        assert isinstance(options, SecretOptions)
        if options.file is not UNSET:
            if options.data is not UNSET:
                raise CommandError("'file' and 'data' are mutually exclusive")
            return _load(
                tree,
                options,
                partial(sources.file, options.file),
                printable(options.file),
                sources.uid,
            )
        if options.data is UNSET:
            raise CommandError("Either 'file' or 'data' must be provided")
        quoted = memoryview(options.data)
        if options.keyid is UNSET and options.format != "base64":
            return _copy(tree, quoted)
        return _decode(tree, options, quoted, sources.uid)

    def stored(self, options: ObjectOptions) -> dict[str, object]:
        """All that was given but ``data``: the journal is not locked memory."""
        assert isinstance(options, SecretOptions)
        given: dict[str, object] = {}
        if options.format is not UNSET:
            given["format"] = options.format
        if options.keyid is not UNSET:
            given["keyid"] = options.keyid
        if options.iv is not UNSET:
            given["iv"] = options.iv
        if options.file is not UNSET:
            given["file"] = options.file
        return given

    def get(self, record: Record, name: str) -> object:
        """What the client gave; ``data`` is write-only, unlike in QEMU."""
        if name == "data":
            raise CommandError("Property 'secret.data' is not readable")
        return super().get(record, name)

    def set(self, name: str, value: JSON) -> dict[str, object]:
        """Any of the client's properties; a new ``data`` is checked for type and not kept."""
        if name == "data":
            JSON_VISITOR.text(name, value)
            return {}
        return super().set(name, value)


class SecretKeyring(ObjectType):
    """A secret from the kernel's keyrings, copied: it outlives the key."""

    info = TypeInfo(
        "secret_keyring",
        "secret_common",
        False,
        ("secret_keyring", *_ANCESTORS),
        (*_COMMON, ("serial", "int32_t")),
    )
    number = 2
    options = SecretKeyringOptions
    defaults: Mapping[str, object] = _DEFAULTS

    def create(
        self, tree: ObjectTree, options: Any, sources: SourceReader
    ) -> LockedBuffer | Awaitable[LockedBuffer | None] | None:
        """qcrypto_secret_keyring_load_data(), then as `secret`."""
        assert isinstance(options, SecretKeyringOptions)
        if options.serial == 0:
            raise CommandError(_NO_SERIAL)
        name = f"serial key {options.serial & 0xFFFFFFFF:08x}"
        return _load(tree, options, partial(sources.key, options.serial), name, sources.uid)

    def set(self, name: str, value: JSON) -> dict[str, object]:
        """As qcrypto_secret_prop_set_key(), which stores a 0 and reports it then."""
        changes = super().set(name, value)
        if changes == {"serial": 0}:
            raise StoredInvalidValue(_NO_SERIAL, changes)
        return changes


_NO_SERIAL: Final = "'serial' should not be equal to 0"
_SECRETS: Final = (Secret.number, SecretKeyring.number)


def _load(
    tree: ObjectTree,
    options: SecretCommonOptions,
    read: "Callable[[], LockedBuffer | Awaitable[LockedBuffer]]",
    what: str,
    uid: int,
) -> LockedBuffer | Awaitable[LockedBuffer]:
    """Return the plaintext of what ``read`` returns, for ``uid``; ``what`` is what errors call it."""
    return use_content(read, lambda content: _decode(tree, options, content.view, uid), what)


def check_key_use(tree: ObjectTree, keyid: str, uid: int) -> None:
    """Raise AccessDenied where a uid must not have something done with a key: with the audit's, which what it
    encrypts and decrypts would disclose.
    """
    if keyid in tree.pinned and uid not in tree.limits.trusted:
        raise AccessDenied(f"Reading secret '{keyid}' is not permitted")


def secret_plaintext(tree: ObjectTree, object_id: str, loading: str | None = None) -> memoryview:
    """Return a secret's plaintext, borrowed; qcrypto_secret_lookup(). Raises CommandError.

    ``loading`` is the id of an object that exists but has no content yet.
    """
    content = tree.journal.content(object_id)
    if content is None or tree.lifetimes.ended(object_id):
        if object_id == loading:
            raise CommandError(f"Secret with id '{object_id}' has no data")
        raise CommandError(f"No secret with id '{object_id}'")
    number, size, slot = content
    if number not in _SECRETS:
        raise CommandError(f"Object with id '{object_id}' is not a secret")
    return tree.journal.arena.view(slot, size)


def generate(tree: ObjectTree, object_id: str, size: int, uid: int) -> tuple[ObjectOptions, int]:
    """Add a secret of ``size`` random bytes for ``uid``; return its options and size. Raises CommandError."""
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
    options = SecretOptions(id=object_id)
    return options, tree.store(options, plaintext, uid)


def _decode(
    tree: ObjectTree, options: SecretCommonOptions, quoted: memoryview, uid: int
) -> LockedBuffer:
    """Return the plaintext of the input between the quotes."""
    if options.keyid is not UNSET:
        check_key_use(tree, options.keyid, uid)
        key = secret_plaintext(tree, options.keyid, options.id)
        cipher.check_key(key)
        if options.iv is UNSET:
            raise CommandError("IV is required to decrypt secret")
        iv = cipher.decode_iv(options.iv)
        if options.format != "base64":
            return _limited(cipher.decrypt(quoted[1:-1], key, iv, tree.scratch, tree.journal.arena))
        with base64.decode_base64(quoted, tree.scratch, tree.scratch) as ciphertext:
            return _limited(
                cipher.decrypt(ciphertext.view, key, iv, tree.scratch, tree.journal.arena)
            )
    if options.format == "base64":
        return _limited(base64.decode_base64(quoted, tree.scratch, tree.journal.arena))
    return _copy(tree, quoted)


def _copy(tree: ObjectTree, quoted: memoryview) -> LockedBuffer:
    """Return what stands between the quotes, as it is."""
    size = len(quoted) - 2
    if size > SECRET_BYTES:
        raise _too_large(size)
    plaintext = tree.journal.arena.allocate(size)
    plaintext.view[:] = quoted[1:-1]
    return plaintext


def _too_large(size: int) -> LimitReached:
    return LimitReached(
        "secret-bytes",
        f"The secret has {size} bytes, more than the limit of {SECRET_BYTES} bytes",
    )


def _limited(plaintext: LockedBuffer) -> LockedBuffer:
    if plaintext.size > SECRET_BYTES:
        plaintext.free()
        raise _too_large(plaintext.size)
    return plaintext
