# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs about hosts: host and peer."""

import json
from typing import cast

from secretd.client import SyncClient
from secretd.ctl.connection import client_of
from secretd.ctl.output import Common, confirm, done, note, table
from secretd.ctl.verb import WrongUsage, argument, option, verb
from secretd.errors import UsageError

_KEY = "host.key"
_HOST = "host"


@verb(
    "host",
    argument("action", type=("init", "show")),
    argument("name", required=False, metavar="[NAME]"),
    option("--keyid", default=_KEY, metavar="K", help="the secret that the keys come from",
           completes="secrets"),
    examples=("secretctl host init alpha", "secretctl host show"),
)  # fmt: skip
def host(common: Common, action: str, name: str | None, keyid: str) -> None:
    """Give this host a name and keys, or show them.

    init generates the secret that the keys come from, if there is none. show prints the name and
    the public half in one line, as 'secretctl peer add' takes it on another host.
    """
    if (action == "init") is (name is None):
        raise WrongUsage("init takes the host's name" if name is None else "show takes no name")
    with client_of(common) as client:
        if name is not None:
            if client.info(keyid) is None:
                client.generate(keyid, 32)
            options = {"qom-type": "secret-host", "id": _HOST, "name": name, "keyid": keyid}
            client.execute("object-add", options)
        found = this_host(client)
    if common.json:
        print(json.dumps(found))
    else:
        print(f"{found['name']} {found['public']}")


def this_host(client: SyncClient) -> dict[str, str]:
    """Return what query-secret-host says. Raises UsageError."""
    found = cast("list[dict[str, str]]", client.execute("query-secret-host"))
    if not found:
        raise UsageError("this host has no name yet; 'secretctl host init NAME' gives it one")
    return found[0]


@verb(
    "peer",
    argument("action", type=("add", "list", "remove")),
    argument("words", nargs=-1, metavar="[NAME [PUBLIC]]"),
    examples=(
        "secretctl peer add $(ssh beta secretctl host show)",
        "secretctl peer list",
    ),
)  # fmt: skip
def peer(common: Common, action: str, words: tuple[str, ...]) -> None:
    """Know other hosts by the public half of their keys.

    Compare what 'secretctl host show' prints there with what is added here: whoever has the keys of
    a name can get what grants allow that name.
    """
    wanted = {"add": 2, "list": 0, "remove": 1}[action]
    if len(words) != wanted:
        raise WrongUsage(f"{action} takes {('nothing', 'NAME', 'NAME and PUBLIC')[wanted]}")
    with client_of(common) as client:
        known = cast("list[dict[str, str]]", client.execute("query-secret-peers"))
        if action == "list":
            _show(common, known)
            return
        if action == "add":
            options = {"name": words[0], "public": words[1]}
            client.execute(
                "object-add", {"qom-type": "secret-peer", "id": f"peer-{words[0]}", **options}
            )
        else:
            ids = [each["id"] for each in known if each["name"] == words[0]]
            if not ids:
                raise UsageError(f"no host '{words[0]}' is known")
            client.delete(ids[0])
    confirm(common, f"{'added' if action == 'add' else 'removed'} {words[0]}")
    done(common, name=words[0])


def _show(common: Common, known: list[dict[str, str]]) -> None:
    if common.json:
        print(json.dumps(known))
    elif not known:
        note("no other host is known")
    else:
        table(["HOST", "PUBLIC"], [(each["name"], each["public"]) for each in known])
