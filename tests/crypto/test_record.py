# SPDX-License-Identifier: LGPL-2.1-or-later
"""Offers and records: every byte counts, and the wrapped key agrees with another HPKE."""

from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from pyhpke import AEADId, CipherSuite, KDFId, KEMId, KEMKey

from secretd.crypto import record
from secretd.crypto.host_keys import PublicKeys, public_keys, receiving_key
from secretd.crypto.record import Head, Malformed
from secretd.linux.immutable import wipe_bytes
from secretd.memory.arena import Arena, LockedBuffer
from tests.support.needs import ARENA_LEVEL

HEAD = Head("alpha", "beta", "disk0", "vm1", b"n" * 32, 1 << 33)
OTHER = CipherSuite.new(KEMId.DHKEM_X25519_HKDF_SHA256, KDFId.HKDF_SHA256, AEADId.AES256_GCM)


class Host:
    """A host's keys."""

    def __init__(self, arena: Arena, first: int) -> None:
        self.arena = arena
        self.seed: LockedBuffer = arena.allocate(32)
        self.seed.view[:] = bytes(range(first, first + 32))
        self.public: PublicKeys = public_keys(self.seed.view, arena)


@pytest.fixture
def hosts(arena: Arena) -> Iterator[tuple[Host, Host]]:
    """Alpha, which sends, and beta."""
    made = Host(arena, 1), Host(arena, 101)
    yield made
    for each in made:
        each.seed.free()


def wrapped(hosts: tuple[Host, Host], plaintext: bytes, head: Head = HEAD) -> bytes:
    """A record."""
    alpha, beta = hosts
    with alpha.arena.allocate(len(plaintext)) as buffer:
        buffer.view[:] = plaintext
        return record.make_record(head, buffer.view, beta.public, alpha.seed.view, alpha.arena)


@pytest.mark.parametrize("size", [0, 1, 64, 1 << 20])
def test_a_record_brings_a_secret(hosts: tuple[Host, Host], size: int) -> None:
    """To the host that it is for; its head says what it is."""
    alpha, beta = hosts
    data = wrapped(hosts, b"x" * size)
    record.verify(data, alpha.public.signing)
    assert record.read_record(data) == HEAD
    with record.open_record(data, beta.seed.view, beta.arena, beta.arena) as content:
        assert bytes(content.view) == b"x" * size
    with pytest.raises(Malformed, match="it was not wrapped for this host"):
        record.open_record(data, alpha.seed.view, alpha.arena, alpha.arena)
    with pytest.raises(Malformed, match="its signature does not fit"):
        record.verify(data, beta.public.signing)


def test_two_records_of_one_secret_have_nothing_in_common(hosts: tuple[Host, Host]) -> None:
    """Keys and nonces are used once."""
    one, other = wrapped(hosts, b"x" * 64), wrapped(hosts, b"x" * 64)
    head = len(HEAD.encoded(b"secretd record 1\0"))
    assert one[:head] == other[:head]
    same = sum(a == b for a, b in zip(one[head:], other[head:], strict=True))
    assert same < 12


def test_a_changed_head_opens_nothing(hosts: tuple[Host, Host]) -> None:
    """Even under a signature that fits: the head is bound to the key and to the content."""
    _, beta = hosts
    data = wrapped(hosts, b"letmein")
    for at in range(len(HEAD.encoded(b"secretd record 1\0"))):
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises(Malformed):
            record.open_record(bytes(changed), beta.seed.view, beta.arena, beta.arena)
    changed = bytearray(data)
    changed[-65] ^= 1
    with pytest.raises(Malformed, match="its content was changed"):
        record.open_record(bytes(changed), beta.seed.view, beta.arena, beta.arena)


def test_an_offer_is_no_record(hosts: tuple[Host, Host]) -> None:
    """And the other way round; a signature of one does not fit the other."""
    alpha, beta = hosts
    offer = record.make_offer(HEAD, beta.seed.view, beta.arena)
    record.verify(offer, beta.public.signing)
    assert record.read_offer(offer) == HEAD
    with pytest.raises(Malformed, match="this is no record"):
        record.read_record(offer)
    with pytest.raises(Malformed, match="this is no offer"):
        record.read_offer(wrapped(hosts, b"x"))
    for size in range(len(offer)):
        with pytest.raises(Malformed):
            record.read_offer(offer[:size])
    assert alpha.public != beta.public


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Whatever follows the magic."""
    for magic, read in (
        (b"secretd offer 1\0", record.read_offer), (b"secretd record 1\0", record.read_record),
    ):  # fmt: skip
        for each in (data, magic + data):
            try:
                head = read(each)
            except Malformed:
                continue
            assert each.startswith(head.encoded(magic))


# --- another implementation


def test_the_other_implementation_has_rfc_9180s_answers() -> None:
    """Its appendix A.1.1: so what agrees with it agrees with the standard."""
    suite = CipherSuite.new(KEMId.DHKEM_X25519_HKDF_SHA256, KDFId.HKDF_SHA256, AEADId.AES128_GCM)
    enc = bytes.fromhex("37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431")
    private = bytes.fromhex("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8")
    info = bytes.fromhex("4f6465206f6e2061204772656369616e2055726e")
    key = KEMKey.from_pyca_cryptography_key(X25519PrivateKey.from_private_bytes(private))
    opened = suite.create_recipient_context(enc, key, info=info).open(
        bytes.fromhex(
            "f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a"
        ),
        aad=b"Count-0",
    )
    assert opened == b"Beauty is truth, truth beauty"


def test_the_other_implementation_opens_the_wrapped_key(hosts: tuple[Host, Host]) -> None:
    """With the head as the info."""
    _, beta = hosts
    data = wrapped(hosts, b"letmein")
    head = HEAD.encoded(b"secretd record 1\0")
    message = data[len(head) : len(head) + 80]
    key = KEMKey.from_pyca_cryptography_key(receiving_key(beta.seed.view, beta.arena))
    opened = OTHER.create_recipient_context(message[:32], key, info=head).open(message[32:])
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    private = receiving_key(beta.seed.view, beta.arena)
    assert opened == suite.decrypt(message, private, info=head)
    assert len(opened) == 32


def test_what_the_other_implementation_wraps_opens(hosts: tuple[Host, Host]) -> None:
    """In the other direction."""
    _, beta = hosts
    public = X25519PublicKey.from_public_bytes(beta.public.receiving)
    enc, context = OTHER.create_sender_context(
        KEMKey.from_pyca_cryptography_key(public), info=b"info"
    )
    message = enc + context.seal(b"k" * 32)
    suite = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    private = receiving_key(beta.seed.view, beta.arena)
    assert suite.decrypt(message, private, info=b"info") == b"k" * 32


def test_a_key_is_wiped_in_place() -> None:
    """What a library has returned; CPython's shared bytes stay."""
    key = bytes([7]) * 32
    wipe_bytes(key)
    assert key == bytes(32)
    shared = b"\x07"
    wipe_bytes(shared)
    assert shared == bytes([7])
    assert ARENA_LEVEL
