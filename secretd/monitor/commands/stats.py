# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd's own command query-secret-stats."""

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

    provider: Literal["limits", "audit"]
    stats: list[StatInfo]


@command()
def query_secret_stats(monitor: Monitor) -> list[StatsResult]:
    """Return current use, limits and hits of all limited resources, and the counts of the audit."""
    audit = monitor.core.audit
    written = (
        Stat("audit-records", "cumulative", None, audit.records),
        Stat("audit-dropped", "cumulative", None, audit.dropped),
        Stat("log-dropped", "cumulative", None, monitor.core.log_dropped()),
    )
    return [
        {"provider": "limits", "stats": [_stat(s) for s in monitor.core.limits.stats()]},
        {"provider": "audit", "stats": [_stat(s) for s in written]},
    ]


def _stat(stat: Stat) -> StatInfo:
    info: StatInfo = {"name": stat.name, "type": stat.type, "value": stat.value}
    if stat.unit is not None:
        info["unit"] = stat.unit
    return info
