# SPDX-License-Identifier: LGPL-2.1-or-later
"""Turning a function into a verb of secretctl: its parameters, and its errors.

A `Verb` is plain data, so that usual command lines need no click: words reads those, and frame
makes click's commands of the same verbs for all others, for help and for completion.
"""

import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

from secretd import client as api
from secretd.ctl.connection import cannot_connect
from secretd.ctl.output import DONE, Common, fail
from secretd.errors import SecretdError, UsageError
from secretd.linux.locked_pages import forbid_dumps

Function = Callable[..., "int | None"]

PATH: Final = "path"
"""The type of a parameter that is a path."""

COMMAND: Final = "command"
"""The type of an argument that is a command line, options included."""


class WrongUsage(SecretdError):
    """Parameters that exclude or need each other; `main` names the verb's help."""

    verb = ""


class Parameter(NamedTuple):
    """A parameter of a verb.

    ``name``: the function's. ``options``: its names on the command line, none for an argument.
    ``settings``: click's, but ``type`` is int, a tuple of choices, PATH, COMMAND or absent, and
    ``completes`` names what a shell completes: "secrets", "grants" or "identities".
    """

    kind: Literal["argument", "option", "flag"]
    name: str
    options: tuple[str, ...]
    settings: dict[str, Any]


class Verb(NamedTuple):
    """A verb: ``function`` gets `Common` and the values of ``parameters`` by name.

    The function's docstring is the help, and ``examples`` are command lines. ``settings`` are
    click's.
    """

    name: str
    function: Function
    parameters: tuple[Parameter, ...]
    examples: Sequence[str]
    settings: dict[str, Any]


def verb(
    name: str, *parameters: Parameter, examples: Sequence[str] = (), **settings: Any
) -> Callable[[Function], Verb]:
    """Return a decorator that turns a function into a verb."""
    return lambda function: Verb(name, function, parameters, examples, settings)


def argument(name: str, **settings: Any) -> Parameter:
    """Return an argument of a verb."""
    return Parameter("argument", name, (), settings)


def option(*names: str, **settings: Any) -> Parameter:
    """Return an option of a verb: its names, and the function's if that differs."""
    return Parameter("option", *_named(names), settings)


def flag(*names: str, **settings: Any) -> Parameter:
    """Return an option without a value."""
    return Parameter("flag", *_named(names), settings)


def _named(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    options = tuple(name for name in names if name.startswith("-"))
    others = [name for name in names if not name.startswith("-")]
    return others[0] if others else options[0].lstrip("-").replace("-", "_"), options


def carry_out(done: Verb, given: dict[str, Any], common: Common) -> int:
    """Call a verb's function; return the exit status, with its errors as messages."""
    _check_socket(common.socket)
    common = common._replace(core_limit=resource.getrlimit(resource.RLIMIT_CORE))
    forbid_dumps()
    try:
        return done.function(common, **given) or DONE
    except WrongUsage as error:
        error.verb = done.name
        raise
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
        return fail(str(error))


def _check_socket(path: str | None) -> None:
    if path == "":
        raise UsageError("--socket: the path is empty")
    if path is not None and path.startswith("@"):
        raise UsageError(f"--socket {path}: abstract sockets are not supported; give a path")
