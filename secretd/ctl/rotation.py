# SPDX-License-Identifier: LGPL-2.1-or-later
"""A rotation as a sequence of steps, and the note with which the alias remembers it.

The verb rotate calls this module. Every change of the alias expects it as this process has last
seen it, note included; so of two processes that rotate one secret, one stops.
"""

import contextlib
import json
from typing import Literal, NamedTuple, get_args

from secretd import client as api
from secretd.client import AliasInfo, SyncClient
from secretd.ctl.new_value import Value
from secretd.ctl.output import Common
from secretd.ctl.readers import Patience, Readers
from secretd.ctl.resources import Resource, Wanted
from secretd.errors import UsageError

Phase = Literal["forward", "applying", "back", "retiring"]


class Note(NamedTuple):
    """What the alias remembers of a rotation: its phase, the LUKS disk, "" for none, and whether a
    command applies the value.

    "applying": the resource may have the new value; "retiring": it may lack the previous one.
    """

    phase: Phase = "forward"
    luks: str = ""
    command: bool = False


def note_of(alias: AliasInfo) -> Note:
    """Return the note of an alias; another program's is taken for none."""
    try:
        members = json.loads(alias.note)
        note = Note(members["phase"], str(members["luks"]), members["command"] is True)
    except (ValueError, KeyError, TypeError):
        return Note()
    return note if note.phase in get_args(Phase) else Note()


def agreed_note(alias: AliasInfo, wanted: Wanted) -> Note:
    """Return the note for a run with some resources: those of a rotation that is under way.

    Raises UsageError if other resources are wanted.
    """
    if not (alias.staged or alias.previous):
        return Note("forward", wanted.luks or "", bool(wanted.words))
    note = note_of(alias)
    if wanted.luks and wanted.luks != note.luks:
        of = f"of the disk '{note.luks}'" if note.luks else "without a disk"
        raise UsageError(f"the rotation of '{alias.id}' that is under way is {of}; end it first")
    committed = alias.previous and note.phase != "applying"
    if note.command and not wanted.words and not committed:
        raise UsageError(
            f"the rotation of '{alias.id}' that is under way applies the value by a command: give "
            "--apply and the command again"
        )
    return note


def no_rotation(object_id: str) -> UsageError:
    """Return the error of going back where there is nothing to go back from."""
    return UsageError(
        f"no rotation of '{object_id}' is under way, so there is no version to go back to"
    )


class Rotation:
    """A rotation of the alias ``object_id``."""

    def __init__(
        self, common: Common, client: SyncClient, object_id: str, resource: Resource, note: Note
    ) -> None:
        self._common = common
        self._client = client
        self._object_id = object_id
        self._resource = resource
        self._note = note
        self._alias = client.alias(object_id)

    # --- forward

    def forward(self, value: Value) -> None:
        """Stage, apply and commit."""
        staged = self._stage(value)
        current = self._alias.current
        if self._note.phase != "applying":
            if self._resource.accepts(staged):
                self._unstage()
                raise UsageError(
                    f"the new value of '{self._object_id}' opens the disk already: it is the "
                    "passphrase of another keyslot"
                )
            self._set("applying")
        self._resource.apply(current, staged)
        self._set("forward", current=staged, staged="", previous=current)
        self._say(f"committed: '{self._object_id}' is {staged}")

    def _stage(self, value: Value) -> str:
        """Return the new version, which exists and is staged then."""
        alias = self._alias
        staged = alias.staged
        if not staged:
            staged = alias.next if value.given else self._added_by_hand(alias)
            self._set("forward", staged=staged)
        if self._client.info(staged) is None:
            try:
                value.add(self._client, staged)
            except BaseException as error:
                if "duplicate property" in str(error):
                    raise UsageError(
                        f"another rotation of '{self._object_id}' is under way: it has added "
                        f"'{staged}'"
                    ) from None
                if not alias.staged:  # else it was staged before, and may be added yet
                    self._unstage()
                raise
        if self._is_same(alias.current, staged):
            self._unstage()
            raise UsageError(
                f"the new value of '{self._object_id}' is the current one, so nothing was rotated"
            )
        self._say(f"staged: {staged}")
        return staged

    def _added_by_hand(self, alias: AliasInfo) -> str:
        """Return the version that exists and is not named yet. Raises UsageError."""
        prefix = f"{self._object_id}.v"
        first = int(alias.current.removeprefix(prefix)) + 1
        numbers = [
            int(number)
            for each in self._client.list()
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
        with self._client.read(one) as first, self._client.read(other) as second:
            return first.view == second.view

    def _unstage(self) -> None:
        """End the staged version: first the secret, then its name."""
        self._delete(self._alias.staged)
        self._set(None, staged="")

    # --- back

    def back(self) -> None:
        """Go back: end a staged version, or let the current and previous one change places."""
        alias, phase = self._alias, self._note.phase
        exists = {each.id for each in self._client.list()}
        if alias.staged:
            if alias.staged in exists and phase == "applying":
                self._resource.undo(alias.staged, alias.current)
            self._unstage()
            self._say(f"rolled back: '{self._object_id}' is {alias.current}, as it was")
        elif alias.previous in exists and phase == "retiring":
            raise UsageError(
                f"the retirement of '{alias.previous}' has begun, so there is no way back; run "
                "rotate again without --rollback to end it"
            )
        elif alias.previous in exists and phase == "forward":
            self._resource.restore(alias.current, alias.previous)
            self._set("back", current=alias.previous, previous=alias.current)
            self._say(f"rolled back: '{self._object_id}' is {alias.previous} again")
        elif not alias.previous:
            raise no_rotation(self._object_id)

    # --- the end

    def end(self, readers: Readers, patience: Patience) -> None:
        """Wait for the readers of the current version, and retire the previous one."""
        alias = self._alias
        if alias.previous:
            if self._note.phase != "retiring":
                readers.wait(patience)
            # Fails if another process has changed the alias during the wait.
            self._set("retiring")
            if self._client.info(alias.previous) is not None:
                self._resource.retire(alias.previous, alias.current)
                self._delete(alias.previous)
            self._set(None, previous="")
            self._say(f"retired: {alias.previous}")
        if self._common.json:
            print(json.dumps({"id": self._object_id, "version": alias.current}))

    # --- steps

    def _set(self, phase: Phase | None, **versions: str) -> None:
        """Change the alias; ``phase``: that of the note from now on, None for no note."""
        self._note = Note() if phase is None else self._note._replace(phase=phase)
        note = "" if phase is None else json.dumps(self._note._asdict())
        try:
            self._client.set_alias(self._alias, note=note, **versions)
        except api.ExecuteError as error:
            if "is not as expected" not in str(error):
                raise
            raise UsageError(
                f"another process has changed the rotation of '{self._object_id}': {error}"
            ) from None
        self._alias = self._client.alias(self._object_id)

    def _delete(self, version: str) -> None:
        with contextlib.suppress(api.ExecuteError):  # it was deleted before
            self._client.delete(version)
        if self._client.info(version) is not None:
            raise UsageError(f"'{version}' was not deleted")

    def _say(self, words: str) -> None:
        if not self._common.json:
            print(words, flush=True)
