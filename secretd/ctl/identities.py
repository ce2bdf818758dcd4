# SPDX-License-Identifier: LGPL-2.1-or-later
"""Identities on the command line: user:www-data is uid:33.

Names of users and groups become numbers here and not in the daemon, since a look-up may take time.
"""

import contextlib
import grp
import os
import pwd
import re
from typing import Final

from secretd.errors import UsageError

IDENTITY: Final = "unit:NAME, user:NAME, group:NAME, uid:N, gid:N, user-unit:USER/NAME or host:NAME"

_UNIT_SUFFIX: Final = re.compile(
    r"\.(?:service|scope|socket|mount|automount|swap|timer|path|target|device|slice)$|[*?]$"
)


def identities(identity: str) -> list[str]:
    """Return secretd's identities for one of the command line: ``user:www-data`` is ``uid:33``.

    Raises UsageError.
    """
    kind, colon, name = identity.partition(":")
    if not (colon and name):
        raise UsageError(
            f"'{identity}': expected a kind and a name, such as unit:nginx.service, user:alice or "
            "gid:33"
        )
    # 1. Numbers, and names that become numbers.
    if kind in ("uid", "gid"):
        if not name.isdecimal():
            raise UsageError(f"'{identity}': {kind} needs a number, user and group a name")
        return [f"{kind}:{int(name)}"]
    if kind == "user":
        return [f"uid:{_uid(name)}"]
    if kind == "group":
        try:
            return [f"gid:{grp.getgrnam(name).gr_gid}"]
        except KeyError:
            raise UsageError(f"'{identity}': there is no group '{name}'") from None
    if kind == "host":
        return [f"host:{name}"]
    # 2. Units.
    if kind == "unit":
        return [f"unit:{_unit(name)}"]
    if kind == "user-unit" and "/" in name:
        user, _, unit = name.partition("/")
        return [f"user-unit:{user if user.isdecimal() else _uid(user)}/{_unit(unit)}"]
    raise UsageError(f"'{identity}': expected {IDENTITY}")


def named_identity(identity: str) -> str:
    """Return an identity with the name of its user or group, where it has one: uid:33 is
    user:www-data.
    """
    kind, _, number = identity.partition(":")
    if number.isdecimal():
        with contextlib.suppress(KeyError, OverflowError):
            if kind == "uid":
                return f"user:{pwd.getpwuid(int(number)).pw_name}"
            if kind == "gid":
                return f"group:{grp.getgrgid(int(number)).gr_name}"
    return identity


def groups_of(identity: str) -> list[str]:
    """Return the groups that a process of a user usually has."""
    kind, _, name = identity.partition(":")
    if kind != "user":
        return []
    return [f"gid:{gid}" for gid in os.getgrouplist(name, pwd.getpwnam(name).pw_gid)]


def _uid(name: str) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise UsageError(f"there is no user '{name}'") from None


def _unit(name: str) -> str:
    """Return a unit's name as systemctl completes it: without a suffix it is a service."""
    return name if _UNIT_SUFFIX.search(name) else f"{name}.service"
