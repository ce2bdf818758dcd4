# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of `secretctl` about who may read what: grant, revoke, explain, expire, audit verify.

Names of users and groups become numbers here, not in the daemon: looking them up may take its time.
ctl calls it.
"""

import contextlib
import grp
import json
import os
import pwd
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import click

if TYPE_CHECKING:
    from secretd.audit import chain

from secretd import client as api
from secretd.client import SyncClient
from secretd.ctl.verb import (
    Options,
    argument,
    at_and_in,
    client_of,
    complete_ids,
    done,
    flag,
    note,
    option,
    unsure_denials,
    verb,
)
from secretd.errors import UsageError
from secretd.memory.arena import SCRATCH_WINDOW, Arena
from secretd.memory.level import choose_level
from secretd.systemd.credential_address import CREDENTIAL_ADDRESS_BYTES

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"([0-9]{1,10})([smhd])")
_UNIT_SUFFIX: Final = re.compile(
    r"\.(?:service|scope|socket|mount|automount|swap|timer|path|target|device|slice)$|[*?]$"
)
_KEY_BYTES: Final = 1 << 20
_WHO: Final = "unit:NAME, user:NAME, group:NAME, uid:N, gid:N or user-unit:USER/NAME"
_TIME: Final = "such as 90s, 15m, 8h or 30d"


def identities(who: str) -> list[str]:
    """Return what secretd calls somebody: ``user:www-data`` is ``uid:33``. Raises UsageError."""
    kind, colon, name = who.partition(":")
    if not (colon and name):
        raise UsageError(
            f"'{who}': say who it is, such as unit:nginx.service, user:alice or gid:33"
        )
    if kind in ("uid", "gid"):
        if not name.isdecimal():
            raise UsageError(f"'{who}': {kind} goes with a number, user and group with a name")
        return [f"{kind}:{int(name)}"]
    if kind == "user":
        return [f"uid:{_uid(name)}"]
    if kind == "group":
        try:
            return [f"gid:{grp.getgrnam(name).gr_gid}"]
        except KeyError:
            raise UsageError(f"'{who}': there is no group '{name}'") from None
    if kind == "unit":
        return [f"unit:{_unit(name)}"]
    if kind == "user-unit" and "/" in name:
        user, _, unit = name.partition("/")
        return [f"user-unit:{user if user.isdecimal() else _uid(user)}/{_unit(unit)}"]
    raise UsageError(
        f"'{who}': expected unit:NAME, user:NAME, group:NAME, uid:N, gid:N or user-unit:USER/NAME"
    )


def _groups(who: str) -> list[str]:
    """Return the groups that a process of a user usually has."""
    kind, _, name = who.partition(":")
    if kind != "user":
        return []
    return [f"gid:{gid}" for gid in os.getgrouplist(name, pwd.getpwnam(name).pw_gid)]


def _uid(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise UsageError(f"there is no user '{name}'") from None


def _unit(name: str) -> str:
    """As systemctl: what has no suffix is a service."""
    return name if _UNIT_SUFFIX.search(name) else f"{name}.service"


def seconds(text: str) -> int:
    """Return a time such as 90s, 15m, 8h or 30d in seconds, or raise UsageError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        unit = "a time needs its unit" if text.isdecimal() else "a time is expected"
        raise UsageError(f"'{text}': {unit}, such as 90s, 15m, 8h or 30d")
    return int(match[1]) * _SECONDS[match[2]]


def grant_id(secret: str, to: list[str]) -> str:
    """Return the id of a grant that was given none."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join([secret, *to]))
    return f"grant-{text}"


def authz_id(grant_name: str) -> str:
    """Return the id of the authz-list that belongs to a grant."""
    return f"{grant_name}.authz"


@verb(
    "grant", argument("secret", shell_complete=complete_ids),
    option("--to", multiple=True, required=True, metavar="WHO", help=_WHO),
    option("--id", metavar="GRANT", help="the grant's id (default: made of the rest)"),
    option("--for", "duration", metavar="TIME", help=_TIME),
    option("--max-reads", type=int, metavar="N", help="allow so many reads"),
    option("--credential", metavar="NAME", help="the name that systemd units know it by"),
    examples=(
        "secretctl grant disk0 --to unit:backup.service",
        "secretctl grant 'web.*' --to user:www-data --for 8h",
    ),
)  # fmt: skip
def grant(options: Options) -> None:
    """Let somebody read secrets on the client socket.

    Prints the grant's id. SECRET is an id, or a pattern with * and ?.
    """
    named = [name for who in options.to for name in identities(who)]
    name = options.id or grant_id(options.secret, named)
    rules = [
        {"match": n, "policy": "allow", "format": "glob" if re.search("[*?]", n) else "exact"}
        for n in named
    ]
    arguments: dict[str, Any] = {
        "qom-type": "secret-grant", "id": name, "secret": options.secret, "authz": authz_id(name),
    }  # fmt: skip
    if options.duration is not None:
        arguments["expires-after"] = seconds(options.duration)
    if options.max_reads is not None:
        arguments["max-reads"] = options.max_reads
    if options.credential is not None:
        _check_credential(options.credential, named)
        arguments["credential"] = options.credential
    rules_object = {"qom-type": "authz-list", "id": authz_id(name), "rules": rules}
    with client_of(options) as client:
        if _type_of(client, name) is not None:
            raise UsageError(
                f"'{name}' exists already; take it back first, or choose another with --id"
            )
        if _type_of(client, authz_id(name)) == "authz-list":
            client.delete(authz_id(name))  # of a grant that has expired
        client.execute("object-add", rules_object)
        try:
            client.execute("object-add", arguments)
        except BaseException:
            client.delete(authz_id(name))
            raise
    print(json.dumps({"id": name}) if options.json else name)
    if options.duration is not None and not options.json:
        note(f"it ends {at_and_in(arguments['expires-after'])}")


def _check_credential(name: str, named: list[str]) -> None:
    """Raise UsageError for a unit that systemd could not ask for it."""
    for unit in (who.rpartition("/")[2].removeprefix("unit:") for who in named if "unit:" in who):
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


@verb("revoke", argument("grant"))
def revoke(options: Options) -> None:
    """Take a grant back; what is being read ends, too."""
    name, rules = options.grant, authz_id(options.grant)
    with client_of(options) as client:
        kind = _type_of(client, name)
        if kind not in ("secret-grant", None):
            raise UsageError(f"'{name}' is no grant; 'secretctl del' removes secrets")
        own = _type_of(client, rules) == "authz-list"
        if kind is None and not own:
            raise UsageError(f"there is no grant '{name}'")
        if kind is not None:
            path = {"path": f"/objects/{name}", "property": "authz"}
            own = own and client.execute("qom-get", path) == rules
            client.delete(name)
        if own:
            client.delete(rules)
    done(options, id=name)


@verb(
    "explain", argument("id", shell_complete=complete_ids),
    option("--as", "who", multiple=True, required=True, metavar="WHO", help=_WHO),
    examples=("secretctl explain disk0 --as unit:backup.service",),
)  # fmt: skip
def explain(options: Options) -> int:
    """Say whether somebody may read a secret, and why.

    The exit status is 0 if so, 1 if
    not.
    """
    named = [name for who in options.who for name in (*identities(who), *_groups(who))]
    with client_of(options) as client:
        found = client.explain(options.id, named)
        grants = cast("list[dict[str, Any]]", found["grants"])
        for considered in grants:
            path = {"path": f"/objects/{considered['grant']}", "property": "authz"}
            with contextlib.suppress(api.ExecuteError):
                authz = str(client.execute("qom-get", path))
                for match in unsure_denials(client, authz):
                    note(
                        f"'{authz}' denies '{match}', which a process can drop; only uid:N is certain"
                    )
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(_explained(options.id, named, found)))
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


@verb(
    "expire", argument("id", shell_complete=complete_ids),
    option("--after", metavar="TIME", help=_TIME),
    flag("--never", help="take it back: the secret stays until it is deleted"),
    examples=("secretctl expire disk0 --after 8h", "secretctl expire disk0 --never"),
)  # fmt: skip
def expire(options: Options) -> None:
    """Have a secret wiped after some time from now."""
    if (options.after is None) == (not options.never):
        raise click.UsageError("give either --after TIME or --never")
    after = None if options.never else seconds(options.after)
    with client_of(options) as client:
        client.expire(options.id, after)
    if options.json:
        done(options, id=options.id, after=after)
    elif after is None:
        print(f"{options.id} will not expire")
    else:
        print(f"{options.id} will be wiped {at_and_in(after)}")


@verb(
    "audit", argument("action", type=click.Choice(("verify",))),
    argument("files", nargs=-1, required=True),
    option("--key", metavar="ID", help="the secret that --audit-key named", shell_complete=complete_ids),
    option("--key-file", metavar="PATH", help="a file that holds it"),
    flag("--continues", help="what came before the first FILE is elsewhere"),
    flag("--live", help="ask secretd whether the end is missing"),
    examples=("secretctl audit verify /var/log/secretd/audit.log --live",),
)  # fmt: skip
def audit(options: Options) -> int:
    """Verify that an audit file is whole.

    FILES are those of one chain, the oldest first.
    The exit status is 1 if anything is wrong with them.
    """
    if options.key is not None and options.key_file is not None:
        raise click.UsageError("--key and --key-file exclude each other")
    if options.key is None and options.key_file is None:
        return _verify(options, None)
    if options.key is not None:
        with client_of(options) as client, client.read(options.key) as key:
            return _verify(options, key.view)
    arena = Arena(choose_level(require=False), window=SCRATCH_WINDOW)
    fd = os.open(options.key_file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with arena.allocate(min(os.fstat(fd).st_size, _KEY_BYTES) or 1) as buffer:
            return _verify(options, buffer.view[: os.readv(fd, [buffer.view])])
    finally:
        os.close(fd)
        arena.close()


def _verify(options: Options, key: memoryview | None) -> int:
    written = None
    if options.live:
        # Asked first, so that what is written meanwhile is not missing.
        with client_of(options) as client:
            written = client.stat("audit-records")
    from secretd.audit import chain  # which is much to import for one verb

    verification = chain.Verification(key, continues=options.continues)
    found = [finding for path in options.files for finding in _findings(path, verification)]
    last = verification.last
    if last is None and not found:
        print("no audit record was found", file=sys.stderr)
        return 1
    if verification.unkeyed():
        found.append("no record is under the key")
    notes = []
    if last is not None:
        time, event = (ascii(last.members.get(name)).strip("'") for name in ("time", "event"))
        notes.append(
            f"{verification.records} records; the last is record {last.number} of {time}: {event}"
        )
        if written is None:
            if event not in chain.LAST_EVENTS:
                notes.append(
                    "it has no end: secretd is running (--live asks it), or what came after is cut off"
                )
        elif written > last.number:
            found.append(
                f"secretd has written {written}: those after {last.number} are missing at the end"
            )
        else:
            with client_of(options) as client:
                written = client.stat("audit-records")
            if last.number > written:
                found.append(f"secretd has written {written}: those after that are made up")
    if options.json:
        number = None if last is None else last.number
        print(
            json.dumps(
                {"records": verification.records, "last": number, "findings": found, "notes": notes}
            )
        )
    else:
        print("\n".join([*found, *notes]))
    return 1 if found else 0


def _findings(path: str, verification: "chain.Verification") -> list[str]:
    """Return what is wrong with a file."""
    with open(path, "rb") as file:
        return [f"{path}:{f.number}: {f.words}" for f in verification.findings(file)]
