# SPDX-License-Identifier: LGPL-2.1-or-later
"""The object types `secret` and `secret_keyring`: QEMU's crypto/secret*.c.

They turn ``data``, ``file`` or a key, raw or base64, in clear or encrypted under another secret,
into plaintext in the arena. descriptors.source opens the sources. The tree and monitor.commands
call this module.
"""

import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, Literal

from msgspec import UNSET, Raw, UnsetType

from secretd.crypto import base64, cipher
from secretd.errors import CommandError, LimitReached
from secretd.journal.files import ObjectRecord
from secretd.memory.arena import Arena, LockedBuffer
from secretd.qapi.visitor import JSON_VISITOR, Int32
from secretd.qom.loading import Loading, printable, use_content
from secretd.qom.object_type import (
    Content,
    ObjectOptions,
    ObjectType,
    StoredInvalidValue,
    TypeInfo,
)
from secretd.wire.parser import JSON

SECRET_BYTES: Final = 1 << 20
"""Bytes of one secret: the most that systemd accepts as a credential. QEMU has no limit."""

SecretFormat = Literal["raw", "base64"]
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

    format: SecretFormat | UnsetType = UNSET
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

    def create(self, options: Any, loading: Loading) -> Content | Awaitable[Content]:
        """qcrypto_secret_complete(): load, then decrypt or decode."""
        assert isinstance(options, SecretOptions)
        if options.file is not UNSET:
            if options.data is not UNSET:
                raise CommandError("'file' and 'data' are mutually exclusive")
            read = partial(loading.sources.file, options.file)
            return _load(loading, options, read, printable(options.file))
        if options.data is UNSET:
            raise CommandError("Either 'file' or 'data' must be provided")
        quoted = memoryview(options.data)
        if options.keyid is UNSET and options.format != "base64":
            return _copy(loading.arena, quoted)
        return _decode(loading, options, quoted)

    def stored(self, options: ObjectOptions) -> dict[str, object]:
        """Return all given properties but ``data``: the journal is not locked memory."""
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

    def get(self, record: ObjectRecord, name: str) -> object:
        """Return the client's value; ``data`` is write-only, unlike in QEMU."""
        if name == "data":
            raise CommandError("Property 'secret.data' is not readable")
        return super().get(record, name)

    def set(self, name: str, value: JSON) -> dict[str, object]:
        """Accept any of the client's properties; a new ``data`` is checked for type and not
        kept.
        """
        if name == "data":
            JSON_VISITOR.text(name, value)
            return {}
        return super().set(name, value)


class SecretKeyring(ObjectType):
    """A copy of a key in the kernel's keyrings, which outlives the key."""

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

    def create(self, options: Any, loading: Loading) -> Content | Awaitable[Content]:
        """qcrypto_secret_keyring_load_data(), then as `secret`."""
        assert isinstance(options, SecretKeyringOptions)
        if options.serial == 0:
            raise CommandError(_NO_SERIAL)
        name = f"serial key {options.serial & 0xFFFFFFFF:08x}"
        return _load(loading, options, partial(loading.sources.key, options.serial), name)

    def set(self, name: str, value: JSON) -> dict[str, object]:
        """As qcrypto_secret_prop_set_key(): a 0 is stored, and then reported as an error."""
        changes = super().set(name, value)
        if changes == {"serial": 0}:
            raise StoredInvalidValue(_NO_SERIAL, changes)
        return changes


_NO_SERIAL: Final = "'serial' should not be equal to 0"


def _load(
    loading: Loading,
    options: SecretCommonOptions,
    read: "Callable[[], LockedBuffer | Awaitable[LockedBuffer]]",
    what: str,
) -> LockedBuffer | Awaitable[LockedBuffer]:
    """Return the plaintext of the content that ``read`` returns; ``what`` is the source's name in
    errors.
    """
    return use_content(read, lambda content: _decode(loading, options, content.view), what)


def check_size(size: int) -> None:
    """Raise CommandError unless a secret may have so many bytes."""
    if not 1 <= size <= SECRET_BYTES:
        raise CommandError(f"Parameter 'size' expects a value between 1 and {SECRET_BYTES}")


def random_plaintext(arena: Arena, size: int) -> LockedBuffer:
    """Return ``size`` random bytes. Raises LockedMemoryExhausted."""
    plaintext = arena.allocate(size)
    # urandom(4), straight into locked memory: os.urandom() would leave a copy in the heap.
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
    return plaintext


def _decode(loading: Loading, options: SecretCommonOptions, quoted: memoryview) -> LockedBuffer:
    """Return the plaintext of the input between the quotes."""
    arena, scratch = loading.arena, loading.scratch
    if options.keyid is not UNSET:
        key = loading.key(options.keyid, loading.sources.uid, options.id)
        cipher.check_key(key)
        if options.iv is UNSET:
            raise CommandError("IV is required to decrypt secret")
        iv = cipher.decode_iv(options.iv)
        if options.format != "base64":
            return _limited(cipher.decrypt(quoted[1:-1], key, iv, scratch, arena))
        with base64.decode_base64(quoted, scratch, scratch) as ciphertext:
            return _limited(cipher.decrypt(ciphertext.view, key, iv, scratch, arena))
    if options.format == "base64":
        return _limited(base64.decode_base64(quoted, scratch, arena))
    return _copy(arena, quoted)


def _copy(arena: Arena, quoted: memoryview) -> LockedBuffer:
    """Return a copy of the text between the quotes."""
    size = len(quoted) - 2
    if size > SECRET_BYTES:
        raise _too_large(size)
    plaintext = arena.allocate(size)
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
