# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of a publisher, beside a secretd with the secrets: publish, withdraw, renew, status."""

import asyncio
import json
import time
from typing import Any, Final

import click

from secretd.client.record_client import RecordClient
from secretd.errors import UsageError
from secretd.fleet import config as files
from secretd.fleet.keyspace import Keyspace
from secretd.fleet.options import CONFIG, CONTROL, TO, client_of, commands

_POLL_SECONDS: Final = 0.25

_WAIT = click.option(
    "--wait", metavar="S", type=click.FloatRange(0),
    help="wait until all hosts have it, for S seconds at most",
)  # fmt: skip


@commands.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@TO
@_WAIT
@CONFIG
@CONTROL
def publish(
    ids: tuple[str, ...], hosts: tuple[str, ...], wait: float | None, config: str,
    control: str | None,
) -> None:  # fmt: skip
    """Bring secrets or aliases of this host's secretd to other hosts."""
    numbers = _publish(config, control, hosts, ids, ())
    print(f"published {_many(len(ids), 'secret')} to {_many(len(numbers), 'host')}")
    _wait(config, numbers, wait)


@commands.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@TO
@_WAIT
@CONFIG
@CONTROL
def withdraw(
    ids: tuple[str, ...], hosts: tuple[str, ...], wait: float | None, config: str,
    control: str | None,
) -> None:  # fmt: skip
    """Delete secrets or aliases on other hosts that were published from here."""
    numbers = _publish(config, control, hosts, (), ids)
    print(f"withdrew {_many(len(ids), 'secret')} from {_many(len(numbers), 'host')}")
    _wait(config, numbers, wait)


@commands.command()
@TO
@CONFIG
@CONTROL
def renew(hosts: tuple[str, ...], config: str, control: str | None) -> None:
    """Sign what other hosts have again, before their 'max-age' ends."""
    numbers = _publish(config, control, hosts, (), ())
    print(f"renewed {_many(len(numbers), 'manifest')}")


@commands.command()
@CONFIG
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def status(config: str, *, as_json: bool) -> None:
    """Show what each host has, as its agent says. For publishers only."""
    from secretd.fleet import status as states

    known = files.read(config)

    async def ask() -> list[Any]:
        etcd, keyspace = known.etcd(), Keyspace(known.fleet)
        try:
            data, _ = await etcd.get(keyspace.roster)
            return list(await states.statuses(etcd, keyspace, known.checked_roster(data)))
        finally:
            etcd.close()

    found = asyncio.run(ask())
    if as_json:
        print(json.dumps([each._asdict() for each in found]))
        return
    rows = [("HOST", "STATE", "HEARD", "SECRETS", "")]
    rows += [
        (each.host, each.state, "never" if each.heard is None else f"{each.heard} s ago",
         str(each.secrets), each.reason)
        for each in found
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )


def _publish(
    config: str, control: str | None, hosts: tuple[str, ...], ids: tuple[str, ...],
    gone: tuple[str, ...],
) -> dict[str, int]:  # fmt: skip
    from secretd.fleet.publishing import Publishing, Wanted

    known = files.read(config)

    async def carry_out(client: RecordClient) -> dict[str, int]:
        etcd = known.etcd()
        try:
            return await Publishing(known, client, etcd).publish(hosts, Wanted(ids, gone))
        finally:
            etcd.close()

    with client_of(control) as client:
        return asyncio.run(carry_out(client))


def _wait(config: str, numbers: dict[str, int], seconds: float | None) -> None:
    """Wait until hosts have the manifests that were published. Raises UsageError for the rest."""
    if seconds is None:
        return
    from secretd.fleet.status import behind

    known = files.read(config)

    async def ask() -> list[str]:
        etcd, end = known.etcd(), time.monotonic() + seconds
        try:
            while True:
                rest = await behind(etcd, Keyspace(known.fleet), known.host, numbers)
                if not rest or time.monotonic() >= end:
                    return rest
                await asyncio.sleep(min(_POLL_SECONDS, seconds))
        finally:
            etcd.close()

    rest = asyncio.run(ask())
    if rest:
        raise UsageError(
            f"{_many(len(rest), 'host')} did not say within {seconds:g} s to have it: "
            f"{', '.join(rest[:20])}; 'secretd-fleet status' shows why"
        )
    print(f"{_many(len(numbers), 'host')} {'has' if len(numbers) == 1 else 'have'} it")


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
