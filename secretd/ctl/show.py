# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb show: everything that is known about one secret, except its value."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

from secretd import client as api
from secretd.client import GrantInfo, SecretInfo, Usage
from secretd.ctl.access import grant_members, whom
from secretd.ctl.audit_records import Wanted, is_readable_file, peer_words, records, time_of
from secretd.ctl.connection import client_of
from secretd.ctl.globs import pattern
from secretd.ctl.identities import named_identity
from secretd.ctl.output import Common, at_and_in, count, duration
from secretd.ctl.secrets import secret_members
from secretd.ctl.verb import PATH, argument, option, verb
from secretd.errors import UsageError


@verb(
    "show", argument("object_id", metavar="ID", completes="secrets"),
    option("--audit", "file", type=PATH, metavar="FILE",
           help="the audit file (default: the one that secretd writes, if it may be read)"),
    examples=("secretctl show disk0",),
)  # fmt: skip
def show(common: Common, object_id: str, file: str | None) -> None:
    """Show what is known about a secret, except its value.

    When and by whom it was added, its size, protection and lifetime, its grants and last reads.
    """
    # 1. What secretd knows; a client may not ask for grants and usage.
    usage: Usage | None = None
    grants: list[GrantInfo] = []
    with client_of(common) as client:
        info = client.info(object_id)
        if info is None:
            raise UsageError(f"No secret with id '{object_id}'")
        with contextlib.suppress(api.ExecuteError):
            usage = client.usage(info.version or object_id)
            grants = client.grants(secret=object_id)
    # 2. What the audit knows.
    path = file if file is not None else (usage.audit if usage is not None else "")
    added, last = None, None
    if file is not None or is_readable_file(path):
        added, last = _from_audit(path, object_id)
    if common.json:
        print(json.dumps(_members(info, usage, grants, added)))
    else:
        print("\n".join(_lines(info, usage, grants, added, last)))


Record = dict[str, Any]


def _from_audit(path: str, object_id: str) -> tuple[Record | None, Record | None]:
    """Return the records of the latest addition of a secret, and of its last release."""
    added, last = None, None
    for record in records(path, Wanted(ids=pattern(object_id))):
        if record["event"] == "add":
            added, last = record, None
        elif record["event"] in ("read", "seal", "credential") and record.get("decision") != "deny":
            last = record
    return added, last


def _members(
    info: SecretInfo, usage: Usage | None, grants: list[GrantInfo], added: Record | None
) -> dict[str, object]:
    members: dict[str, object] = secret_members(info)
    if usage is not None:
        members |= {
            "uid": usage.uid, "releases": usage.releases, "last-time": usage.last_time,
            "last-peer": usage.last_peer, "grants": [grant_members(each) for each in grants],
        }  # fmt: skip
    if added is not None:
        members |= {"added": added.get("time"), "added-by": added.get("peer")}
    return {name: value for name, value in members.items() if value is not None}


def _lines(
    info: SecretInfo,
    usage: Usage | None,
    grants: list[GrantInfo],
    added: Record | None,
    last: Record | None,
) -> Iterator[str]:
    yield info.id
    yield f"  type      {info.qom_type}, {count(info.size, 'byte')}, in {info.memory} memory"
    if info.version:
        yield f"  version   {info.version}; 'secretctl rotate {info.id} --status' says more"
    # 1. Its beginning and end.
    if added is not None:
        yield f"  added     {_clock(time_of(added))} by {peer_words(added.get('peer'))}"
    elif usage is not None:
        yield f"  added     by {named_identity(f'uid:{usage.uid}')}"
    left = info.expires_in
    yield f"  expires   {'never' if left is None else at_and_in(left)}"
    # 2. Its readers.
    if usage is None:
        return
    if usage.releases:
        since = f"{count(usage.releases, 'time')} since secretd started"
        when = "" if usage.last_time is None else f", last {_clock(usage.last_time)}"
        yield f"  read      {since}{when} by {peer_words(usage.last_peer)}"
    elif last is not None:
        yield (
            f"  read      last {_clock(time_of(last))} by {peer_words(last.get('peer'))}, before "
            "secretd started"
        )
    else:
        yield "  read      not since secretd started"
    for number, grant in enumerate(grants):
        title = "grants" if number == 0 else ""
        limits = ""
        if grant.reads_left is not None:
            limits += f", {count(grant.reads_left, 'read')} left"
        if grant.expires_in is not None:
            limits += f", ends in {duration(grant.expires_in)}"
        pattern_words = "" if grant.secret == info.id else f" (of '{grant.secret}')"
        yield f"  {title:<9} {grant.id}{pattern_words}: {whom(grant)}{limits}"
    if not grants:
        yield f"  grants    none; 'secretctl grant {info.id} --to WHO' adds one"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
