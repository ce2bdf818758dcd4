# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb store: secrets that survive a reboot, from the first step to the last.

secretd keeps the store and opens it with an ordinary secret, the key. This module makes that key,
seals it for recipients (ctl.recipients), and brings it back.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from typing import Final, cast

from secretd import client as api
from secretd import paths
from secretd.client import SyncClient
from secretd.ctl.connection import client_of
from secretd.ctl.output import REFUSED, Common, agreed, confirm, count, done, note, warn
from secretd.ctl.recipients import KEY_BYTES, KINDS, Kind, Recipients, Sealing
from secretd.ctl.store_keys import (
    DeclaredStore,
    bring_key,
    declared_store,
    find_store,
    recipient,
    rekey,
)
from secretd.ctl.verb import PATH, WrongUsage, argument, flag, option, verb
from secretd.errors import UsageError

STORE: Final = "store"
KEY: Final = "store.key"
SYSTEMS_STORE: Final = "/var/lib/secretd/store"
"""The store of the system's unit, whose key secretd-unlock.service brings."""

DECLARATION: Final = "store.json"
"""The file in the directory of objects that declares the store at each start."""

_ACTIONS: Final = (
    "init", "status", "unlock", "verify", "backup", "rekey", "destroy", "recipient",
)  # fmt: skip


@verb(
    "store", argument("action", type=_ACTIONS),
    argument("words", nargs=-1, metavar="[WORD]..."),
    flag("--systemd", help="init: seal the key for this machine (systemd-creds)"),
    option("--age", metavar="KEY", multiple=True, help="init: seal the key for this age recipient"),
    option("--secrets", metavar="PATTERN", default="*", help="init: the ids to keep (default: *)"),
    option("--with-key", metavar="KIND", help="systemd: host, tpm2, host+tpm2 or auto"),
    option("--tpm2-pcrs", metavar="PCRS", help="systemd: the PCRs that must not change"),
    option("--tpm2-device", metavar="DEVICE", help="systemd: the TPM to use"),
    option("--identity", metavar="FILE", type=PATH, help="age: the file with the private key"),
    option("--file", metavar="FILE", type=PATH, help="unlock: a file that holds the key"),
    flag("--stdin", help="unlock: read the key from standard input"),
    flag("--data", help="rekey: encrypt everything anew, too"),
    flag("--yes", help="destroy, recipient remove: do not ask"),
    examples=(
        "secretctl store init --systemd --age age1…",
        "secretctl store status",
        "age -d -i key.txt recipients/age | secretctl store unlock --stdin",
        "secretctl store recipient add age age1… --identity key.txt",
        "secretctl store recipient list|test|remove systemd|age",
        "secretctl store backup /backup/secretd.db",
        "secretctl store rekey --data",
    ),
)  # fmt: skip
def store(
    common: Common,
    *,
    action: str,
    words: tuple[str, ...],
    systemd: bool,
    age: tuple[str, ...],
    secrets: str,
    with_key: str | None,
    tpm2_pcrs: str | None,
    tpm2_device: str | None,
    identity: str | None,
    file: str | None,
    stdin: bool,
    data: bool,
    yes: bool,
) -> int:
    """Keep secrets over a reboot, in a store on disk.

    'init [DIR]' makes a store and its key, and seals the key for recipients, which bring it back:
    systemd without a person, age by hand. 'unlock' opens the store, 'verify' reads all of it,
    'backup FILE' copies it, 'rekey' replaces its key, and 'destroy' ends it. secretd opens it at
    its start if the key is there; the unit secretd-unlock.service brings the key.
    """
    given = (("--with-key", with_key), ("--tpm2-pcrs", tpm2_pcrs), ("--tpm2-device", tpm2_device))
    how = Sealing(age, tuple(f"{n}={value}" for n, value in given if value is not None), identity)
    if action == "recipient":
        return recipient(common, words, how, yes=yes)
    most = 1 if action in ("init", "backup") else 0
    if len(words) > most or (action == "backup" and not words):
        raise WrongUsage(f"store {action} takes {('no argument', 'one argument')[most]}")
    if action == "init":
        kinds = [kind for kind, wanted in zip(KINDS, (systemd, age), strict=True) if wanted]
        return _init(common, words[0] if words else default_directory(), secrets, kinds, how)
    if action == "status":
        return _status(common)
    if action == "unlock":
        return _unlock(common, file, how, stdin=stdin)
    with client_of(common) as client:
        found = declared_store(client)
        if action == "verify":
            rows = _rows(client.execute("secret-store-verify", {"id": found.id}))
            if not common.json:
                print(f"{count(rows, 'row')} opened, and no other is missing")
            done(common, rows=rows)
        elif action == "backup":
            _backup(common, client, found, words[0])
        elif action == "rekey":
            rekey(common, client, found, how, data=data)
        else:
            return _destroy(common, client, found, yes=yes)
    return 0


def default_directory() -> str:
    """Return the directory of a new store: the state directory of the system's unit, or of this
    user.
    """
    if os.getuid() == 0:
        return SYSTEMS_STORE
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(home, "secretd", "store")


def _is_the_systems(socket: str) -> bool:
    """Return True for the daemon of the system's unit."""
    return os.getuid() == 0 and socket == paths.control_path()


def _rows(reply: object) -> int:
    return cast("dict[str, int]", reply)["rows"]


# --- init


def _init(common: Common, directory: str, pattern: str, kinds: Sequence[Kind], how: Sealing) -> int:
    if not kinds:
        raise WrongUsage(
            "store init needs a recipient that brings the key back after a reboot: --systemd, "
            "--age KEY, or better both"
        )
    path = os.path.abspath(directory)
    with client_of(common) as client:
        present = find_store(client)
        if present is not None:
            raise UsageError(f"secretd has a store already: {present.path}")
        if os.path.lexists(os.path.join(path, "store.db")):
            raise UsageError(f"{path} has a store already; docs/howto/recover.md opens it")
        if "systemd" in kinds and _is_the_systems(client.path) and path != SYSTEMS_STORE:
            raise UsageError(
                f"secretd-unlock.service brings the key of {SYSTEMS_STORE} only; leave DIR out"
            )
        if os.getuid() != 0:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        client.generate(KEY, KEY_BYTES)
        try:
            _declare(client, path, pattern)
            unsure = [kind for kind in kinds if not Recipients(path).add(client, KEY, kind, how)]
        except BaseException:
            _undo(client, path)
            raise
        rows = declared_store(client).rows
    declared = _declare_for_good(client.path, path, pattern)
    done(common, path=path, recipients=list(kinds), rows=rows, declared=declared)
    if common.json:
        return 0
    print(f"made the store {path}; it keeps {'all secrets' if pattern == '*' else pattern}")
    for kind in kinds:
        tried = (
            "not tried yet: store recipient test age --identity FILE" if kind in unsure else "tried"
        )
        print(f"sealed its key for {kind} ({tried})")
    if declared is None:
        pair = f"path={path},keyid={KEY}{'' if pattern == '*' else f',secrets={pattern}'}"
        note(f"secretd does not know it after a restart; start it with "
             f"--object secret-store,id={STORE},{pair}")  # fmt: skip
    if len(kinds) == 1:
        warn("it has one recipient; add another kind with 'secretctl store recipient add'")
    return 0


def _declare(client: SyncClient, path: str, pattern: str) -> None:
    options: dict[str, object] = {"path": path, "keyid": KEY, "create": True}
    if pattern != "*":
        options["secrets"] = pattern
    client.execute("object-add", {"qom-type": "secret-store", "id": STORE, **options})
    client.execute("secret-store-unlock", {"id": STORE})


def _undo(client: SyncClient, path: str) -> None:
    """Leave nothing of a store that could not be made; what secretd has stays in memory."""
    for object_id in (KEY, STORE):
        _try(client, "object-del", object_id)
    while _try(client, "object-del", STORE) and find_store(client) is not None:
        pass  # it is in use until its files are closed
    Recipients(path).remove_all()
    for name in ("store.db", "store.db-wal", "tombstones"):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(path, name))
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _try(client: SyncClient, command: str, object_id: str) -> bool:
    """Execute a command; return True if it failed."""
    try:
        client.execute(command, {"id": object_id})
    except api.ExecuteError:
        return True
    return False


def _declare_for_good(socket: str, path: str, pattern: str) -> str | None:
    """Write the declaration that the system's unit reads at its start; return its file, None for
    another daemon.
    """
    if not _is_the_systems(socket):
        return None
    declaration = {"qom-type": "secret-store", "id": STORE, "path": path, "keyid": KEY}
    if pattern != "*":
        declaration["secrets"] = pattern
    os.makedirs(paths.OBJECTS_DIR, exist_ok=True)
    file = os.path.join(paths.OBJECTS_DIR, DECLARATION)
    with open(file, "w") as opened:
        opened.write(json.dumps(declaration, indent=2) + "\n")
    return file


# --- status, unlock


def _status(common: Common) -> int:
    with client_of(common) as client:
        found = declared_store(client)
    try:
        kinds: list[Kind] | None = found.recipients.present()
    except UsageError:
        kinds = None  # another user's
    if common.json:
        print(json.dumps(found._asdict() | {"recipients": kinds}))
        return 0
    print(f"{found.id}: {found.state}" + (f" ({found.reason})" if found.reason else ""))
    print(f"path        {found.path}")
    print(f"keeps       {found.secrets}")
    print(f"key         {found.keyid}")
    if found.state == "open":
        print(f"holds       {count(found.rows, 'row')} after {count(found.sequence, 'change')}")
    shown = "only root or its owner can see them" if kinds is None else ", ".join(kinds) or "none"
    print(f"recipients  {shown}")
    return 0 if found.state == "open" else REFUSED


def _unlock(common: Common, file: str | None, how: Sealing, *, stdin: bool) -> int:
    if file is not None and stdin:
        raise WrongUsage("--file and --stdin exclude each other")
    with client_of(common) as client:
        found = declared_store(client)
        brought = False
        given = file is not None or stdin or how.identity is not None
        if found.state != "open" and (given or client.info(found.keyid) is None):
            bring_key(client, found, file, how, stdin=stdin)
            brought = True
        try:
            client.execute("secret-store-unlock", {"id": found.id})
        except api.ExecuteError:
            if brought:
                client.delete(found.keyid)
            raise
        found = declared_store(client)
    confirm(common, f"the store {found.path} is open, and has {count(found.rows, 'row')}")
    done(common, id=found.id, state=found.state, rows=found.rows)
    return 0


# --- backup, destroy


def _backup(common: Common, client: SyncClient, found: DeclaredStore, file: str) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        size = client.backup_store(found.id, fd)
        os.fsync(fd)
    except BaseException:
        os.unlink(file)
        raise
    finally:
        os.close(fd)
    confirm(common, f"wrote {count(size, 'byte')} to {file}; the same recipients open it")
    done(common, file=file, size=size)


def _destroy(common: Common, client: SyncClient, found: DeclaredStore, *, yes: bool) -> int:
    what = f"{count(found.rows, 'row')} in {found.path}"
    if not yes and not agreed(f"Destroy {what}, and wipe these secrets? Nothing brings them back."):
        return REFUSED
    client.execute("secret-store-destroy", {"id": found.id})
    found.recipients.remove_all()
    _try(client, "object-del", found.keyid)
    _try(client, "object-del", found.id)
    file = os.path.join(paths.OBJECTS_DIR, DECLARATION)
    if _is_the_systems(client.path) and os.path.exists(file):
        os.unlink(file)
    confirm(common, f"destroyed {what}")
    done(common, path=found.path)
    return 0
