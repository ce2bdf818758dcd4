# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs that bring secrets to another host: offer, wrap, accept and handover.

Offers and records are lines of JSON, so that any program can carry them: they are worth nothing to
it. handover carries them itself, through a program such as ssh.
"""

import base64
import contextlib
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

from secretd import client as api
from secretd.client.record_client import RecordClient
from secretd.ctl.connection import client_of
from secretd.ctl.globs import chosen
from secretd.ctl.hosts import this_host
from secretd.ctl.output import DONE, REFUSED, Common, count, fail, progress
from secretd.ctl.verb import argument, option, verb
from secretd.errors import UsageError

_SUBJECT = re.compile(r"[A-Za-z0-9._:@-]{1,256}")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
_FOR = "what they are for, such as a guest"


@verb(
    "offer", argument("ids", nargs=-1, metavar="[ID...]"),
    option("--from", "sender", metavar="HOST", required=True, help="the host that has them"),
    option("--for", "subject", metavar="WHAT", help=_FOR),
    examples=("secretctl offer disk0 --from alpha > offers",),
)  # fmt: skip
def offer(common: Common, ids: tuple[str, ...], sender: str, subject: str | None) -> int:
    """Offer to take secrets from another host.

    Each once, within ten minutes. Prints a line of JSON for each. Without IDS they are read from
    standard input, one to a line.
    """
    failed = 0
    about = {} if subject is None else {"for": subject}
    with client_of(common) as client:
        for object_id in ids or map(str.strip, sys.stdin):
            try:
                asked = {"from": sender, "id": object_id, **about}
                found = cast("dict[str, str]", client.execute("secret-offer", asked))
            except api.ExecuteError as error:
                failed += 1
                fail(f"{object_id}: {error}")
            else:
                print(json.dumps({"id": object_id, "offer": found["offer"]}), flush=True)
    return REFUSED if failed else DONE


@verb("wrap", examples=("secretctl wrap < offers > records",))
def wrap(common: Common) -> int:
    """Wrap the secrets that offers ask for.

    Reads offers from standard input, and prints a line of JSON for each. A grant must name the
    other host: secretctl grant ID --to host:NAME. What is printed can be opened by that host only.
    """
    with client_of(common) as client:
        wrapping = _Wrapping(client)
        for line in wrapping.lines(sys.stdin):
            print(line, flush=True)
    return REFUSED if wrapping.failed else DONE


class _Wrapping:
    """Turns offers into records; ``failed``: the number of those that could not be wrapped."""

    def __init__(
        self, client: RecordClient, receiver: str | None = None, ids: Iterable[str] | None = None
    ) -> None:
        """``receiver``, ``ids``: the only host and secrets, each once, that offers may name."""
        self._client = client
        self._receiver = receiver
        self._ids = None if ids is None else set(ids)
        self.failed = 0
        self.wrapped = 0

    def lines(self, offers: Iterable[str]) -> Iterator[str]:
        """Yield the lines of records."""
        for object_id, text in _members(offers, "offer"):
            if self._ids is not None and object_id not in self._ids:
                self.failed += 1
                fail("the other host has offered to take what it was not asked for")
                continue
            if self._ids is not None:
                self._ids.discard(object_id)
            try:
                record = self._client.wrap(object_id, text, self._receiver)
            except api.ExecuteError as error:
                self.failed += 1
                fail(f"{object_id}: {error}")
                continue
            self.wrapped += 1
            yield json.dumps({"id": object_id, "record": base64.b64encode(record).decode()})


@verb("accept", examples=("secretctl accept < records",))
def accept(common: Common) -> int:
    """Add the secrets in records.

    Reads records from standard input. Each must answer an offer of this host. One that cannot be
    accepted is named, the others follow, and the exit status is 1.
    """
    accepted = failed = 0
    with client_of(common) as client:
        for object_id, text in _members(sys.stdin, "record"):
            try:
                client.accept(base64.b64decode(text))
            except (api.ExecuteError, ValueError) as error:
                failed += 1
                fail(f"{object_id}: {error}")
            else:
                accepted += 1
    print(json.dumps({"accepted": accepted}) if common.json else f"{accepted} accepted")
    return REFUSED if failed else DONE


def _members(lines: Iterable[str], name: str) -> Iterator[tuple[str, str]]:
    """Yield the id and a member of lines of JSON. Raises UsageError."""
    for number, line in enumerate(lines, 1):
        try:
            members = json.loads(line)
            yield str(members["id"]), str(members[name])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(f"line {number}: this is no {name}") from None


@verb(
    "handover", argument("patterns", nargs=-1, required=True, metavar="ID...",
                         completes="secrets"),
    option("--to", "receiver", metavar="HOST", required=True, help="the host that gets them"),
    option("--for", "subject", metavar="WHAT", help=_FOR),
    option("--ssh", metavar="COMMAND",
           help="what runs a command on that host (default: ssh HOST)"),
    examples=(
        "secretctl handover 'vm1.*' --to beta --for vm1",
        "secretctl handover disk0 --to beta --ssh 'ssh -p 2222 root@192.0.2.7'",
    ),
)  # fmt: skip
def handover(
    common: Common,
    *,
    patterns: tuple[str, ...],
    receiver: str,
    subject: str | None,
    ssh: str | None,
) -> int:
    """Bring secrets to another host.

    secretctl runs there through ssh. That host offers to take them, this one wraps them, and that
    one accepts them; the connection carries nothing that another could use. The secrets stay here,
    too. A grant must name the host: secretctl grant ID --to host:NAME.
    """
    if subject is not None and not _SUBJECT.fullmatch(subject):
        raise UsageError("--for takes letters, digits and . _ : @ - only")
    if not _NAME.fullmatch(receiver):
        raise UsageError(f"'{receiver!a}' is no host's name")
    prefix = shlex.split(ssh) if ssh is not None else ["ssh", receiver]
    with client_of(common) as client:
        own = this_host(client)["name"]
        secrets = {each.id: each for each in client.list()}
        ids = chosen(patterns, secrets)
        about = [] if subject is None else ["--for", subject]
        asking = [*prefix, "secretctl", "offer", "--from", own, *about]
        wrapping = _Wrapping(client, receiver, ids)
        try:
            with (
                _running(asking, "\n".join(ids)) as offers,
                _accepting(prefix) as records,
                progress("handing over", len(ids)) as step,
            ):
                for line in wrapping.lines(offers):
                    records.write(f"{line}\n")
                    records.flush()
                    step()
        except BrokenPipeError:
            raise UsageError(f"{shlex.join(prefix)}: it ended too early") from None
    if not common.json:
        print(f"{count(wrapping.wrapped, 'secret')} handed over to {receiver}")
    else:
        print(json.dumps({"to": receiver, "secrets": wrapping.wrapped}))
    return REFUSED if wrapping.failed or wrapping.wrapped < len(ids) else DONE


@contextlib.contextmanager
def _running(words: list[str], given: str) -> Iterator[IO[str]]:
    """Yield the output of a command that gets some input; it is ended with the context."""
    process = _started(words)
    assert process.stdin is not None
    assert process.stdout is not None
    # It prints an offer for each id as it reads them.
    feeder = threading.Thread(target=_feed, args=(process.stdin, given))
    feeder.start()
    try:
        yield process.stdout
    finally:
        process.stdout.close()
        process.terminate()  # it may wait for something
        process.wait()
        feeder.join()


def _feed(stdin: IO[str], given: str) -> None:
    with contextlib.suppress(OSError), stdin:
        stdin.write(given)


@contextlib.contextmanager
def _accepting(prefix: list[str]) -> Iterator[IO[str]]:
    """Yield the input of 'secretctl accept' on the other host; raise UsageError if it fails."""
    process = _started([*prefix, "secretctl", "accept"], output=subprocess.DEVNULL)
    assert process.stdin is not None
    with process:
        yield process.stdin
    if process.returncode:
        raise UsageError("the other host has not accepted all of them; its words are above")


def _started(words: list[str], output: Any = subprocess.PIPE) -> "subprocess.Popen[str]":
    try:
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=output, text=True)
    except OSError as error:
        raise UsageError(f"{words[0]}: {error.strerror}") from None
