# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all verbs of `secretctl` have in common: the command line (click), errors with the next
step, tables, JSON, progress and completion. The verbs are in ctl, ctl_access, ctl_bulk and
ctl_doctor.

rich is imported where a terminal is drawn on, and nowhere else: `secretctl read` in a script must
start soon.
"""

import contextlib
import errno
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from secretd import __version__, paths
from secretd import client as api
from secretd.client import SyncClient, default_socket
from secretd.client.channel import Refused
from secretd.client.types import before
from secretd.errors import SecretdError, UsageError
from secretd.linux.locked_pages import forbid_dumps

RETRY_SECONDS: Final = 5.0
"""Seconds for which a connection that was lost is made anew: a restart takes less."""

COMPLETION_SECONDS: Final = 1.0
"""Seconds within which secretd must answer what ids there are, while somebody types."""

DONE: Final = 0
REFUSED: Final = 1
USAGE: Final = 2
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
INTERRUPTED: Final = 130

EXIT_STATUS: Final = {
    DONE: "done",
    REFUSED: "secretd or the system refused, and stderr says why; for explain: no; for audit verify and "
    "doctor: something is wrong",
    USAGE: "wrong usage",
    NOT_EXECUTABLE: "run: the command cannot be executed",
    NOT_FOUND: "run: there is no such command",
    INTERRUPTED: "interrupted by Ctrl-C",
}
"""What each exit status means. `run` ends as the command does that it ran."""

_NEXT_STEPS: Final = (
    (r"No secret with id|object '.*' not found", "'secretctl list' shows what there is"),
    (
        r"Reading secret '(.*)' is not permitted",
        r"root can let you: secretctl grant \1 --to user:NAME",
    ),
    (
        r"attempt to add duplicate property '.*' to object",
        "the id is taken, so nothing was changed; choose another one",
    ),
    (r"The command (\S+) has not been found", "the control socket has it: --socket names that one"),
    (r"No locked memory left|\(object-bytes-per-uid\)", "'secretctl doctor' says how to get more"),
    (r"has no data|is not a secret", "'secretctl list' shows which are secrets"),
    (r"IV is required to decrypt secret", "--iv gives it"),
    (
        r"Invalid base64 data|non-base64|not valid base64",
        "--format says how the content is encoded",
    ),
)


class Options(SimpleNamespace):
    """What stands on the command line, by the names of click's parameters; and ``socket``,
    ``json``.
    """

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


SECTIONS: Final = {
    "Secrets": ("add", "read", "list", "del", "generate", "expire"),
    "Hand-over": ("run", "push", "seal"),
    "Access": ("grant", "revoke", "explain", "audit"),
    "Many at once": ("import", "export", "watch"),
    "The daemon": ("status", "doctor", "shell", "completion"),
}
"""The verbs, as the help lists them."""

Verb = Callable[[Options], "int | None"]


class Sections(click.Group):
    """A group whose help lists its commands under headings."""

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each section's commands with the first sentence of their help."""
        longest = max(map(len, self.commands), default=0)
        for title, names in SECTIONS.items():
            with formatter.section(title):
                width = formatter.width - longest - 6
                rows = [
                    (n.ljust(longest), self.commands[n].get_short_help_str(width)) for n in names
                ]
                formatter.write_dl(rows)


_TIMEOUT = "give up after S seconds without an answer (default: wait, and say for what)"
_SOCKET = "secretd's socket (default: $SECRETD_SOCKET, else the control or client socket)"


@click.group(
    cls=Sections,
    subcommand_metavar="VERB ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="'secretctl VERB --help' tells more of each, with examples. Secrets are never arguments: "
    "they come from files, descriptors, pipes or a prompt, and go to pipes and files.",
)
@click.option("--socket", metavar="PATH", help=_SOCKET, type=click.Path(readable=False))
@click.option("--timeout", metavar="S", type=click.FloatRange(min=0.001), help=_TIMEOUT)
@click.version_option(__version__, prog_name="secretctl", message="%(prog)s %(version)s")
def cli(socket: str | None, timeout: float | None) -> None:
    """Add secrets to a running secretd, and hand them on without showing them."""


def verb(
    name: str, *params: click.Parameter, examples: Sequence[str] = (), **settings: Any
) -> Callable[[Verb], Verb]:
    """Make a function a verb. Its docstring is the help, ``examples`` are command lines."""

    def register(function: Verb) -> Verb:
        options = [
            *params,
            click.Option(["--json"], is_flag=True, help="for programs: print JSON"),
            click.Option(
                ["--socket"],
                metavar="PATH",
                help="as before the verb",
                type=click.Path(readable=False),
            ),
            click.Option(
                ["--timeout"],
                metavar="S",
                type=click.FloatRange(min=0.001),
                help="as before the verb",
            ),
        ]
        epilog = "\b\nExamples:\n" + "\n".join(f"  {e}" for e in examples) if examples else None
        command = click.Command(
            name,
            params=options,
            help=function.__doc__,
            epilog=epilog,
            callback=lambda **given: _carry_out(function, given),
            **settings,
        )
        cli.add_command(command)
        return function

    return register


def argument(name: str, **settings: Any) -> click.Argument:
    """An argument of a verb."""
    return click.Argument([name], **settings)


def option(*names: str, **settings: Any) -> click.Option:
    """An option of a verb."""
    return click.Option(names, **settings)


def flag(*names: str, **settings: Any) -> click.Option:
    """An option that takes no value."""
    return click.Option(names, is_flag=True, **settings)


def _carry_out(function: Verb, given: dict[str, Any]) -> int:
    parent = click.get_current_context().parent
    assert parent is not None
    for name in ("socket", "timeout"):
        given[name] = parent.params[name] if given[name] is None else given[name]
    _check_socket(given["socket"])
    options = Options(connecting=None, core_limit=resource.getrlimit(resource.RLIMIT_CORE), **given)
    forbid_dumps()
    try:
        return function(options) or DONE
    except SecretdError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            raise
        return fail(str(error))
    except Exception as error:
        # qemu.qmp is imported where one of its errors is raised, and nowhere else.
        if "qemu.qmp" not in sys.modules or not isinstance(error, api.QMPError):
            raise
        if isinstance(error, api.ConnectError):
            return _cannot_connect(error, options)
        if isinstance(error, api.ExecuteError):
            return fail(str(error))
        return fail(
            f"the connection was lost before the answer: {error}; it may have been carried out"
        )


def _check_socket(path: str | None) -> None:
    if path == "":
        raise UsageError("--socket: the path is empty")
    if path is not None and path.startswith("@"):
        raise UsageError(f"--socket {path}: abstract sockets are not supported; give a path")


def main() -> int:
    """Run `secretctl`; return the exit status."""
    _open_closed()
    try:
        status: int | None = cli.main(prog_name="secretctl", standalone_mode=False)
        sys.stdout.flush()
    except click.Abort:  # Ctrl-C; and click ends by itself where nobody reads what it prints
        return INTERRUPTED
    except click.UsageError as error:
        return _usage(error)
    except SecretdError as error:
        return fail(str(error))
    except BrokenPipeError:  # nobody reads any more, as behind 'head'
        _drop_output()
        return REFUSED
    except OSError as error:
        _drop_output()
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        if error.errno in (errno.EBADF, errno.ENOSPC, errno.EIO) and not where:
            where = "standard output: "
        return fail(f"{where}{error.strerror or error}")
    else:
        return status or DONE


def _open_closed() -> None:
    """Give each closed standard descriptor an end: nothing that is opened later must be taken for
    it.

    What is written to a closed standard output is an error then, not lost (as with the tools of GNU
    coreutils).
    """
    for fd, flags in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, flags)  # the lowest free number
            assert opened == fd
            if fd == 1:
                sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for as long as the process runs
            elif fd == 2:
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _drop_output() -> None:
    """Have the interpreter not try once more, at its end, to write what could not be written."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.close(devnull)


# --- errors


def fail(message: str) -> int:
    """Say what went wrong, and what to do if that is known; return the exit status."""
    print(f"secretctl: {_shown(message)}", file=sys.stderr)
    for pattern, step in () if message.startswith("QEMU says") else _NEXT_STEPS:
        match = re.search(pattern, message)
        if match:
            print(f"secretctl: {match.expand(step)}", file=sys.stderr)
            break
    return REFUSED


def _shown(text: str) -> str:
    """Return a text as it can be printed: what is not UTF-8 as U+FFFD."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def note(message: str) -> None:
    """Tell a person something besides the result."""
    print(f"secretctl: {message}", file=sys.stderr)


def warn(message: str) -> None:
    """Say what may not be meant."""
    print(f"secretctl: warning: {message}", file=sys.stderr)


def _usage(error: click.UsageError) -> int:
    """Say what is wrong with the command line.

    What it cannot place is not printed: it may be a secret.
    """
    context = error.ctx
    words = error.format_message()
    if isinstance(error, click.NoSuchOption):
        words = f"unknown option {error.option_name} (secrets must not be passed as arguments)"
    elif words.startswith("Got unexpected extra argument"):
        words = "unknown argument (secrets must not be passed as arguments)"
    elif words.startswith("No such command"):
        near = getattr(error, "possibilities", None) or []
        words = "there is no such verb" + (f"; {' or '.join(near)}?" if near else "")
    path = context.command_path if context else "secretctl"
    print(f"secretctl: {words[:1].lower() + words[1:]}", file=sys.stderr)
    print(f"secretctl: '{path} --help' tells how", file=sys.stderr)
    return USAGE


def _cannot_connect(error: "api.ConnectError", options: Options) -> int:
    cause = error.exc
    path = options.socket or default_socket()
    if isinstance(cause, Refused):
        return fail(f"{path}: {cause}")
    reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else cause
    absent = isinstance(cause, (FileNotFoundError, ConnectionRefusedError))
    fail(f"cannot connect to {path}: {reason}{'; is it running?' if absent else ''}")
    if absent:
        print(
            "secretctl: start it with 'secretd', or name its socket with --socket; "
            "'secretctl doctor' looks for the reason",
            file=sys.stderr,
        )
    elif isinstance(cause, PermissionError):
        print(
            "secretctl: only root and secretd's own user may; 'secretctl doctor' says more",
            file=sys.stderr,
        )
    return REFUSED


class _Client(SyncClient):
    """The client of all verbs: it says which socket answers where that may be a surprise."""

    def connect(self) -> None:
        """See SyncClient."""
        super().connect()
        if not self.package.startswith("secretd"):
            raise UsageError(
                f"{self.path}: this is the monitor of a QEMU, not a socket of secretd; "
                "name that with --socket"
            )


def client_of(options: Options) -> SyncClient:
    """Return the client of all verbs."""
    if options.socket is None and not os.environ.get("SECRETD_SOCKET"):
        path = default_socket()
        if path != paths.control_path():
            note(f"no control socket at {paths.control_path()}; asking the client socket {path}")
    return _Client(
        options.socket,
        retry_seconds=RETRY_SECONDS if options.timeout is None else options.timeout,
        timeout=options.timeout,
        on_wait=say_waiting,
    )


def say_waiting(what: str) -> None:
    """Tell a person what takes so long."""
    note(f"waiting for {what} ... (--timeout S gives up)")


def unsure_denials(client: SyncClient, authz: str) -> list[str]:
    """Return the matches of an authz-list's deny rules that a process can get around: it can drop a
    group in a user namespace, and leave a unit. Only its uid stays.
    """
    try:
        rules = client.execute("qom-get", {"path": f"/objects/{authz}", "property": "rules"})
    except api.ExecuteError:
        return []
    assert isinstance(rules, list)
    return [
        r["match"] for r in rules if r["policy"] == "deny" and not r["match"].startswith("uid:")
    ]


# --- output


def done(options: Options, **facts: object) -> None:
    """Print in JSON what was done, if that was asked for."""
    if options.json:
        print(json.dumps(facts))


def count(number: int, noun: str) -> str:
    """Return such as "5,000 bytes"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: int | None) -> str:
    """Return two of days, hours, minutes and seconds, such as "2d 3h"; "-" for no limit."""
    if seconds is None:
        return "-"
    parts = []
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        number, seconds = divmod(seconds, size)
        if number:
            parts.append(f"{number}{unit}")
    return " ".join(parts[:2]) or "0s"


def at_and_in(seconds: int) -> str:
    """Return when so many seconds are over, such as "at 21:03, in 8h"."""
    then = time.localtime(time.time() + seconds)
    form = "%H:%M" if seconds < 12 * 3600 else "%Y-%m-%d %H:%M"
    return f"at {time.strftime(form, then)}, in {duration(seconds)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> None:
    """Print a table: drawn with rich on a terminal, plain columns in a pipe. ``right``: columns of
    numbers.
    """
    numbers = set(right)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for index, title in enumerate(head):
            first = {"no_wrap": True, "style": "cyan"} if index == 0 else {}
            drawn.add_column(title, justify="right" if index in numbers else "left", **first)  # type: ignore[arg-type]
        for row in rows:
            drawn.add_row(*map(Text, row))
        Console().print(drawn)
        return
    every = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    for row in every:
        cells = (
            cell.rjust(width) if index in numbers else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


@contextlib.contextmanager
def progress(words: str, total: int | None) -> Iterator[Callable[[], None]]:
    """Show how far something long has come, on a terminal's stderr; yields what tells of each
    step.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # rich would take standard output for the terminal's, and what goes to a file with it.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bar:
        task = bar.add_task(words, total=total)
        yield lambda: bar.advance(task)


# --- completion


def complete_ids(
    context: click.Context, _param: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Return the ids of secrets that begin so; none if secretd does not answer soon."""
    parent = context.parent
    socket = context.params.get("socket") or (parent.params.get("socket") if parent else None)

    try:
        with SyncClient(socket, retry_seconds=0, timeout=COMPLETION_SECONDS) as client:
            found: Any = client.execute("query-secrets", {"after": before(begun)})
    except Exception:  # noqa: BLE001 - a shell that completes must not be disturbed
        return []
    return [CompletionItem(each["id"]) for each in found if each["id"].startswith(begun)]


@verb(
    "completion",
    argument("shell", type=click.Choice(("bash", "zsh", "fish"))),
    examples=(
        'eval "$(secretctl completion bash)"',
        "secretctl completion fish > ~/.config/fish/completions/secretctl.fish",
    ),
)
def completion(options: Options) -> None:
    """Print a script that completes verbs and ids in a shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(options.shell)
    assert kind is not None
    print(kind(cli, {}, "secretctl", "_SECRETCTL_COMPLETE").source())
