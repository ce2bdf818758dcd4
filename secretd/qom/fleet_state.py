# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a daemon knows of its fleet: the roster, and the manifests that it has accepted or signed.

qom.fleet fills it from objects, fleet_rules decides by it, and access asks it what is locked.
"""

import time
from typing import Final, Literal

from secretd.crypto.roster import Manifest, Roster

PUBLISHED: Final = "publisher:"
"""What stands before a publisher's name in the origin of its secrets."""

State = Literal["live", "stale", "refused"]


class Fleet:
    """The fleet of the secret-fleet object ``id``, "" without one.

    ``root``: the Ed25519 key of 32 bytes that signs rosters. ``max_age``: seconds, 0 for no limit.
    ``known_roster``: the last one, which ``roster_root`` has signed. ``carrier``: the id of the
    authz object of the carriers, which may bring what was signed, or "".
    ``manifests``: those accepted, by publisher; ``sent``: those signed here, by host. ``keys``: the
    signing keys of accepted ones, by publisher. ``digests``: of accepted ones as a whole.
    ``withdrawn``: the ids that go when no alias needs them, by publisher. ``refused``: why the last
    thing that came was refused, or "".
    """

    def __init__(self) -> None:
        self.id = self.name = self.carrier = ""
        self.root = b""
        self.max_age = 0
        self.known_roster: Roster | None = None
        self.roster_root = b""
        self.manifests: dict[str, Manifest] = {}
        self.keys: dict[str, bytes] = {}
        self.digests: dict[str, str] = {}
        self.sent: dict[str, Manifest] = {}
        self.withdrawn: dict[str, set[str]] = {}
        self.refused = ""

    def locked(self, origin: str | None) -> str:
        """Return why a secret of this origin cannot be read now, or ""."""
        if not self.max_age or origin is None or not origin.startswith(PUBLISHED):
            return ""
        manifest = self.manifests.get(origin.removeprefix(PUBLISHED))
        age = None if manifest is None else int(time.time()) - manifest.signed_at
        if age is not None and age <= self.max_age:
            return ""
        since = "none came" if age is None else f"the last one is {age} s old"
        return (
            f"fleet '{self.id}' has no manifest of {origin} that is fresh: {since}, and max-age is "
            f"{self.max_age} s"
        )

    @property
    def roster(self) -> Roster | None:
        """The roster, if this root has signed it."""
        return self.known_roster if self.roster_root == self.root else None

    def manifest(self, publisher: str) -> Manifest | None:
        """Return the manifest of a publisher, if it is signed with the key that the roster has
        now.
        """
        roster = self.roster
        known = None if roster is None else roster.publishers.get(publisher)
        if known is None or known.keys.signing != self.keys.get(publisher):
            return None
        return self.manifests[publisher]

    @property
    def stale_at(self) -> float | None:
        """The time from which the fleet is stale: 0.0 if it always was, None for never."""
        if self.roster is None:
            return 0.0
        ends = [float(self.roster.until)] if self.roster.until else []
        if self.max_age:
            known = [each for each in map(self.manifest, self.manifests) if each is not None]
            if not known:
                return 0.0
            ends += [float(each.signed_at + self.max_age + 1) for each in known]
        return min(ends, default=None)

    @property
    def reason(self) -> str:
        """Why the fleet is not live, or ""."""
        if self.refused or self.state == "live":
            return self.refused
        roster, now = self.roster, int(time.time())
        if roster is None:
            return "There is no roster yet"
        if roster.until and roster.until <= now:
            return f"The roster has expired {now - roster.until} s ago"
        old = [
            f"that of publisher '{name}' is {now - each.signed_at} s old"
            for name in self.manifests
            if (each := self.manifest(name)) is not None and now - each.signed_at > self.max_age
        ]
        return f"No manifest is fresh: {old[0] if old else 'none came'}"

    @property
    def state(self) -> State:
        """The state, as the event FLEET_STATE has it."""
        if self.refused:
            return "refused"
        stale_at = self.stale_at
        return "stale" if stale_at is not None and stale_at <= time.time() else "live"
