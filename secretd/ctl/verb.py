# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turning a function into a verb of secretctl: its command line (click), and its errors."""

import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from secretd import client as api
from secretd.ctl.connection import cannot_connect
from secretd.ctl.output import DONE, Common, fail
from secretd.errors import SecretdError, UsageError
from secretd.linux.locked_pages import forbid_dumps

Verb = Callable[..., "int | None"]


def verb(
    name: str, *params: click.Parameter, examples: Sequence[str] = (), **settings: Any
) -> Callable[[Verb], click.Command]:
    """Return a decorator that turns a function into a verb.

    The docstring is the help, and ``examples`` are command lines. The function gets `Common` and
    the values of ``params`` by name.
    """

    def register(function: Verb) -> click.Command:
        # Every verb has the common options, too.
        options = [
            *params,
            click.Option(["--json"], is_flag=True, help="for programs: print JSON"),
            click.Option(
                ["--socket"],
                metavar="PATH",
                help="secretd's socket; see 'secretctl --help'",
                type=click.Path(readable=False),
            ),
            click.Option(
                ["--timeout"],
                metavar="S",
                type=click.FloatRange(min=0.001),
                help="give up after S seconds without an answer",
            ),
        ]
        epilog = "\b\nExamples:\n" + "\n".join(f"  {e}" for e in examples) if examples else None
        return click.Command(
            name,
            params=options,
            help=function.__doc__,
            epilog=epilog,
            callback=lambda **given: _carry_out(function, given),
            **settings,
        )

    return register


def argument(name: str, **settings: Any) -> click.Argument:
    """Return an argument of a verb."""
    return click.Argument([name], **settings)


def option(*names: str, **settings: Any) -> click.Option:
    """Return an option of a verb."""
    return click.Option(names, **settings)


def flag(*names: str, **settings: Any) -> click.Option:
    """Return an option without a value."""
    return click.Option(names, is_flag=True, **settings)


def _carry_out(function: Verb, given: dict[str, Any]) -> int:
    # 1. Common options, from after the verb or before it.
    parent = click.get_current_context().parent
    assert parent is not None
    socket, timeout = given.pop("socket"), given.pop("timeout")
    common = Common(
        socket=parent.params["socket"] if socket is None else socket,
        timeout=parent.params["timeout"] if timeout is None else timeout,
        json=given.pop("json"),
        core_limit=resource.getrlimit(resource.RLIMIT_CORE),
    )
    _check_socket(common.socket)
    forbid_dumps()
    # 2. The verb, and its errors as messages and an exit status.
    try:
        return function(common, **given) or DONE
    except SecretdError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            raise
        return fail(str(error))
    except Exception as error:
        # qemu.qmp is imported only to raise one of its errors.
        if "qemu.qmp" not in sys.modules or not isinstance(error, api.QMPError):
            raise
        if isinstance(error, api.ConnectError):
            return cannot_connect(error, common)
        if isinstance(error, api.ExecuteError):
            return fail(str(error))
        return fail(f"the connection was lost before the answer: {error}; the command may have run")


def _check_socket(path: str | None) -> None:
    if path == "":
        raise UsageError("--socket: the path is empty")
    if path is not None and path.startswith("@"):
        raise UsageError(f"--socket {path}: abstract sockets are not supported; give a path")
