# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading audit files for people: records by id, peer, event and time; also compressed files.

It verifies nothing; audit.chain does.
"""

import datetime
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from secretd.errors import UsageError

_GZIP: Final = b"\x1f\x8b"

_ID: Final = re.compile(rb'"id":"([^"\\]*)"')


def audit_lines(path: str) -> Iterator[bytes]:
    """Yield the lines of an audit file or pipe, also of one that gzip has compressed.

    Raises OSError, and UsageError after the last good line of a damaged compressed file.
    """
    with open(path, "rb") as file:
        if file.peek(len(_GZIP))[: len(_GZIP)] != _GZIP:
            yield from file
            return
        try:
            yield from gzip.GzipFile(fileobj=file)
        except EOFError:
            raise UsageError(f"{path}: the compressed file is cut short") from None
        except (zlib.error, gzip.BadGzipFile):
            raise UsageError(f"{path}: the compressed file is damaged from here on") from None


class Wanted(NamedTuple):
    """What records to show: None for any.

    ``ids``: a pattern of ids; ``peer``: a part of the peer as `peer_words` writes it; ``event``: a
    name; ``since``: seconds since the epoch.
    """

    ids: "re.Pattern[str] | None" = None
    peer: str | None = None
    event: str | None = None
    since: float | None = None


def records(path: str, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Yield the wanted records of a file, in order. Raises OSError, and UsageError for a file that
    holds no record.
    """
    lines = found = 0
    for line in audit_lines(path):
        lines += 1
        if wanted.ids is not None:
            # Most lines need no decoding: an id is written without escapes.
            named = _ID.search(line)
            if named is None or not wanted.ids.fullmatch(named[1].decode(errors="replace")):
                found += named is not None
                continue
        record = _record(line)
        if record is None:
            continue
        found += 1
        if _fits(record, wanted):
            yield record
    if lines and not found and wanted.ids is None:
        raise UsageError(f"{path}: holds no audit record")


def _record(line: bytes) -> dict[str, Any] | None:
    line = line.lstrip(b"<>0123456789")  # the priority of a line in the journal
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "event" in record else None


def _fits(record: dict[str, Any], wanted: Wanted) -> bool:
    if wanted.event is not None and record["event"] != wanted.event:
        return False
    if wanted.peer is not None and wanted.peer not in peer_words(record.get("peer")):
        return False
    return wanted.since is None or time_of(record) >= wanted.since


def time_of(record: dict[str, Any]) -> float:
    """Return a record's time in seconds since the epoch, 0 if it has none."""
    try:
        return datetime.datetime.fromisoformat(str(record.get("time"))).timestamp()
    except ValueError:
        return 0.0


def peer_words(peer: object) -> str:
    """Return a peer in words, such as "unit:nginx.service, uid:33, pid 812"; "-" without one."""
    if not isinstance(peer, dict):
        return "-"
    parts = [str(peer["unit"])] if "unit" in peer else []
    parts.append(f"uid:{peer.get('uid')}")
    if "pid" in peer:
        parts.append(f"pid {peer['pid']}")
    return ", ".join(parts)


def is_readable_file(target: str) -> bool:
    """Return True if an audit target is a file that this process may read."""
    return os.path.isabs(target) and os.path.isfile(target) and os.access(target, os.R_OK)
