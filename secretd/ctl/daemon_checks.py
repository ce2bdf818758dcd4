# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checks of `secretctl doctor` that ask the daemon. They change nothing."""

from collections.abc import Iterator
from typing import Any, Final, cast

from secretd import __version__, paths
from secretd import client as api
from secretd.client import SyncClient, default_socket
from secretd.client.types import figures
from secretd.ctl.connection import unsure_denials
from secretd.ctl.findings import Finding
from secretd.ctl.output import Common, count
from secretd.ctl.store_checks import store_findings

ANSWER_SECONDS: Final = 3.0
"""Seconds that the daemon may take for an answer."""


def daemon_findings(common: Common) -> Iterator[Finding]:
    """Ask the daemon, on the socket that the verb names or the default one."""
    path = common.socket or default_socket()
    seconds = ANSWER_SECONDS if common.timeout is None else common.timeout
    try:
        with SyncClient(path, retry_seconds=0, timeout=seconds) as client:
            if not client.package.startswith("secretd"):
                yield Finding(
                    "daemon",
                    "failed",
                    f"{path} is the monitor of a QEMU",
                    "name secretd's socket with --socket",
                )
                return
            yield from _answers(client)
    except api.ConnectError as error:
        yield Finding(
            "daemon", "failed", f"no answer: {error.exc}", "systemctl status secretd, or its stderr"
        )
    except api.QMPError as error:
        yield Finding("daemon", "failed", str(error), "systemctl status secretd, or its stderr")


def _answers(client: SyncClient) -> Iterator[Finding]:
    version = client.version()
    if version != f"secretd {__version__}":
        yield Finding(
            "daemon",
            "warning",
            f"{version}, and this is secretctl {__version__}",
            "restart secretd: its secrets survive that under systemd",
        )
    else:
        yield Finding("daemon", "ok", version)
    control = paths.control_path()
    if client.path != control:
        yield Finding(
            "its socket", "ok", f"{client.path}, which is not the control socket {control}"
        )
    secrets = [each for each in client.list() if not each.version]
    if "none" in {s.memory for s in secrets}:
        yield Finding("its memory", "failed", "not locked", "start it where memory can be locked")
    yield Finding("secrets", "ok", str(len(secrets)))
    yield from _figures(client)
    yield from _rules(client)
    yield from store_findings(client)
    yield from _fleet(client)


def _fleet(client: SyncClient) -> Iterator[Finding]:
    """Check the fleet, if the host belongs to one."""
    try:
        found = cast("list[dict[str, Any]]", client.execute("query-secret-fleet"))
    except api.ExecuteError:  # an older secretd
        return
    for fleet in found:
        missing = sum(each["missing"] for each in fleet["publishers"])
        if fleet["state"] == "live" and not missing:
            yield Finding("fleet", "ok", f"{fleet['name']}, as host {fleet['host']}")
            continue
        reason = fleet.get("reason") or f"{count(missing, 'record')} missing"
        yield Finding(
            "fleet", "warning", f"{fleet['name']} is {fleet['state']}: {reason}",
            "systemctl status secretd-fleet, and docs/fleet.md",
        )  # fmt: skip


def _figures(client: SyncClient) -> Iterator[Finding]:
    """Check the limits that were reached; only the control socket shows them."""
    try:
        found = figures(client.execute("query-secret-stats"))
    except api.ExecuteError:
        return
    # 1. Limits that were hit.
    reached = [name for name, hits in found.items() if name.endswith("-hits") and hits]
    for name in reached:
        yield Finding(
            "limits", "warning", f"{name.removesuffix('-hits')} was reached {found[name]} times",
            "docs/protocol.md, 'Limits', lists the limits and what each is for",
        )  # fmt: skip
    # 2. Lost records and log lines.
    if found.get("audit-dropped"):
        yield Finding(
            "audit",
            "failed",
            f"{found['audit-dropped']} records were lost",
            "make room where --audit writes; --audit-policy=require releases nothing without a "
            "record",
        )
    if found.get("log-dropped"):
        yield Finding(
            "log",
            "warning",
            f"{found['log-dropped']} lines were lost, since stderr took none",
            "look at what reads secretd's stderr, such as systemd-journald",
        )
    if not reached:
        yield Finding("limits", "ok", "none was reached")


def _rules(client: SyncClient) -> Iterator[Finding]:
    """Check for rules that deny something by an identity that a process can drop."""
    try:
        listed = client.execute("qom-list", {"path": "/objects"})
    except api.ExecuteError:  # the client socket, or too many objects
        return
    assert isinstance(listed, list)
    for entry in listed:
        if entry["type"] == "child<authz-list>":
            for match in unsure_denials(client, entry["name"]):
                yield Finding(
                    "rules",
                    "warning",
                    f"'{entry['name']}' denies '{match}', which a process can drop",
                    "permit an identity that the process must have; only denying uid:N is certain",
                )
