# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line before everything else: the values of ``--object …data=`` leave argv.

It creates no objects and knows no other option; daemon.process calls it before it parses options.
"""

import os
import sys

from secretd.daemon import redaction
from secretd.errors import UsageError
from secretd.qapi import keyval
from secretd.wire import encoder
from secretd.wire.parser import Text

ARGV_FDS = "SECRETD_ARGV_FDS"
"""Environment variable from one incarnation to the next: the memfds with the values of
``data=``.
"""

_LONG = 8
"""Bytes of a value that is too long to occur in an environment variable by chance."""


def words() -> list[str]:
    """Return the arguments; ``-object`` with one dash is accepted, since QEMU's users type it."""
    one = ("-object", "-object=")
    return [f"-{word}" if word.startswith(one) else word for word in sys.argv[1:]]


def hide_data() -> None:
    """Execute this program again without the values of ``--object …data=``.

    They move to memfds that the next incarnation reads as files. It is the same process, but
    without a copy of them in its memory or in /proc/PID/cmdline.
    """
    # 1. Move each value to a memfd, and name it in its option.
    given_words = words()
    fds: list[int] = []
    values: list[bytes] = []
    for index, word in enumerate(given_words):
        option, equals, text = word.partition("=")
        if option != "--object":
            continue
        if not equals:
            if index + 1 == len(given_words):
                continue
            text = given_words[index + 1]
        hidden = _without_data(text)
        if hidden is not None:
            values += (os.fsencode(text), hidden[2])
            fd, text, _ = hidden
            fds.append(fd)
            if equals:
                given_words[index] = f"--object={text}"
            else:
                given_words[index + 1] = text
    if not fds:
        return
    print(
        "secretd: warning: --object with data= shows the secret to every user of this machine "
        "until secretd has started; use file= instead (a path, or <(command) in bash)",
        file=sys.stderr,
        flush=True,
    )
    # 2. Execute the program again with the new arguments and a clean environment.
    _clean_environment(values)
    os.environ[ARGV_FDS] = ",".join(map(str, fds))
    interpreter = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    os.execv(sys.executable, [*interpreter, *given_words])


def _clean_environment(values: list[bytes]) -> None:
    """Remove the variables that hold a hidden value, such as the one with a unit's options.

    A short value may equal a part of a variable by chance (``x``, ``/root``), so it counts only
    after ``data=``.
    """
    forms = {form for value in values for form in (value, value.replace(b",", b",,"))}
    for name, content in list(os.environb.items()):
        if any(
            b"data=" + form in content or (len(form) >= _LONG and form in content)
            for form in forms
            if form
        ):
            del os.environb[name]


def _without_data(text: str) -> tuple[int, str, bytes] | None:
    """Return a memfd with the value of ``data``, the text that names it instead, and the value."""
    try:
        given = keyval.arguments(keyval.buffer(text)).members
    except UsageError:
        return None  # creating the objects reports it again, with the option's text
    data = given.pop("data", None)
    if not isinstance(data, Text):
        return None
    if "file" in given:
        shown = redaction.shown(text, [])
        raise UsageError(f"--object {shown}: 'file' and 'data' are mutually exclusive")
    value = bytes(data.decode_in_place()[1:-1])
    fd = os.memfd_create("secretd-argv", 0)
    with open(fd, "wb", closefd=False) as memfd:
        memfd.write(value)
    # In the same place, so that errors show the members in their original order.
    file = f"/dev/fd/{fd}"
    if text.startswith("{"):
        return fd, redaction.with_file(text, file) or encoder.value(given | {"file": file}), value
    file = f"file={file}"
    listed = [file if part.key == "data" else part.text for part in redaction.parts(text)]
    return (
        fd,
        ",".join(part for i, part in enumerate(listed) if part != file or file not in listed[:i]),
        value,
    )


def hidden_fds() -> list[int]:
    """Return the memfds with the values of ``data=`` of this incarnation."""
    return [int(number) for number in filter(None, os.environ.pop(ARGV_FDS, "").split(","))]


def close(fds: list[int]) -> None:
    """Empty and close memfds, once the objects exist."""
    for fd in fds:
        os.ftruncate(fd, 0)
        os.close(fd)
