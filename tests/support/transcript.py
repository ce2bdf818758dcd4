# SPDX-License-Identifier: LGPL-2.1-or-later
r"""Transcripts: exchanges with a QMP server as data, in tests/vectors/*.qmp.

What QEMU says in them was recorded by scripts/dev/record-vectors, never typed. A file is a list of
vectors, each with a connection of its own and no objects at its start:

    = the name of the vector
    # a remark
    @file NAME b'…'     makes $dir/NAME; also @dir NAME, @fifo NAME, @link NAME TARGET, @socket NAME
    @key NAME b'…'      makes a key of this user's keyring: $NAME is its serial, $NAME.hex the
                        same as %08x;
                        @revoke NAME
    @no-negotiation     qmp_capabilities is not sent beforehand
    @enable NAME        qmp_capabilities enables this capability
    @together           nothing is awaited between the messages
    @quits              the server ends; all is sent in one piece
    -> {"execute": …}   is sent, with a newline
    -> b'…'             is sent as it stands, without
    -> <memfd b'…'> …   is sent with a descriptor: memfd; pipe, a filled one's read end
    <- {"return": …}    is answered by QEMU 10; without the CR LF at the end
    <7 {"return": …}    is answered by QEMU 7.2, where that is different
    != FIELD JSON | ROW secretd's value of one field of the answer above (FIELD like error.desc);
                        ROW is the beginning of the row under "Differences from QEMU" in
                        docs/protocol.md

In what is sent and answered $dir is the vector's directory; $fd1, $fd2 … are numbers of
descriptors, the same wherever the same name stands; $seconds and $microseconds any number.
"""

import ast
import contextlib
import json
import os
import re
import socket
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

VECTORS = Path(__file__).parent.parent / "vectors"
FILES = sorted(VECTORS.glob("*.qmp"))
OPTIONS = VECTORS / "object.opt"
SCHEMA = VECTORS / "schema.json"


@dataclass
class Reply:
    """An answer: QEMU 10's, QEMU 7.2's where it is different (None if there is none), ours
    likewise.
    """

    text: str
    ours: tuple[str, object, str] | None = None


@dataclass
class Step:
    """What is sent and the answers to it. ``old``: those of QEMU 7.2 if they are different."""

    text: str
    replies: list[Reply] = field(default_factory=list)
    old: list[str] | None = None


@dataclass
class Vector:
    """One connection's worth of exchanges."""

    file: str
    name: str
    lines: list[str] = field(default_factory=list)
    directives: list[list[str]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def has(self, directive: str) -> bool:
        """Is there such a directive?"""
        return any(words[0] == directive for words in self.directives)

    @property
    def enable(self) -> list[str]:
        """The capabilities to enable."""
        return [words[1] for words in self.directives if words[0] == "enable"]

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


def load(path: Path) -> list[Vector]:
    """Read a file of vectors."""
    vectors: list[Vector] = []
    for line in path.read_text().splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "=":
            vectors.append(Vector(path.stem, rest))
        elif line.startswith("@"):
            vectors[-1].directives.append(line[1:].split(" ", 2))
        elif mark == "->":
            vectors[-1].steps.append(Step(rest))
        elif mark == "<-":
            vectors[-1].steps[-1].replies.append(Reply(rest))
        elif mark == "<7":
            step = vectors[-1].steps[-1]
            step.old = (step.old or []) + ([rest] if rest else [])
        elif mark == "!=":
            name, value = rest.split(" ", 1)
            value, row = value.rsplit(" | ", 1)
            vectors[-1].steps[-1].replies[-1].ours = (name, json.loads(value), row)
        elif line and mark != "#":
            raise ValueError(f"{path}: {line}")
        if vectors and mark in ("#", ""):
            vectors[-1].lines.append(line)
    return vectors


@dataclass
class Option:
    """What stands after ``--object``; the words of the error, what is printed; our own words, and
    why.
    """

    text: str
    words: str = ""
    printed: str = ""
    ours: str | None = None
    row: str = ""

    @property
    def expected(self) -> str:
        """What secretd says."""
        return self.words if self.ours is None else self.ours


def load_options() -> list[Option]:
    """Read the file of options."""
    options: list[Option] = []
    for line in OPTIONS.read_text().splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "->":
            options.append(Option(json.loads(rest)))
        elif mark == "<-":
            options[-1].words = json.loads(rest)
        elif mark == "==":
            options[-1].printed = json.loads(rest)
        elif mark == "!=":
            value, options[-1].row = rest.rsplit(" | ", 1)
            options[-1].ours = json.loads(value)
    return options


def expanded(schema: list[dict], name: str) -> dict:
    """Return an entry of query-qmp-schema with each type's own entry in place of its name."""
    by_name = {entry["name"]: entry for entry in schema}

    def expand(node: object, key: str = "") -> object:
        if isinstance(node, list):
            return [expand(element, key) for element in node]
        if isinstance(node, dict):
            return {k: expand(v, k) for k, v in node.items()}
        if key in ("type", "arg-type", "ret-type", "element-type"):
            entry = by_name[str(node)]
            if entry["meta-type"] == "builtin":
                return entry
            return {k: expand(v, k) for k, v in entry.items() if k != "name"}
        return node

    return {k: expand(v, k) for k, v in by_name[name].items()}


class Peer(Protocol):
    """A connection to a QMP server."""

    def send(self, data: bytes, fds: list[int]) -> None:
        """Send bytes, with descriptors."""

    def line(self) -> bytes:
        """Return the next line; b"" at the end."""

    def end(self) -> bytes:
        """Send no more; return all that is still answered."""


class SocketPeer:
    """A connection over a Unix socket."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(5)
        self._sock.connect(path)
        self._stream = self._sock.makefile("rb")

    def send(self, data: bytes, fds: list[int]) -> None:
        """See Peer."""
        if fds:
            socket.send_fds(self._sock, [data], fds)
        else:
            self._sock.sendall(data)

    def line(self) -> bytes:
        """See Peer."""
        return self._stream.readline()

    def end(self) -> bytes:
        """See Peer."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        lines: list[bytes] = []
        # A server that ends with something unread resets the connection.
        with contextlib.suppress(ConnectionResetError):
            lines.extend(iter(self._stream.readline, b""))
        return b"".join(lines)

    def close(self) -> None:
        """Disconnect."""
        self._stream.close()
        self._sock.close()


class Scene:
    """What a vector finds in place: its directory, keys, and names of numbers."""

    def __init__(self, vector: Vector) -> None:
        self._stack = contextlib.ExitStack()
        self.directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="v"))
        self.values = {"dir": self.directory}
        try:
            for words in vector.directives:
                self._prepare(*words)
        except BaseException:
            self.close()
            raise

    def _prepare(self, what: str, name: str = "", rest: str = "") -> None:
        path = os.path.join(self.directory, name)
        if what == "file":
            Path(path).write_bytes(ast.literal_eval(rest))
        elif what == "dir":
            os.mkdir(path)
        elif what == "fifo":
            os.mkfifo(path)
        elif what == "link":
            os.symlink(rest.replace("$dir", self.directory), path)
        elif what == "socket":
            sock = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(path)
        elif what == "key":
            serial = add_key(ast.literal_eval(rest))
            self._stack.callback(keyctl, "unlink", str(serial), "@u")
            self.values[name] = str(serial)
            self.values[f"{name}.hex"] = f"{serial & 0xFFFFFFFF:08x}"
        elif what == "revoke":
            keyctl("revoke", self.values[name])
        elif what not in ("no-negotiation", "enable", "together", "quits"):
            raise ValueError(what)

    def message(self, text: str) -> tuple[bytes, list[int]]:
        """Return the bytes to send and the descriptors, which the caller closes."""
        fds = []
        while match := re.match(r"<(\w+)(?: (b'.*?'))?> ", text):
            fds.append(_descriptor(match[1], ast.literal_eval(match[2] or "b''")))
            text = text[match.end() :]
        for name in sorted(self.values, key=len, reverse=True):
            text = text.replace(f"${name}", self.values[name])
        if re.match("b['\"]", text):
            return ast.literal_eval(text), fds
        return text.encode() + b"\n", fds

    def pattern(self, text: str) -> "re.Pattern[str]":
        """Return what an expected answer matches."""
        made = ""
        bound = set()
        for literal, name in re.findall(r"([^$]+|\$(?![a-z]))|\$([a-z]\w*(?:\.hex)?)", text):
            if literal:
                made += re.escape(literal)
            elif name in self.values:
                made += re.escape(json.dumps(self.values[name])[1:-1])
            elif name in bound:
                made += f"(?P={name})"
            else:
                made += f"(?P<{name}>[0-9]+)"
                bound.add(name)
        return re.compile(made)

    def bind(self, match: "re.Match[str]") -> None:
        """Remember the numbers of descriptors."""
        self.values |= {n: v for n, v in match.groupdict().items() if n.startswith("fd")}

    def close(self) -> None:
        """Remove it all."""
        self._stack.close()


def _descriptor(kind: str, content: bytes) -> int:
    if kind == "memfd":
        fd = os.memfd_create("vector")
        os.write(fd, content)
        return fd
    source, sink = os.pipe()
    if kind == "pipe":
        os.write(sink, content)
        os.close(sink)
        return source
    raise ValueError(kind)


def keyctl(*words: str) -> str:
    """Call the program; return what it prints."""
    return subprocess.run(["keyctl", *words], check=True, capture_output=True, text=True).stdout


def add_key(payload: bytes) -> int:
    """Add a key to the user's keyring, which processes of this user may read; return its serial."""
    name = f"secretd-test-{os.getpid()}-{os.urandom(4).hex()}"
    done = subprocess.run(
        ["keyctl", "padd", "user", name, "@u"], input=payload, check=True, capture_output=True
    )
    serial = int(done.stdout)
    keyctl("setperm", str(serial), "0x3f3f0000")
    return serial


class Mismatch(AssertionError):
    """An answer that is not as the transcript says."""


def play(vector: Vector, peer: Peer, scene: Scene, *, server: str) -> None:
    """Play a vector on a fresh connection. ``server``: secretd, qemu10 or qemu7.

    Raises Mismatch.
    """
    check_greeting(peer.line())
    if not vector.has("no-negotiation"):
        arguments = {"enable": vector.enable} if vector.enable else {}
        message = {"execute": "qmp_capabilities", "arguments": arguments}
        peer.send(json.dumps(message).encode(), [])
        _expect(vector, "qmp_capabilities", scene, Reply('{"return": {}}'), peer.line(), server)
    if vector.has("quits"):
        # In one piece: later bytes would find no reader.
        peer.send(b"".join(scene.message(step.text)[0] for step in vector.steps), [])
        for step in vector.steps:
            _check_step(vector, step, peer, scene, server)
    elif vector.has("together"):
        for step in vector.steps:
            _send(peer, scene, step)
        for step in vector.steps:
            _check_step(vector, step, peer, scene, server)
    else:
        for step in vector.steps:
            _send(peer, scene, step)
            _check_step(vector, step, peer, scene, server)
    rest = peer.end()
    if rest:
        raise Mismatch(f"{vector}\n  at the end there is more: {rest!r}")


def check_greeting(line: bytes) -> None:
    """Is it QEMU 10's greeting, but for the version?"""
    version = rb'{"qemu": {"micro": \d+, "minor": \d+, "major": \d+}, "package": "[^"]*"}'
    if not re.fullmatch(
        rb'{"QMP": {"version": ' + version + rb', "capabilities": \["oob"\]}}\r\n', line
    ):
        raise Mismatch(f"greeting: {line!r}")


def _send(peer: Peer, scene: Scene, step: Step) -> None:
    data, fds = scene.message(step.text)
    try:
        peer.send(data, fds)
    finally:
        for fd in fds:
            os.close(fd)


def _check_step(vector: Vector, step: Step, peer: Peer, scene: Scene, server: str) -> None:
    replies = step.replies
    if server == "qemu7" and step.old is not None:
        replies = [Reply(text) for text in step.old]
    for reply in replies:
        _expect(vector, step.text, scene, reply, peer.line(), server)


def _expect(
    vector: Vector, sent: str, scene: Scene, reply: Reply, line: bytes, server: str
) -> None:
    try:
        got = line.decode("ascii")
    except UnicodeDecodeError:
        got = ascii(line)
    if server == "secretd" and reply.ours is not None:
        wanted = _with_difference(reply.text, *reply.ours[:2])
        same = got.endswith("\r\n") and _matches_json(scene, wanted, got)
    else:
        wanted = reply.text
        match = scene.pattern(wanted).fullmatch(got.removesuffix("\r\n"))
        same = match is not None and got.endswith("\r\n")
        if match is not None:
            scene.bind(match)
    if not same:
        raise Mismatch(f"{vector}\n  -> {sent}\n  <- {wanted}\n  but {server}: {got!r}")


def _with_difference(text: str, name: str, value: object) -> str:
    """Return QEMU's answer with one field changed. An answer has either `return` or `error`."""
    reply = json.loads(re.sub(r"\$fd\d", lambda m: f'"{m[0]}"', text))
    *path, last = name.split(".")
    node = reply
    for key in path:
        node = node[key]
    if not path and last in ("return", "error"):
        reply.pop("return", None)
        reply.pop("error", None)
    node[last] = value
    return json.dumps(reply)


def _matches_json(scene: Scene, wanted: str, got: str) -> bool:
    for name, value in scene.values.items():
        wanted = wanted.replace(f"${name}", value)
    wanted = re.sub(r'"\$fd\d"', "-1", wanted)
    return json.loads(wanted) == _anonymous(json.loads(got), wanted)


def _anonymous(data: object, wanted: str) -> object:
    """Numbers of descriptors as -1, where the answer wanted has them so."""
    if isinstance(data, dict) and '"fd": -1' in wanted:
        return {k: -1 if k == "fd" else _anonymous(v, wanted) for k, v in data.items()}
    if isinstance(data, list):
        return [_anonymous(v, wanted) for v in data]
    return data
