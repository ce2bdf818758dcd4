# SPDX-License-Identifier: LGPL-2.1-or-later
"""Objects put into a journal."""

from secretd.journal.journal import Journal


def put(journal: Journal, object_id: str, content: bytes, **properties: object) -> None:
    buffer = journal.arena.allocate(len(content))
    buffer.view[:] = content
    journal.add(object_id, 1, dict(properties), buffer, 7)
