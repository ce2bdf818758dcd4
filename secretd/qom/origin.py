# SPDX-License-Identifier: LGPL-2.1-or-later
"""Secrets that came from another host: where they came from, and what they may replace.

A secret that was accepted in a record has an origin, which nothing changes. A record replaces only
a secret of the same origin. monitor.commands.records calls this module.
"""

from typing import Final

from secretd.memory.arena import LockedBuffer
from secretd.qom.lookup import ORIGIN
from secretd.qom.renewal import check_replaceable
from secretd.qom.secret import Secret
from secretd.qom.tree import ObjectTree
from secretd.store.commit import Commit

DIGEST: Final = "digest"
"""The journal's name for the digest of the record that brought a secret."""


def check_place(tree: ObjectTree, object_id: str, host: str, *, is_version: bool = False) -> None:
    """Raise CommandError unless there is no object of that id, or a secret from this host.

    ``is_version``: it may be a version of an alias, as for a publisher, which has the alias, too.
    """
    if tree.origins.get(object_id) != host:
        tree.check_new(object_id)
    else:
        check_replaceable(tree, object_id, is_version=is_version)


def place(  # noqa: PLR0917 - what a secret has
    tree: ObjectTree,
    object_id: str,
    host: str,
    plaintext: LockedBuffer,
    uid: int,
    digest: str = "",
) -> int | Commit:
    """Add a secret that came from another host, or replace one of the same origin in one step; see
    `ObjectTree.add`. Takes over the plaintext, also if it raises CommandError.

    ``digest``: of its record, in hexadecimal, in a fleet.
    """
    kind = tree.types.numbered[Secret.number]
    properties: dict[str, object] = {ORIGIN: host, **({DIGEST: digest} if digest else {})}
    if object_id not in tree.journal:
        return tree.store_content(object_id, kind, properties, plaintext, uid)
    try:
        owner, before = tree.journal.owner(object_id)
        more = plaintext.size if owner != uid else max(0, plaintext.size - before)
        tree.limits.object_bytes.check(uid, more)
        check_replaceable(tree, object_id, is_version=bool(digest))
        if tree.keeper is not None and tree.keeper.covers(object_id):
            return tree.keeper.exchange(object_id, kind, properties, plaintext, uid)
    except BaseException:
        plaintext.free()
        raise
    size = plaintext.size
    tree.replace(object_id, kind, properties, plaintext, uid)
    return size
