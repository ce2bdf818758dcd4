# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs about access: grant, revoke, grants, access and explain."""

import contextlib
import json
import re
from collections.abc import Iterator

from secretd import client as api
from secretd.client import Explanation, GrantInfo, SyncClient
from secretd.client.plans import default_grant_id
from secretd.ctl.audit_records import Wanted, records
from secretd.ctl.connection import client_of, unsure_denials
from secretd.ctl.globs import chosen, is_pattern
from secretd.ctl.hints import ID_RULES
from secretd.ctl.identities import IDENTITY, groups_of, identities, named_identity
from secretd.ctl.output import Common, at_and_in, confirm, count, done, duration, note, table
from secretd.ctl.times import TIME, seconds
from secretd.ctl.verb import WrongUsage, argument, option, verb
from secretd.errors import UsageError
from secretd.systemd.credential_address import CREDENTIAL_ADDRESS_BYTES

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")

_CELLS = 20_000
"""Cells of the table of `access`: secretd is asked for each."""


@verb(
    "grant", argument("secret", completes="secrets"),
    option("--to", multiple=True, required=True, metavar="IDENTITY", help=IDENTITY,
           completes="identities"),
    option("--id", "name", metavar="GRANT", help="the grant's id (default: from SECRET and --to)"),
    option("--for", "duration", metavar="TIME", help=f"end the grant {TIME}"),
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
    if not (is_pattern(secret) or _ID.fullmatch(secret)):
        raise UsageError(f"'{secret}' can be no secret's id; {ID_RULES}")
    named = [found for identity in to for found in identities(identity)]
    name = name or default_grant_id(secret, named)
    limit = None if duration is None else seconds(duration)
    if credential is not None:
        _check_credential(credential, named)
    with client_of(common) as client:
        try:
            client.grant(
                secret, named, grant_id=name, expires_after=limit, max_reads=max_reads,
                credential=credential,
            )  # fmt: skip
        except api.ExecuteError as error:
            if "duplicate property" not in str(error):
                raise
            raise UsageError(
                f"'{name}' exists already; revoke it first, or choose another with --id"
            ) from None
        if not is_pattern(secret) and client.info(secret) is None:
            note(f"there is no secret '{secret}' yet")
    print(json.dumps({"id": name}) if common.json else name)
    if limit is not None and not common.json:
        note(f"it ends {at_and_in(limit)}")


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


@verb("revoke", argument("name", metavar="GRANT", completes="grants"))
def revoke(common: Common, name: str) -> None:
    """Withdraw a grant; running reads end, too."""
    with client_of(common) as client:
        try:
            found = client.revoke(name)
        except ValueError as error:
            raise UsageError(f"{error}; 'secretctl del' removes secrets") from None
    if not found:
        raise UsageError(f"there is no grant '{name}'")
    confirm(common, f"revoked {name}")
    done(common, id=name)


# --- grants, access


@verb(
    "grants", argument("secret", required=False, completes="secrets"),
    option("--to", multiple=True, metavar="WHO", help=f"only grants to {IDENTITY}",
           completes="identities"),
    examples=("secretctl grants", "secretctl grants disk0", "secretctl grants --to user:alice"),
)  # fmt: skip
def grants(common: Common, secret: str | None, to: tuple[str, ...]) -> None:
    """List the grants: which secrets, and to whom.

    With the reads and the time that are left. With SECRET only the grants that cover this id; with
    --to only those that a client with these identities could use.
    """
    peer = [found for each in to for found in (*identities(each), *groups_of(each))]
    with client_of(common) as client:
        found = client.grants(secret=secret, to=peer or None)
    if common.json:
        print(json.dumps([grant_members(each) for each in found]))
        return
    if not found:
        about = f" covers '{secret}'" if secret else " was made"
        note("no grant" + (f" allows {', '.join(to)}" if to else about))
        return
    limited = any(g.max_reads is not None or g.expires_in is not None for g in found)
    credentials = any(g.credential for g in found)
    head = ["GRANT", "SECRETS", "WHO"]
    head += ["AS"] * credentials + ["READS LEFT", "ENDS IN"] * limited
    rows = []
    for each in found:
        left = "-" if each.reads_left is None else str(each.reads_left)
        row = [each.id, each.secret, whom(each)] + [each.credential or "-"] * credentials
        rows.append(row + [left, duration(each.expires_in)] * limited)
    table(head, rows, right=(len(head) - 2,) if limited else ())


def grant_members(found: GrantInfo) -> dict[str, object]:
    """Return a grant in the words of query-secret-grants."""
    members = found._asdict().items()
    left_out: tuple[object, ...] = (None, "", 0, [])
    kept = {n.replace("_", "-"): v for n, v in members if v not in left_out or n == "reads_left"}
    if found.reads_left is None:
        kept.pop("reads-left", None)
    return {"allows": [], **kept}


def whom(found: GrantInfo) -> str:
    """Return whom a grant allows, in words."""
    if found.fault:
        return f"nobody: {found.fault}"
    names = ["anyone" if each == "*" else named_identity(each) for each in found.allows]
    names += [f"not {named_identity(each)}" for each in found.denies]
    names += [f"{found.more:,} more"] if found.more else []
    return ", ".join(names) or "nobody"


@verb(
    "access", argument("patterns", nargs=-1, metavar="SECRET", completes="secrets"),
    option("--audit", "file", type="path", metavar="FILE",
           help="also ask about the clients in this audit file"),
    examples=("secretctl access", "secretctl access 'web.*' --audit /var/log/secretd/audit.log"),
)  # fmt: skip
def access(common: Common, patterns: tuple[str, ...], file: str | None) -> None:
    """Show which secrets may be read by whom, as secretd decides now.

    The columns are the identities that grants name, and with --audit the units and users that read
    secrets before. Patterns of identities cannot be enumerated; they are named below the table.
    """
    with client_of(common) as client:
        secrets = [each.id for each in client.list()]
        secrets = chosen(patterns, secrets) if patterns else secrets
        exact, open_ended = _named_identities(client.grants())
        if file is not None:
            exact |= dict.fromkeys(_seen(file))
        if len(secrets) * len(exact) > _CELLS:
            raise UsageError(
                f"{count(len(secrets), 'secret')} and {len(exact):,} identities are too many for a "
                "table; name some secrets"
            )
        may = {
            secret: [client.explain(secret, [identity]).allowed for identity in exact]
            for secret in secrets
        }
    if common.json:
        found = {s: [i for i, yes in zip(exact, may[s], strict=True) if yes] for s in secrets}
        print(json.dumps({"access": found, "patterns": open_ended}))
        return
    if not (secrets and exact):
        note("there is no secret" if not secrets else "no grant names a user, group or unit")
    else:
        rows = ([s, *("yes" if yes else "-" for yes in may[s])] for s in secrets)
        table(["SECRET", *map(named_identity, exact)], rows)
    for each in open_ended:
        note(f"grants name {each}, which stands for any number of clients that are not listed")


def _named_identities(found: list[GrantInfo]) -> tuple[dict[str, None], list[str]]:
    """Return the identities that grants name, and the patterns among them."""
    exact: dict[str, None] = {}
    patterns: dict[str, None] = {}
    for each in found:
        for identity in (*each.allows, *each.denies):
            (patterns if is_pattern(identity) else exact)[identity] = None
    return exact, list(patterns)


def _seen(path: str) -> Iterator[str]:
    """Yield the identities of the peers in an audit file: the unit, or else the user."""
    for record in records(path, Wanted()):
        peer = record.get("peer")
        if isinstance(peer, dict) and "uid" in peer:
            yield str(peer.get("unit") or f"uid:{peer['uid']}")


# --- explain


@verb(
    "explain", argument("object_id", metavar="ID", completes="secrets"),
    option("--as", "peer", multiple=True, required=True, metavar="IDENTITY", help=IDENTITY,
           completes="identities"),
    examples=("secretctl explain disk0 --as unit:backup.service",),
)  # fmt: skip
def explain(common: Common, object_id: str, peer: tuple[str, ...]) -> int:
    """Say whether a user, group or unit may read a secret, and why.

    The exit status is 0 if so, 1 if not.
    """
    if is_pattern(object_id):
        raise WrongUsage("explain is about one secret; 'secretctl access' takes patterns")
    named = [found for each in peer for found in (*identities(each), *groups_of(each))]
    with client_of(common) as client:
        found = client.explain(object_id, named)
        for considered in found.grants:
            _warn_of_unsure_denials(client, considered.grant)
    if common.json:
        members = found._asdict() | {"grants": [each._asdict() for each in found.grants]}
        print(json.dumps({n: v for n, v in members.items() if v is not None}))
    else:
        print("\n".join(_explained(object_id, named, found)))
        if "uid:0" in named and not found.allowed:
            note("that is so on the client socket; on the control socket root reads every secret")
    return 0 if found.allowed else 1


def _warn_of_unsure_denials(client: SyncClient, grant_id: str) -> None:
    path = {"path": f"/objects/{grant_id}", "property": "authz"}
    with contextlib.suppress(api.ExecuteError):
        authz = str(client.execute("qom-get", path))
        for match in unsure_denials(client, authz):
            note(f"'{authz}' denies '{match}', which a process can drop; only uid:N is certain")


def _explained(object_id: str, named: list[str], found: Explanation) -> Iterator[str]:
    verdict = f"yes, by grant {found.grant}" if found.allowed else "no"
    yield f"{', '.join(named)} may read '{object_id}': {verdict}"
    if not found.exists:
        yield "  there is no secret of that id"
    for considered in found.grants:
        mark = "allows" if considered.allowed else "does not"
        yield f"  grant {considered.grant} {mark}: {considered.reason}"
    if not found.grants:
        yield f"  no grant names it; 'secretctl grant {object_id} --to {named[0]}' would"
