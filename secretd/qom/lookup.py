# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding objects: by id, by type, in order of their ids (qcrypto_secret_lookup() and the like).

It changes nothing. The tree is a `Lookup` with the changes; access and the commands use both.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Final

from secretd.crypto.host_keys import PublicKeys
from secretd.errors import AccessDenied, CommandError
from secretd.journal.journal import Journal
from secretd.limits import Limits
from secretd.qom.alias import Alias, alias_of
from secretd.qom.deadlines import Deadlines
from secretd.qom.fleet_state import Fleet
from secretd.qom.object_type import ObjectType, Types
from secretd.qom.sorted_ids import SortedIds

ORIGIN: Final = "origin"
"""The journal's name for the host that a secret came from."""


class Lookup:
    """The objects of a journal.

    ``pinned``: the ids of objects that cannot be deleted, since the daemon itself needs them.
    ``own_keys``: those of secrets that only trusted peers may use: the audit's key and the store's.
    ``aliases``: the secret-alias objects, by id. ``promised``: the versions that become current
    again if a store fails. ``origins``: the hosts that secrets came from.
    ``host``, ``host_name``, ``host_keyid``: of the secret-host, or ""; ``host_keys``: the ids of
    the secrets that its keys come or came from. ``peers``, ``peer_keys``: the secret-peers and
    their keys by name. ``offers``: the secret-offers by nonce; ``asked``: what each asks for.
    ``fleet``: what is known of the fleet.
    """

    _sorted: SortedIds

    def __init__(self, journal: Journal, types: Types) -> None:
        self.journal = journal
        self.types = types
        self.deadlines = Deadlines()
        self.limits = Limits()
        self.pinned: set[str] = set()
        self.own_keys: set[str] = set()
        self.aliases: dict[str, Alias] = {}
        self.promised: Counter[str] = Counter()
        self.origins: dict[str, str] = {}
        self.host = ""
        self.host_keys: set[str] = set()
        self.host_name = self.host_keyid = ""
        self.peers: dict[str, str] = {}
        self.peer_keys: dict[str, PublicKeys] = {}
        self.offers: dict[str, str] = {}
        self.asked: dict[str, tuple[str, str, str]] = {}
        self.fleet = Fleet()

    def is_secret(self, object_id: str) -> bool:
        """Return True if there is an unexpired secret of that id."""
        found = self.journal.summary(object_id)
        is_secret = found is not None and found[0] in self.types.secrets
        return is_secret and not self.deadlines.expired(object_id)

    def resolved(self, object_id: str) -> str:
        """Return the current version of an alias; any other id as it is."""
        alias = self.aliases.get(object_id)
        return object_id if alias is None else alias.current

    def names_secret(self, object_id: str) -> bool:
        """Return True if there is an unexpired secret of that id, or of an alias of that id."""
        return self.is_secret(self.resolved(object_id))

    def check_deletable(self, object_id: str) -> None:
        """Raise CommandError if an alias has a secret as its current version, or may get it back.

        Expiry does not ask, and the daemon's own keys can always be deleted.
        """
        alias = self.aliases.get(alias_of(object_id)) if self.aliases else None
        if alias is None or object_id not in self.journal or object_id in self.own_keys:
            return
        if alias.current == object_id or object_id in self.promised:
            raise CommandError(f"object '{object_id}' is in use, can not be deleted")

    def secret(self, object_id: str) -> tuple[str, int]:
        """Return the type's name and the size in bytes of an existing secret; for an alias the size
        of its current version.
        """
        summary = self.journal.summary(object_id)
        assert summary is not None
        size = summary[1]
        if object_id in self.aliases:
            version = self.journal.summary(self.resolved(object_id))
            assert version is not None
            size = version[1]
        return self.types.numbered[summary[0]].info.name, size

    def secrets_after(
        self, object_id: str, prefixes: Collection[str] = ("",)
    ) -> Iterator[str | None]:
        """Yield the ids of the secrets and their aliases after ``object_id``, as `ids_after`
        does.
        """
        summary, secrets, expired = self.journal.summary, self.types.secrets, self.deadlines.expired
        aliases = self.aliases
        for each in self.ids_after(object_id, prefixes):
            if each is None:
                yield None
            elif each in aliases:
                if self.names_secret(each):
                    yield each
            elif (found := summary(each)) and found[0] in secrets and not expired(each):
                yield each

    def ids_after(self, object_id: str, prefixes: Collection[str]) -> Iterator[str | None]:
        """See SortedIds.with_prefixes."""
        return self._sorted.with_prefixes(object_id, prefixes)

    def plaintext(self, object_id: str, loading: str | None = None) -> memoryview:
        """Return a secret's plaintext, borrowed; qcrypto_secret_lookup(). Raises CommandError.

        ``loading`` is the id of an object that exists but has no content yet.
        """
        content = self.journal.content(object_id)
        if content is None or self.deadlines.expired(object_id):
            if object_id == loading:
                raise CommandError(f"Secret with id '{object_id}' has no data")
            raise CommandError(f"No secret with id '{object_id}'")
        number, size, slot = content
        if number not in self.types.secrets:
            raise CommandError(f"Object with id '{object_id}' is not a secret")
        return self.journal.arena.view(slot, size)

    def check_fresh(self, object_id: str) -> None:
        """Raise CommandError for a secret that its fleet locks."""
        if self.fleet.max_age:
            reason = self.fleet.locked(self.origins.get(object_id))
            if reason:
                raise CommandError(f"Secret '{object_id}' is locked: {reason}")

    def key(self, keyid: str, uid: int, loading: str | None = None) -> memoryview:
        """Return the plaintext of a secret that ``uid`` uses as a key. Raises CommandError.

        Untrusted uids may not use the daemon's own keys: their use would disclose them.
        """
        if keyid in self.own_keys and uid not in self.limits.trusted:
            raise AccessDenied(f"Reading secret '{keyid}' is not permitted")
        return self.plaintext(keyid, loading)

    def type_of(self, object_id: str) -> ObjectType | None:
        """Return the type of an object, None if there is none of that id."""
        summary = self.journal.summary(object_id)
        return None if summary is None else self.types.numbered[summary[0]]
