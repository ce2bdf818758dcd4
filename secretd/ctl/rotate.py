# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb rotate: replace a secret by another version, with both valid for a while.

Theory of operation. The alias in secretd is the only state: which version is staged, current and
previous says which step is next (docs/design.md, "Rotation"). So a rotation that was interrupted
anywhere goes on when it is run again with the same options.

1. Stage: name the new version, then add it.
2. Apply: make the resource accept it, too (resources).
3. Commit: the alias names it as the current one.
4. Wait until the readers have read it (readers).
5. Retire: take the previous version from the resource, delete it, then forget its name.

Each step may be repeated. Going back before the commit ends the new version; after it, the two
versions change places, and the other one is retired.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import NamedTuple

from secretd import client as api
from secretd.client import AliasInfo, SyncClient
from secretd.ctl.connection import client_of
from secretd.ctl.new_value import Value
from secretd.ctl.output import DONE, Common, note
from secretd.ctl.readers import Patience, Readers
from secretd.ctl.resources import Resource, resource_of
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
    option("--wait", metavar="S", type=int,
           help="retire the previous version after S seconds at the latest"),
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
    wait: int | None,
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
    if status and rollback:
        raise WrongUsage("--status and --rollback exclude each other")
    if text and generate is None:
        raise WrongUsage("--text belongs to --generate")
    value = Value(generate, text or luks is not None, file, prompt)
    patience = Patience(wait, "restart" if restart_units else "reload" if reload_units else "")
    with client_of(common) as client:
        if status:
            return _status(common, client, object_id)
        with resource_of(common, client, object_id, luks, command) as resource:
            rotation = _Rotation(common, client, object_id, resource)
            with _going_on(object_id):
                rotation.begin()
                if rollback:
                    rotation.back()
                elif not rotation.alias.previous:
                    rotation.forward(value)
                rotation.end(Readers(common, client, object_id), patience)
    return DONE


@contextlib.contextmanager
def _going_on(object_id: str) -> Iterator[None]:
    """Say how an interrupted rotation goes on."""
    try:
        yield
    except KeyboardInterrupt:
        note(
            f"the rotation of '{object_id}' is interrupted, and both versions are there: run it "
            "again with the same options to go on, or with --rollback to go back"
        )
        raise


def _is_secret(error: "api.ExecuteError", object_id: str) -> bool:
    """Return True if there is another object than an alias; raise UsageError if there is none."""
    if str(error).startswith("No alias with id"):
        raise UsageError(f"No secret with id '{object_id}'") from None
    return "is not a secret-alias" in str(error)


def _status(common: Common, client: SyncClient, object_id: str) -> int:
    try:
        alias = client.alias(object_id)
    except api.ExecuteError as error:
        if not _is_secret(error, object_id):
            raise
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
    Readers(common, client, object_id).show(alias)
    if alias.staged:
        note(f"'{alias.staged}' is not committed: run rotate again to go on, or --rollback")
    elif alias.previous:
        note(f"'{alias.previous}' is not retired: run rotate again to go on, or --rollback")
    return DONE


class _Rotation(NamedTuple):
    """A rotation of the alias ``object_id``."""

    common: Common
    client: SyncClient
    object_id: str
    resource: Resource

    @property
    def alias(self) -> AliasInfo:
        """The alias as it is now."""
        return self.client.alias(self.object_id)

    def begin(self) -> None:
        """Make sure that there is an alias, and that its current version is there."""
        try:
            alias = self.alias
        except api.ExecuteError as error:
            if not _is_secret(error, self.object_id):
                raise
            self.client.convert(self.object_id)
            self._say(f"'{self.object_id}' is an alias now; its value is {self.object_id}.v1")
            return
        if alias.fault:
            raise UsageError(
                f"'{self.object_id}' has no current version: {alias.fault}; add it again first"
            )

    # --- forward

    def forward(self, value: Value) -> None:
        """Stage, apply and commit."""
        staged = self._stage(value)
        alias = self.alias
        self.resource.apply(alias.current, staged)
        self._set(alias, current=staged, staged="", previous=alias.current)
        self._say(f"committed: '{self.object_id}' is {staged}")

    def _stage(self, value: Value) -> str:
        """Return the new version, which exists and is staged then."""
        alias = self.alias
        staged = alias.staged
        if not staged:
            staged = alias.next if value.given else self._added_by_hand(alias)
            self._set(alias, staged=staged)
        if self.client.info(staged) is None:
            try:
                value.add(self.client, staged)
            except BaseException:
                self._unstage()
                raise
        if self._is_same(alias.current, staged):
            self._unstage()
            raise UsageError(
                f"the new value of '{self.object_id}' is the current one, so nothing was rotated"
            )
        self._say(f"staged: {staged}")
        return staged

    def _added_by_hand(self, alias: AliasInfo) -> str:
        """Return the version that exists and is not named yet. Raises UsageError."""
        prefix = f"{self.object_id}.v"
        first = int(alias.current.removeprefix(prefix)) + 1
        numbers = [
            int(number)
            for each in self.client.list()
            if (number := each.id.removeprefix(prefix)) != each.id and number.isdecimal()
        ]
        found = [f"{prefix}{number}" for number in sorted(numbers) if number >= first]
        if len(found) == 1:
            return found[0]
        words = f"one of {', '.join(found)} is to be staged; remove the others" if found else (
            f"give the new value with --generate N, --file FILE or --prompt, or add it as "
            f"'{alias.next}' first"
        )  # fmt: skip
        raise UsageError(words)

    def _is_same(self, one: str, other: str) -> bool:
        """Compare two versions in locked memory."""
        with self.client.read(one) as first, self.client.read(other) as second:
            return first.view == second.view

    def _unstage(self) -> None:
        """End the staged version: first the secret, then its name."""
        alias = self.alias
        self._delete(alias.staged)
        self._set(alias, staged="")

    # --- back

    def back(self) -> None:
        """Go back: end a staged version, or let the current and previous one change places."""
        alias = self.alias
        exists = {each.id for each in self.client.list()}
        if alias.staged:
            if alias.staged in exists:
                self.resource.restore(alias.staged, alias.current)
                self.resource.retire(alias.staged, alias.current)
            self._unstage()
            self._say(f"rolled back: '{self.object_id}' is {alias.current}, as it was")
        elif alias.previous in exists:
            self.resource.restore(alias.current, alias.previous)
            self._set(alias, current=alias.previous, previous=alias.current)
            self._say(f"rolled back: '{self.object_id}' is {alias.previous} again")
        else:
            raise UsageError(
                f"no rotation of '{self.object_id}' is under way, so there is no version to go "
                "back to"
            )

    # --- the end

    def end(self, readers: Readers, patience: Patience) -> None:
        """Wait for the readers of the current version, and retire the previous one."""
        alias = self.alias
        if alias.previous:
            readers.wait(patience)
            self._retire(alias)
        alias = self.alias
        if self.common.json:
            print(json.dumps({"id": self.object_id, "version": alias.current}))

    def _retire(self, alias: AliasInfo) -> None:
        if self.client.info(alias.previous) is not None:
            self.resource.retire(alias.previous, alias.current)
            self._delete(alias.previous)
        self._set(alias, previous="")
        self._say(f"retired: {alias.previous}")

    # --- steps

    def _set(self, alias: AliasInfo, **versions: str) -> None:
        self.client.set_alias(alias, **versions)

    def _delete(self, version: str) -> None:
        with contextlib.suppress(api.ExecuteError):  # it was deleted before
            self.client.delete(version)
        if self.client.info(version) is not None:
            raise UsageError(f"'{version}' was not deleted")

    def _say(self, words: str) -> None:
        if not self.common.json:
            print(words, flush=True)
