# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own commands about figures: query-secret-stats and query-secret-usage."""

from typing import Final, Literal, NotRequired, TypedDict

from secretd.limits import Stat
from secretd.monitor.monitor import Monitor
from secretd.qapi.command import Commands

command: Final = Commands()


class StatInfo(TypedDict):
    """A figure, as QEMU's query-stats and query-stats-schemas have them (qapi/stats.json)."""

    name: str
    type: Literal["instant", "cumulative"]
    unit: NotRequired[Literal["bytes", "seconds"]]
    value: int


class StatsResult(TypedDict):
    """The figures of one part of the daemon."""

    provider: Literal["limits", "audit", "daemon"]
    stats: list[StatInfo]


class LastRelease(TypedDict):
    """The last release of a secret: seconds since the epoch, and the peer as events have it."""

    time: int
    peer: NotRequired[object]


SecretUsage = TypedDict(
    "SecretUsage",
    {
        "id": str,
        "uid": int,
        "releases": int,
        "last-release": NotRequired[LastRelease],
        "audit": str,
    },
)
"""The result of query-secret-usage.

``uid``: the user that added the secret; ``releases``: reads, seals and credentials since the daemon
started; ``audit``: the value of ``--audit``, where all of them are.
"""


@command()
def query_secret_stats(monitor: Monitor) -> list[StatsResult]:
    """Return current use, limits and hits of all limited resources, and the counts of the audit.

    ``instance`` is a random number that each process of the daemon chooses at its start.
    """
    core, audit = monitor.core, monitor.core.audit
    daemon = (
        Stat("instance", "instant", None, core.instance),
        Stat("start-time", "instant", "seconds", core.start_time),
        Stat("objects", "instant", None, len(core.tree.journal)),
    )
    written = (
        Stat("audit-records", "cumulative", None, audit.records),
        Stat("audit-dropped", "cumulative", None, audit.dropped),
        Stat("log-dropped", "cumulative", None, core.log_dropped()),
    )
    return [
        {"provider": "limits", "stats": [_stat(s) for s in core.limits.stats()]},
        {"provider": "audit", "stats": [_stat(s) for s in written]},
        {"provider": "daemon", "stats": [_stat(s) for s in daemon]},
    ]


@command()
def query_secret_usage(monitor: Monitor, id: str) -> SecretUsage:  # noqa: A002
    """Return a secret's owner, and how often it was released since the daemon started."""
    monitor.tree.plaintext(id)
    use = monitor.core.access.uses.of(id)
    usage: SecretUsage = {
        "id": id,
        "uid": monitor.tree.journal.owner(id)[0],
        "releases": use.releases,
        "audit": monitor.core.audit.target,
    }
    if use.subject is not None and use.subject.info is not None:
        usage["last-release"] = {"time": use.time // 1_000_000_000, "peer": use.subject.info}
    return usage


def _stat(stat: Stat) -> StatInfo:
    info: StatInfo = {"name": stat.name, "type": stat.type, "value": stat.value}
    if stat.unit is not None:
        info["unit"] = stat.unit
    return info
