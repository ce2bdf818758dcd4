# SPDX-License-Identifier: LGPL-2.1-or-later
"""An optimisation: the text of the two most frequent records, written directly.

The reference is records.text_of; a test holds both equal. Ids of objects and grants consist of
characters that JSON does not escape, so only the credential's name needs an encoder.
"""

from secretd.audit.records import AUDIT_ID_CHARACTERS, Subject, json_text


def object_event(event: str, subject: Subject, object_id: str, kind: str, size: int | None) -> str:
    """Return the record of what a peer did to an object of type ``kind``; ``size`` is in bytes,
    None if it has none.
    """
    if len(object_id) > AUDIT_ID_CHARACTERS:
        object_id = object_id[:AUDIT_ID_CHARACTERS]
    of = "" if size is None else f'"size":{size},'
    return f'"event":"{event}","id":"{object_id}","type":"{kind}",{of}{subject.text}'


def release(  # noqa: PLR0917 - the members that each of these records has
    event: str,
    subject: Subject,
    rule: str,
    object_id: str,
    size: int,
    credential: str,
    alias: str = "",
    host: str = "",
) -> str:
    """Return the record of a release of a secret by a rule.

    ``credential``: the name that a unit requested, "" for a read or seal. ``alias``: the alias that
    was named, or "". ``host``: the host that it is wrapped for, or "".
    """
    if len(object_id) > AUDIT_ID_CHARACTERS:
        object_id = object_id[:AUDIT_ID_CHARACTERS]
    by = "" if not alias else f'"alias":"{alias[:AUDIT_ID_CHARACTERS]}",'
    if host:
        by += f'"host":"{host}",'
    if credential:
        by += f'"credential":{json_text(credential)},'
    return (
        f'"event":"{event}","decision":"allow","rule":"{rule}","id":"{object_id}",'
        f'{by}"size":{size},{subject.text}'
    )
