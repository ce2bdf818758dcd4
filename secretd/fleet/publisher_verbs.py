# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of a publisher, beside a secretd with the secrets: publish, withdraw, renew, status."""

import asyncio
import json
import logging
import sys
import time
from typing import Any, Final

import click

from secretd.client.record_client import RecordClient
from secretd.errors import UsageError
from secretd.fleet import config as files
from secretd.fleet.keyspace import Keyspace
from secretd.fleet.options import CONFIG, CONTROL, TO, client_of, commands
from secretd.fleet.preparing import Wanted
from secretd.fleet.publishing import Outcome, Publishing

_POLL_SECONDS: Final = 0.25

_WAIT = click.option(
    "--wait", metavar="S", type=click.FloatRange(0),
    help="wait until all hosts have it, for S seconds at most",
)  # fmt: skip


@commands.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@TO
@_WAIT
@click.option("--begin-anew", is_flag=True,
              help="what was published with other keys of this host may be deleted")  # fmt: skip
@CONFIG
@CONTROL
def publish(
    ids: tuple[str, ...], hosts: tuple[str, ...], wait: float | None, config: str,
    control: str | None, *, begin_anew: bool,
) -> None:  # fmt: skip
    """Bring secrets or aliases of this host's secretd to other hosts."""
    done = _publish(config, control, hosts, Wanted(ids, (), begin_anew))
    if done.numbers or not done.failures:
        print(f"published {_many(len(ids), 'secret')} to {_many(len(done.numbers), 'host')}")
    _ended(config, done, wait, "have it")


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
    done = _publish(config, control, hosts, Wanted((), ids))
    if done.numbers or not done.failures:
        print(f"withdrew {_many(len(ids), 'secret')} from {_many(len(done.numbers), 'host')}")
    _ended(config, done, wait, "no longer have it")


@commands.command()
@TO
@CONFIG
@CONTROL
def renew(hosts: tuple[str, ...], config: str, control: str | None) -> None:
    """Sign what other hosts have again, before their 'max-age' ends."""
    done = _publish(config, control, hosts, Wanted())
    print(f"renewed {_many(len(done.numbers), 'manifest')}")
    _ended(config, done, None, "")


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


def _publish(config: str, control: str | None, hosts: tuple[str, ...], wanted: Wanted) -> Outcome:
    logging.basicConfig(format="secretd-fleet: %(message)s")
    known = files.read(config)

    async def carry_out(client: RecordClient) -> Outcome:
        etcd = known.etcd()
        try:
            return await Publishing(known, client, etcd).publish(hosts, wanted)
        finally:
            etcd.close()

    with client_of(control) as client:
        return asyncio.run(carry_out(client))


def _ended(config: str, done: Outcome, seconds: float | None, have: str) -> None:
    """Wait for hosts, if asked for, and end with an error if some failed."""
    if done.numbers:
        _wait(config, done.numbers, seconds, have)
    if done.failures:
        for host, reason in sorted(done.failures.items()):
            print(f"secretd-fleet: {host}: {reason}", file=sys.stderr)
        raise click.exceptions.Exit(1)


def _wait(config: str, numbers: dict[str, int], seconds: float | None, have: str) -> None:
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
            f"{_many(len(rest), 'host')} did not confirm within {seconds:g} s: "
            f"{', '.join(rest[:20])}; 'secretd-fleet status' shows why"
        )
    words = have.replace("have", "has") if len(numbers) == 1 else have
    print(f"{_many(len(numbers), 'host')} {words}")


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
