# SPDX-License-Identifier: LGPL-2.1-or-later
"""The audit: one line of JSON for each thing that somebody did, or was refused, with a secret.

`Audit` numbers records, links them (chain) and writes them, all of a turn of the loop at once; sinks says
where to. access writes releases and refusals through it, commands the rest. It never
holds a value or a key of a secret; what it is told of is redacted where it comes from, since an id
is all that it takes.

Writing never waits. What cannot be written now is kept up to a limit, then dropped and counted. Under
``--audit-policy=require`` a secret is released only after its record has been written.
"""

import asyncio
import contextlib
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from secretd.audit import chain
from secretd.audit.sinks import Sink, open_sink
from secretd.errors import CommandError, UsageError
from secretd.systemd.stderr_journal import journal_on_stderr

AUDIT_ID_CHARACTERS: Final = 128
"""Characters of an id in a record; the rest is cut."""

AUDIT_BACKLOG: Final = 4096
"""Records that may wait until they can be written; further ones are dropped and counted."""

AUDIT_RETRY_SECONDS: Final = 1.0
"""Seconds until writing is tried again."""

REFUSALS_SECONDS: Final = 60.0
"""Seconds for which the refusals of one uid are counted, after the first, and then told in one record: nobody
can fill the disk for the others."""

REFUSALS_UIDS: Final = 1024
"""Uids whose refusals are counted apart; those of further ones together."""

_OTHERS: Final = -2
_TAIL_BYTES: Final = 64 << 10
_ORDINARY: Final = 0
_REFUSAL: Final = 1
_FIRST: Final = 2  # of a file or a run
_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class Record(Struct, omit_defaults=True, rename="kebab"):
    """A line, behind ``seq``, its number, and ``time``, in UTC. ``size``: bytes; ``peer``: JSON of who did
    it; ``rule``: what decided.
    """

    event: str
    decision: str | UnsetType = UNSET
    rule: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    credential: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    size: int | UnsetType = UNSET
    door: str | UnsetType = UNSET
    peer: Raw | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    count: int | UnsetType = UNSET
    of: int | UnsetType = UNSET
    version: str | UnsetType = UNSET
    objects: int | UnsetType = UNSET
    prev: str | UnsetType = UNSET  # only of the first record of a file or a run
    dropped: int | UnsetType = UNSET  # records that were lost before this one


class Subject:
    """Who did it: by which door, and the peer as JSON, if it is known. ``text``: as members of a record."""

    __slots__ = ("door", "peer", "text")

    def __init__(self, door: str, peer: Mapping[str, object] | None) -> None:
        self.door = door
        self.peer = UNSET if peer is None else Raw(msgspec.json.encode(peer))
        self.text = _json({"door": door} if peer is None else {"door": door, "peer": peer})[1:-1]


class _Window:
    """The refusals of one uid since the last record of them."""

    def __init__(self, peer: Raw | UnsetType) -> None:
        self.peer = peer
        self.count = 0


def _made(event: str, members: dict[str, object]) -> tuple[str, int]:
    """Return a record's text, and which kind of record it is."""
    object_id = members.get("id")
    if isinstance(object_id, str) and len(object_id) > AUDIT_ID_CHARACTERS:
        members["id"] = object_id[:AUDIT_ID_CHARACTERS]
    record = Record(event, **members)  # type: ignore[arg-type]  # its members
    kind = _FIRST if event in chain.FIRST_EVENTS else _ORDINARY
    return _json(record)[1:-1], _REFUSAL if record.decision == "deny" else kind


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _told(window: _Window) -> tuple[str, dict[str, object]]:
    count, window.count = window.count, 0
    return "refusals", {"decision": "deny", "peer": window.peer, "count": count}


class Audit:
    """The records of this process, and how they follow those of the one before in the same file.

    ``in_turn``: what is noted is written by `end_turn`, all at once. ``key``: returns what the chain's HMAC
    is made with, borrowed; None for a chain without.
    """

    def __init__(
        self,
        target: str = "none",
        *,
        require: bool = False,
        key: Callable[[], memoryview] | None = None,
    ) -> None:
        self._target = target
        self._require = require
        self._key = key
        self._sink: Sink | None = None
        self._rest = b""  # whole lines or the rest of one that come before all others
        self._batch = b""  # what the rest is the rest of
        self._pending: list[bytes] = []  # lines
        self._windows: dict[int, _Window] = {}
        self._scheduled = False
        self.in_turn = False
        self._started = False
        self._stamp = ""  # the time of what was not written yet
        self._second = -1
        self._prefix = ""
        # The journal takes a line's priority from its beginning, and the rest as it is.
        journal = target == "-" and journal_on_stderr()
        self._priorities = ("<6>", "<5>", "<6>") if journal else ("", "", "")
        self._fault = ""
        self.records = 0
        self.dropped = 0
        self._dropped_before = 0  # of those, how many a record has told
        self.head = chain.GENESIS
        if target == "none":
            if require:
                raise UsageError("--audit-policy=require needs --audit")
            return
        self._sink = open_sink(target)
        if require and not self._sink.certain:
            self._sink.close()
            raise UsageError(
                f"--audit={target}: --audit-policy=require needs a file on a local file system, "
                "a pipe or a socket"
            )
        if target != "-":
            try:
                self._go_on_from(target)
            except BaseException:
                self._sink.close()
                raise

    @property
    def target(self) -> str:
        """What ``--audit`` says."""
        return self._target

    def _go_on_from(self, path: str) -> None:
        """Follow the last record in a file; a line that was cut is ended first."""
        if not stat.S_ISREG(os.stat(path).st_mode):
            return
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
        if not size:
            return
        if lines[-1]:
            self._rest = b"\n"
        last = next(filter(None, map(chain.read, reversed(lines))), None)
        if last is None:
            raise UsageError(f"--audit={path}: holds no audit record; move it away")
        self.records, self.head = last.number, last.link

    # --- what happens

    def start(self, version: str, objects: int) -> None:
        """The daemon begins to serve."""
        self._started = True
        self.note("start", version=version, objects=objects)
        self._written()

    def note(self, event: str, subject: Subject | None = None, **members: object) -> None:
        """Write a record as soon as possible. See Record for what members there are."""
        if subject is not None:
            members |= {"door": subject.door, "peer": subject.peer}
        self._keep(*_made(event, members))
        if not self.in_turn:
            self._schedule()

    def done(
        self, event: str, subject: Subject, object_id: str, kind: str, size: int | None
    ) -> None:
        """Write the record of what was done to an object that there is, of a type, with so many bytes: the
        same as `note` would, in less time.
        """
        if self._sink is None:
            return
        if len(object_id) > AUDIT_ID_CHARACTERS:
            object_id = object_id[:AUDIT_ID_CHARACTERS]
        of = "" if size is None else f'"size":{size},'
        text = f'"event":"{event}","id":"{object_id}","type":"{kind}",{of}{subject.text}'
        self._keep(text, _ORDINARY)
        if not self.in_turn:
            self._schedule()

    def end_turn(self) -> None:
        """Write all that was noted, before anybody is told of it."""
        self.in_turn = False
        if self._pending and not self._flush() and not self._scheduled:
            self._retry()

    def _keep(self, text: str, kind: int) -> None:
        """Number a record and link it to the one before, unless there is no room for it."""
        pending = self._pending
        if self._sink is None or len(pending) >= AUDIT_BACKLOG:
            self.dropped += self._sink is not None
            return
        if kind == _FIRST:
            text += f',"prev":"{self.head}"'
        if self.dropped > self._dropped_before:
            text += f',"dropped":{self.dropped - self._dropped_before}'
            self._dropped_before = self.dropped
        self.records = number = self.records + 1
        stamp = self._stamp or self._now()
        key = None if self._key is None else self._key()
        line, self.head = chain.write(self.head, f'"seq":{number},"time":"{stamp}",{text}', key)
        pending.append((self._priorities[kind] + line).encode())

    def release(  # noqa: PLR0917 - the members that each of these records has
        self,
        event: str,
        subject: Subject,
        rule: str,
        object_id: str,
        size: int,
        credential: str = "",
    ) -> None:
        """Write the record of a release of a secret that there is, by a rule, which must not happen if this
        raises CommandError. ``credential``: the name it was asked for by, if that is another.
        """
        if self._sink is None:
            return
        if len(object_id) > AUDIT_ID_CHARACTERS:
            object_id = object_id[:AUDIT_ID_CHARACTERS]
        by = "" if not credential else f'"credential":{_json(credential)},'
        text = (
            f'"event":"{event}","decision":"allow","rule":"{rule}","id":"{object_id}",'
            f'{by}"size":{size},{subject.text}'
        )
        if not self._require:
            self._keep(text, _ORDINARY)
            if not self.in_turn:
                self._schedule()
            return
        if self._flush():
            self._keep(text, _ORDINARY)
            if self._flush():
                return
            # It is on its way, in part or whole, and may yet be written: say that it is not true.
            self.note("withheld", of=self.records, reason=self._fault)
        else:
            self.dropped += 1
        raise CommandError(
            f"The audit record cannot be written ({self._fault}), and --audit-policy=require "
            "then releases no secret"
        )

    def refuse(self, event: str, uid: int, subject: Subject | None, **members: object) -> None:
        """Write the record of a refusal; of many from one uid, the first and how many more there were."""
        if self._sink is None:
            return
        if uid not in self._windows and len(self._windows) >= REFUSALS_UIDS:
            uid = _OTHERS
        window = self._windows.get(uid)
        if window is not None:
            window.count += 1
            return
        self._windows[uid] = _Window(UNSET if uid == _OTHERS else Raw(b'{"uid":%d}' % uid))
        asyncio.get_running_loop().call_later(REFUSALS_SECONDS, self._end_window, uid)
        asked = members.get("id")
        if isinstance(asked, str) and not _ID.fullmatch(asked):
            members["id"] = "?"  # it may be anything that somebody typed by mistake
        self.note(event, subject, decision="deny", **members)

    def _end_window(self, uid: int) -> None:
        window = self._windows.get(uid)
        if window is None:
            return
        if not window.count:
            del self._windows[uid]
            return
        event, members = _told(window)
        self.note(event, None, **members)
        asyncio.get_running_loop().call_later(REFUSALS_SECONDS, self._end_window, uid)

    def is_in_line_on_stderr(self) -> bool:
        """True if a line was begun on stderr, and the rest of it waits."""
        return bool(self._rest) and self._target == "-"

    def open_again(self) -> Sink | None:
        """Open the file that has the name now, for `switch`; None if it is the same. Raises UsageError.

        It may wait, where the file is on another machine.
        """
        if self._sink is None or self._target == "-":
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self._target), self._sink.status()):
                return None  # not moved away
        sink = open_sink(self._target)
        if self._require and not sink.certain:
            sink.close()
            raise UsageError(
                f"--audit={self._target}: it may block, so nothing can be required of it"
            )
        return sink

    def switch(self, sink: Sink) -> None:
        """Go on in another file."""
        if self._sink is None:
            sink.close()
            return
        self.note("rotate")
        self._flush()
        # A line that was begun in the old file is written anew, whole.
        self._rest = self._batch[
            self._batch.rfind(b"\n", 0, len(self._batch) - len(self._rest)) + 1 :
        ]
        old, self._sink = self._sink, sink
        old.close()
        self.note("reopen")
        self._flush()

    def stop(self) -> None:
        """The daemon ends; there may be no loop any more."""
        for window in self._windows.values():
            if window.count:
                event, members = _told(window)
                self._keep(*_made(event, members))
        self._windows.clear()
        if self._started:
            self._keep(*_made("stop", {}))
        self._flush()
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    # --- writing

    def _now(self) -> str:
        now = time.time_ns()
        second = now // 1_000_000_000
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        self._stamp = stamp = f"{self._prefix}.{now // 1000 % 1_000_000:06d}Z"
        return stamp

    def _schedule(self) -> None:
        if self._pending and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._written)

    def _written(self) -> None:
        self._scheduled = False
        if not self._flush() and not self._scheduled:
            self._retry()

    def _retry(self) -> None:
        self._scheduled = True
        asyncio.get_running_loop().call_later(AUDIT_RETRY_SECONDS, self._written)

    def _flush(self) -> bool:
        """Write all that waits; False if something is left."""
        sink, pending = self._sink, self._pending
        self._stamp = ""
        if sink is None or (self._rest and not self._push(sink)):
            return sink is None
        if not pending:
            return True
        data = pending[0] if len(pending) == 1 else b"".join(pending)
        pending.clear()
        try:
            written = sink.write(data)
        except OSError as error:
            written, self._fault = 0, os.strerror(error.errno or 0)
        if written == len(data):
            return True
        self._rest, self._batch = data[written:], data
        return written > 0 and self._push(sink)

    def _push(self, sink: Sink) -> bool:
        rest = self._rest
        try:
            while rest:
                rest = rest[sink.write(rest) :]
            self._batch = b""
        except OSError as error:
            self._fault = os.strerror(error.errno or 0)
        self._rest = rest
        return not rest
