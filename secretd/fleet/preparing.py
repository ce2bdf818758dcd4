# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host's next manifest: what secretd has signed last for it, with the changes of one call.

secretd wraps and signs. publishing brings the result to etcd.
"""

import base64
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypedDict, cast

from qemu.qmp import ExecuteError

from secretd.client.record_client import RecordClient
from secretd.crypto.host_keys import PublicKeys
from secretd.crypto.record import Malformed, verify
from secretd.crypto.roster import AliasVersions, Manifest, Publisher, digest_of, read_manifest
from secretd.errors import UsageError
from secretd.fleet import messages as m
from secretd.fleet.config import Config
from secretd.fleet.keyspace import Keyspace
from secretd.qom.patterns import matcher

log: Final = logging.getLogger("secretd-fleet")

BEHIND: Final = 1000
"""Manifests that are signed again after secretd has forgotten them."""


class _Sent(TypedDict):
    number: int
    publisher: str
    ids: list[dict[str, str]]
    aliases: list[dict[str, str]]


@dataclass
class Wanted:
    """What is to change. ``ids``: to publish; ``gone``: to withdraw; without both manifests are
    signed again as they are. ``begin_anew``: what was published with other keys may be deleted.
    """

    ids: Sequence[str] = ()
    gone: Sequence[str] = ()
    begin_anew: bool = False


@dataclass
class Prepared:
    """A host's next manifest, which has the key ``key``, and what else changes at once.

    ``revision``: of the last change of that key.
    """

    host: str
    key: bytes
    revision: int
    manifest: bytes
    records: dict[bytes, bytes] = field(default_factory=dict)
    stale: list[bytes] = field(default_factory=list)

    @property
    def operations(self) -> list[Any]:
        """All as operations of a transaction."""
        puts = {**self.records, self.key: self.manifest}
        return [
            *(m.Operation(put=m.PutRequest(key=key, value=value)) for key, value in puts.items()),
            *(m.Operation(delete=m.DeleteRequest(key=key)) for key in self.stale),
        ]


class Preparing:
    """What a publisher's secretd has signed, and makes.

    ``publisher``: the keys and pattern that the roster gives it.
    """

    def __init__(self, config: Config, client: RecordClient) -> None:
        self._config, self._client = config, client
        self._keys = Keyspace(config.fleet)
        self.publisher = Publisher(PublicKeys(b"", b""), "")

    def prepared(
        self, host: str, wanted: Wanted, revision: int, manifest: bytes | None, there: set[str]
    ) -> tuple[Prepared, int]:
        """Wrap what a host lacks, and sign; return that and the manifest's number."""
        sent = self._caught_up(self.sent(host), manifest)
        sent = self._within_pattern(sent)
        aliases = dict(sent.aliases)
        wrap: set[str] = set()  # anew, whether it is there or not
        needed = set(sent.ids)
        for object_id in (*wanted.ids, *wanted.gone):
            before = aliases.pop(object_id, None)
            needed -= {object_id, *(before or ())}
        for object_id in wanted.ids:
            versions = self._versions(object_id)
            if versions is None:
                wrap.add(object_id)
            else:
                aliases[object_id] = versions
                wrap |= {each for each in versions if each}  # an id may have another value by now
        for versions in aliases.values():  # one may have versions of another's name
            needed |= {each for each in versions if each}
        wrap |= {
            each for each in needed if each not in sent.ids or sent.ids[each].hex() not in there
        }
        self._check_earlier(sent, manifest, {*needed, *wrap, *wanted.gone}, wanted)
        named = {*wanted.ids, *(each for alias in wanted.ids for each in aliases.get(alias, ()))}
        ids = {each: sent.ids[each] for each in needed - wrap}
        records = {}
        for object_id in sorted(wrap):
            try:
                data = self._client.wrap(object_id, receiver=host)
            except ExecuteError as error:
                if object_id in named or object_id not in sent.ids:
                    raise
                # Hosts that have it keep it: only a withdrawal deletes.
                log.warning("etcd has lost '%s' for host '%s': %s", object_id, host, error)
                ids[object_id] = sent.ids[object_id]
                continue
            ids[object_id] = digest_of(data)
            records[self._keys.record(host, ids[object_id].hex())] = data
        signed, number = self._signed(sent, ids, aliases)
        stale = {*sent.ids.values(), *_digests(manifest)} - set(ids.values())
        prepared = Prepared(
            host, self._keys.manifest(host, self._config.host), revision, signed, records,
            [self._keys.record(host, each.hex()) for each in stale if each.hex() in there],
        )  # fmt: skip
        return prepared, number

    def sent(self, host: str) -> Manifest:
        """Return what was signed last for a host."""
        ids: dict[str, bytes] = {}
        aliases: dict[str, AliasVersions] = {}
        number, after = None, ""
        while True:
            found = cast(
                _Sent,
                self._client.execute("query-secret-fleet-sent", {"host": host, "after": after}),
            )
            if number not in (None, found["number"]):  # another program has signed: begin again
                ids, aliases, number, after = {}, {}, None, ""
                continue
            number = found["number"]
            ids |= {each["id"]: bytes.fromhex(each["digest"]) for each in found["ids"]}
            aliases |= {
                each["id"]: AliasVersions(each["current"], each["previous"])
                for each in found["aliases"]
            }
            entries = [each["id"] for each in (*found["ids"], *found["aliases"])]
            if not entries:
                break
            after = max(entries)
        return Manifest(
            self._config.fleet, host, found["publisher"], found["number"], 0, ids, aliases
        )

    def _within_pattern(self, sent: Manifest) -> Manifest:
        """Leave out what this publisher may not publish any more; hosts delete that."""
        matches = matcher(self.publisher.pattern)
        ids = {each: digest for each, digest in sent.ids.items() if matches(each)}
        aliases = {
            each: versions for each, versions in sent.aliases.items()
            if matches(each) and all(version in ids for version in versions if version)
        }  # fmt: skip
        gone = {*sent.ids, *sent.aliases} - {*ids, *aliases}
        for each in sorted(gone):
            log.warning(
                "'%s' is outside of the pattern '%s' by now, and withdrawn from host '%s'",
                each, self.publisher.pattern, sent.host,
            )  # fmt: skip
        return sent._replace(ids=ids, aliases=aliases)

    def _check_earlier(
        self, sent: Manifest, there: bytes | None, kept: set[str], wanted: Wanted
    ) -> None:
        """Raise UsageError if this publisher's first manifest would delete what it has published
        with other keys.
        """
        if sent.number or there is None or wanted.begin_anew:
            return
        try:
            gone = sorted(set(read_manifest(there).ids) - kept)
        except Malformed:
            return
        if gone:
            more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
            raise UsageError(
                f"with other keys this publisher has published {', '.join(gone[:5])}{more} to it, "
                "which would be deleted there; publish that, too, or give --begin-anew"
            )

    def _caught_up(self, sent: Manifest, there: bytes | None) -> Manifest:
        """Return what was signed last, which may be in etcd and no longer in a secretd whose store
        was restored: then sign up to that number, or hosts would refuse what follows.
        """
        try:
            verify(there or b"", self.publisher.keys.signing)
            known = read_manifest(there or b"")
        except Malformed:
            return sent
        if (known.fleet, known.host) != (sent.fleet, sent.host) or known.number <= sent.number:
            return sent
        if known.number - sent.number > BEHIND:
            raise UsageError(
                f"manifest {known.number} for host '{sent.host}' is in etcd, and secretd has "
                f"signed {sent.number} only; give this host new keys, and enrol it with --replace"
            )
        log.warning(
            "manifest %d for host '%s' is in etcd, and secretd has signed %d only: was its store "
            "restored? Going on from the one in etcd", known.number, sent.host, sent.number,
        )  # fmt: skip
        while sent.number < known.number:
            _, number = self._signed(sent, known.ids, known.aliases)
            sent = sent._replace(number=number, ids=known.ids, aliases=known.aliases)
        return sent

    def _versions(self, object_id: str) -> AliasVersions | None:
        """Return the versions of an alias, None for a secret."""
        info = self._client.info(object_id)
        if info is None:
            raise UsageError(f"object '{object_id}' not found")
        if not info.version:
            return None
        found = cast(
            "list[dict[str, str]]", self._client.execute("query-secret-alias", {"id": object_id})
        )
        return AliasVersions(found[0]["current"], found[0].get("previous", ""))

    def _signed(
        self, sent: Manifest, ids: dict[str, bytes], aliases: dict[str, AliasVersions]
    ) -> tuple[bytes, int]:
        arguments = {
            "host": sent.host,
            "expect": sent.number,
            "ids": [{"id": each, "digest": digest.hex()} for each, digest in ids.items()],
            "aliases": [
                {"id": each, "current": current, **({"previous": previous} if previous else {})}
                for each, (current, previous) in aliases.items()
            ],
        }
        reply = cast("dict[str, Any]", self._client.execute("secret-fleet-sign", arguments))
        manifest = sent._replace(
            number=reply["number"], signed_at=reply["signed-at"], ids=ids, aliases=aliases
        )
        return manifest.encoded() + base64.b64decode(reply["signature"]), manifest.number


def _digests(manifest: bytes | None) -> set[bytes]:
    """Return the digests of a manifest in etcd, whoever wrote it."""
    if manifest is None:
        return set()
    try:
        return set(read_manifest(manifest).ids.values())
    except Malformed:
        return set()
