# SPDX-License-Identifier: LGPL-2.1-or-later
"""The X.509 certificates of etcd's nodes and of its users: ECDSA P-256, signed by a CA of our own.

etcd knows a user by the common name of a client's certificate.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_DAYS: Final = 3650
DAYS: Final = 825
"""Days for which a certificate is good."""

_EARLIER: Final = datetime.timedelta(minutes=10)
"""Clocks of hosts differ."""


def make_authority(name: str) -> tuple[bytes, bytes]:
    """Return a CA's certificate and key in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(f"secretd fleet {name}")
    builder = _builder(subject, subject, key.public_key(), key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(is_ca=True), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), _pem(key)


def issue(
    authority: tuple[bytes, bytes],
    common_name: str,
    *,
    hosts: Sequence[str] = (),
    days: float = DAYS,
) -> tuple[bytes, bytes]:
    """Return a certificate and its key in PEM.

    ``authority``: the CA's. ``hosts``: the names and addresses of a node; without them the
    certificate is a user's.
    """
    ca = x509.load_pem_x509_certificate(authority[0])
    ca_key = load_pem_private_key(authority[1], None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _builder(_name(common_name), ca.subject, key.public_key(), ca_key.public_key(), days)
    if hosts:
        # A node is its peers' client, too.
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names = x509.SubjectAlternativeName([_general_name(each) for each in hosts])
        builder = builder.add_extension(names, critical=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_usage(is_ca=False), critical=True)
    return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM), _pem(key)


def ends_at(path: str) -> float:
    """Return the time at which the certificate in a file ends, in seconds since the epoch."""
    with open(path, "rb") as file:
        found = x509.load_pem_x509_certificate(file.read())
    return found.not_valid_after_utc.timestamp()


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer_public: ec.EllipticCurvePublicKey,
    days: float,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public), critical=False
        )
    )


def _usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca, key_cert_sign=is_ca, crl_sign=is_ca,
        content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
