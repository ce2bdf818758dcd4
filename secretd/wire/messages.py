# SPDX-License-Identifier: LGPL-2.1-or-later
"""The messages of QMP (QMP spec, section "Protocol Specification") as values and as bytes.

It reads no stream (wire.connection does) and knows no command. monitor calls it.
"""

from typing import NamedTuple, TypedDict

from secretd.wire import encoder
from secretd.wire.parser import JSON, Fault

DESC_BYTES = 48_000
"""Bytes of the words of an error, including escapes. Even with the longest id the reply stays under
64 KiB.
"""

LONGEST_ESCAPE = 12
"""Bytes that one character may need in JSON."""

EMPTY_RETURN = b'{"return": {}}\r\n'

GREETS = True
"""The server speaks first (QMP spec, section "Server Greeting")."""

SERVER_ERROR = INVALID_PARAMS = INTERNAL_ERROR = 0
"""Codes of errors, which QMP has not."""


class Request(NamedTuple):
    """A well-formed command object (QMP spec, section "Issuing Commands").

    ``command``: its name. ``arguments``: the members by name, undecoded. ``id``: the JSON text of
    the member, None without one. ``oob``: True for exec-oob, which runs at once.
    """

    command: str
    arguments: dict[str, JSON]
    id: str | None
    oob: bool = False


class Malformed(NamedTuple):
    """The fault of a message that is not a command object, in QEMU's words. It keeps its place in
    the queue. ``code``: JSON-RPC's number of it.
    """

    fault: Fault
    id: str | None = None
    code: int = 0


def greeting(qemu: tuple[int, int, int], package: str, capabilities: list[str]) -> bytes:
    """Return the server's first line (QMP spec, section "Server Greeting").

    ``qemu``: QEMU's version as major, minor, micro. ``package``: the server's name.
    ``capabilities``: those that the client may enable.
    """
    return encoder.line(
        {"QMP": {"version": version(qemu, package), "capabilities": list(capabilities)}}
    )


class VersionTriple(TypedDict):
    """A version of QEMU."""

    major: int
    minor: int
    micro: int


class VersionInfo(TypedDict):
    """The result of query-version (qapi/control.json)."""

    qemu: VersionTriple
    package: str


def version(qemu: tuple[int, int, int], package: str) -> VersionInfo:
    """Return the VersionInfo of a QEMU version (major, minor, micro) and a package."""
    major, minor, micro = qemu
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": package}


def success(data: object, id_text: str | None) -> bytes:
    """Return a success response; ``data`` None stands for an empty object. ``id_text``: the id's
    JSON text.
    """
    if isinstance(data, encoder.JSONText):
        body: str = data
    else:
        body = "{}" if data is None else encoder.value(data)
    suffix = "" if id_text is None else f', "id": {id_text}'
    return f'{{"return": {body}{suffix}}}\r\n'.encode("ascii")


def failure(error_class: str, desc: str, id_text: str | None, _code: int = 0) -> bytes:
    """Return an error response; overlong words are cut. ``id_text``: the id's JSON text. QMP has no
    codes.
    """
    prefix = "" if id_text is None else f'"id": {id_text}, '
    text = encoder.string(desc)
    if len(text) > DESC_BYTES:
        text = encoder.string(desc[: DESC_BYTES // LONGEST_ESCAPE])
    return f'{{{prefix}"error": {{"class": "{error_class}", "desc": {text}}}}}\r\n'.encode("ascii")


def quoted_failure_size(fault: Fault) -> int:
    """Return the bytes that `write_quoted_failure` may need."""
    assert fault.quote is not None
    return 6 * (len(fault.quote) + len(fault.before) + len(fault.after)) + 64


def write_quoted_failure(fault: Fault, into: memoryview) -> int:
    """Write the error response that quotes the sender's bytes into a buffer; return its length in
    bytes.
    """
    assert fault.quote is not None
    head = b'{"error": {"class": "GenericError", "desc": '
    return encoder.write_quoted_message(fault, head, b"}}\r\n", into)


def refusal(desc: str) -> bytes:
    """Return an error that answers no request, such as that of a limit."""
    return failure("GenericError", desc, None)


def events(lines: bytes) -> bytes:
    """Return events as this dialect sends them: as they are."""
    return lines


def event(name: str, data: str, seconds: int, microseconds: int) -> bytes:
    """Return an event (QMP spec, section "Asynchronous events").

    ``data``: JSON text. ``seconds``, ``microseconds``: the time since the epoch.
    """
    time = f'{{"seconds": {seconds}, "microseconds": {microseconds}}}'
    return f'{{"timestamp": {time}, "event": "{name}", "data": {data}}}\r\n'.encode("ascii")
