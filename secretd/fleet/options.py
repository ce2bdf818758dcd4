# SPDX-License-Identifier: LGPL-2.1-or-later
"""The options that verbs of `secretd-fleet` share, and the group of all verbs."""

import os

import click

from secretd import __version__, paths
from secretd.client.record_client import RecordClient
from secretd.fleet import config as files

CONFIG = click.option(
    "--config", default=files.DEFAULT_PATH, show_default=True, metavar="FILE",
    help="what 'enrol' made for this host",
)  # fmt: skip
CONTROL = click.option(
    "--control",
    metavar="PATH",
    help="secretd's control socket (default: $SECRETD_SOCKET, else that of this user)",
)
TO = click.option(
    "--to", "hosts", multiple=True, required=True, metavar="HOST",
    help="a host of the roster, or a pattern with * and ?; may be repeated",
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="secretd-fleet")
def commands() -> None:
    """Bring secrets to many hosts through etcd, which sees ciphertext only."""


def client_of(control: str | None) -> RecordClient:
    """Return a client of the control socket."""
    return RecordClient(control or os.environ.get("SECRETD_SOCKET") or paths.control_path())
