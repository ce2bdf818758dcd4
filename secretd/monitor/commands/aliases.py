# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own commands about aliases: set, convert, and list them with their readers."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Literal, NotRequired, TypedDict

from msgspec import UNSET, Struct, UnsetType

from secretd.monitor.commands.pages import Page, fill_later
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands
from secretd.qom import rotation
from secretd.qom.alias import number_of
from secretd.store.commit import Commit
from secretd.wire import encoder
from secretd.wire.encoder import JSONText

command: Final = Commands()


class AliasVersions(Struct, forbid_unknown_fields=True, rename="kebab", kw_only=True):
    """The versions that an alias is expected to have; one that is not given is expected to be
    none, "". The note is compared only if it is given.
    """

    current: str
    staged: str | UnsetType = UNSET
    previous: str | UnsetType = UNSET
    note: str | UnsetType = UNSET


class AliasReader(TypedDict):
    """An identity: which version it has read last, and whether it is to read the current one."""

    identity: str
    read: Literal["current", "previous", "nothing"]
    awaited: bool


class AliasInfo(TypedDict):
    """An entry of query-secret-alias.

    ``next``: the id for another version. ``consumers``: the identities that are awaited, if they
    were given; by default all readers are. ``more``: more identities have read it than are
    remembered. ``fault``: why it cannot be read now.
    """

    id: str
    current: str
    staged: NotRequired[str]
    previous: NotRequired[str]
    next: str
    consumers: NotRequired[list[str]]
    note: NotRequired[str]
    readers: list[AliasReader]
    more: NotRequired[bool]
    fault: NotRequired[str]


@command(waits=True)
def secret_alias_set(  # noqa: PLR0917 - the arguments of the command
    monitor: Monitor,
    id: str,  # noqa: A002 - the wire's name
    expect: AliasVersions,
    current: str | UnsetType = UNSET,
    staged: str | UnsetType = UNSET,
    previous: str | UnsetType = UNSET,
    consumers: list[str] | UnsetType = UNSET,
    note: str | UnsetType = UNSET,
) -> Awaitable[None] | None:
    """Change an alias, if its versions are those that ``expect`` names.

    ``staged`` and ``previous`` may be "" for none. A new ``current`` must exist.
    """
    tree = monitor.tree
    before = rotation.alias(tree, id)
    given = {"current": current, "staged": staged, "previous": previous}
    expected = {
        "current": expect.current,
        "staged": "" if expect.staged is UNSET else expect.staged,
        "previous": "" if expect.previous is UNSET else expect.previous,
    }
    if expect.note is not UNSET:
        expected["note"] = expect.note
    versions = {name: each for name, each in given.items() if each is not UNSET}
    for name in (id, *versions.values()):
        monitor.check_own(name)
    commit = rotation.set_alias(
        tree,
        id,
        expected,
        versions,
        None if consumers is UNSET else consumers,
        None if note is UNSET else note,
    )

    def changed() -> None:
        after = tree.aliases.get(id, before)
        monitor.core.audit.append(
            "alias", monitor.subject, id=id, current=after.current,
            **{n: v for n, v in (("staged", after.staged), ("previous", after.previous)) if v},
        )  # fmt: skip
        if after.current != before.current:
            monitor.announce("SECRET_ROTATED", id, version=after.current)

    if commit is None:
        changed()
    else:
        commit.then(lambda error: changed() if error is None else None)
    return commit


@command(waits=True)
def secret_alias_convert(monitor: Monitor, id: str) -> Awaitable[None] | None:  # noqa: A002
    """Turn a secret into an alias whose current version is ID.v1, in one step for its readers.

    The version gets the secret's content, lifetime and owner. Running reads of the secret end.
    """
    for name in (id, f"{id}.v1"):
        monitor.check_own(name)
    outcome = rotation.convert(monitor.tree, id, monitor.peer.uid)

    def converted() -> None:
        monitor.core.audit.append("alias", monitor.subject, id=id, current=f"{id}.v1")
        monitor.announce("SECRET_ROTATED", id, version=f"{id}.v1")

    if outcome is None:
        converted()
    elif isinstance(outcome, Commit):
        outcome.then(lambda error: converted() if error is None else None)
    else:
        return _once(outcome, converted)
    return outcome


async def _once(outcome: Awaitable[None], use: Callable[[], object]) -> None:
    await outcome
    use()


@command(waits=True)
def query_secret_alias(
    monitor: Monitor,
    id: str | UnsetType = UNSET,  # noqa: A002
    after: str | UnsetType = UNSET,
) -> JSONText[list[AliasInfo]] | Coroutine[Any, Any, JSONText[list[AliasInfo]]]:
    """List the aliases by id: their versions, and which of them each reader has read last.

    ``id``: only this one. ``after`` continues after that id, until the list is empty.
    """
    tree = monitor.tree
    if id is not UNSET:
        rotation.alias(tree, id)
        return JSONText(f"[{encoder.value(_info(monitor, id))}]")
    found = (
        None if each is None else _info(monitor, each)
        for each in tree.ids_after("" if after is UNSET else after, ("",))
        if each is None or each in tree.aliases
    )
    page: Page[AliasInfo] = Page()
    return page.text if page.fill(found) else fill_later(page, monitor, found)


def _info(monitor: Monitor, alias_id: str) -> AliasInfo:
    tree = monitor.tree
    found = tree.aliases[alias_id]
    read: dict[int, Literal["current", "previous", "nothing"]] = {
        number_of(found.previous): "previous", 0: "nothing", number_of(found.current): "current",
    }  # fmt: skip
    awaited = found.awaited
    number = found.next
    while f"{alias_id}.v{number}" in tree.journal:
        number += 1
    info: AliasInfo = {
        "id": alias_id,
        "current": found.current,
        "next": f"{alias_id}.v{number}",
        "readers": [
            {
                "identity": each,
                "read": read[found.readers.get(each, 0)],
                "awaited": each in awaited,
            }
            for each in sorted({*found.readers, *found.consumers})
        ],
    }
    if found.staged:
        info["staged"] = found.staged
    if found.previous:
        info["previous"] = found.previous
    if found.consumers:
        info["consumers"] = list(found.consumers)
    if found.note:
        info["note"] = found.note
    if found.more:
        info["more"] = True
    if not tree.is_secret(found.current):
        info["fault"] = f"there is no secret '{found.current}'"
    return info
