# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the clients' methods of several commands do, without a connection.

A plan is a generator: it yields an `Ask` and gets the command's result, or None where secretd
refuses a command that may be refused. Both clients carry out the same plans.
"""

import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from secretd.client.types import GrantInfo, Sealed, grant_infos

T = TypeVar("T")


class Ask(NamedTuple):
    """A command. ``optional``: a refusal is an answer, too."""

    command: str
    arguments: Mapping[str, object]
    optional: bool = False


Plan = Generator[Ask, object, T]


def authz_id(grant_id: str) -> str:
    """Return the id of the authz-list that belongs to a grant made by `grant`."""
    return f"{grant_id}.authz"


def default_grant_id(secret: str, to: Sequence[str]) -> str:
    """Return the id of a grant that was given none."""
    return "grant-" + re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join([secret, *to]))


def grant(grant_id: str, secret: str, to: Sequence[str], limits: Mapping[str, object]) -> Plan[str]:
    """Add an authz-list and the grant that names it, or neither; return the grant's id.

    ``limits``: further members of secret-grant.
    """
    rules_id = authz_id(grant_id)
    rules = [
        {"match": each, "policy": "allow", "format": "glob" if re.search("[*?]", each) else "exact"}
        for each in to
    ]
    wanted = {"qom-type": "secret-grant", "id": grant_id, "secret": secret, "authz": rules_id}
    if (yield _type_of(grant_id)) is not None:
        yield Ask("object-add", wanted)  # secretd refuses it, in its words
    if (yield _type_of(rules_id)) == "authz-list":
        yield Ask("object-del", {"id": rules_id})  # left by an expired grant
    yield Ask("object-add", {"qom-type": "authz-list", "id": rules_id, "rules": rules})
    try:
        yield Ask("object-add", {**wanted, **limits})
    except Exception:
        yield Ask("object-del", {"id": rules_id}, optional=True)
        raise
    return grant_id


def revoke(grant_id: str) -> Plan[bool]:
    """Delete a grant and its own authz-list; return False if there is no such grant.

    What an expired grant has left is deleted, too. Raises ValueError if the object is no grant.
    """
    rules_id = authz_id(grant_id)
    kind = yield _type_of(grant_id)
    if kind not in ("secret-grant", None):
        raise ValueError(f"'{grant_id}' is not a grant")
    own = (yield _type_of(rules_id)) == "authz-list"
    if kind is not None:
        path = {"path": f"/objects/{grant_id}", "property": "authz"}
        own = own and (yield Ask("qom-get", path)) == rules_id
        yield Ask("object-del", {"id": grant_id})
    if own:
        yield Ask("object-del", {"id": rules_id})
    return own or kind is not None


def _type_of(object_id: str) -> Ask:
    path = {"path": f"/objects/{object_id}", "property": "type"}
    return Ask("qom-get", path, optional=True)


def grants(secret: str | None, to: Sequence[str] | None) -> Plan[list[GrantInfo]]:
    """Return all grants; ``secret``, ``to``: only those for this id, and for such a client."""
    found: list[GrantInfo] = []
    arguments: dict[str, object] = {}
    if secret is not None:
        arguments["secret"] = secret
    if to is not None:
        arguments["peer"] = list(to)
    while True:
        after = {"after": found[-1].id} if found else {}
        page = grant_infos((yield Ask("query-secret-grants", {**arguments, **after})))
        if not page:
            return found
        found += page


def for_qemu(sealed: Sealed, object_id: str, keyid: str) -> dict[str, Any]:
    """Return the arguments of QEMU's object-add for a sealed secret."""
    return {
        "qom-type": "secret", "id": object_id, "keyid": keyid, "data": sealed.data,
        "iv": sealed.iv, "format": "base64",
    }  # fmt: skip
