# SPDX-License-Identifier: LGPL-2.1-or-later
"""The values that both clients take and return."""

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, cast

Format = Literal["raw", "base64"]

OnChange = Callable[[bool], object]


class SecretInfo(NamedTuple):
    """An entry of query-secrets.

    ``size``: bytes; ``memory``: secretmem, mlock or none; ``expires_in``: the seconds that are
    left, None without a lifetime; ``version``: the current version of an alias, "" for a secret.
    """

    id: str
    qom_type: str
    size: int
    memory: str
    expires_in: int | None = None
    version: str = ""


class Sealed(NamedTuple):
    """The result of secret-seal: AES-256-CBC ciphertext and its IV, both in base64."""

    data: str
    iv: str


class Event(NamedTuple):
    """An event (docs/protocol.md, "Events").

    ``id``: the secret's, "" for an event without one. ``peer``: the uid, gid, pid and unit that
    caused it, None where secretd does not name it. ``time``: seconds since the epoch.
    """

    name: str
    id: str
    peer: dict[str, object] | None
    time: float
    data: dict[str, object]


class GrantInfo(NamedTuple):
    """An entry of query-secret-grants: which clients may read which secrets.

    ``secret``: an id or a pattern. ``allows``, ``denies``: the identities that the authz object
    ``authz`` names, ``more`` the number of those that are left out, ``fault`` why it allows nobody.
    ``max_reads``, ``reads_left``, ``expires_in`` (seconds): None without a limit.
    """

    id: str
    secret: str
    authz: str
    allows: list[str]
    denies: list[str]
    more: int
    fault: str
    credential: str
    max_reads: int | None
    reads_left: int | None
    expires_in: int | None


class AliasInfo(NamedTuple):
    """An entry of query-secret-alias: the versions of a secret, "" for none.

    ``next``: the id for another version. ``consumers``: the identities that are awaited, if they
    were given. ``readers``: what each identity has read last, "current", "previous" or "nothing".
    ``missing``: those that are to read the current version and have not. ``more``: more have read
    it than are remembered. ``fault``: why it cannot be read now. ``note``: a text of the program
    that rotates.
    """

    id: str
    current: str
    staged: str
    previous: str
    next: str
    consumers: list[str]
    readers: dict[str, str]
    missing: list[str]
    more: bool
    fault: str
    note: str


class Considered(NamedTuple):
    """The verdict of one grant about a client, with its reason."""

    grant: str
    allowed: bool
    reason: str


class Explanation(NamedTuple):
    """The result of secret-explain.

    ``allowed``: the client may read the secret; ``exists``: there is one of that id; ``grant``: one
    that permits it, None if there is none; ``grants``: those that name the secret.
    """

    allowed: bool
    exists: bool
    grant: str | None
    grants: list[Considered]


class Usage(NamedTuple):
    """The result of query-secret-usage.

    ``uid``: the user that added the secret; ``releases``: how often it was read, sealed or given to
    a unit since the daemon started. ``last_time`` (seconds since the epoch) and ``last_peer``: of
    the last one, None without one. ``audit``: the target of the audit, which has them all.
    """

    id: str
    uid: int
    releases: int
    last_time: int | None
    last_peer: dict[str, object] | None
    audit: str


class Encoding(NamedTuple):
    """The encoding of a new secret's content: raw or base64, optionally encrypted under ``keyid``;
    ``iv`` is base64.
    """

    format: Format = "raw"
    keyid: str | None = None
    iv: str | None = None

    def members(self) -> dict[str, object]:
        """Return the members of object-add for this encoding."""
        return {name: value for name, value in self._asdict().items() if value is not None}


PLAIN: Final = Encoding()


def secret_infos(entries: object) -> list[SecretInfo]:
    """Return the entries of query-secrets as SecretInfo."""
    return [
        SecretInfo(
            s["id"],
            s["qom-type"],
            s["size"],
            s["memory"],
            s.get("expires-in"),
            s.get("version", ""),
        )
        for s in cast("list[dict[str, Any]]", entries)
    ]


def grant_infos(entries: object) -> list[GrantInfo]:
    """Return the entries of query-secret-grants as GrantInfo."""
    return [
        GrantInfo(
            g["id"],
            g["secret"],
            g["authz"],
            g["allows"],
            g.get("denies", []),
            g.get("more", 0),
            g.get("fault", ""),
            g.get("credential", ""),
            g.get("max-reads"),
            g.get("reads-left"),
            g.get("expires-in"),
        )
        for g in cast("list[dict[str, Any]]", entries)
    ]


def alias_infos(entries: object) -> list[AliasInfo]:
    """Return the entries of query-secret-alias as AliasInfo."""
    return [
        AliasInfo(
            a["id"],
            a["current"],
            a.get("staged", ""),
            a.get("previous", ""),
            a["next"],
            a.get("consumers", []),
            {each["identity"]: each["read"] for each in a["readers"]},
            [e["identity"] for e in a["readers"] if e["awaited"] and e["read"] != "current"],
            a.get("more", False),
            a.get("fault", ""),
            a.get("note", ""),
        )
        for a in cast("list[dict[str, Any]]", entries)
    ]


def explanation(found: object) -> Explanation:
    """Return the result of secret-explain as Explanation."""
    members = cast("dict[str, Any]", found)
    considered = [Considered(**each) for each in members["grants"]]
    return Explanation(members["allowed"], members["exists"], members.get("grant"), considered)


def usage(found: object) -> Usage:
    """Return the result of query-secret-usage as Usage."""
    members = cast("dict[str, Any]", found)
    last = members.get("last-release", {})
    owner, releases = members["uid"], members["releases"]
    return Usage(
        members["id"], owner, releases, last.get("time"), last.get("peer"), members["audit"]
    )


def event_of(message: Mapping[str, object]) -> Event:
    """Return the event in a message."""
    data = cast("dict[str, Any]", message.get("data", {}))
    stamp = cast("dict[str, int]", message["timestamp"])
    seconds = stamp["seconds"] + stamp["microseconds"] / 1e6
    return Event(str(message["event"]), str(data.get("id", "")), data.get("peer"), seconds, data)


def figures(parts: object) -> dict[str, int]:
    """Return the figures of query-secret-stats by name."""
    listed = cast("list[dict[str, list[dict[str, Any]]]]", parts)
    return {s["name"]: int(s["value"]) for part in listed for s in part["stats"]}


def check_text(value: object) -> None:
    """Raise ValueError for text that is not UTF-8, such as a name from a command line: JSON cannot
    carry it.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{value!a} is not UTF-8 text") from None
    elif isinstance(value, Mapping):
        for name, member in value.items():
            check_text(name)
            check_text(member)
    elif isinstance(value, list | tuple):
        for member in value:
            check_text(member)


def before(beginning: str) -> str:
    """Return a text that sorts just before all ids with a prefix; "~" sorts after all characters of
    an id.
    """
    return f"{beginning[:-1]}{chr(ord(beginning[-1]) - 1)}~" if beginning else ""
