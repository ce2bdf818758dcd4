# SPDX-License-Identifier: LGPL-2.1-or-later
"""Search every readable byte of a process for secrets of a known shape, as root sees it.

A secret here is "q~" and two hexadecimal digits, over and over: every 8 bytes of it hold a whole
marker, so that a part of a secret is found as well as the whole. It is looked for as UTF-8, UTF-16,
UTF-32, and as base64 at its three alignments (where any 18 characters are enough). A marker alone
is no find: it has 5 bytes, and Python keeps the hash of each string, tens of thousands of random
numbers.
"""

import re
from typing import NamedTuple

GROUPS = 8
SECRET_BYTES = 4 * GROUPS

# In base64 the marker is "cX", "F+" or "xf", by its alignment; two of them in a row are no
# accident.
_PARTS = (
    re.compile(rb"~[0-9a-f]{2}q~"),
    re.compile(rb"~\0[0-9a-f]\0[0-9a-f]\0q\0~\0"),
    re.compile(rb"~\0\0\0[0-9a-f]\0\0\0[0-9a-f]\0\0\0q\0\0\0~\0\0\0"),
    re.compile(rb"cX[4-7][A-Za-z0-9+/]{3}F\+"),
    re.compile(rb"F\+[A-Za-z0-9+/]{3}xf"),
    re.compile(rb"xf[A-Za-z0-9+/]{3}cX"),
)
_EIGHT = re.compile(rb"q~HHq~HH|~HHq~HHq|HHq~HHq~|Hq~HHq~H".replace(b"H", b"[0-9a-f]"))
_WHOLE = re.compile(rb"(?:q~[0-9a-f]{2}){%d}" % GROUPS)
_CHUNK = 8 << 20
_OVERLAP = 256


def secret(number: int) -> str:
    """A secret of SECRET_BYTES bytes, different for each number."""
    digits = f"{number * 2654435761 % (1 << 64):0{2 * GROUPS}x}"
    return "".join(f"q~{digits[i : i + 2]}" for i in range(0, 2 * GROUPS, 2))


class Found(NamedTuple):
    """What a scan found: parts outside of the arenas (with the mapping), whole secrets inside."""

    outside: list[str]
    inside: list[bytes]
    scanned: int


def parts(data: bytes) -> list[bytes]:
    """Return parts of secrets that stand in ``data``."""
    found = []
    for pattern in _PARTS:
        for match in pattern.finditer(data):
            if pattern is not _PARTS[0] or _EIGHT.search(
                data, max(0, match.start() - 3), match.end() + 3
            ):
                found.append(match[0])
                break
    return found


def scan(pid: int) -> Found:
    """Scan a process. Arenas are the mappings of memfds called "secretd" and of memfd_secret."""
    outside: list[str] = []
    inside: list[bytes] = []
    scanned = 0
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            span, mode, *_, name = [*line.split(maxsplit=5), ""][:6]
            start, end = (int(part, 16) for part in span.split("-"))
            if mode[0] != "r" or name.strip() in ("[vvar]", "[vvar_vclock]", "[vsyscall]"):
                continue
            arena = name.startswith("/memfd:secretd (deleted)")
            for at in range(start, end, _CHUNK):
                memory.seek(at)
                try:
                    data = memory.read(min(_CHUNK + _OVERLAP, end - at))
                except OSError:
                    continue  # memfd_secret: not even root reads it
                scanned += len(data)
                if arena:
                    inside += _WHOLE.findall(data)
                    if any(pattern.search(data) for pattern in _PARTS[1:]):
                        outside.append(f"{name.strip()}: encoded in the arena")
                else:
                    outside += [f"{line.strip()}: {part!r}" for part in parts(data)]
    return Found(outside, inside, scanned)
