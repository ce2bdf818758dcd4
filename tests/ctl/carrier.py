# SPDX-License-Identifier: LGPL-2.1-or-later
"""A hostile carrier: carrier.py ALPHA BETA COUNT, on two client sockets.

It reads offers from standard input, one to a line with the id before it. It keeps, repeats, swaps,
cuts and holds back offers and records, and accepts each of them once in the end. Then it prints
what was accepted, and stays until its standard input ends.
"""

import base64
import contextlib
import json
import sys
from typing import cast

from secretd.client import ExecuteError, SyncClient

Pairs = list[tuple[str, str]]


def cut(text: str) -> str:
    """The first half of what base64 says."""
    data = base64.b64decode(text)
    return base64.b64encode(data[: len(data) // 2]).decode()


def wrapped(alpha: SyncClient, object_id: str, offer: str) -> str | None:
    """A record for an offer, if there is one."""
    with contextlib.suppress(ExecuteError):
        reply = alpha.execute("secret-wrap", {"id": object_id, "offer": offer})
        return cast("dict[str, str]", reply)["record"]
    return None


def accepted(beta: SyncClient, record: str) -> str | None:
    """The id of a secret that was accepted."""
    with contextlib.suppress(ExecuteError):
        return cast("dict[str, str]", beta.execute("secret-accept", {"record": record}))["id"]
    return None


def carry(alpha: SyncClient, beta: SyncClient, offers: Pairs) -> dict[str, list[str]]:
    """All that it can think of; returns the ids that wrong attempts and right ones placed."""
    wrong: list[str | None] = []
    for (object_id, offer), (other, _) in zip(offers, offers[1:] + offers[:1], strict=True):
        wrong += [wrapped(alpha, other, offer), wrapped(alpha, object_id, cut(offer))]
    records = [wrapped(alpha, *each) for each in offers]
    assert all(records), records
    kept = [record for record in records if record is not None]
    wrong += [wrapped(alpha, *each) for each in offers]  # again
    wrong += [accepted(beta, cut(record)) for record in kept]
    halves = [base64.b64decode(record) for record in kept]
    for one, two in zip(halves, halves[1:] + halves[:1], strict=True):
        at = len(one) // 2
        wrong.append(accepted(beta, base64.b64encode(one[:at] + two[at:]).decode()))
    wrong += [accepted(alpha, record) for record in kept]  # back to where they came from
    right = [accepted(beta, record) for record in reversed(kept)]
    wrong += [accepted(beta, record) for record in kept]
    return {"wrong": [each for each in wrong if each], "right": [each for each in right if each]}


def main() -> None:
    """See above."""
    alpha_path, beta_path, count = sys.argv[1:]
    offers: Pairs = []
    for _ in range(int(count)):
        object_id, offer = sys.stdin.readline().split()
        offers.append((object_id, offer))
    with SyncClient(alpha_path) as alpha, SyncClient(beta_path) as beta:
        print(json.dumps(carry(alpha, beta, offers)), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
