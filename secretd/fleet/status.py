# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `secretd-fleet status` shows: what etcd has for each host, and what each host says."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from secretd.crypto.record import Malformed
from secretd.crypto.roster import Roster, digest_of, read_manifest, read_roster
from secretd.fleet.etcd import Etcd, prefix_end
from secretd.fleet.keyspace import Keyspace

SILENT_SECONDS: Final = 900
"""Seconds after which an agent should have been heard again: it says each 5 minutes what it has."""

_STATES: Final = {state: state for state in ("live", "stale", "refused", "none")}


class HostStatus(NamedTuple):
    """A host. ``state``: "current", "behind", "silent" (no ack), or what its secretd says;
    ``reason``: of what is wrong. ``heard``: seconds since its ack, None without one; ``secrets``:
    those that etcd's manifests list.
    """

    host: str
    state: str
    heard: int | None
    secrets: int
    reason: str


async def statuses(etcd: Etcd, keyspace: Keyspace, roster: Roster) -> Sequence[HostStatus]:
    """Return the state of each host of a roster. Raises Refused and Unreachable."""
    kvs = (await etcd.range(keyspace.acks, prefix_end(keyspace.acks))).kvs
    acks = {each.key: each.value for each in kvs}
    shown = []
    for host in sorted(roster.hosts):
        prefix = keyspace.host(host)
        kvs = (await etcd.range(prefix, prefix_end(prefix))).kvs
        values = {each.key: each.value for each in kvs}
        found = {keyspace.publisher_of(host, key): values[key] for key in values}
        number = _number(values.get(keyspace.host_roster(host)))
        manifests = {name: found[name] for name in found if name in roster.publishers}
        shown.append(_status(host, manifests, acks.get(keyspace.ack(host)), number))
    return shown


async def behind(
    etcd: Etcd, keyspace: Keyspace, publisher: str, numbers: Mapping[str, int]
) -> list[str]:
    """Return the hosts that do not say that they have all of a publisher's manifests with these
    numbers, or later ones.
    """
    found = (await etcd.range(keyspace.acks, prefix_end(keyspace.acks))).kvs
    acks = {each.key: each.value for each in found}
    rest = []
    for host, number in numbers.items():
        try:
            said = json.loads(acks.get(keyspace.ack(host), b"{}"))["publishers"][publisher]
            if int(said["number"]) >= number and not said["missing"] and not said["pending"]:
                continue
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            pass
        rest.append(host)
    return rest


def _status(
    host: str, manifests: dict[str, bytes], ack: bytes | None, roster_number: int
) -> HostStatus:
    secrets = 0
    for each in manifests.values():
        try:
            secrets += len(read_manifest(each).ids)
        except Malformed:
            return HostStatus(host, "damaged", None, secrets, "a manifest in etcd is not whole")
    if ack is None:
        return HostStatus(host, "silent", None, secrets, "its agent was never heard")
    try:
        said = json.loads(ack)
        heard = max(0, int(time.time()) - int(said["time"]))
        has = {name: str(each["digest"]) for name, each in said["publishers"].items()}
        missing = sum(int(each["missing"]) for each in said["publishers"].values())
        pending = sum(int(each["pending"]) for each in said["publishers"].values())
        state, number = _STATES[said["state"]], int(said["roster"])
        refused = _shown(str(said.get("refused", "")))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return HostStatus(host, "damaged", None, secrets, "its ack cannot be read")
    if state != "live":
        return HostStatus(host, state, heard, secrets, refused)
    behind = [
        *(["the roster"] if number != roster_number else []),
        *(f"publisher '{name}'" for name, data in manifests.items()
          if has.get(name) != digest_of(data).hex()),
    ]  # fmt: skip
    if behind:
        return HostStatus(host, "behind", heard, secrets, refused or f"in {', '.join(behind)}")
    if missing:
        return HostStatus(host, "behind", heard, secrets, refused or f"{missing} records missing")
    if pending:
        reason = f"{pending} objects are not yet as published, or still in use"
        return HostStatus(host, "behind", heard, secrets, refused or reason)
    if heard > SILENT_SECONDS:
        return HostStatus(host, "silent", heard, secrets, "its agent was not heard for long")
    return HostStatus(host, "current", heard, secrets, refused)


def _shown(text: str) -> str:
    """Return a host's text in printable form, for a terminal."""
    return "".join(each if each.isprintable() else "?" for each in text[:300])


def _number(roster: bytes | None) -> int:
    """Return the number of a host's roster in etcd, 0 for none."""
    try:
        return read_roster(roster or b"").number
    except Malformed:
        return 0
