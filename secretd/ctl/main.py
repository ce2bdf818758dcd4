# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `secretctl`: all verbs, and the answers to a mistyped command line.

Secrets are never arguments: an argument that click cannot place is not printed, since it may be
one.
"""

import errno
import os
import sys
from typing import Final

import click

from secretd import __version__
from secretd.ctl import (
    access,
    audit,
    bulk,
    daemon,
    doctor,
    handover,
    secrets,
)
from secretd.ctl.output import DONE, INTERRUPTED, REFUSED, USAGE, Common, fail
from secretd.ctl.verb import argument, verb
from secretd.errors import SecretdError

SECTIONS: Final = {
    "Secrets": ("add", "read", "list", "del", "generate", "expire"),
    "Hand-over": ("run", "push", "seal"),
    "Access": ("grant", "revoke", "explain", "audit"),
    "Many at once": ("import", "export", "watch"),
    "The daemon": ("status", "doctor", "shell", "completion"),
}
"""The verbs by section, as the help lists them."""


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
    argument("shell", type=click.Choice(("bash", "zsh", "fish"))),
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


for _command in (
    secrets.add, secrets.read, secrets.list_secrets, secrets.delete, secrets.generate,
    secrets.expire,
    handover.run, handover.push, handover.seal,
    access.grant, access.revoke, access.explain, audit.audit,
    bulk.import_, bulk.export, bulk.watch,
    daemon.status, doctor.doctor, daemon.shell, completion,
):  # fmt: skip
    cli.add_command(_command)


def main() -> int:
    """Run `secretctl`; return the exit status."""
    _open_closed()
    try:
        status: int | None = cli.main(prog_name="secretctl", standalone_mode=False)
        sys.stdout.flush()
    except click.Abort:  # Ctrl-C, or the end of input at a question
        return INTERRUPTED
    except click.UsageError as error:
        return _usage(error)
    except SecretdError as error:
        return fail(str(error))
    except BrokenPipeError:  # the reader has ended, as 'head' does
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
    """Open /dev/null for each closed standard descriptor, so that no later one is taken for it.

    Output to a closed standard output is then an error and not lost, as with GNU coreutils.
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
    """Keep the interpreter from writing failed output again at its end."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.close(devnull)


def _usage(error: click.UsageError) -> int:
    """Print what is wrong with the command line, without unknown arguments: they may be secrets."""
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
    print(f"secretctl: '{path} --help' explains it", file=sys.stderr)
    return USAGE


if __name__ == "__main__":
    sys.exit(main())
