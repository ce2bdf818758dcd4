# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb audit verify, which checks audit files."""

import json
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Final

from secretd.ctl.connection import client_of
from secretd.ctl.output import Common
from secretd.ctl.verb import WrongUsage, argument, flag, option, verb
from secretd.memory.arena import SCRATCH_WINDOW, Arena
from secretd.memory.level import choose_level

if TYPE_CHECKING:
    from secretd.audit import chain

_KEY_BYTES: Final = 1 << 20


@verb(
    "audit", argument("action", type=("verify",)),
    argument("files", nargs=-1, required=True),
    option(
        "--key", "key_id", metavar="ID", help="the secret that --audit-key named",
        ids=True,
    ),
    option("--key-file", metavar="PATH", help="a file that holds it"),
    flag("--continues", help="the records before the first FILE are elsewhere"),
    flag("--live", help="ask secretd whether records are missing at the end"),
    examples=("secretctl audit verify /var/log/secretd/audit.log --live",),
)  # fmt: skip
def audit(
    common: Common,
    *,
    action: str,  # noqa: ARG001 - there is only one
    files: tuple[str, ...],
    key_id: str | None,
    key_file: str | None,
    continues: bool,
    live: bool,
) -> int:
    """Verify that an audit file is complete and unchanged.

    FILES are those of one chain, the oldest first. The exit status is 1 if anything is wrong.
    """
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
        time, event = (ascii(last.members.get(name)).strip("'") for name in ("time", "event"))
        notes.append(
            f"{verification.records} records; the last is record {last.number} of {time}: {event}"
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
    with open(path, "rb") as file:
        return [f"{path}:{f.number}: {f.words}" for f in verification.findings(file)]
