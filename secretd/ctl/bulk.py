# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs for many secrets: import and export.

import and export use a line of JSON for each secret, which has the arguments of QEMU's object-add.
Nothing is exported in clear.
"""

import json
import os
from collections import deque
from collections.abc import Callable
from typing import Final

from secretd import client as api
from secretd.client import SyncClient
from secretd.client.batch import Batch
from secretd.client.channel import Lost, Message
from secretd.ctl.connection import client_of
from secretd.ctl.import_lines import LINE_BYTES, decoded, lines
from secretd.ctl.output import Common, done, fail, progress
from secretd.ctl.verb import PATH, argument, flag, option, verb
from secretd.errors import UsageError

KEY_BYTES: Final = 32
"""Bytes of an AES-256 key."""

BATCH_BYTES: Final = 128 << 10
"""Locked memory for the lines that are sent together."""


@verb(
    "import",
    argument("file", default="-", type=PATH),
    flag("--skip-existing", help="skip secrets that exist already"),
    examples=(
        "secretctl import secrets.jsonl",
        "secretctl --socket old.sock export --keyid master | secretctl import",
    ),
)
def import_(common: Common, file: str, skip_existing: bool) -> int:
    """Add many secrets from lines of JSON.

    The lines come from FILE or standard input. A line has the members of object-add: id, data, and
    optionally format, keyid and iv; and expires-in, in seconds. 'export' writes such lines. The
    first refused line ends the import and is named; the lines before it are added, and none after
    it. If the connection is lost, the lines that may be added are named; --skip-existing goes on.
    """
    fd = 0 if file == "-" else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _import(common, file, fd, skip_existing=skip_existing)
    finally:
        if fd:
            os.close(fd)


def _import(common: Common, file: str, fd: int, *, skip_existing: bool) -> int:
    with (
        client_of(common) as client,
        client.buffer(2 * LINE_BYTES) as buffer,
        client.buffer(BATCH_BYTES) as outgoing,
        progress("importing", None) as step,
    ):
        adding = _Import(client, client.batch(outgoing), step, skip_existing=skip_existing)
        wrong: UsageError | None = None
        try:
            try:
                for number, line in enumerate(lines(fd, buffer), 1):
                    adding.add(line, f"{file}:{number}")
            except UsageError as error:
                wrong = error  # the lines before it are added
            adding.finish()
        except _RefusedError as refused:
            adding.undo_later()
            return fail(f"{refused} ({adding.added} added before it)")
        except Lost as error:
            return fail(f"{file}: {adding.unanswered(error)}")
    if wrong is not None:
        raise wrong
    if not adding.added and not adding.skipped:
        return fail(f"{file}: it has no line with a secret, so nothing was added")
    if common.json:
        done(common, added=adding.added, skipped=adding.skipped)
    else:
        skipped = f", {adding.skipped} exist already" if adding.skipped else ""
        print(f"{adding.added} added{skipped}")
    return 0


class _RefusedError(Exception):
    """The first line that secretd refused, and why."""


class _Import:
    """Adds the secrets of lines, several under way at a time.

    ``added``, ``skipped``: the number of lines with that result so far.
    """

    def __init__(
        self, client: SyncClient, batch: Batch, step: Callable[[], None], *, skip_existing: bool
    ) -> None:
        self.added = self.skipped = 0
        self._client = client
        self._batch = batch
        self._step = step
        self._skip_existing = skip_existing
        self._waiting: deque[tuple[str, str]] = deque()  # the lines without a reply, and their ids

    def add(self, line: memoryview, where: str) -> None:
        """Add the secret of a line. Raises UsageError, _RefusedError or Lost.

        Nothing of a line that raises UsageError was sent.
        """
        if not line:
            self._step()
            return
        found = decoded(line, where)
        members = {"qom-type": "secret", "id": found.id}
        for name in ("format", "keyid", "iv"):
            value = getattr(found, name)
            if value is not None:
                members[name] = value
        head = json.dumps({"execute": "object-add", "arguments": members}).encode()
        # The data goes from one locked buffer into the other.
        replies = self._batch.put((head[:-2], b', "data": ', memoryview(found.data), b"}}\n"))
        self._waiting.append((where, found.id))
        for reply in replies:
            self._settle(reply)
        if found.expires_in is not None:
            self._expire(where, found.id, found.expires_in)

    def _expire(self, where: str, object_id: str, seconds: int) -> None:
        """Limit the lifetime of the latest secret, once it is known to be added."""
        before = self.skipped
        self.finish()
        if self.skipped == before:
            try:
                self._client.expire(object_id, seconds)
            except api.ExecuteError as error:
                self.added -= 1
                self._client.delete(object_id)
                raise _RefusedError(f"{where}: {error}") from None

    def finish(self) -> None:
        """Wait for all replies. Raises _RefusedError or Lost."""
        for reply in self._batch.finish():
            self._settle(reply)

    def _settle(self, reply: Message) -> None:
        where, _ = self._waiting.popleft()
        self._step()
        if "error" not in reply:
            self.added += 1
            return
        words = str(reply["error"].get("desc"))
        if not (self._skip_existing and "duplicate property" in words):
            raise _RefusedError(f"{where}: {words}")
        self.skipped += 1

    def undo_later(self) -> None:
        """Delete the secrets of lines after the refused one, which were under way already."""
        later = []
        for reply in self._batch.outstanding():
            _, object_id = self._waiting.popleft()
            if "error" not in reply:
                later.append(object_id)
        for object_id in later:
            self._client.delete(object_id)

    def unanswered(self, error: Lost) -> str:
        """Return the words about a connection that was lost with lines under way."""
        first, last = self._waiting[0][0], self._waiting[-1][0]
        return f"{error} ({self.added} added before; lines {first} to {last} may be added)"


@verb(
    "export",
    argument("ids", nargs=-1, completes="secrets"),
    option(
        "--keyid",
        metavar="K",
        required=True,
        help="the secret to encrypt them under",
        completes="secrets",
    ),
    examples=("secretctl export --keyid master > sealed.jsonl",),
)
def export(common: Common, ids: tuple[str, ...], keyid: str) -> int:
    """Print many secrets, sealed, as lines of JSON.

    Without IDS all secrets but the sealing key are printed. 'import' reads the lines, also on
    another machine where the key has the same id; each line is also the arguments of QEMU's
    object-add. A secret that cannot be exported is named, the others follow, and the exit status is
    1.
    """
    exported = failed = 0
    with client_of(common) as client:
        every = {s.id: s for s in client.list()}
        key = every.get(keyid)
        if key is None:
            return fail(f"No secret with id '{keyid}'")
        if key.size != KEY_BYTES:
            return fail(
                f"--keyid {keyid}: a key has {KEY_BYTES} bytes, and this secret has {key.size}"
            )
        # An alias has no value of its own; its versions are exported.
        wanted = ids or [i for i, each in every.items() if i != keyid and not each.version]
        with progress("exporting", len(wanted)) as step:
            for object_id in wanted:
                try:
                    sealed = client.seal(object_id, keyid)
                except api.ExecuteError as error:
                    failed += 1
                    fail(f"{object_id}: {error}")
                    step()
                    continue
                line = {
                    "qom-type": "secret", "id": object_id, "data": sealed.data, "format": "base64",
                    "keyid": keyid, "iv": sealed.iv,
                }  # fmt: skip
                left = every[object_id].expires_in if object_id in every else None
                print(json.dumps(line if left is None else line | {"expires-in": left}), flush=True)
                exported += 1
                step()
    if failed:
        return fail(f"{exported} exported, {failed} not: the export is not complete")
    return 0
