# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb doctor, which checks everything that secretd needs, and says how to repair it.

Each check is a function that yields findings; machine_checks examines this machine, and
daemon_checks asks the daemon.
"""

import json
import sys
from collections.abc import Iterator
from typing import Final

import click

from secretd.ctl.daemon_checks import daemon_findings
from secretd.ctl.findings import Finding
from secretd.ctl.machine_checks import CHECKS
from secretd.ctl.output import Common
from secretd.ctl.verb import verb

_MARKS: Final = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}


@verb("doctor", examples=("secretctl doctor --json | jq '.[] | select(.state != \"ok\")'",))
def doctor(common: Common) -> int:
    """Check what secretd needs, and say how to repair it.

    It checks memory locking, kernel, limits, units, sockets, and the daemon itself, and takes 5
    seconds at most. The exit status is 1 if something has failed; a warning is not a failure.
    """
    findings: list[Finding] = []

    def found(some: Iterator[Finding]) -> None:
        for finding in some:
            findings.append(finding)
            if not common.json:
                _print(finding)

    for check in CHECKS:
        found(check(common))
    if not any(f.check == "socket" and f.state == "failed" for f in findings):
        found(daemon_findings(common))
    if common.json:
        print(json.dumps([f._asdict() for f in findings]))
    return int(any(f.state == "failed" for f in findings))


_WIDTH: Final = len("secretd-credentials.socket")


def _print(finding: Finding) -> None:
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    mark, color = _MARKS[finding.state]
    shown = click.style(finding.state.ljust(7) if plain else mark, fg=color)
    click.echo(f"{shown} {finding.check:<{_WIDTH}}  {finding.found}")
    if finding.mend:
        indent = "       " if plain else " "
        click.echo(f"{indent} {'':<{_WIDTH}}  {'->' if plain else '→'} {finding.mend}")
