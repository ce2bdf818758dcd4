# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs as click's commands: help, completion, and the answers to a mistyped command line.

main imports this module only where `words` declines a command line. Secrets are never arguments: an
argument that click cannot place is not printed, since it may be one.
"""

import sys
from functools import partial
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from secretd import __version__
from secretd.ctl.completion import COMPLETIONS
from secretd.ctl.output import DONE, INTERRUPTED, USAGE, Common
from secretd.ctl.verb import COMMAND, PATH, Parameter, Verb, argument, carry_out, verb
from secretd.ctl.verbs import MODULES, find

SECTIONS: Final = {
    "Secrets": ("add", "read", "list", "show", "del", "generate", "expire", "rotate"),
    "Hand-over": ("run", "push", "seal", "libvirt"),
    "Access": ("grant", "revoke", "grants", "access", "explain", "audit"),
    "Many at once": ("import", "export", "watch"),
    "At rest": ("store",),
    "Other hosts": ("host", "peer", "offer", "wrap", "accept", "handover"),
    "The daemon": ("status", "stats", "metrics", "doctor", "check-config", "shell"),
    "This tool": ("completion", "help"),
}
"""The verbs by section, as the help lists them."""


ALIASES: Final = {
    "ls": "list",
    "rm": "del",
    "delete": "del",
    "remove": "del",
    "get": "read",
    "cat": "read",
    "create": "add",
    "put": "add",
    "set": "add",
    "info": "show",
    "logs": "audit",
}
"""The words of other tools, and the verb that each means."""


class Sections(click.Group):
    """A group whose help lists its commands under headings."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a verb, also by the name that other tools have for it."""
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete verbs, each with the whole first sentence of its help."""
        return [
            CompletionItem(name, help=_first_sentence(command.help or ""))
            if name in self.commands
            else item
            for item in super().shell_complete(ctx, incomplete)
            for name, command in ((item.value, self.commands.get(item.value, self)),)
        ]

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


_TIMEOUT = "give up after S seconds without an answer (default: no limit)"
_SOCKET = "secretd's socket (default: $SECRETD_SOCKET, else the control or client socket)"


@click.group(
    cls=Sections,
    subcommand_metavar="VERB ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="'secretctl VERB --help' explains each with examples. Secrets are never arguments: "
    "they come from files, descriptors, pipes or a prompt, and go to pipes and files.",
)
@click.option("--socket", metavar="PATH", help=_SOCKET, type=click.Path(readable=False))
@click.option("--timeout", metavar="S", type=click.FloatRange(min=0.001), help=_TIMEOUT)
@click.version_option(__version__, prog_name="secretctl", message="%(prog)s %(version)s")
def cli(socket: str | None, timeout: float | None) -> None:
    """Add secrets to a running secretd, and hand them on without showing them."""


@verb(
    "completion",
    argument("shell", type=("bash", "zsh", "fish")),
    examples=(
        'eval "$(secretctl completion bash)"',
        "secretctl completion fish > ~/.config/fish/completions/secretctl.fish",
    ),
)
def completion(_common: Common, shell: str) -> None:
    """Print a script that completes verbs and ids in a shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(cli, {}, "secretctl", "_SECRETCTL_COMPLETE").source())


@verb(
    "help",
    argument("name", required=False, metavar="[VERB]"),
    examples=("secretctl help grant",),
)
def help_(_common: Common, name: str | None) -> None:
    """Print the help of secretctl, or of a verb."""
    root = click.get_current_context().find_root()
    command = cli.get_command(root, name) if name is not None else cli
    if command is None:
        raise click.UsageError(f"No such command '{name}'.", root)
    context = root if name is None else click.Context(command, root, command.name)
    print(command.get_help(context))


def _command(done: Verb) -> click.Command:
    """Return a verb as a command. Every verb has the common options, too."""
    options = [
        *map(_parameter, done.parameters),
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
    examples = done.examples
    epilog = "\b\nExamples:\n" + "\n".join(f"  {e}" for e in examples) if examples else None
    return _Command(
        done.name,
        params=options,
        help=done.function.__doc__,
        epilog=epilog,
        callback=partial(_call, done),
        **done.settings,
    )


class _Command(click.Command):
    """A verb; what follows the flag ``rest_after`` is a command line with options of its own."""

    def __init__(self, *args: Any, rest_after: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rest_after = rest_after

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click.Command."""
        if self._rest_after in args:
            after = args.index(self._rest_after) + 1
            if args[after : after + 1] != ["--"]:
                args = [*args[:after], "--", *args[after:]]
        return super().parse_args(ctx, args)


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n", maxsplit=1)[0].split()).rstrip(".")


def _parameter(parameter: Parameter) -> click.Parameter:
    settings: dict[str, Any] = dict(parameter.settings)
    kind = settings.pop("type", str)
    if isinstance(kind, tuple):
        kind = click.Choice(kind)
    elif kind == PATH:
        kind = click.Path(readable=False, allow_dash=True)
    elif kind == COMMAND:
        kind = click.UNPROCESSED
    completes = "commands" if parameter.settings.get("type") == COMMAND else None
    completes = settings.pop("completes", completes)
    if completes is not None:
        settings["shell_complete"] = COMPLETIONS[completes]
    if parameter.kind == "argument":
        return click.Argument([parameter.name], type=kind, **settings)
    names = [*parameter.options, parameter.name]
    if parameter.kind == "flag":
        return click.Option(names, is_flag=True, **settings)
    return click.Option(names, type=kind, **settings)


def _call(done: Verb, **given: Any) -> int:
    """Take the common options from after the verb or before it, and call the verb."""
    parent = click.get_current_context().parent
    assert parent is not None
    socket, timeout = given.pop("socket"), given.pop("timeout")
    common = Common(
        socket=parent.params["socket"] if socket is None else socket,
        timeout=parent.params["timeout"] if timeout is None else timeout,
        json=given.pop("json"),
    )
    return carry_out(done, given, common)


for _name in MODULES:
    cli.add_command(_command(find(_name)))
cli.add_command(_command(completion))
cli.add_command(_command(help_))


def run() -> int:
    """Read the command line as click does, and call the verb; return the exit status."""
    try:
        status: int | None = cli.main(prog_name="secretctl", standalone_mode=False)
    except click.Abort:  # Ctrl-C, or the end of input at a question
        return INTERRUPTED
    except click.UsageError as error:
        return _usage(error)
    return status or DONE


def _usage(error: click.UsageError) -> int:
    """Print what is wrong with the command line, without unknown arguments: they may be secrets."""
    context = error.ctx
    words = error.format_message()
    if isinstance(error, click.NoSuchOption):
        near = error.possibilities or []
        words = f"unknown option {error.option_name}"
        words += f"; {' or '.join(near)}?" if near else _of_add(context)
    elif words.startswith("Got unexpected extra argument"):
        words = "there are too many arguments" + _of_add(context)
    elif words.startswith("No such command"):
        near = getattr(error, "possibilities", None) or []
        words = "there is no such verb" + (f"; {' or '.join(near)}?" if near else "")
    path = context.command_path if context else "secretctl"
    print(f"secretctl: {words[:1].lower() + words[1:]}", file=sys.stderr)
    print(f"secretctl: '{path} --help' explains it", file=sys.stderr)
    return USAGE


def _of_add(context: click.Context | None) -> str:
    """Return why a secret is no argument, for the verb where one is tried."""
    of_add = context is not None and context.command.name == "add"
    return " (secrets must not be passed as arguments)" if of_add else ""
