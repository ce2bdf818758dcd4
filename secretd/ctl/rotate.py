# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb rotate: replace a secret by another version, with both valid for a while.

Theory of operation. The alias in secretd is the only state: which version is staged, current and
previous, and a note with the phase and the disk (docs/design.md, "Rotation"). So a rotation that
was interrupted anywhere goes on when it is run again.

1. Stage: name the new version, then add it.
2. Apply: make the resource accept it, too (resources).
3. Commit: the alias names it as the current one.
4. Wait until the readers have read it (readers).
5. Retire: take the previous version from the resource, delete it, then forget its name.

Each step may be repeated, and expects the alias as it was. Going back before the commit ends the
new version; after it, the two versions change places, and the other one is retired. Once the
retirement has begun there is no way back.
"""

import contextlib
import json
from collections.abc import Iterator

from secretd import client as api
from secretd.client import AliasInfo, SyncClient
from secretd.ctl.connection import client_of
from secretd.ctl.new_value import Value
from secretd.ctl.output import DONE, Common, note
from secretd.ctl.readers import Patience, Readers
from secretd.ctl.resources import Wanted, absolute, resource_of
from secretd.ctl.rotation import Rotation, agreed_note, no_rotation, note_of
from secretd.ctl.verb import COMMAND, PATH, WrongUsage, argument, flag, option, verb
from secretd.errors import UsageError


@verb(
    "rotate",
    argument("object_id", metavar="ID", completes="secrets"),
    option("--generate", metavar="N", type=int, help="the new value: N random bytes"),
    flag("--text", help="with --generate: as hexadecimal text, as --luks does"),
    option("--file", metavar="FILE", type=PATH, help="the new value: from a file"),
    flag("--prompt", help="the new value: ask for it on the terminal"),
    option("--luks", metavar="DISK", help="a LUKS disk: IMAGE, or qmp=SOCKET,node=NODE"
           "[,secret=ID][,master=ID][,pid=N] of a running QEMU"),
    option("--iter-time", metavar="MS", type=int,
           help="with --luks: how long it takes to try the new passphrase (QEMU's default: 2000)"),
    option("--wait", metavar="S", type=int,
           help="retire the previous version after S seconds at the latest"),
    flag("--no-wait", help="end once the new version is current; the next run retires the other"),
    flag("--restart-units", help="restart units that have not read the new version"),
    flag("--reload-units", help="reload them"),
    flag("--status", help="show the versions, and what each reader has read"),
    flag("--rollback", help="go back to the version before"),
    flag("--apply", help="run the rest of the line to apply the new value"),
    argument("command", nargs=-1, type=COMMAND, metavar="[COMMAND...]"),
    examples=(
        "secretctl rotate disk0 --generate 32 --luks disk0.qcow2",
        "secretctl rotate db --generate 24 --text --restart-units --apply set-password {new}",
        "secretctl rotate db --status",
    ),
    rest_after="--apply",
)  # fmt: skip
def rotate(
    common: Common,
    *,
    object_id: str,
    generate: int | None,
    text: bool,
    file: str | None,
    prompt: bool,
    luks: str | None,
    iter_time: int | None,
    wait: int | None,
    no_wait: bool,
    restart_units: bool,
    reload_units: bool,
    status: bool,
    rollback: bool,
    apply: bool,
    command: tuple[str, ...],
) -> int:
    """Replace a secret by a new version, step by step.

    Stages the new version ID.vN, applies it, makes it the current one, waits until its readers have
    read it, and retires the version before. Interrupted anywhere, it goes on when it is run again
    with the same options. A secret becomes an alias the first time: its readers keep its id.

    Without a source of the new value, a version that was added by hand is taken. With --apply the
    COMMAND runs once the version is staged; {old} and {new} in its words become files with the
    values, and without {new} the new value is its standard input. It may run again, so it should do
    no harm then.
    """
    if sum((generate is not None, file is not None, prompt)) > 1:
        raise WrongUsage("--generate, --file and --prompt exclude each other")
    if apply != bool(command):
        raise WrongUsage("--apply needs a command after it" if apply else "--apply takes a command")
    if restart_units and reload_units:
        raise WrongUsage("--restart-units and --reload-units exclude each other")
    if no_wait and (wait is not None or rollback or restart_units or reload_units):
        raise WrongUsage("--no-wait excludes the options of waiting, and --rollback")
    if status and rollback:
        raise WrongUsage("--status and --rollback exclude each other")
    if text and generate is None:
        raise WrongUsage("--text belongs to --generate")
    if iter_time is not None and (luks is None or iter_time < 1):
        raise WrongUsage("--iter-time belongs to --luks, and takes milliseconds")
    if wait is not None and wait < 0:
        raise WrongUsage("--wait takes seconds from 0 on")
    patience = Patience(wait, "restart" if restart_units else "reload" if reload_units else "")
    with client_of(common) as client:
        if status:
            return _status(common, client, object_id)
        with _going_on(object_id):
            alias = _begun(common, client, object_id, rollback=rollback)
            wanted = Wanted(absolute(luks), iter_time, command)
            agreed = agreed_note(alias, wanted)
            value = Value(generate, text or bool(agreed.luks), file, prompt)
            with resource_of(common, client, object_id, wanted._replace(luks=agreed.luks)) as found:
                rotation = Rotation(common, client, object_id, found, agreed)
                if rollback:
                    rotation.back()
                elif not alias.previous:
                    rotation.forward(value)
                if no_wait:
                    note(f"'{object_id}' is rotated; run rotate again to retire what was before")
                else:
                    rotation.end(Readers(common, client, object_id), patience)
    return DONE


@contextlib.contextmanager
def _going_on(object_id: str) -> Iterator[None]:
    """Say how an interrupted rotation goes on."""
    try:
        yield
    except KeyboardInterrupt:
        note(
            f"interrupted; 'secretctl rotate {object_id} --status' shows where it is: run it again "
            "with the same options to go on, or with --rollback to go back"
        )
        raise


def _is_secret(error: "api.ExecuteError", object_id: str) -> bool:
    """Return True if there is another object than an alias; raise UsageError if there is none."""
    if str(error).startswith("No alias with id"):
        raise UsageError(f"No secret with id '{object_id}'") from None
    return "is not a secret-alias" in str(error)


def _begun(common: Common, client: SyncClient, object_id: str, *, rollback: bool) -> AliasInfo:
    """Return the alias, which a secret becomes the first time. Raises UsageError."""
    try:
        alias = client.alias(object_id)
    except api.ExecuteError as error:
        if not _is_secret(error, object_id):
            raise
        if rollback:
            raise no_rotation(object_id) from None
        client.convert(object_id)
        if not common.json:
            print(f"'{object_id}' is an alias now; its value is {object_id}.v1", flush=True)
        return client.alias(object_id)
    if alias.fault:
        raise UsageError(f"'{object_id}' has no current version: {alias.fault}; add it again first")
    return alias


def _status(common: Common, client: SyncClient, object_id: str) -> int:
    try:
        alias = client.alias(object_id)
    except api.ExecuteError as error:
        if not _is_secret(error, object_id):
            raise
        if common.json:
            print(json.dumps({"id": object_id, "current": None}))
        note(f"'{object_id}' is a secret with one version, and was never rotated")
        return DONE
    if common.json:
        print(json.dumps(alias._asdict()))
        return DONE
    known = {each.id for each in client.list()}
    for name, version in (
        ("current", alias.current), ("staged", alias.staged), ("previous", alias.previous),
    ):  # fmt: skip
        if version:
            print(f"{name:<9} {version}{'' if version in known else '  (there is no such secret)'}")
    found = note_of(alias)
    if found.luks:
        print(f"{'disk':<9} {found.luks}")
    Readers(common, client, object_id).show(alias)
    if found.phase == "retiring":
        note(f"the retirement of '{alias.previous}' has begun: run rotate again to end it")
    elif alias.staged:
        note(f"'{alias.staged}' is not committed: run rotate again to go on, or --rollback")
    elif alias.previous:
        note(f"'{alias.previous}' is not retired: run rotate again to go on, or --rollback")
    return DONE
