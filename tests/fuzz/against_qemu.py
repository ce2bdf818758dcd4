# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd against QEMU 10: random and mutated messages to both, answers compared byte for byte.

Each case is followed by 0xFF, which resets the parser, and a command that marks its end, so many go
over one connection, whole or in random pieces. A difference that `explained` knows is one of those
under "Differences from QEMU" in docs/protocol.md; after it both are emptied, since their objects
may differ. Texts of --object are compared with qemu-storage-daemon's answers, one start of it each.
"""

import argparse
import contextlib
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from secretd.errors import UsageError
from secretd.journal.journal import Journal
from secretd.memory.arena import Arena
from secretd.memory.level import choose_level
from secretd.qom.registry import TYPES
from secretd.qom.tree import ObjectTree
from tests.support.daemon import add_object
from tests.support.real_qemu import Qemu, ask, storage_daemon
from tests.support.transcript import FILES, SocketPeer, load

BATCH = 40
LEVEL = choose_level(require=False)
IDS = ["a", "b", "s0", "disk1", "type", "1", "", "a b", "é", "A-b.c_9", "nope"]
BASE64 = [
    "",
    "MTIz",
    "MTIzNDU2",
    "AAECAwQFBgcICQoLDA0ODw==",
    "MTI",
    "M=",
    "====",
    "MT\nIz",
    "!",
    "MTIz=",
    "é",
]
DATA = [
    *BASE64,
    "x",
    "letmein",
    "k" * 32,
    "A" * 44,
    "0123456789abcdef0123456789abcde",
    "\0",
    "a\0b",
    "\x7f",
]
STRINGS = [
    *IDS,
    *DATA,
    "raw",
    "base64",
    "secret",
    "authz-simple",
    "allow",
    "deny",
    "\\",
    '"',
    "'",
    "%s",
    "😀",
]
SCALARS = [0, 1, -1, 2**31, 2**63 - 1, 2**63, 2**64, 1.5, 1e300, True, False, None]
QOM_TYPES = [
    "secret",
    "secret",
    "secret",
    "authz-simple",
    "authz-list",
    "nope",
    "secret_common",
    "",
    "Secret",
]
RULES = [
    [],
    [{"match": "x", "policy": "allow"}],
    [{"match": "x"}],
    [{}],
    "x",
    [{"match": 3, "z": 1}],
]
PATHS = [
    "/objects",
    "objects",
    "/objects/a",
    "a",
    "b",
    "/objects/s0",
    "s0",
    "nope",
    "/nope",
    "a/",
    "/objects/a/x",
]
PROPERTIES = ["type", "format", "keyid", "iv", "file", "identity", "policy", "rules", "nope", ""]
INTERESTING = (
    b"{}[]:,\"'\\ \t\r\n\0\x01\x1f\x7f\x80\xbf\xc0\xc3\xe2\xed\xf0\xf4\xf8\xfe\xff"
    b"0123456789-+.eEtrufalsn%ux/"
)
TOKENS = [
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"true",
        b"null",
        b"nul",
        b"1",
        b"-",
        b"0.5",
        b"1e",
        b"T",
    ),
    *(b'""', b"''", b'"\\u00e9"', b'"\\ud800"', b"'\\''", b'"a":1', b"\n", b" "),
    *(b"\xff", b"\xef\xbf\xbe", b"\xc0\x80"),
]
# What ends the server, needs a vector's scene, or is each server's own.
UNFIT = re.compile(
    r'\$|"quit"|version|query-commands|query-qmp-schema|human-monitor', re.IGNORECASE
)
COMMANDS = [
    *["object-add"] * 8,
    *["object-del", "qom-list", "qom-get", "qom-set"] * 2,
    *(
        "query-name",
        "qom-list-properties",
        "getfd",
        "closefd",
        "add-fd",
        "remove-fd",
        "query-fdsets",
    ),
    "nope",
]


def arguments(rng: random.Random) -> tuple[str, dict[str, object]]:
    """A command that both have, and arguments that fit it more or less."""
    command = rng.choice(COMMANDS)
    pick = rng.choice
    given: dict[str, object] = {}
    if command == "object-add":
        given = {"qom-type": pick(QOM_TYPES), "id": pick(IDS)}
        some = {
            "data": pick(DATA), "format": pick(["raw", "base64", "base64", "hex"]),
            "keyid": pick(IDS),
            "iv": pick(BASE64), "file": pick(["/nope", "/", "x"]), "identity": pick(STRINGS),
            "policy": pick(["allow", "deny", "x"]), "rules": pick(RULES),
        }  # fmt: skip
        wanted = ["data"] if rng.random() < 0.7 else []
        given |= {k: some[k] for k in [*wanted, *rng.sample(sorted(some), rng.randint(0, 3))]}
    elif command == "object-del":
        given = {"id": pick(IDS)}
    elif command.startswith("qom-list"):
        key = "path" if command == "qom-list" else "typename"
        given = {key: pick(PATHS if key == "path" else ["secret", "authz-list", "nope"])}
    elif command.startswith("qom-"):
        given = {"path": pick(PATHS), "property": pick(PROPERTIES)}
        if command == "qom-set":
            given["value"] = pick([*STRINGS, *SCALARS, *RULES])
    elif command in ("getfd", "closefd"):
        given = {"fdname": pick(IDS)}
    elif command in ("add-fd", "remove-fd"):
        given = {"fdset-id": pick(SCALARS)} if rng.random() < 0.7 else {}
    if rng.random() < 0.15:
        given[pick(["x", "y", "props", "id", "data", "é", "foo"])] = value(rng)
    if rng.random() < 0.1 and given:
        del given[pick(sorted(given))]
    if rng.random() < 0.1 and given:
        given[pick(sorted(given))] = value(rng)
    return command, given


def value(rng: random.Random, depth: int = 0) -> object:
    """Any JSON."""
    kind = rng.random()
    if kind < 0.2 and depth < 4:
        return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind < 0.4 and depth < 4:
        return {rng.choice(STRINGS): value(rng, depth + 1) for _ in range(rng.randint(0, 4))}
    return rng.choice(STRINGS) if kind < 0.7 else rng.choice(SCALARS)


def message(rng: random.Random) -> bytes:
    """A command object that is mostly good."""
    command, given = arguments(rng)
    made: dict[str, object] = {rng.choice(["execute"] * 30 + ["exec-oob", "Execute"]): command}
    if given or rng.random() < 0.5:
        made["arguments"] = given if rng.random() < 0.97 else value(rng)
    if rng.random() < 0.4:
        made["id"] = value(rng)
    if rng.random() < 0.04:
        made[rng.choice(["x", "exec-oob", "control", "timestamp"])] = value(rng)
    items = list(made.items())
    rng.shuffle(items)
    separators = rng.choice([(",", ":"), (", ", ": "), (" ,\n", "\t: ")])
    text = json.dumps(dict(items), ensure_ascii=rng.random() < 0.5, separators=separators)
    if rng.random() < 0.1 and "'" not in text and '\\"' not in text:
        text = text.replace('"', "'")
    return text.encode() + rng.choice([b"", b"\n", b"\r\n", b" "])


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A few bytes or tokens different."""
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        at = rng.randrange(len(made) + 1)
        what = rng.random()
        if what < 0.3:
            made[at : at + 1] = bytes([rng.choice(INTERESTING)])
        elif what < 0.5:
            made[at:at] = rng.choice(TOKENS)
        elif what < 0.65:
            del made[at : at + rng.choice([1, 1, 2, 5, 20])]
        elif what < 0.75:
            made[at:at] = made[at : at + rng.randint(1, 12)]
        elif what < 0.85:
            made[at : at + 1] = bytes([rng.randrange(256)])
        elif what < 0.92:
            del made[at:]
        else:
            made[at:at] = rng.choice([b"\\u", b"\\", b"\\ud83d\\ude00", b"\\x", b'"', b"'"])
    return bytes(made)


def soup(rng: random.Random) -> bytes:
    """Tokens in any order."""
    return b"".join(rng.choice(TOKENS) for _ in range(rng.randint(1, 12)))


def cases(rng: random.Random) -> Iterator[bytes]:
    """Cases without end."""
    corpus = [
        step.text.encode()
        for path in FILES
        if path.stem in ("control", "objects", "authz", "secret")
        for vector in load(path)
        if not vector.has("quits")
        for step in vector.steps
        if step.text.startswith("{") and not UNFIT.search(step.text)
    ]
    while True:
        kind = rng.random()
        if kind < 0.35:
            yield message(rng)
        elif kind < 0.7:
            yield mutated(rng, message(rng))
        elif kind < 0.9:
            yield mutated(rng, rng.choice(corpus))
        else:
            yield soup(rng)


def explained(case: bytes, qemu: list[bytes], ours: list[bytes]) -> str | None:
    """Which documented difference this is, if it is one."""
    if len(qemu) != len(ours):
        return None
    for theirs, own in zip(qemu, ours, strict=True):
        if theirs == own:
            continue
        if b"Property 'secret.data' is not readable" in own:
            return "data is write-only"
        if b"Base64 data contains invalid characters" in own and (
            b"base64" in case or b"iv" in case
        ):
            return "base64 is strict"
        if b"Incorrect number of padding bytes" in own:
            return "padding is checked whole"
        if b"name" in own and sorted(own) == sorted(theirs) and b"child<" in own:
            return "order of children after deletions"
        if b'"objects", "type": "child<container>"' in own:
            return "the tree has no machine"
        return None
    return None


KEYS = ["rules", "0", "1", "2", "00", "match", "policy", "format", "x", "rules.0", "rules.1"]
PIECES = [
    *(
        "secret",
        "authz-list",
        "authz-simple",
        "id",
        "=",
        "a",
        ",",
        ",",
        ",,",
        "data",
        "x",
        ".",
        "0",
        "1",
    ),
    *(
        "rules",
        "match",
        "policy",
        "allow",
        "format",
        "raw",
        "help",
        "?",
        "-",
        "_",
        "__x.y_",
        "qom-type",
    ),
    *(
        " ",
        "identity",
        "serial",
        "00",
        "{",
        "}",
        "'",
        '"',
        ":",
        "1a",
        "secret,id=a,",
        "authz-list,id=a,",
    ),
]


def option(rng: random.Random) -> str:
    """What may stand after --object."""
    if rng.random() < 0.5:
        return "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 9)))
    text = "authz-list,id=a"
    for _ in range(rng.randint(1, 5)):
        key = ".".join(rng.choice(KEYS) for _ in range(rng.randint(1, 4)))
        text += f",rules.{key}={rng.choice(['x', 'allow', 'deny', 'glob', ''])}"
    return text


def fuzz_options(count: int, seed: int) -> int:
    """Compare what --object TEXT gives with qemu-storage-daemon; return how many are different."""
    rng = random.Random(seed)
    different = 0
    for _ in range(count):
        text = option(rng)
        theirs, ours = storage_daemon(text), add_option(text)
        if theirs != ours and "List of user creatable objects" not in ours[1]:
            different += 1
            print(f"--object {text}\nQEMU    {theirs}\nsecretd {ours}\n", flush=True)
    print(f"{count} options, seed {seed}: {different} differences unexplained")
    return different


def add_option(text: str) -> tuple[str, str]:
    """Return the words of the error and what is printed."""
    scratch, journal = Arena(LEVEL), Journal(Arena(LEVEL))
    printed = io.StringIO()
    words = ""
    try:
        with contextlib.redirect_stdout(printed):
            add_object(ObjectTree(journal, scratch, TYPES), text)
    except UsageError as error:
        words = str(error)
    finally:
        journal.close()
        journal.arena.close()
        scratch.close()
    return words, printed.getvalue()


class Side:
    """One of the two servers."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._connect()

    def _connect(self) -> None:
        self._peer = SocketPeer(self._path)
        self._peer.line()
        ask(self._peer, "qmp_capabilities")

    def play(self, batch: list[bytes], rng: random.Random, *, pieces: bool) -> list[list[bytes]]:
        """Return the answers to each case."""
        marks = [b'\xff{"execute": "query-name", "id": "mark %d"}\n' % n for n in range(len(batch))]
        data = b"".join(case + mark for case, mark in zip(batch, marks, strict=True))
        while data:
            size = rng.randint(1, 40) if pieces else len(data)
            self._peer.send(data[:size], [])
            data = data[size:]
        answers = []
        for number in range(len(batch)):
            end = b'{"return": {}, "id": "mark %d"}\r\n' % number
            answers.append(list(iter(self._peer.line, end)))
            if b"" in answers[-1]:
                raise EOFError(f"{self._path} closed the connection")
        return answers

    def close(self) -> None:
        """Disconnect."""
        self._peer.close()

    def empty(self) -> None:
        """Delete all objects and begin a new connection."""
        listed = ask(self._peer, "qom-list", path="/objects").get("return", [])
        for entry in listed:
            if entry["name"] != "type":
                ask(self._peer, "object-del", id=entry["name"])
        self._peer.close()
        self._connect()


def fuzz(count: int, seed: int, reference: Qemu, ours: Side) -> int:
    """Compare so many cases; return how many differences were not explained. A QEMU that dies, as
    10.0 does of some messages with oob, is no difference: it is started again.
    """
    qemu = Side(reference.path)
    rng = random.Random(seed)
    source = cases(rng)
    reasons: Counter[str] = Counter()
    unexplained = done = 0
    shown = time.monotonic()
    while done < count and unexplained < 20:
        batch = [next(source) for _ in range(BATCH)]
        while batch:
            pieces = rng.random() < 0.3
            try:
                theirs = qemu.play(batch, rng, pieces=pieces)
            except (EOFError, OSError):
                if not reference.has_died:
                    raise
                reference.start_again()
                qemu.close()
                qemu = Side(reference.path)
                reasons["QEMU has died, and was started again"] += 1
                done += len(batch)
                break
            pairs = [theirs, ours.play(batch, rng, pieces=pieces)]
            at = next((i for i, (a, b) in enumerate(zip(*pairs, strict=True)) if a != b), None)
            if at is None:
                done += len(batch)
                break
            done += at + 1
            reason = explained(batch[at], pairs[0][at], pairs[1][at])
            if reason is None:
                unexplained += 1
                print(f"case    {batch[at]!r}\nQEMU    {pairs[0][at]}\nsecretd {pairs[1][at]}")
                print(f"before  {batch[max(0, at - 3) : at]}\n", flush=True)
            else:
                reasons[reason] += 1
            batch = batch[at + 1 :]
            qemu.empty()
            ours.empty()
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{done} cases, {unexplained} unexplained", flush=True)
    qemu.close()
    print(f"{done} cases, seed {seed}: {unexplained} differences unexplained")
    for reason, number in reasons.most_common():
        print(f"{number:8} explained: {reason}")
    return unexplained


def main() -> int:
    """Start both, compare, end both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--options", type=int, default=500, help="texts of --object (default: 500)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    different = fuzz_options(options.options, options.seed)
    program = Path(sys.executable).parent / "secretd"
    with tempfile.TemporaryDirectory() as directory, contextlib.closing(Qemu("qemu10")) as qemu:
        path = f"{directory}/control.sock"
        secretd = subprocess.Popen([program, "--control", path], stderr=subprocess.PIPE, text=True)
        try:
            for line in secretd.stderr:
                if "try:" in line:
                    break
            different += fuzz(options.cases, options.seed, qemu, Side(path))
            return min(1, different)
        finally:
            secretd.terminate()
            secretd.communicate(timeout=20)


if __name__ == "__main__":
    sys.exit(main())
