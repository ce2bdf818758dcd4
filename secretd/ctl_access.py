# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of `secretctl` about who may read what: grant, revoke, explain, expire, audit verify.

Names of users and groups become numbers here, not in the daemon: looking them up may take its time.
ctl calls it.
"""

import argparse
import grp
import json
import os
import pwd
import re
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from secretd import chain
from secretd.client import Client, ExecuteError
from secretd.errors import UsageError
from secretd.memory import SCRATCH_WINDOW, Arena, choose_level
from secretd.systemd import CREDENTIAL_ADDRESS_BYTES

AddVerb = Callable[[str, Callable[..., Awaitable[int | None]], str], argparse.ArgumentParser]

_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"([0-9]{1,10})([smhd]?)")
_UNIT_SUFFIX: Final = re.compile(
    r"\.(?:service|scope|socket|mount|automount|swap|timer|path|target|device|slice)$|[*?]$"
)
_KEY_BYTES: Final = 1 << 20


RETRY_SECONDS: Final = 5.0
"""Seconds for which a connection that was lost is made anew: a restart takes less."""


def client_of(options: argparse.Namespace) -> Client:
    """Return the client of all verbs."""
    return Client(options.socket, retry_seconds=RETRY_SECONDS)


def add_verbs(verb: AddVerb) -> None:
    """Define the verbs' options."""
    who = "unit:NAME, user:NAME, group:NAME, uid:N, gid:N or user-unit:USER/NAME"
    sub = verb("grant", grant, "let somebody read secrets on the client socket")
    sub.add_argument("secret", metavar="SECRET", help="its id, or a pattern with * and ?")
    sub.add_argument("--to", action="append", required=True, metavar="WHO", help=who)
    sub.add_argument("--id", metavar="GRANT", help="the grant's id (default: made of the rest)")
    sub.add_argument("--for", dest="duration", metavar="TIME", help="such as 90s, 15m, 8h or 30d")
    sub.add_argument("--max-reads", type=int, metavar="N", help="allow so many reads")
    sub.add_argument("--credential", metavar="NAME", help="the name that systemd units know it by")

    sub = verb("revoke", revoke, "take a grant back, at once")
    sub.add_argument("grant", metavar="GRANT")

    sub = verb("explain", explain, "say whether somebody may read a secret, and which rule says so")
    sub.add_argument("id", metavar="ID")
    sub.add_argument("--as", dest="who", action="append", required=True, metavar="WHO", help=who)
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = verb("expire", expire, "wipe a secret after some time")
    sub.add_argument("id", metavar="ID")
    sub.add_argument("--after", required=True, metavar="TIME", help="such as 90s, 15m, 8h or 30d")

    sub = verb("audit", audit, "verify that an audit file is whole")
    sub.add_argument("action", choices=("verify",))
    sub.add_argument("files", nargs="+", metavar="FILE", help="of one chain, the oldest first")
    key = sub.add_mutually_exclusive_group()
    key.add_argument("--key", metavar="ID", help="the secret that --audit-key named")
    key.add_argument("--key-file", metavar="PATH", help="a file that holds it")
    sub.add_argument(
        "--continues", action="store_true", help="what came before the first FILE is elsewhere"
    )
    sub.add_argument("--live", action="store_true", help="ask secretd whether the end is missing")


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
        raise UsageError(f"'{text}': a time is expected, such as 90s, 15m, 8h or 30d")
    return int(match[1]) * _SECONDS[match[2]]


def grant_id(secret: str, to: list[str]) -> str:
    """Return the id of a grant that was given none."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join([secret, *to]))
    return f"grant-{text}"


def authz_id(grant_name: str) -> str:
    """Return the id of the authz-list that belongs to a grant."""
    return f"{grant_name}.authz"


async def grant(options: argparse.Namespace) -> None:
    """Make the authz-list and the secret-grant; print the grant's id."""
    named = [name for who in options.to for name in identities(who)]
    name = options.id or grant_id(options.secret, named)
    rules = [
        {"match": n, "policy": "allow", "format": "glob" if re.search("[*?]", n) else "exact"}
        for n in named
    ]
    arguments = {
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
    async with client_of(options) as client:
        if await _type_of(client, name) is not None:
            raise UsageError(
                f"'{name}' exists already; take it back first, or choose another with --id"
            )
        if await _type_of(client, authz_id(name)) == "authz-list":
            await client.delete(authz_id(name))  # of a grant that has expired
        await client.execute("object-add", rules_object)
        try:
            await client.execute("object-add", arguments)
        except BaseException:
            await client.delete(authz_id(name))
            raise
    print(name)


def _check_credential(name: str, named: list[str]) -> None:
    """Raise UsageError for a unit that systemd could not ask for it."""
    for unit in (who.rpartition("/")[2].removeprefix("unit:") for who in named if "unit:" in who):
        size = len((unit + name).encode())
        if size > CREDENTIAL_ADDRESS_BYTES:
            raise UsageError(
                f"'{unit}' and '{name}' have {size} bytes together, and systemd can ask for "
                f"{CREDENTIAL_ADDRESS_BYTES}: choose a shorter --credential"
            )


async def _type_of(client: Client, object_id: str) -> object:
    try:
        return await client.execute(
            "qom-get", {"path": f"/objects/{object_id}", "property": "type"}
        )
    except ExecuteError:
        return None


async def revoke(options: argparse.Namespace) -> None:
    """Delete a grant, and the authz-list that was made for it."""
    name, rules = options.grant, authz_id(options.grant)
    async with client_of(options) as client:
        kind = await _type_of(client, name)
        if kind not in ("secret-grant", None):
            raise UsageError(f"'{name}' is no grant; 'secretctl del' removes secrets")
        own = await _type_of(client, rules) == "authz-list"
        if kind is None and not own:
            raise UsageError(f"there is no grant '{name}'")
        if kind is not None:
            path = {"path": f"/objects/{name}", "property": "authz"}
            own = own and await client.execute("qom-get", path) == rules
            await client.delete(name)
        if own:
            await client.delete(rules)


async def explain(options: argparse.Namespace) -> int:
    """Say whether somebody may read a secret; the exit status is 0 if so, 1 if not."""
    named = [name for who in options.who for name in (*identities(who), *_groups(who))]
    async with client_of(options) as client:
        found = await client.explain(options.id, named)
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


async def expire(options: argparse.Namespace) -> None:
    """Give a secret a lifetime."""
    async with client_of(options) as client:
        await client.expire(options.id, seconds(options.after))


async def audit(options: argparse.Namespace) -> int:
    """Verify audit files; the exit status is 1 if anything is wrong with them."""
    if options.key is None and options.key_file is None:
        return await _verify(options, None)
    if options.key is not None:
        async with client_of(options) as client:
            with await client.read(options.key) as key:
                return await _verify(options, key.view)
    arena = Arena(choose_level(require=False), window=SCRATCH_WINDOW)
    fd = os.open(options.key_file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with arena.allocate(min(os.fstat(fd).st_size, _KEY_BYTES) or 1) as buffer:
            return await _verify(options, buffer.view[: os.readv(fd, [buffer.view])])
    finally:
        os.close(fd)
        arena.close()


async def _verify(options: argparse.Namespace, key: memoryview | None) -> int:
    written = None
    if options.live:
        # Asked first, so that what is written meanwhile is not missing.
        async with client_of(options) as client:
            written = await client.stat("audit-records")
    verification = chain.Verification(key, continues=options.continues)
    wrong = sum(_report(path, verification) for path in options.files)
    last = verification.last
    if last is None:
        print("no audit record was found", file=sys.stderr)
        return 1
    if verification.unkeyed():
        print("no record is under the key")
        wrong += 1
    time, event = (ascii(last.members.get(name)).strip("'") for name in ("time", "event"))
    print(f"{verification.records} records; the last is record {last.number} of {time}: {event}")
    if written is None:
        if event not in chain.LAST_EVENTS:
            print(
                "it has no end: secretd is running (--live asks it), or what came after is cut off"
            )
    elif written > last.number:
        print(f"secretd has written {written}: those after {last.number} are missing at the end")
        wrong += 1
    else:
        async with client_of(options) as client:
            written = await client.stat("audit-records")
        if last.number > written:
            print(f"secretd has written {written}: those after that are made up")
            wrong += 1
    return 1 if wrong else 0


def _report(path: str, verification: chain.Verification) -> int:
    """Print what is wrong with a file; return how much it is."""
    with open(path, "rb") as file:
        found = [f"{path}:{f.number}: {f.words}" for f in verification.findings(file)]
    print("".join(f"{line}\n" for line in found), end="")
    return len(found)
