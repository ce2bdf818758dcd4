# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of the operator, with a fleet's directory: init, enrol and revoke."""

import asyncio
import math
import os
import shlex

import click

from secretd.errors import UsageError
from secretd.fleet import config as files
from secretd.fleet.certificates import CA_DAYS, DAYS
from secretd.fleet.etcd import Endpoint, endpoint
from secretd.fleet.options import commands


@commands.command()
@click.argument("directory", metavar="DIR")
@click.option("--name", required=True, help="the fleet's name")
@click.option(
    "--node", "nodes", multiple=True, required=True, metavar="https://HOST:PORT",
    help="a node of etcd, for its clients; its peers use the port after it; may be repeated",
)  # fmt: skip
@click.option(
    "--roster-days", default=0, metavar="N", type=click.IntRange(0, 3650),
    help="let each roster end after N days; 'enrol DIR' signs another (default: no end)",
)  # fmt: skip
def init(directory: str, name: str, nodes: tuple[str, ...], roster_days: int) -> None:
    """Make a fleet: its root key, its CA, and the configuration of etcd's nodes.

    DIR is created. Keep it where no host can read it: DIR/root.key decides which hosts belong
    to the fleet.
    """
    from secretd.fleet import enrolment

    named = {f"node{n}": _endpoint(text) for n, text in enumerate(nodes, 1)}
    enrolment.init(directory, name, named, roster_days)
    print(f"fleet {name} is in {directory}; start etcd on each node:")
    for node in named:
        print(f"  etcd --config-file {directory}/etcd/{node}.yml")


@commands.command()
@click.argument("directory", metavar="DIR")
@click.argument("host", required=False)
@click.argument("public", required=False)
@click.option(
    "--publisher", metavar="PATTERN",
    help="let it publish secrets whose ids fit; '' for none (default: as it was)",
)  # fmt: skip
@click.option("--days", default=DAYS, show_default=True, metavar="N",
              type=click.FloatRange(0, CA_DAYS),
              help="days for which its certificate is good")  # fmt: skip
@click.option("--replace", is_flag=True, help="its keys may be others than those of the roster")
@click.option("--ssh", metavar="COMMAND",
              help="what runs a command on that host (default: ssh HOST)")  # fmt: skip
@click.option("--at", metavar="PATH", default=os.path.dirname(files.DEFAULT_PATH),
              show_default=True, help="where its agent's files go")  # fmt: skip
@click.option("--again", is_flag=True, help="without HOST: sign the roster again, as its end comes")
def enrol(  # noqa: PLR0917 - the options of the verb
    directory: str, host: str | None, public: str | None, publisher: str | None, days: float,
    ssh: str | None, at: str, *, replace: bool, again: bool,
) -> None:  # fmt: skip
    """Take a host into the fleet, or renew its certificate.

    With HOST only, secretctl and secretd-fleet run there through ssh: the host gets a name and
    keys, and its agent's files. With PUBLIC, which 'secretctl host show' prints on it, bring it the
    files by hand and run 'secretd-fleet join' there.
    """
    from secretd.fleet import directory as fleets
    from secretd.fleet import enrolment
    from secretd.fleet.remote import Remote

    if math.isnan(days):
        raise UsageError("--days takes a number")
    if (host is None) is not again:
        raise click.UsageError("enrol takes a host, or --again")
    with fleets.opened(directory) as opened:
        if host is None:
            print(f"roster {asyncio.run(enrolment.sign_again(opened))}")
            return
        remote = None
        if public is None:
            remote = Remote(shlex.split(ssh) if ssh else ["ssh", host], host, at)
            public = remote.public()
        done = asyncio.run(enrolment.enrol(opened, host, public, publisher, days, replace=replace))
        if remote is not None:
            remote.bring(done.where)
    bring = "" if remote is not None else f"; bring it {done.where}"
    print(f"{host} is in roster {done.number}{bring}")
    if done.was_known:
        print("its certificate is a new one: restart its agent, or send it SIGHUP")


@commands.command()
@click.argument("directory", metavar="DIR")
@click.argument("host")
def revoke(directory: str, host: str) -> None:
    """Take a host out of the fleet. It keeps what it has: rotate that."""
    from secretd.fleet import directory as fleets
    from secretd.fleet import enrolment

    with fleets.opened(directory) as opened:
        done = asyncio.run(enrolment.revoke(opened, host))
    print(f"{host} is out of the fleet")
    for text, ids in (
        ("it knows these secrets, so rotate them:", done.knows),
        ("hosts keep these secrets of it, so delete them there:", done.published),
    ):
        if ids:
            print(text)
            for each in ids:
                print(f"  {each}")


def _endpoint(text: str) -> Endpoint:
    try:
        return endpoint(text)
    except ValueError as error:
        raise UsageError(str(error)) from None
