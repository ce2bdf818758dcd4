# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb audit: verify checks audit files, and show prints their records for people."""

import json
import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from secretd.ctl.audit_records import Wanted, audit_lines, peer_words, records, time_of
from secretd.ctl.connection import client_of
from secretd.ctl.globs import pattern
from secretd.ctl.identities import identities
from secretd.ctl.output import Common, note
from secretd.ctl.times import moment
from secretd.ctl.verb import PATH, WrongUsage, argument, flag, option, verb
from secretd.errors import UsageError
from secretd.memory.arena import SCRATCH_WINDOW, Arena
from secretd.memory.level import choose_level

if TYPE_CHECKING:
    from secretd.audit import chain

_KEY_BYTES: Final = 1 << 20


@verb(
    "audit", argument("action", type=("verify", "show")),
    argument("files", nargs=-1, required=True, type=PATH),
    option(
        "--key", "key_id", metavar="ID", help="the secret that --audit-key named",
        completes="secrets",
    ),
    option("--key-file", metavar="FILE", type=PATH, help="a file that holds it"),
    flag("--continues", help="the records before the first FILE are elsewhere"),
    flag("--live", help="ask secretd whether records are missing at the end"),
    option("--id", "object_id", metavar="ID", completes="secrets",
           help="show: only records of this id or pattern"),
    option("--peer", metavar="WHO", help="show: only records of this unit, user, uid or pid"),
    option("--event", metavar="NAME", help="show: only records of this event, such as read"),
    option("--since", metavar="TIME", help="show: only records from 2h, 18:00 or 2030-12-24 on"),
    examples=(
        "secretctl audit verify /var/log/secretd/audit.log --live",
        "secretctl audit show /var/log/secretd/audit.log --id disk0 --since 2h",
    ),
)  # fmt: skip
def audit(
    common: Common,
    *,
    action: str,
    files: tuple[str, ...],
    key_id: str | None,
    key_file: str | None,
    continues: bool,
    live: bool,
    object_id: str | None,
    peer: str | None,
    event: str | None,
    since: str | None,
) -> int:
    """Verify an audit file, or show its records.

    A verified file is complete and unchanged. FILES are those of one chain, the oldest first, and
    may be compressed with gzip. The exit status of verify is 1 if anything is wrong.
    """
    filters = (object_id, peer, event, since)
    if action == "show":
        if key_id is not None or key_file is not None or continues or live:
            raise WrongUsage("show takes none of verify's options")
        fits = None if object_id is None else pattern(object_id)
        start = None if since is None else moment(since)
        if peer is not None and peer.startswith("user:"):
            (peer,) = identities(peer)
        return _show(common, files, Wanted(fits, peer, event, start))
    if any(each is not None for each in filters):
        raise WrongUsage("--id, --peer, --event and --since are options of show")
    if key_id is not None and key_file is not None:
        raise WrongUsage("--key and --key-file exclude each other")
    verify = partial(_verify, common, files, continues=continues, live=live)
    if key_id is not None:
        with client_of(common) as client, client.read(key_id) as key:
            return verify(key.view)
    if key_file is None:
        return verify(None)
    arena = Arena(choose_level(require=False), window=SCRATCH_WINDOW)
    fd = os.open(key_file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with arena.allocate(min(os.fstat(fd).st_size, _KEY_BYTES) or 1) as buffer:
            return verify(buffer.view[: os.readv(fd, [buffer.view])])
    finally:
        os.close(fd)
        arena.close()


def _show(common: Common, files: tuple[str, ...], wanted: Wanted) -> int:
    """Print records, a line for each; the newest is last."""
    shown = False
    for path in files:
        for record in records(path, wanted):
            shown = True
            print(json.dumps(record) if common.json else _described(record))
    if not shown and not common.json:
        note("no record matches")
    return 0


def _described(record: dict[str, Any]) -> str:
    """Return a record as a line for people; control characters are escaped."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_of(record)))
    refused = record.get("decision") == "deny"
    event = f"{record['event']} refused" if refused else str(record["event"])
    what = str(record.get("id") or record.get("credential") or "-")
    line = f"{clock}  {event:<16}  {what:<20}  {peer_words(record.get('peer'))}"
    more = [
        f"{name} {record[name]}"
        for name in ("rule", "reason", "count", "size", "version", "objects", "dropped")
        if name in record
    ]
    line += f"  ({', '.join(more)})" if more else ""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _verify(
    common: Common,
    files: tuple[str, ...],
    key: memoryview | None,
    *,
    continues: bool,
    live: bool,
) -> int:
    written = None
    if live:
        # First, so that records written meanwhile do not count as missing.
        with client_of(common) as client:
            written = client.stat("audit-records")
    from secretd.audit import chain  # imported late: only this verb needs it

    verification = chain.Verification(key, continues=continues)
    found = [finding for path in files for finding in _findings(path, verification)]
    last = verification.last
    if last is None and not found:
        print("no audit record was found", file=sys.stderr)
        return 1
    if verification.unkeyed():
        found.append("no record is under the key")
    notes = []
    if last is not None:
        stamp, event = (ascii(last.members.get(name)).strip("'") for name in ("time", "event"))
        notes.append(
            f"{verification.records} records; the last is record {last.number} of {stamp}: {event}"
        )
        if written is None:
            if event not in chain.LAST_EVENTS:
                notes.append(
                    "it has no stop record: secretd is running (--live asks it), or the file was "
                    "truncated"
                )
        elif written > last.number:
            found.append(
                f"secretd has written {written}: those after {last.number} are missing at the end"
            )
        else:
            with client_of(common) as client:
                written = client.stat("audit-records")
            if last.number > written:
                found.append(f"secretd has written {written}: later ones are forged")
    if common.json:
        number = None if last is None else last.number
        print(
            json.dumps(
                {"records": verification.records, "last": number, "findings": found, "notes": notes}
            )
        )
    else:
        print("\n".join([*found, *notes]))
    return 1 if found else 0


def _findings(path: str, verification: "chain.Verification") -> list[str]:
    """Return the faults of a file."""
    found = []
    try:
        found += [f"{path}:{f.number}: {f.words}" for f in verification.findings(audit_lines(path))]
    except UsageError as error:
        found.append(str(error))
    return found
