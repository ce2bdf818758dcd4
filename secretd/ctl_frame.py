# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all verbs of `secretctl` have in common: the command line (click), errors with the next step,
tables, JSON, progress and completion. The verbs are in ctl, ctl_access, ctl_bulk and ctl_doctor.

rich is imported where a terminal is drawn on, and nowhere else: `secretctl read` in a script must start
soon.
"""

import asyncio
import contextlib
import json
import os
import re
import resource
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from secretd import __version__
from secretd.client import Client, ConnectError, ExecuteError, QMPError, default_socket
from secretd.errors import SecretdError
from secretd.pages import forbid_dumps

T = TypeVar("T")

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
        r"attempt to add duplicate property '(.*)' to object",
        r"the id is taken; 'secretctl del \1' removes what has it",
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
    """What stands on the command line, by the names of click's parameters; and ``socket``, ``json``."""

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

Verb = Callable[[Options], "Awaitable[int | None] | int | None"]


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


_SOCKET = "secretd's socket (default: $SECRETD_SOCKET, else the control or client socket)"


@click.group(
    cls=Sections,
    subcommand_metavar="VERB ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="'secretctl VERB --help' tells more of each, with examples. Secrets are never arguments: "
    "they come from files, descriptors, pipes or a prompt, and go to pipes and files.",
)
@click.option("--socket", metavar="PATH", help=_SOCKET, type=click.Path(readable=False))
@click.version_option(__version__, prog_name="secretctl", message="%(prog)s %(version)s")
def cli(socket: str | None) -> None:
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
    given["socket"] = given["socket"] or parent.params["socket"]
    options = Options(connecting=None, core_limit=resource.getrlimit(resource.RLIMIT_CORE), **given)
    forbid_dumps()
    try:
        result = function(options)
        if not isinstance(result, Awaitable):
            return result or DONE
        return asyncio.run(_finish(result)) or DONE
    except ConnectError as error:
        return _cannot_connect(error, options)
    except ExecuteError as error:
        return fail(str(error))
    except QMPError as error:
        return fail(f"the connection was lost: {error}")


async def _finish(result: Awaitable[int | None]) -> int | None:
    return await result


def main() -> int:
    """Run `secretctl`; return the exit status."""
    try:
        status: int | None = cli.main(prog_name="secretctl", standalone_mode=False)
    except click.Abort:  # Ctrl-C; and click ends by itself where nobody reads what it prints
        return INTERRUPTED
    except click.UsageError as error:
        return _usage(error)
    except SecretdError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    else:
        return status or DONE


# --- errors


def fail(message: str) -> int:
    """Say what went wrong, and what to do if that is known; return the exit status."""
    print(f"secretctl: {message}", file=sys.stderr)
    for pattern, step in () if message.startswith("QEMU says") else _NEXT_STEPS:
        match = re.search(pattern, message)
        if match:
            print(f"secretctl: {match.expand(step)}", file=sys.stderr)
            break
    return REFUSED


def warn(message: str) -> None:
    """Say what may not be meant."""
    print(f"secretctl: warning: {message}", file=sys.stderr)


def _usage(error: click.UsageError) -> int:
    """Say what is wrong with the command line. What it cannot place is not printed: it may be a secret."""
    context = error.ctx
    words = error.format_message()
    if isinstance(error, click.NoSuchOption):
        words = f"unknown option {error.option_name} (secrets are not given as arguments)"
    elif words.startswith("Got unexpected extra argument"):
        words = "unknown argument (secrets are not given as arguments)"
    elif words.startswith("No such command"):
        near = getattr(error, "possibilities", None) or []
        words = "there is no such verb" + (f"; {' or '.join(near)}?" if near else "")
    path = context.command_path if context else "secretctl"
    print(f"secretctl: {words[:1].lower() + words[1:]}", file=sys.stderr)
    print(f"secretctl: '{path} --help' tells how", file=sys.stderr)
    return USAGE


def _cannot_connect(error: ConnectError, options: Options) -> int:
    qemu: str | None = options.connecting
    cause = error.exc
    reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else cause
    absent = isinstance(cause, (FileNotFoundError, ConnectionRefusedError))
    path = qemu or options.socket or default_socket()
    fail(f"cannot connect to {path}: {reason}{'; is it running?' if absent else ''}")
    if absent and qemu is None:
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


def client_of(options: Options) -> Client:
    """Return the client of all verbs."""
    return Client(options.socket, retry_seconds=RETRY_SECONDS)


# --- output


def done(options: Options, **facts: object) -> None:
    """Say in JSON what was done, if that was asked for; people are told nothing when all went well."""
    if options.json:
        print(json.dumps(facts))


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
    """Show how far something long has come, on a terminal's stderr; yields what tells of each step."""
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
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(words, total=total)
        yield lambda: bar.advance(task)


# --- completion


def complete_ids(
    context: click.Context, _param: click.Parameter, begun: str
) -> list[CompletionItem]:
    """Return the ids of secrets that begin so; none if secretd does not answer soon."""
    parent = context.parent
    socket = context.params.get("socket") or (parent.params.get("socket") if parent else None)

    async def ask() -> list[dict[str, Any]]:
        async with asyncio.timeout(COMPLETION_SECONDS), Client(socket, retry_seconds=0) as client:
            # Whatever sorts just before what was begun.
            after = f"{begun[:-1]}{chr(ord(begun[-1]) - 1)}~" if begun else ""
            return await client.execute("query-secrets", {"after": after})  # type: ignore[return-value]

    try:
        found = asyncio.run(ask())
    except (QMPError, OSError, TimeoutError):
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
