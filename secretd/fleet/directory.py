# SPDX-License-Identifier: LGPL-2.1-or-later
"""The operator's directory: the fleet's root key, its roster, its CA, and what hosts and nodes get.

    fleet.toml  roster  root.key  ca.crt ca.key  operator.crt operator.key
    etcd/NODE.yml .crt .key     hosts/HOST/fleet.toml ca.crt host.crt host.key

Files appear under their names when they are whole.
"""

import base64
import fcntl
import os
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from secretd.crypto.record import Malformed, verify
from secretd.crypto.roster import ROSTER_BYTES, Roster, read_roster, signed_part
from secretd.errors import UsageError
from secretd.fleet import certificates, config
from secretd.fleet.etcd import Endpoint, Etcd, endpoint, tls

_DAY_SECONDS: Final = 86400


class _Settings(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    fleet: str
    nodes: dict[str, str]
    roster_days: int = 0


class Directory:
    """The directory of a fleet, which `opened` locks."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with open(self._file("fleet.toml"), "rb") as file:
                self._settings = msgspec.convert(tomllib.load(file), _Settings)
        except FileNotFoundError:
            raise UsageError(
                f"{path} is no fleet's directory; 'secretd-fleet init' makes one"
            ) from None
        except (ValueError, msgspec.ValidationError) as error:
            raise UsageError(f"{self._file('fleet.toml')}: {error}") from None
        with open(self._file("root.key"), "rb") as file:
            try:
                key = load_pem_private_key(file.read(), None)
            except (ValueError, TypeError):
                key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise UsageError(f"{self._file('root.key')}: this is no Ed25519 key in PEM")
        self._root = key

    @property
    def fleet(self) -> str:
        """The fleet's name."""
        return self._settings.fleet

    @property
    def root(self) -> str:
        """The public half of the root key in base64."""
        return base64.b64encode(self._root.public_key().public_bytes_raw()).decode()

    @property
    def endpoints(self) -> list[str]:
        """The nodes of etcd."""
        return list(self._settings.nodes.values())

    def etcd(self) -> Etcd:
        """Return a client with all rights."""
        files = [self._file(each) for each in ("ca.crt", "operator.crt", "operator.key")]
        return Etcd([endpoint(each) for each in self.endpoints], lambda: tls(*files))

    def roster(self) -> tuple[Roster, bytes]:
        """Return the roster, and its signed bytes."""
        with open(self._file("roster"), "rb") as file:
            data = file.read()
        try:
            verify(data, self._root.public_key().public_bytes_raw())
            return read_roster(data), data
        except Malformed as error:
            raise UsageError(f"{self._file('roster')}: {error}") from None

    def for_host(self, host: str) -> bytes:
        """Return the roster for a host: publishers get all of it, others the line of their own.

        So a host more changes nothing for those that are there.
        """
        roster, data = self.roster()
        if host in roster.publishers or host not in roster.hosts:
            return data
        own = roster._replace(hosts={host: roster.hosts[host]}).encoded()
        return own + self._root.sign(signed_part(own))

    def adopt(self, there: bytes | None) -> None:
        """Take over a later roster that was signed with this root, such as by a copy of DIR."""
        try:
            verify(there or b"", self._root.public_key().public_bytes_raw())
            roster = read_roster(there or b"")
        except Malformed:
            return
        mine, data = self.roster()
        # One of the same number was put by a copy of DIR, and ours was not.
        if roster.fleet == self.fleet and (
            roster.number > mine.number or (roster.number == mine.number and data != there)
        ):
            _write(self._file("roster"), there or b"")

    @contextmanager
    def unfinished(self) -> Iterator[bool]:
        """Note that a change of etcd is under way; yields whether an earlier one was left so."""
        path = self._file("unfinished")
        was_left = os.path.exists(path)
        _write(path, b"")
        yield was_left
        os.unlink(path)

    def save_roster(self, roster: Roster) -> bytes:
        """Sign the next roster with the hosts and publishers of this one; return its bytes."""
        days = self._settings.roster_days
        until = int(time.time()) + days * _DAY_SECONDS if days else 0
        data = roster._replace(number=roster.number + 1, until=until).encoded()
        if len(data) > ROSTER_BYTES - 64:
            raise UsageError(f"the roster would exceed {ROSTER_BYTES} bytes")
        signed = data + self._root.sign(signed_part(data))
        _write(self._file("roster"), signed)
        return signed

    def save_host(self, host: str, days: float) -> str:
        """Make what a host gets, with a new certificate; return its directory."""
        where = self._file(os.path.join("hosts", host))
        os.makedirs(where, mode=0o700, exist_ok=True)
        authority = self._authority()
        certificate, key = certificates.issue(authority, host, days=days)
        values: dict[str, str | int | Sequence[str]] = {
            "fleet": self.fleet, "host": host, "root": self.root, "endpoints": self.endpoints,
            "ca": "ca.crt", "certificate": "host.crt", "key": "host.key",
        }  # fmt: skip
        path = os.path.join(where, "fleet.toml")
        if os.path.exists(path):  # what was added to it by hand stays
            values = config.extras(path) | values
        text = config.written(values)
        for name, data in {
            "ca.crt": authority[0], "host.crt": certificate, "host.key": key,
            "fleet.toml": text.encode(),
        }.items():  # fmt: skip
            _write(os.path.join(where, name), data)
        return where

    def _authority(self) -> tuple[bytes, bytes]:
        with open(self._file("ca.crt"), "rb") as file, open(self._file("ca.key"), "rb") as key:
            return file.read(), key.read()

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name)


@contextmanager
def opened(path: str) -> Iterator[Directory]:
    """Open a directory for one program at a time. Raises UsageError and OSError."""
    directory = Directory(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another secretd-fleet is using {path}") from None
        yield directory
    finally:
        os.close(fd)


def create(path: str, fleet: str, nodes: Mapping[str, Endpoint], roster_days: int) -> None:
    """Make a fleet's directory. Raises UsageError if there is something already."""
    path = path.rstrip("/") or path
    if os.path.lexists(path):
        raise UsageError(f"{path} exists already")
    fresh = f"{path}.{os.getpid()}.new"
    os.mkdir(fresh, 0o700)
    try:
        _fill(fresh, path, fleet, nodes, roster_days)
        os.rename(fresh, path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _fill(
    fresh: str, path: str, fleet: str, nodes: Mapping[str, Endpoint], roster_days: int
) -> None:
    for name in ("hosts", "etcd"):
        os.mkdir(os.path.join(fresh, name), 0o700)
    root = Ed25519PrivateKey.generate()
    pem = root.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    authority = certificates.make_authority(fleet)
    days = certificates.CA_DAYS  # as long as the CA itself
    operator = certificates.issue(authority, "root", days=days)
    files = {
        "root.key": pem, "ca.crt": authority[0], "ca.key": authority[1],
        "operator.crt": operator[0], "operator.key": operator[1],
    }  # fmt: skip
    for name, node in nodes.items():
        certificate, key = certificates.issue(authority, name, hosts=[node.host], days=days)
        files |= {
            f"etcd/{name}.crt": certificate, f"etcd/{name}.key": key,
            f"etcd/{name}.yml": node_text(os.path.abspath(path), fleet, name, nodes).encode(),
        }  # fmt: skip
    settings = config.written({"fleet": fleet, "roster-days": roster_days}) + "[nodes]\n"
    settings += config.written({name: str(node) for name, node in nodes.items()})
    for name, data in {**files, "fleet.toml": settings.encode()}.items():
        _write(os.path.join(fresh, name), data)
    empty = Roster(fleet, 0, 0, {}, {})
    Directory(fresh).save_roster(empty)


def node_text(path: str, fleet: str, name: str, nodes: Mapping[str, Endpoint]) -> str:
    """Return the text of a node's configuration (etcd --config-file)."""
    node = nodes[name]
    peers = ",".join(f"{each}={_peer_url(node)}" for each, node in nodes.items())
    security = (
        f"  cert-file: {path}/etcd/{name}.crt\n  key-file: {path}/etcd/{name}.key\n"
        f"  trusted-ca-file: {path}/ca.crt\n  client-cert-auth: true\n"
    )
    return (
        f"# A node of fleet {fleet}: etcd --config-file\n"
        f"name: {name}\ndata-dir: {path}/etcd/{name}.etcd\n"
        f"listen-client-urls: {node}\n"
        f"advertise-client-urls: {node}\n"
        f"listen-peer-urls: {_peer_url(nodes[name])}\n"
        f"initial-advertise-peer-urls: {_peer_url(nodes[name])}\n"
        f"initial-cluster: {peers}\ninitial-cluster-token: secretd-{fleet}\n"
        "auto-compaction-mode: revision\nauto-compaction-retention: '10000'\n"
        f"quota-backend-bytes: {2 << 30}\n"
        f"client-transport-security:\n{security}peer-transport-security:\n{security}"
    )


def _peer_url(node: Endpoint) -> str:
    return str(node._replace(port=node.port + 1))


def _write(path: str, data: bytes) -> None:
    """Write a file for its owner only; it appears whole."""
    fresh = f"{path}.new"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.rename(fresh, path)
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
