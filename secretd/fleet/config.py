# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file by which a host knows its fleet: fleet.toml, which `secretd-fleet enrol` makes.

Paths in it are relative to its directory.
"""

import base64
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from secretd.crypto.record import Malformed, verify
from secretd.crypto.roster import Roster, read_roster
from secretd.errors import UsageError
from secretd.fleet.etcd import Endpoint, Etcd, endpoint, tls

DEFAULT_PATH: Final = "/etc/secretd/fleet/fleet.toml"


class Config(msgspec.Struct, forbid_unknown_fields=True):
    """A host's part of a fleet.

    ``fleet``, ``host``: their names. ``root``: the key that signs rosters, in base64.
    ``endpoints``: etcd's nodes, as https://HOST:PORT. ``ca``, ``certificate``, ``key``: paths of
    PEM files. ``socket``: secretd's, if not the default. ``metrics``: the file in which
    Prometheus' node exporter looks for figures, if any.
    """

    fleet: str
    host: str
    root: str
    endpoints: list[str]
    ca: str
    certificate: str
    key: str
    socket: str | None = None
    metrics: str | None = None

    @property
    def nodes(self) -> list[Endpoint]:
        """The endpoints."""
        return [endpoint(each) for each in self.endpoints]

    def etcd(self) -> Etcd:
        """Return a client; each new connection reads the certificate's file."""
        return Etcd(self.nodes, lambda: tls(self.ca, self.certificate, self.key))

    def checked_roster(self, data: bytes | None) -> Roster:
        """Return a roster that the root has signed. Raises UsageError."""
        if data is None:
            raise UsageError(f"etcd has no roster of fleet '{self.fleet}'")
        try:
            verify(data, base64.b64decode(self.root))
            roster = read_roster(data)
        except Malformed as error:
            raise UsageError(f"the roster in etcd is not the fleet's: {error}") from None
        if roster.fleet != self.fleet:
            raise UsageError(f"the roster in etcd is of fleet '{roster.fleet}'")
        return roster


def read(path: str) -> Config:
    """Return what a file says. Raises UsageError, and OSError for what cannot be read."""
    with open(path, "rb") as file:
        try:
            found = msgspec.convert(tomllib.load(file), Config)
        except (ValueError, msgspec.ValidationError) as error:
            raise UsageError(f"{path}: {error}") from None
    here = os.path.dirname(os.path.abspath(path))
    for name in ("ca", "certificate", "key", "socket", "metrics"):
        value = getattr(found, name)
        if value is not None:
            setattr(found, name, os.path.join(here, value))
    try:
        if not found.nodes:
            raise UsageError(f"{path}: 'endpoints' is empty")
        root = base64.b64decode(found.root, validate=True)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    if len(root) != 32:
        raise UsageError(f"{path}: 'root' expects a key of 32 bytes in base64")
    return found


def extras(path: str) -> dict[str, str]:
    """Return the lines that were added to a file by hand."""
    with open(path, "rb") as file:
        found = tomllib.load(file)
    return {name: str(found[name]) for name in ("socket", "metrics") if name in found}


def written(values: Mapping[str, str | int | Sequence[str]]) -> str:
    """Return the text of a TOML file; JSON's strings and lists are TOML's, too."""
    return "".join(
        f"{name} = {json.dumps(value if isinstance(value, (str, int)) else list(value))}\n"
        for name, value in values.items()
    )
