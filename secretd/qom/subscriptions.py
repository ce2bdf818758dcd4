# SPDX-License-Identifier: LGPL-2.1-or-later
"""The callbacks for changes of the tree, which access, deliveries, the status and core supply.

The tree is a `Subscriptions`, and calls the lists.
"""

from collections.abc import Callable


class Subscriptions:
    """Callbacks by kind of change."""

    def __init__(self) -> None:
        self._on_decision: list[Callable[[str], None]] = []
        self._on_removal: list[Callable[[str], None]] = []
        self._on_count: list[Callable[[], None]] = []
        self._on_store: list[Callable[[str], None]] = []

    def subscribe(
        self,
        *,
        decision: Callable[[str], None] | None = None,
        removal: Callable[[str], None] | None = None,
        count: Callable[[], None] | None = None,
        store: Callable[[str], None] | None = None,
    ) -> None:
        """Subscribe to changes.

        ``decision``: called with the id of each object that access decides by, after it was added,
        changed or removed. ``removal``: called with the id of an object before its plaintext is
        wiped; it must end every reader. ``count``: called after an object was added or removed.
        ``store``: called with the id of a secret-store after it was added.
        """
        self._on_decision += [] if decision is None else [decision]
        self._on_removal += [] if removal is None else [removal]
        self._on_count += [] if count is None else [count]
        self._on_store += [] if store is None else [store]
