# SPDX-License-Identifier: LGPL-2.1-or-later
"""The users and roles of etcd (its RBAC): a host reads what is for it, and writes its ack.

They keep hosts from disturbing each other; what a host accepts is decided by signatures. etcd knows
a user by the common name of its certificate, so no user has a password.
"""

from contextlib import suppress
from typing import Any, Final

from secretd.fleet import messages as m
from secretd.fleet.etcd import Etcd, Refused, prefix_end
from secretd.fleet.keyspace import Keyspace

ROOT: Final = "root"


async def protect(etcd: Etcd) -> None:
    """Let etcd ask for rights, if it does not yet. Raises Refused and Unreachable."""
    await _add_user(etcd, ROOT)
    await _add_role(etcd, ROOT)
    await _call(etcd, "UserGrantRole", m.UserRole(user=ROOT, role=ROOT))
    await _call(etcd, "AuthEnable", m.Nothing())


async def allow(etcd: Etcd, keyspace: Keyspace, host: str, *, publishes: bool) -> None:
    """Give a host its rights, and those of a publisher or none of them."""
    role = _role(host)
    await _add_user(etcd, host)
    await _add_role(etcd, role)
    await _permit(etcd, role, keyspace.ack(host), b"", m.READWRITE)
    if publishes:
        await _permit(etcd, role, keyspace.roster, b"", m.READ)
        await _permit(etcd, role, keyspace.acks, prefix_end(keyspace.acks), m.READ)
        await _permit(etcd, role, keyspace.hosts, prefix_end(keyspace.hosts), m.READWRITE)
    else:
        own = keyspace.host(host)
        await _permit(etcd, role, own, prefix_end(own), m.READ)
        for key, end in (  # it may have been one
            (keyspace.roster, b""), (keyspace.acks, prefix_end(keyspace.acks)),
            (keyspace.hosts, prefix_end(keyspace.hosts)),
        ):  # fmt: skip
            request = m.RoleRevoke(role=role, key=key)
            if end:
                request.range_end = end
            with suppress(Refused):
                await _call(etcd, "RoleRevokePermission", request)
    await _call(etcd, "UserGrantRole", m.UserRole(user=host, role=role))


async def forbid(etcd: Etcd, host: str) -> None:
    """Take a host's rights. A watch that it has open goes on: what is for it must be deleted."""
    for path, request in (
        ("UserDelete", m.UserDelete(name=host)), ("RoleDelete", m.RoleDelete(role=_role(host))),
    ):  # fmt: skip
        try:
            await _call(etcd, path, request)
        except Refused as error:
            if "not found" not in str(error):
                raise


def _role(host: str) -> str:
    return f"host:{host}"


async def _add_user(etcd: Etcd, name: str) -> None:
    try:
        options = m.UserOptions(no_password=True)
        await _call(etcd, "UserAdd", m.UserAdd(name=name, options=options))
    except Refused as error:
        if "already exists" not in str(error):
            raise


async def _add_role(etcd: Etcd, name: str) -> None:
    try:
        await _call(etcd, "RoleAdd", m.RoleAdd(name=name))
    except Refused as error:
        if "already exists" not in str(error):
            raise


async def _permit(etcd: Etcd, role: str, key: bytes, end: bytes, kind: int) -> None:
    permission = m.Permission(type=kind, key=key)
    if end:
        permission.range_end = end
    request = m.RolePermission(name=role, permission=permission)
    await _call(etcd, "RoleGrantPermission", request)


async def _call(etcd: Etcd, name: str, request: Any) -> None:
    await etcd.call(f"/etcdserverpb.Auth/{name}", request, m.Answer)
