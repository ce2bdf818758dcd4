# SPDX-License-Identifier: LGPL-2.1-or-later
"""Base64 and AES: right results, QEMU's words for what is wrong, scratch memory freed."""

import base64
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secretd.crypto import base64 as locked_base64
from secretd.crypto import cipher
from secretd.errors import CommandError
from secretd.memory.arena import Arena, LockedBuffer
from tests.support.needs import ARENA_LEVEL, need_program

KEY = bytes(range(32))
IV = bytes(range(16))


def buffer(arena: Arena, content: bytes) -> LockedBuffer:
    made = arena.allocate(len(content))
    made.view[:] = content
    return made


@pytest.mark.slow
@given(st.binary(max_size=200), st.integers(1, 80))
def test_base64_is_decoded_with_newlines_anywhere(content: bytes, columns: int) -> None:
    """As openssl and base64(1) write it."""
    arena = Arena(ARENA_LEVEL)
    text = base64.b64encode(content)
    lines = b"\n".join(text[i : i + columns] for i in range(0, len(text), columns)) + b"\n"
    for form in (text, lines):
        with buffer(arena, b'"' + form + b'"') as quoted:
            with locked_base64.decode_base64(quoted.view, arena, arena) as decoded:
                assert bytes(decoded.view) == content
    with buffer(arena, content) as plain, locked_base64.encode_base64(plain.view, arena) as encoded:
        assert bytes(encoded.view) == text
    assert arena.held == 0
    arena.close()


@pytest.mark.parametrize(
    "text",
    [
        b"A",
        b"AA",
        b"AAA",
        b"====",
        b"AAAA=",
        b"A A=",
        b"AA-_",
        b"QQ==QQ==",
        b"A\rA=",
        b"QUJD\\u0051",
        b"\xc0\x80AAAA",
    ],
)
def test_bad_base64_is_refused_in_qemus_words(arena: Arena, text: bytes) -> None:
    """Where QEMU drops an incomplete group or takes stray padding, this is refused too."""
    with buffer(arena, b'"' + text + b'"') as quoted:
        with pytest.raises(CommandError, match="^Base64 data contains invalid characters$"):
            locked_base64.decode_base64(quoted.view, arena, arena)


@pytest.mark.parametrize("text", [b"AAAA\0", b"AA\0A"])
def test_nul_in_base64_has_words_of_its_own(arena: Arena, text: bytes) -> None:
    """In a file; JSON brings it as C0 80, which is simply no base64."""
    with buffer(arena, b'"' + text + b'"') as quoted:
        with pytest.raises(CommandError, match="^Base64 data contains embedded NUL characters$"):
            locked_base64.decode_base64(quoted.view, arena, arena)


def test_the_iv_is_checked_in_qemus_order() -> None:
    """Base64 first, then the length."""
    assert cipher.decode_iv(base64.encodebytes(IV).decode()) == IV
    for text in ("é", "A", "!!!!"):
        with pytest.raises(CommandError, match="^Base64 data contains invalid characters$"):
            cipher.decode_iv(text)
    with pytest.raises(CommandError, match="^IV should be 16 bytes in length not 12$"):
        cipher.decode_iv(base64.b64encode(bytes(12)).decode())
    with pytest.raises(CommandError, match="^IV should be 16 bytes in length not 0$"):
        cipher.decode_iv("")


def encrypt(arena: Arena, padded: bytes) -> LockedBuffer:
    """Encrypt without padding, by other code."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    encryptor = Cipher(algorithms.AES(KEY), modes.CBC(IV)).encryptor()
    return buffer(arena, encryptor.update(padded) + encryptor.finalize())


@pytest.mark.parametrize(
    ("padded", "number"),
    [
        (b"x" * 15 + b"\0", 0),
        (b"x" * 15 + b"\x11", 17),
        (b"x" * 14 + b"\1\2", 2),
        (b"\1" + b"\x10" * 15, 16),
        (b"x" * 16 + b"\xc8" * 16, 200),
        (b"", 0),
    ],
)
def test_wrong_padding_is_named_by_its_last_byte(arena: Arena, padded: bytes, number: int) -> None:
    """All of PKCS#7 is checked, not only the last byte as in QEMU."""
    with encrypt(arena, padded) as ciphertext, buffer(arena, KEY) as key:
        with pytest.raises(CommandError) as caught:
            cipher.decrypt(ciphertext.view, key.view, IV, arena, arena)
    assert (
        caught.value.desc == f"Incorrect number of padding bytes ({number}) found on decrypted data"
    )


def test_a_ciphertext_must_be_whole_blocks(arena: Arena) -> None:
    """QEMU's words."""
    with buffer(arena, bytes(24)) as ciphertext, buffer(arena, KEY) as key:
        with pytest.raises(CommandError, match="^Length 24 must be a multiple of block size 16$"):
            cipher.decrypt(ciphertext.view, key.view, IV, arena, arena)


def test_a_key_has_32_bytes() -> None:
    """QEMU's words."""
    cipher.check_key(memoryview(KEY))
    with pytest.raises(CommandError, match="^Key should be 32 bytes in length$"):
        cipher.check_key(memoryview(KEY[1:]))


@pytest.mark.slow
@given(st.binary(max_size=100))
def test_what_is_sealed_is_decrypted_again(content: bytes) -> None:
    """Of every length, and under a new IV each time."""
    arena = Arena(ARENA_LEVEL)
    with buffer(arena, content) as plain, buffer(arena, KEY) as key:
        data, iv = cipher.seal(plain.view, key.view, arena)
        assert cipher.seal(plain.view, key.view, arena) != (data, iv)
        with (
            buffer(arena, base64.b64decode(data)) as ciphertext,
            cipher.decrypt(ciphertext.view, key.view, cipher.decode_iv(iv), arena, arena) as found,
        ):
            assert bytes(found.view) == content
    assert arena.held == 0
    arena.close()


def test_openssl_reads_what_was_sealed(arena: Arena) -> None:
    """The other side of the wire, by its most usual program."""
    need_program("openssl")
    content = os.urandom(1000)
    with buffer(arena, content) as plain, buffer(arena, KEY) as key:
        data, iv = cipher.seal(plain.view, key.view, arena)
    done = subprocess.run(
        [
            "openssl",
            "enc",
            "-d",
            "-aes-256-cbc",
            "-K",
            KEY.hex(),
            "-iv",
            base64.b64decode(iv).hex(),
        ],
        input=base64.b64decode(data),
        capture_output=True,
        check=True,
    )
    assert done.stdout == content
