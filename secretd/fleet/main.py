# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `secretd-fleet`: secrets for many hosts, through etcd.

Its operator has a fleet's directory (init, enrol, revoke). A publisher's host has secretd with the
secrets (publish, withdraw, renew), and every host an agent (join, agent). Secrets are no arguments.
"""

import asyncio
import json
import logging
import sys
from typing import Any, Final, TypeVar, cast

import click
from qemu.qmp import ConnectError, ExecuteError, QMPError

from secretd import __version__, paths
from secretd.client.record_client import RecordClient
from secretd.errors import SecretdError, UsageError
from secretd.fleet import config as files
from secretd.fleet.certificates import DAYS
from secretd.fleet.etcd import Endpoint, Refused, Unreachable, endpoint
from secretd.systemd.stderr_journal import JournalFormatter, journal_on_stderr

T = TypeVar("T")

FAILED: Final = 1

_CONFIG = click.option(
    "--config", default=files.DEFAULT_PATH, show_default=True, metavar="FILE",
    help="what 'enrol' made for this host",
)  # fmt: skip
_CONTROL = click.option(
    "--control", metavar="PATH", help="secretd's control socket (default: that of this user)"
)
_TO = click.option(
    "--to", "hosts", multiple=True, required=True, metavar="HOST",
    help="a host of the roster, or a pattern with * and ?; may be repeated",
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="secretd-fleet")
def commands() -> None:
    """Bring secrets to many hosts through etcd, which sees ciphertext only."""


# --- the operator


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
@click.option("--days", default=DAYS, show_default=True, metavar="N", type=click.FloatRange(0),
              help="days for which its certificate is good")  # fmt: skip
@click.option("--replace", is_flag=True, help="its keys may be others than those of the roster")
def enrol(
    directory: str, host: str | None, public: str | None, publisher: str | None, days: float,
    *, replace: bool,
) -> None:  # fmt: skip
    """Take a host into the fleet, or renew its certificate.

    HOST and PUBLIC are what 'secretctl host show' prints on it. Without them the roster is signed
    again.
    """
    from secretd.fleet import directory as fleets
    from secretd.fleet import enrolment

    if host is not None and public is None:
        raise UsageError("enrol takes HOST and PUBLIC, as 'secretctl host show' prints them")
    with fleets.opened(directory) as opened:
        if host is None or public is None:
            print(f"roster {asyncio.run(enrolment.sign_again(opened))}")
            return
        done = asyncio.run(enrolment.enrol(opened, host, public, publisher, days, replace=replace))
    print(f"{host} is in roster {done.number}; bring it {done.where}")


@commands.command()
@click.argument("directory", metavar="DIR")
@click.argument("host")
def revoke(directory: str, host: str) -> None:
    """Take a host out of the fleet. It keeps what it has: rotate that."""
    from secretd.fleet import directory as fleets
    from secretd.fleet import enrolment

    with fleets.opened(directory) as opened:
        ids = asyncio.run(enrolment.revoke(opened, host))
    print(f"{host} is out of the fleet")
    if ids:
        print("it knows these secrets, so rotate them:")
        for each in ids:
            print(f"  {each}")


# --- a publisher


@commands.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@_TO
@_CONFIG
@_CONTROL
def publish(ids: tuple[str, ...], hosts: tuple[str, ...], config: str, control: str | None) -> None:
    """Bring secrets or aliases of this host's secretd to other hosts."""
    numbers = _publish(config, control, hosts, ids, ())
    print(f"published {_many(len(ids), 'secret')} to {_many(len(numbers), 'host')}")


@commands.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@_TO
@_CONFIG
@_CONTROL
def withdraw(
    ids: tuple[str, ...], hosts: tuple[str, ...], config: str, control: str | None
) -> None:
    """Delete secrets or aliases on other hosts that were published from here."""
    numbers = _publish(config, control, hosts, (), ids)
    print(f"withdrew {_many(len(ids), 'secret')} from {_many(len(numbers), 'host')}")


@commands.command()
@_TO
@_CONFIG
@_CONTROL
def renew(hosts: tuple[str, ...], config: str, control: str | None) -> None:
    """Sign what other hosts have again, before their 'max-age' ends."""
    numbers = _publish(config, control, hosts, (), ())
    print(f"renewed {_many(len(numbers), 'manifest')}")


@commands.command()
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def status(config: str, *, as_json: bool) -> None:
    """Show what each host has, as its agent says. For publishers only."""
    from secretd.fleet import status as states
    from secretd.fleet.keyspace import Keyspace

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


# --- every host


@commands.command()
@_CONFIG
@_CONTROL
@click.option("--carrier", default="unit:secretd-fleet.service", show_default=True,
              metavar="IDENTITY", help="the agent, which may bring what was signed")  # fmt: skip
@click.option(
    "--max-age", default=0, metavar="S", type=click.IntRange(0),
    help="lock the fleet's secrets after S seconds without news (default: never)",
)  # fmt: skip
def join(config: str, control: str | None, carrier: str, max_age: int) -> None:
    """Let this host's secretd accept what the fleet's root and publishers have signed."""
    known = files.read(config)
    with _client(control) as client:
        found = cast("list[dict[str, str]]", client.execute("query-secret-host"))
        if not found or found[0]["name"] != known.host:
            name = f"is '{found[0]['name']}'" if found else "has no name"
            raise UsageError(
                f"{config} is for host '{known.host}', and this one {name}; "
                f"'secretctl host init {known.host}' names it"
            )
        identity = {"qom-type": "authz-simple", "id": "fleet.carrier", "identity": carrier}
        client.execute("object-add", identity)
        try:
            client.execute("object-add", {
                "qom-type": "secret-fleet", "id": "fleet", "name": known.fleet, "root": known.root,
                "carrier": "fleet.carrier", "max-age": max_age,
            })  # fmt: skip
        except ExecuteError:
            client.execute("object-del", {"id": "fleet.carrier"})
            raise
    print(f"{known.host} belongs to fleet {known.fleet}")


@commands.command()
@_CONFIG
def agent(config: str) -> None:
    """Follow etcd, and bring what is for this host to its secretd."""
    handler = logging.StreamHandler()
    formatter = JournalFormatter if journal_on_stderr() else logging.Formatter
    text = "%(message)s" if journal_on_stderr() else "secretd-fleet: %(message)s"
    handler.setFormatter(formatter(text))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    from secretd.fleet import agent as agents

    agents.run(files.read(config))


# --- what they share


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

    with _client(control) as client:
        return asyncio.run(carry_out(client))


def _client(control: str | None) -> RecordClient:
    return RecordClient(control or paths.control_path())


def _endpoint(text: str) -> Endpoint:
    try:
        return endpoint(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def main() -> int:
    """Run `secretd-fleet`; return the exit status."""
    try:
        commands.main(standalone_mode=False, prog_name="secretd-fleet")
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.UsageError as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ExecuteError as error:
        return _failed(str(error))
    except ConnectError as error:
        return _failed(f"cannot connect to secretd: {error}")
    except Refused as error:
        return _failed(f"etcd refuses: {error}")
    except Unreachable as error:
        return _failed(f"etcd cannot be reached: {error}")
    except (SecretdError, QMPError) as error:
        return _failed(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}")
    return 0


def _failed(message: str) -> int:
    print(f"secretd-fleet: {message}", file=sys.stderr)
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
