# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs stats and metrics: the figures of query-secret-stats, for people and for monitoring."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any, cast

from secretd.ctl.connection import client_of
from secretd.ctl.output import Common, table
from secretd.ctl.verb import PATH, option, verb


def _parts(common: Common) -> tuple[list[dict[str, Any]], str]:
    with client_of(common) as client:
        parts = cast("list[dict[str, Any]]", client.execute("query-secret-stats"))
        return parts, client.version()


@verb("stats", examples=("secretctl stats",))
def stats(common: Common) -> None:
    """Show use, limits and hits of all resources.

    And the numbers of audit records, of objects, and of what was dropped.
    """
    parts, _ = _parts(common)
    if common.json:
        print(json.dumps(parts))
        return
    figures = {stat["name"]: stat["value"] for part in parts for stat in part["stats"]}
    used = [n for n in figures if f"{n}-limit" in figures]
    rows = [
        (name, f"{figures[name]:,}", f"{figures[f'{name}-limit']:,}",
         f"{figures.get(f'{name}-hits', 0):,}")
        for name in used
    ]  # fmt: skip
    table(("RESOURCE", "MOST OF ANY UID", "LIMIT", "HITS"), rows, right=(1, 2, 3))
    others = [n for n in figures if not re.search("-(limit|hits)$", n) and n not in used]
    others += [n for n in figures if n.endswith("-hits") and n.removesuffix("-hits") not in used]
    print()
    table(("FIGURE", "VALUE"), [(n, f"{figures[n]:,}") for n in others], right=(1,))


@verb(
    "metrics", option("--output", "-o", type=PATH, metavar="FILE",
                      help="replace this file in one step, instead of standard output"),
    examples=("secretctl metrics -o /var/lib/prometheus/node-exporter/secretd.prom",),
)  # fmt: skip
def metrics(common: Common, output: str | None) -> None:
    """Print the figures in OpenMetrics' text format.

    For the textfile collector of node_exporter. With --output a reader sees either the old file or
    the whole new one.
    """
    parts, version = _parts(common)
    text = "".join(f"{line}\n" for line in _openmetrics(parts, version))
    if output is None or output == "-":
        print(text, end="")
        return
    temporary = f"{output}.{os.getpid()}"
    try:
        with open(temporary, "x", encoding="ascii") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
        os.replace(temporary, output)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _openmetrics(parts: list[dict[str, Any]], version: str) -> Iterator[str]:
    """Yield the lines: a gauge for each present value, a counter for each count.

    The limits of all resources are one family with the resource as a label, and so are their use
    and hits.
    """
    figures = [stat for part in parts for stat in part["stats"]]
    names = {stat["name"] for stat in figures}
    yield "# TYPE secretd_build info"
    yield "# HELP secretd_build The version of the daemon."
    yield f'secretd_build_info{{version="{version.removeprefix("secretd ")}"}} 1'
    by_suffix: dict[str, list[tuple[str, int]]] = {"-limit": [], "-hits": [], "": []}
    single = []
    for stat in figures:
        name = stat["name"]
        suffix = next((s for s in ("-limit", "-hits") if name.endswith(s)), "")
        if suffix or f"{name}-limit" in names:
            resource = name.removesuffix(suffix)
            by_suffix[suffix].append((resource, stat["value"]))
        else:
            single.append(stat)
    yield from _family("secretd_resource_used", "gauge", "Use of a resource by the uid with most",
                       by_suffix[""])  # fmt: skip
    yield from _family("secretd_resource_limit", "gauge", "Limit of a resource for each uid",
                       by_suffix["-limit"])  # fmt: skip
    yield from _family("secretd_limit_hits", "counter", "Requests that a limit refused",
                       by_suffix["-hits"])  # fmt: skip
    for stat in single:
        family = "secretd_" + stat["name"].replace("-", "_")
        if stat["name"] == "start-time":
            family += "_seconds"
        kind = "counter" if stat["type"] == "cumulative" else "gauge"
        words = _HELP.get(stat["name"], stat["name"])
        yield from _family(family, kind, words, [("", stat["value"])])
    yield "# EOF"


_HELP = {
    "audit-records": "Records in the audit's chain",
    "audit-dropped": "Audit records that could not be written",
    "log-dropped": "Lines of the log that could not be written",
    "instance": "A random number that each process of the daemon chooses",
    "start-time": "Start of the daemon since the epoch",
    "objects": "Objects that secretd holds",
}


def _family(name: str, kind: str, words: str, values: list[tuple[str, int]]) -> Iterator[str]:
    yield f"# TYPE {name} {kind}"
    if name.endswith("_seconds"):
        yield f"# UNIT {name} seconds"
    yield f"# HELP {name} {words}."
    sample = f"{name}_total" if kind == "counter" else name
    for label, value in values:
        labels = f'{{resource="{label}"}}' if label else ""
        yield f"{sample}{labels} {value}"
