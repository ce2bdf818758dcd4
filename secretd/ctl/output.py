# SPDX-License-Identifier: LGPL-2.1-or-later
"""The output of secretctl: errors with the next step, JSON, tables and progress; and its exit
statuses.

rich is imported only to draw on a terminal: `secretctl read` in a script must start soon.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from secretd.ctl.hints import next_step
from secretd.errors import UsageError

DONE: Final = 0
REFUSED: Final = 1
USAGE: Final = 2
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
INTERRUPTED: Final = 130

EXIT_STATUS: Final = {
    DONE: "done",
    REFUSED: "secretd or the system refused, and stderr has the reason; for explain: no; for "
    "audit verify and doctor: something is wrong",
    USAGE: "wrong usage",
    NOT_EXECUTABLE: "run: the command cannot be executed",
    NOT_FOUND: "run: there is no such command",
    INTERRUPTED: "interrupted by Ctrl-C",
}
"""The meaning of each exit status. `run` ends with the status of its command."""


class Common(NamedTuple):
    """The options that all verbs share, and the core limit before secretctl changed it."""

    socket: str | None
    timeout: float | None
    json: bool
    core_limit: tuple[int, int] = (0, 0)


def fail(message: str) -> int:
    """Print an error, and its next step if one is known; return the exit status."""
    print(f"secretctl: {_shown(message)}", file=sys.stderr)
    step = next_step(message)
    if step is not None:
        print(f"secretctl: {step}", file=sys.stderr)
    return REFUSED


def _shown(text: str) -> str:
    """Return a text in printable form, with U+FFFD for invalid UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def note(message: str) -> None:
    """Print a remark besides the result."""
    print(f"secretctl: {message}", file=sys.stderr)


def warn(message: str) -> None:
    """Print a warning about something that is probably a mistake."""
    print(f"secretctl: warning: {message}", file=sys.stderr)


def done(common: Common, **facts: object) -> None:
    """Print the outcome in JSON, if that was requested."""
    if common.json:
        print(json.dumps(facts))


def confirm(common: Common, words: str) -> None:
    """Tell a person at a terminal that a change was made; scripts have the exit status."""
    if not common.json and sys.stdout.isatty():
        print(words)


def agreed(question: str) -> bool:
    """Ask a person at a terminal; only "y" and "yes" agree. Raises UsageError without one."""
    if not sys.stdin.isatty():
        raise UsageError(f"{question} There is no terminal to ask, and --yes agrees beforehand")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as "5,000 bytes"."""
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
    """Return the end of so many seconds, such as "at 21:03, in 8h"."""
    try:
        then = time.localtime(time.time() + seconds)
    except (OverflowError, OSError, ValueError):
        return f"in {duration(seconds)}"
    form = "%H:%M" if seconds < 12 * 3600 else "%Y-%m-%d %H:%M"
    return f"at {time.strftime(form, then)}, in {duration(seconds)}"


_GAP: Final = 2
_SHORT: Final = 12
"""Columns of a terminal that a name or a text keeps at least."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> None:
    """Print a table: drawn with rich on a terminal, plain columns in a pipe.

    ``right``: the numbers of right-aligned columns.
    """
    numbers = set(right)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        rows = list(rows)
        console = Console()
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        # A narrow terminal cuts names, then folds long texts, and never cuts numbers.
        fixed = [i > 0 and (i in numbers or widths[i] <= _SHORT) for i in range(len(head))]
        others = sum(w if f else min(w, _SHORT) for w, f in zip(widths[1:], fixed[1:], strict=True))
        room = console.width - others - _GAP * len(head)
        drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0))
        for index, title in enumerate(head):
            drawn.add_column(
                title,
                justify="right" if index in numbers else "left",
                no_wrap=index == 0 or fixed[index],
                overflow="ellipsis" if index == 0 else "fold",
                style="cyan" if index == 0 else None,
                min_width=widths[index] if fixed[index] else None,
                max_width=max(_SHORT, room) if index == 0 else None,
            )
        for row in rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
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
    """Show the progress of long work on a terminal's stderr; yields the function to call after each
    step.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
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
    # rich would capture standard output, too, even where it is a file.
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bar:
        task = bar.add_task(words, total=total)
        yield lambda: bar.advance(task)
