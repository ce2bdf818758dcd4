# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs for many secrets: import, export, watch.

import and export use a line of JSON for each secret, which has the arguments of QEMU's object-add.
Nothing is exported in clear.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

from secretd import client as api
from secretd.client import Encoding, Event, SyncClient
from secretd.ctl.connection import client_of
from secretd.ctl.output import Common, done, fail, progress
from secretd.ctl.verb import PATH, argument, flag, option, verb
from secretd.errors import UsageError
from secretd.memory.arena import LockedBuffer

LINE_BYTES: Final = 2 << 20
"""Bytes of a line of `import`: a secret of the largest size in base64, and its names."""

_NEWLINE: Final = re.compile(rb"\n")
_QUOTE: Final = ord('"')
_BACKSLASH: Final = ord("\\")
_BLANK: Final = re.compile(rb"[ \t\r]*")


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
    first refused line ends the import and is named; the lines before it are added.
    """
    fd = 0 if file == "-" else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _import(common, file, fd, skip_existing=skip_existing)
    finally:
        if fd:
            os.close(fd)


def _import(common: Common, file: str, fd: int, *, skip_existing: bool) -> int:
    added = skipped = 0
    with (
        client_of(common) as client,
        client.buffer(2 * LINE_BYTES) as buffer,
        progress("importing", None) as step,
    ):
        for number, line in enumerate(_lines(fd, buffer), 1):
            where = f"{file}:{number}"
            try:
                if line:
                    _add(client, line, where)
                    added += 1
            except api.ExecuteError as error:
                if not (skip_existing and "duplicate property" in str(error)):
                    return fail(f"{where}: {error} ({added} added before it)")
                skipped += 1
            step()
    if not added and not skipped:
        return fail(f"{file}: it has no line with a secret, so nothing was added")
    if common.json:
        done(common, added=added, skipped=skipped)
    else:
        print(f"{added} added" + (f", {skipped} exist already" if skipped else ""))
    return 0


def _lines(fd: int, buffer: LockedBuffer) -> Iterator[memoryview]:
    """Yield the lines, each in locked memory until the next one is requested; a blank line is
    empty.
    """
    view, fill, ended = buffer.view, 0, False
    while not ended:
        count = os.readv(fd, [view[fill:]])
        ended = count == 0
        fill += count
        start = 0
        for end in _ends(view[:fill], last=ended):
            if end - start > LINE_BYTES:
                raise UsageError(f"a line has more than {LINE_BYTES} bytes")
            line = view[start:end]
            yield line[:0] if _BLANK.fullmatch(line) else line
            start = min(end + 1, fill)
        if fill - start > LINE_BYTES:
            raise UsageError(f"a line has more than {LINE_BYTES} bytes")
        view[: fill - start] = view[start:fill]
        fill -= start


def _ends(view: memoryview, *, last: bool) -> Iterator[int]:
    """Yield the ends of lines."""
    end = 0
    for match in _NEWLINE.finditer(view):
        end = match.end()
        yield match.start()
    if last and end < len(view):
        yield len(view)


@cache
def _decoder() -> Any:
    """Return the decoder of a line, which leaves the data in place; msgspec is imported late."""
    import msgspec

    names = {"keyid": str, "iv": str, "format": str, "qom_type": str, "expires_in": int}
    fields = [("id", str), ("data", msgspec.Raw)] + [
        (n, kind | None, None) for n, kind in names.items()
    ]
    line = msgspec.defstruct("Line", fields, forbid_unknown_fields=True, rename="kebab")
    decoder = msgspec.json.Decoder(line)

    def decode(view: memoryview) -> Any:
        try:
            return decoder.decode(view)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None  # the error may quote the line

    return decode


def _add(client: SyncClient, line: memoryview, where: str) -> None:
    """Add the secret of a line; its data goes from locked memory into a pipe."""
    found = _decoder()(line)
    if found is None or found.qom_type not in (None, "secret"):
        raise UsageError(
            f"{where}: not a secret: a JSON object is expected with id, data and, as needed, "
            "format, keyid, iv and expires-in"
        )
    quoted = memoryview(found.data)
    if quoted[0] != _QUOTE:
        raise UsageError(f"{where}: data must be a string")
    if found.format not in (None, "raw", "base64"):
        raise UsageError(f"{where}: format must be raw or base64")
    if any(byte == _BACKSLASH for byte in quoted):
        raise UsageError(f'{where}: data has escapes; give it in base64, with "format": "base64"')
    encoding = Encoding(found.format or "raw", found.keyid, found.iv)
    client.add_bytes(found.id, quoted[1:-1], encoding)
    if found.expires_in is not None:
        client.expire(found.id, found.expires_in)


@verb(
    "export",
    argument("ids", nargs=-1, ids=True),
    option(
        "--keyid",
        metavar="K",
        required=True,
        help="the secret to encrypt them under",
        ids=True,
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
        wanted = ids or [i for i in every if i != keyid]
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


@verb("watch", flag("--once", help="end after the first event"))
def watch(common: Common, once: bool) -> None:
    """Print events about secrets as they happen.

    On the control socket with the peer that caused them; on the client socket about secrets that
    the caller may read. It continues after a restart of secretd.
    """
    with client_of(common) as client:
        if sys.stderr.isatty() and not common.json:
            print(f"watching {client.path}; Ctrl-C ends it", file=sys.stderr)
        events = client.events()
        while True:
            print(_described(next(events), as_json=common.json), flush=True)
            if once:
                return


def _described(event: Event, *, as_json: bool) -> str:
    if as_json:
        return json.dumps({"time": event.time, "event": event.name, **event.data})
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    by = ""
    if event.peer is not None:
        by = (
            f"  by {event.peer.get('unit') or 'uid:' + str(event.peer['uid'])}, pid "
            f"{event.peer['pid']}"
        )
    what = event.id or json.dumps(event.data)
    return f"{clock}  {event.name:<18}  {what}{by}"
