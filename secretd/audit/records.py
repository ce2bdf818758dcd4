# SPDX-License-Identifier: LGPL-2.1-or-later
"""Audit records: their members, and their text.

The text is the part between a record's number and its last member; log numbers and links it. A
record never holds a value or key: callers pass object ids only, so no value can reach it.
"""

from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from secretd.audit import chain

AUDIT_ID_CHARACTERS: Final = 128
"""Characters of an id in a record; the rest is cut."""


class AuditRecord(Struct, omit_defaults=True, rename="kebab"):
    """The members of a record after ``seq``, its number, and ``time``, in UTC.

    ``size``: bytes; ``peer``: JSON of the peer; ``rule``: the rule that decided.
    """

    event: str
    decision: str | UnsetType = UNSET
    rule: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    alias: str | UnsetType = UNSET
    host: str | UnsetType = UNSET
    origin: str | UnsetType = UNSET
    number: int | UnsetType = UNSET  # of a roster or manifest
    credential: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    size: int | UnsetType = UNSET
    door: str | UnsetType = UNSET
    peer: Raw | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    state: str | UnsetType = UNSET
    current: str | UnsetType = UNSET
    staged: str | UnsetType = UNSET
    previous: str | UnsetType = UNSET
    count: int | UnsetType = UNSET
    of: int | UnsetType = UNSET
    version: str | UnsetType = UNSET
    objects: int | UnsetType = UNSET
    prev: str | UnsetType = UNSET  # only in the first record of a file or a run
    dropped: int | UnsetType = UNSET  # records that were lost before this one


ORDINARY: Final = 0
REFUSAL: Final = 1
FIRST: Final = 2
"""Kinds of records, by which log chooses the journal's priority; FIRST also gets ``prev``. Plain
numbers, since each record is compared with them.
"""


class Subject:
    """The peer that caused an event, and the role of its socket.

    ``info``: the peer's ids and unit; ``text``: the same as members of a record.
    """

    __slots__ = ("info", "peer", "role", "text")

    def __init__(self, role: str, peer: Mapping[str, object] | None) -> None:
        self.role = role
        self.info = None if peer is None else dict(peer)
        self.peer = UNSET if peer is None else Raw(msgspec.json.encode(peer))
        members = {"door": role} if peer is None else {"door": role, "peer": peer}
        self.text = json_text(members)[1:-1]


def text_of(event: str, members: dict[str, object]) -> tuple[str, int]:
    """Return a record's text and importance; ``members`` are those of AuditRecord."""
    object_id = members.get("id")
    if isinstance(object_id, str) and len(object_id) > AUDIT_ID_CHARACTERS:
        members["id"] = object_id[:AUDIT_ID_CHARACTERS]
    record = AuditRecord(event, **members)  # type: ignore[arg-type]  # its members
    first = FIRST if event in chain.FIRST_EVENTS else ORDINARY
    return json_text(record)[1:-1], REFUSAL if record.decision == "deny" else first


def json_text(value: object) -> str:
    """Return the JSON text of a value."""
    return msgspec.json.encode(value).decode()
