# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of every host: join and agent."""

import logging
from collections.abc import Mapping
from typing import cast

import click
from qemu.qmp import ExecuteError

from secretd.client.record_client import RecordClient
from secretd.errors import UsageError
from secretd.fleet import config as files
from secretd.fleet.options import CONFIG, CONTROL, client_of, commands
from secretd.systemd.stderr_journal import JournalFormatter, journal_on_stderr


@commands.command()
@CONFIG
@CONTROL
@click.option("--carrier", default="unit:secretd-fleet.service", show_default=True,
              metavar="IDENTITY", help="the agent, which may bring what was signed")  # fmt: skip
@click.option(
    "--max-age", default=0, metavar="S", type=click.IntRange(0),
    help="lock the fleet's secrets after S seconds without news (default: never)",
)  # fmt: skip
def join(config: str, control: str | None, carrier: str, max_age: int) -> None:
    """Let this host's secretd accept what the fleet's root and publishers have signed."""
    known = files.read(config)
    with client_of(control) as client:
        found = cast("list[dict[str, str]]", client.execute("query-secret-host"))
        if not found or found[0]["name"] != known.host:
            name = f"is '{found[0]['name']}'" if found else "has no name"
            raise UsageError(
                f"{config} is for host '{known.host}', and this one {name}; "
                f"'secretctl host init {known.host}' names it"
            )
        identity = {"qom-type": "authz-simple", "id": "fleet.carrier", "identity": carrier}
        fleet = {
            "qom-type": "secret-fleet", "id": "fleet", "name": known.fleet, "root": known.root,
            "carrier": "fleet.carrier", "max-age": max_age,
        }  # fmt: skip
        if _is_as(client, fleet) and _is_as(client, identity):
            print(f"{known.host} belongs to fleet {known.fleet} already")
            return
        same = {name: fleet[name] for name in ("id", "name", "root")}
        if _is_as(client, same):  # only the other options change; what was accepted stays
            client.execute("object-del", {"id": "fleet"})
            client.execute("object-del", {"id": "fleet.carrier"})
        was_there = _is_as(client, identity)  # a join may have ended between the two
        if not was_there:
            client.execute("object-add", identity)
        try:
            client.execute("object-add", fleet)
        except ExecuteError:
            if not was_there:
                client.execute("object-del", {"id": "fleet.carrier"})
            raise
    print(f"{known.host} belongs to fleet {known.fleet}")


@commands.command()
@CONFIG
def agent(config: str) -> None:
    """Follow etcd, and bring what is for this host to its secretd."""
    handler = logging.StreamHandler()
    formatter = JournalFormatter if journal_on_stderr() else logging.Formatter
    text = "%(message)s" if journal_on_stderr() else "secretd-fleet: %(message)s"
    handler.setFormatter(formatter(text))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    from secretd.fleet import agent as agents

    agents.run(files.read(config))


def _is_as(client: RecordClient, wanted: Mapping[str, object]) -> bool:
    """Return True if an object has these options."""
    path = f"/objects/{wanted['id']}"
    names = [name for name in wanted if name not in ("id", "qom-type")]
    try:
        return all(
            client.execute("qom-get", {"path": path, "property": name}) == wanted[name]
            for name in names
        )
    except ExecuteError:
        return False
