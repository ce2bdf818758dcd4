# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs about access: grant, revoke and explain."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, cast

from secretd import client as api
from secretd.client import SyncClient
from secretd.ctl.connection import client_of, unsure_denials
from secretd.ctl.identities import IDENTITY, groups_of, identities
from secretd.ctl.output import Common, at_and_in, done, note
from secretd.ctl.times import TIME, seconds
from secretd.ctl.verb import argument, option, verb
from secretd.errors import UsageError
from secretd.systemd.credential_address import CREDENTIAL_ADDRESS_BYTES


def grant_id(secret: str, to: list[str]) -> str:
    """Return the id of a grant without --id."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join([secret, *to]))
    return f"grant-{text}"


def authz_id(grant_name: str) -> str:
    """Return the id of the authz-list of a grant."""
    return f"{grant_name}.authz"


@verb(
    "grant", argument("secret", ids=True),
    option("--to", multiple=True, required=True, metavar="IDENTITY", help=IDENTITY),
    option("--id", "name", metavar="GRANT", help="the grant's id (default: from SECRET and --to)"),
    option("--for", "duration", metavar="TIME", help=f"end the grant after a time {TIME}"),
    option("--max-reads", type=int, metavar="N", help="limit the number of reads"),
    option("--credential", metavar="NAME", help="the name that systemd units know it by"),
    examples=(
        "secretctl grant disk0 --to unit:backup.service",
        "secretctl grant 'web.*' --to user:www-data --for 8h",
    ),
)  # fmt: skip
def grant(
    common: Common,
    *,
    secret: str,
    to: tuple[str, ...],
    name: str | None,
    duration: str | None,
    max_reads: int | None,
    credential: str | None,
) -> None:
    """Let a user, group or unit read secrets on the client socket.

    Prints the grant's id. SECRET is an id, or a pattern with * and ?.
    """
    # 1. The two objects: an authz-list, and the grant that names it.
    named = [found for identity in to for found in identities(identity)]
    name = name or grant_id(secret, named)
    rules = [
        {"match": n, "policy": "allow", "format": "glob" if re.search("[*?]", n) else "exact"}
        for n in named
    ]
    arguments: dict[str, Any] = {
        "qom-type": "secret-grant", "id": name, "secret": secret, "authz": authz_id(name),
    }  # fmt: skip
    if duration is not None:
        arguments["expires-after"] = seconds(duration)
    if max_reads is not None:
        arguments["max-reads"] = max_reads
    if credential is not None:
        _check_credential(credential, named)
        arguments["credential"] = credential
    rules_object = {"qom-type": "authz-list", "id": authz_id(name), "rules": rules}
    # 2. Add both, or none.
    with client_of(common) as client:
        if _type_of(client, name) is not None:
            raise UsageError(
                f"'{name}' exists already; revoke it first, or choose another with --id"
            )
        if _type_of(client, authz_id(name)) == "authz-list":
            client.delete(authz_id(name))  # left by an expired grant
        client.execute("object-add", rules_object)
        try:
            client.execute("object-add", arguments)
        except BaseException:
            client.delete(authz_id(name))
            raise
    print(json.dumps({"id": name}) if common.json else name)
    if duration is not None and not common.json:
        note(f"it ends {at_and_in(arguments['expires-after'])}")


def _check_credential(name: str, named: list[str]) -> None:
    """Raise UsageError if the names of a unit and the credential are too long together for
    systemd.
    """
    for unit in (n.rpartition("/")[2].removeprefix("unit:") for n in named if "unit:" in n):
        size = len((unit + name).encode())
        if size > CREDENTIAL_ADDRESS_BYTES:
            raise UsageError(
                f"'{unit}' and '{name}' have {size} bytes together, and systemd can ask for "
                f"{CREDENTIAL_ADDRESS_BYTES}: choose a shorter --credential"
            )


def _type_of(client: SyncClient, object_id: str) -> object:
    try:
        return client.execute("qom-get", {"path": f"/objects/{object_id}", "property": "type"})
    except api.ExecuteError:
        return None


@verb("revoke", argument("name", metavar="GRANT"))
def revoke(common: Common, name: str) -> None:
    """Withdraw a grant; running reads end, too."""
    rules = authz_id(name)
    with client_of(common) as client:
        kind = _type_of(client, name)
        if kind not in ("secret-grant", None):
            raise UsageError(f"'{name}' is not a grant; 'secretctl del' removes secrets")
        own = _type_of(client, rules) == "authz-list"
        if kind is None and not own:
            raise UsageError(f"there is no grant '{name}'")
        if kind is not None:
            path = {"path": f"/objects/{name}", "property": "authz"}
            own = own and client.execute("qom-get", path) == rules
            client.delete(name)
        if own:
            client.delete(rules)
    done(common, id=name)


@verb(
    "explain", argument("object_id", metavar="ID", ids=True),
    option("--as", "peer", multiple=True, required=True, metavar="IDENTITY", help=IDENTITY),
    examples=("secretctl explain disk0 --as unit:backup.service",),
)  # fmt: skip
def explain(common: Common, object_id: str, peer: tuple[str, ...]) -> int:
    """Say whether a user, group or unit may read a secret, and why.

    The exit status is 0 if so, 1 if not.
    """
    named = [found for each in peer for found in (*identities(each), *groups_of(each))]
    with client_of(common) as client:
        found = client.explain(object_id, named)
        grants = cast("list[dict[str, Any]]", found["grants"])
        for considered in grants:
            path = {"path": f"/objects/{considered['grant']}", "property": "authz"}
            with contextlib.suppress(api.ExecuteError):
                authz = str(client.execute("qom-get", path))
                for match in unsure_denials(client, authz):
                    note(
                        f"'{authz}' denies '{match}', which a process can drop; only uid:N is "
                        "certain"
                    )
    if common.json:
        print(json.dumps(found))
    else:
        print("\n".join(_explained(object_id, named, found)))
    return 0 if found["allowed"] else 1


def _explained(object_id: str, named: list[str], found: dict[str, object]) -> Iterator[str]:
    verdict = f"yes, by grant {found['grant']}" if found["allowed"] else "no"
    yield f"{', '.join(named)} may read '{object_id}': {verdict}"
    if not found["exists"]:
        yield "  there is no secret of that id"
    grants = found["grants"]
    assert isinstance(grants, list)
    for considered in grants:
        mark = "allows" if considered["allowed"] else "does not"
        yield f"  grant {considered['grant']} {mark}: {considered['reason']}"
    if not grants:
        yield f"  no grant names it; 'secretctl grant {object_id} --to {named[0]}' would"
