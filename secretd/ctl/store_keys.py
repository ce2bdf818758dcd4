# SPDX-License-Identifier: LGPL-2.1-or-later
"""The key of the store: bringing it, sealing it for recipients, replacing it.

The verb store calls this module; recipients runs the programs.
"""

import os
from typing import Final, NamedTuple, cast

from secretd.client import SyncClient
from secretd.ctl.connection import client_of
from secretd.ctl.output import REFUSED, Common, agreed, confirm, done, fail, note
from secretd.ctl.recipients import KEY_BYTES, KINDS, Kind, Recipients, Sealing, opening
from secretd.ctl.verb import WrongUsage
from secretd.errors import UsageError

_NEXT: Final = ".new"


class DeclaredStore(NamedTuple):
    """The declared store, as query-secret-store describes it."""

    id: str
    path: str
    keyid: str
    secrets: str
    state: str
    reason: str = ""
    rows: int = 0
    sequence: int = 0

    @property
    def recipients(self) -> Recipients:
        """The recipients of its key."""
        return Recipients(self.path)


def find_store(client: SyncClient) -> DeclaredStore | None:
    """Return the store that secretd has, None if there is none."""
    found = cast("list[dict[str, object]]", client.execute("query-secret-store"))
    return DeclaredStore(**found[0]) if found else None  # type: ignore[arg-type]  # its members


def declared_store(client: SyncClient) -> DeclaredStore:
    """Return the store that secretd has. Raises UsageError if there is none."""
    found = find_store(client)
    if found is None:
        raise UsageError("secretd has no store; 'secretctl store init' makes one")
    return found


def bring_key(
    client: SyncClient, found: DeclaredStore, file: str | None, how: Sealing, *, stdin: bool
) -> None:
    """Add the key from a file, standard input, or the first recipient that can be opened here."""
    if file is not None or stdin:
        fd = 0 if file is None else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            client.add(found.keyid, fd, replace=True)
        finally:
            if file is not None:
                os.close(fd)
        return
    present = found.recipients.present()
    kind: Kind | None = "systemd" if "systemd" in present else None
    if how.identity is not None and "age" in present:
        kind = "age"
    if kind is None:
        raise UsageError(
            f"no recipient in {found.recipients.directory} can be opened without a person; give "
            "the key with --stdin or --file, or --identity for age"
        )
    with opening(kind, found.recipients.file(kind), how) as source:
        client.add(found.keyid, source, replace=True)


def recipient(common: Common, words: tuple[str, ...], how: Sealing, *, yes: bool) -> int:
    """Add, test, list or remove a recipient; return the exit status."""
    if not words or words[0] not in ("add", "test", "list", "remove"):
        raise WrongUsage("store recipient takes add, test, list or remove")
    step, *rest = words
    with client_of(common) as client:
        found = declared_store(client)
        recipients = found.recipients
        if step == "list":
            for kind in recipients.present():
                print(f"{kind:<8}  {recipients.file(kind)}") if not common.json else None
            done(common, recipients=recipients.present())
            return 0
        if not rest or rest[0] not in KINDS:
            raise WrongUsage(f"store recipient {step} takes systemd or age")
        kind = next(each for each in KINDS if each == rest[0])
        if step == "remove":
            return _remove(common, recipients, kind, yes=yes)
        how = how._replace(to=(*how.to, *rest[1:]))
        if step == "test":
            if kind not in recipients.present():
                return fail(f"there is no recipient '{kind}'")
            recipients.test(client, found.keyid, kind, how)
            confirm(common, f"recipient '{kind}' opens the store's key")
        elif not recipients.add(client, found.keyid, kind, how):
            note("it was not tried: 'secretctl store recipient test age --identity FILE' does")
        else:
            confirm(common, f"sealed the key for {kind}, and tried it")
        done(common, recipient=kind)
    return 0


def _remove(common: Common, recipients: Recipients, kind: Kind, *, yes: bool) -> int:
    present = recipients.present()
    if kind not in present:
        return fail(f"there is no recipient '{kind}'")
    last = (
        " It is the last one: after a reboot nothing opens the store." if len(present) == 1 else ""
    )
    if not yes and not agreed(f"Remove recipient '{kind}'?{last}"):
        return REFUSED
    recipients.remove(kind)
    done(common, recipient=kind)
    return 0


def rekey(
    common: Common, client: SyncClient, found: DeclaredStore, how: Sealing, *, data: bool
) -> None:
    """Replace the key. Interrupted anywhere, both keys open the store, and it can be run again."""
    recipients, fresh = found.recipients, f"{found.keyid}{_NEXT}"
    kinds = recipients.present()
    if not kinds:
        raise UsageError(
            "the store has no recipient, so nothing would bring the new key back after a reboot; "
            "'secretctl store recipient add' adds one"
        )
    if client.info(fresh) is not None:
        client.delete(fresh)  # of an interrupted change
    client.generate(fresh, KEY_BYTES)
    # 1. The store opens with both; each recipient gets the new one, and is tried.
    client.execute("secret-store-rekey", {"id": found.id, "keyid": fresh})
    for kind in kinds:
        recipients.add(client, fresh, kind, recipients.sealing(kind, how), kind + _NEXT)
    for kind in kinds:
        recipients.rename(kind, kind + _NEXT)
    # 2. The key has its usual id again, and is the only one.
    source, sink = os.pipe2(os.O_CLOEXEC)
    try:
        client.read_into(fresh, sink)
        os.close(sink)
        sink = -1
        client.add(found.keyid, source, replace=True)
    finally:
        os.close(source)
        if sink >= 0:
            os.close(sink)
    client.execute(
        "secret-store-rekey",
        {"id": found.id, "keyid": found.keyid, "data" if data else "only": True},
    )
    client.delete(fresh)
    confirm(common, f"the store has a new key, sealed for {' and '.join(kinds)}")
    done(common, recipients=kinds, data=data)
