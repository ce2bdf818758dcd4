# SPDX-License-Identifier: LGPL-2.1-or-later
"""The audit log: numbered, linked records of what peers did with secrets, or were refused.

`Audit` numbers records, links them (chain) and writes them (sinks), all records of one turn of the
loop in one write. access appends releases
and refusals, server refused connections, daemon.process events of the start, and monitor the rest.

Writing never waits. A record without room stays in a queue; beyond the queue's limit records are
dropped, and the next record carries their count. Under ``--audit-policy=require`` a secret is
released only after its record has been written.
"""

import asyncio
import contextlib
import os
import re
import stat
import time
from collections.abc import Callable
from typing import Final

from secretd.audit import chain
from secretd.audit.fast_records import object_event, release
from secretd.audit.records import FIRST, ORDINARY, Subject, text_of
from secretd.audit.refusals import Refusals
from secretd.audit.sinks import Sink, open_sink
from secretd.errors import CommandError, UsageError
from secretd.limits import Tuning
from secretd.systemd.stderr_journal import journal_on_stderr

_TAIL_BYTES: Final = 64 << 10
_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class Audit:
    """The records of this process, which continue those of the previous process in the same file.

    ``in_turn``: records are collected, and `end_turn` writes them all at once. ``key``: returns the
    HMAC's key as a borrowed view; None for a chain of hashes. ``on_terminal``: a person watches.
    """

    def __init__(
        self,
        target: str = "none",
        *,
        require: bool = False,
        key: Callable[[], memoryview] | None = None,
        tuning: Tuning = Tuning(),  # noqa: B008 - it cannot be changed
    ) -> None:
        self._backlog = tuning.audit_backlog
        self._retry_seconds = tuning.audit_retry_seconds
        self._target = target
        self._require = require
        self.on_terminal = target == "-" and os.isatty(2)
        self._key = key
        self._sink: Sink | None = None
        self._rest = b""  # unwritten bytes, which begin within or before a line
        self._batch = b""  # the lines that the rest belongs to
        self._pending: list[bytes] = []  # lines
        self._refusals = Refusals(self._append_refusals, tuning)
        self._scheduled = False
        self.in_turn = False
        self._started = False
        self._stamp = ""  # the time of the unwritten records
        self._second = -1
        self._prefix = ""
        # The journal reads a priority at the beginning of each line.
        journal = target == "-" and journal_on_stderr()
        self._priorities = ("<6>", "<5>", "<6>") if journal else ("", "", "")
        self._fault = ""
        self.records = 0
        self.dropped = 0
        self._dropped_before = 0  # how many of those a record has reported
        self.head = chain.GENESIS
        if target == "none":
            if require:
                raise UsageError("--audit-policy=require cannot be used with --audit=none")
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
        """The value of ``--audit``."""
        return self._target

    def _go_on_from(self, path: str) -> None:
        """Continue after the last record of a file, and end a line that was cut."""
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

    # --- events

    def start(self, version: str, objects: int) -> None:
        """Append the record of the start; ``objects``: the number of objects that exist then."""
        self._started = True
        self.append("start", version=version, objects=objects)
        self._written()

    def append(self, event: str, subject: Subject | None = None, **members: object) -> None:
        """Append a record, to be written as soon as possible; ``members`` are those of
        AuditRecord.
        """
        if subject is not None:
            members |= {"door": subject.role, "peer": subject.peer}
        self._number(*text_of(event, members))
        if not self.in_turn:
            self._schedule()

    def append_object_event(
        self, event: str, subject: Subject, object_id: str, kind: str, size: int | None
    ) -> None:
        """Append the record of what a peer did to an object of type ``kind`` with ``size``
        bytes.
        """
        if self._sink is None:
            return
        self._number(object_event(event, subject, object_id, kind, size))
        if not self.in_turn:
            self._schedule()

    def end_turn(self) -> None:
        """Write all collected records, before any client gets an answer."""
        self.in_turn = False
        if self._pending and not self._flush() and not self._scheduled:
            self._retry()

    def _number(self, text: str, importance: int = ORDINARY) -> None:
        """Number a record and link it to the previous one, unless there is no room for it."""
        pending = self._pending
        if self._sink is None or len(pending) >= self._backlog:
            self.dropped += self._sink is not None
            return
        if importance == FIRST:
            text += f',"prev":"{self.head}"'
        if self.dropped > self._dropped_before:
            text += f',"dropped":{self.dropped - self._dropped_before}'
            self._dropped_before = self.dropped
        self.records = number = self.records + 1
        stamp = self._stamp or self._now()
        key = None if self._key is None else self._key()
        line, self.head = chain.write(self.head, f'"seq":{number},"time":"{stamp}",{text}', key)
        pending.append((self._priorities[importance] + line).encode())

    def append_release(  # noqa: PLR0917 - the members that each of these records has
        self,
        event: str,
        subject: Subject,
        rule: str,
        object_id: str,
        size: int,
        credential: str = "",
        alias: str = "",
        host: str = "",
    ) -> None:
        """Append the record of a release, which must not happen if this raises CommandError.

        ``rule`` permits it. ``credential``: the name that a unit requested, "" for a read or seal;
        ``alias``: the alias that was named, or ""; ``host``: the host that it is wrapped for.
        """
        if self._sink is None:
            return
        text = release(event, subject, rule, object_id, size, credential, alias, host)
        if not self._require:
            self._number(text)
            if not self.in_turn:
                self._schedule()
            return
        if self._flush():
            self._number(text)
            if self._flush():
                return
            # The record may still be written, in part or whole: record that it is not true.
            self.append("withheld", of=self.records, reason=self._fault)
        else:
            self.dropped += 1
        raise CommandError(
            f"The audit record cannot be written ({self._fault}), and --audit-policy=require "
            "then releases no secret"
        )

    def append_refusal(
        self, event: str, uid: int, subject: Subject | None, **members: object
    ) -> None:
        """Append the record of a refusal; after the first of a uid, only count further ones."""
        if self._sink is None or not self._refusals.is_first(uid):
            return
        asked = members.get("id")
        if isinstance(asked, str) and not _ID.fullmatch(asked):
            members["id"] = "?"  # a person may have typed a secret by mistake
        self.append(event, subject, decision="deny", **members)

    def _append_refusals(self, members: dict[str, object]) -> None:
        self.append("refusals", None, **members)

    def is_in_line_on_stderr(self) -> bool:
        """Return True if a line on stderr is unfinished, and its rest waits."""
        return bool(self._rest) and self._target == "-"

    def open_again(self) -> Sink | None:
        """Open the file that has the name now, for `switch`; return None if it is the same file.

        It may wait for a remote file system. Raises UsageError.
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
                f"--audit={self._target}: it may block, so --audit-policy=require cannot use it"
            )
        return sink

    def switch(self, sink: Sink) -> None:
        """Continue in another file."""
        if self._sink is None:
            sink.close()
            return
        self.append("rotate")
        self._flush()
        # A line that is unfinished in the old file is written again as a whole.
        self._rest = self._batch[
            self._batch.rfind(b"\n", 0, len(self._batch) - len(self._rest)) + 1 :
        ]
        old, self._sink = self._sink, sink
        old.close()
        self.append("reopen")
        self._flush()

    def stop(self) -> None:
        """Append the last record, and close the target; the loop may have ended already."""
        for members in self._refusals.close():
            self._number(*text_of("refusals", members))
        if self._started:
            self._number(*text_of("stop", {}))
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
        asyncio.get_running_loop().call_later(self._retry_seconds, self._written)

    def _flush(self) -> bool:
        """Write all that waits; return False if some of it is left."""
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
