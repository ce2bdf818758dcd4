# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the agent says about itself: in its log, to systemd, in etcd, and to Prometheus.

The ack in etcd is what `secretd-fleet status` shows; it is signed by nobody, and decides nothing.
"""

import json
import logging
import os
import time
from typing import Any, Final

from secretd.fleet import certificates
from secretd.fleet.carrier import Carrier
from secretd.fleet.config import Config
from secretd.systemd.notify import NotifySocket

log: Final = logging.getLogger("secretd-fleet")

REPEAT_SECONDS: Final = 60.0
"""Seconds after which a trouble is logged again."""

QUIET_SECONDS: Final = 2.0
"""Seconds within which another reason for a trouble is not logged."""

NEVER: Final = "not tried yet"

_ENDING_SECONDS: Final = 14 * 86400
_REASON_CHARACTERS: Final = 200


class Health:
    """The state of an agent.

    ``etcd``, ``secretd``: why there is no connection, "" if there is one. ``fleet``: what
    query-secret-fleet said last.
    """

    def __init__(self, config: Config, carrier: Carrier, manager: NotifySocket | None) -> None:
        self._config, self._carrier, self._manager = config, carrier, manager
        self.etcd, self.secretd = NEVER, ""
        self.fleet: dict[str, Any] = {"state": "none", "publishers": []}
        self.losses = 0
        self._said: dict[str, str] = {}
        self._said_at: dict[str, float] = {}
        self._status = ""

    def set_etcd(self, reason: str, where: str) -> None:
        """Note that etcd's node ``where`` was lost, or is watched again."""
        before, self.etcd = self.etcd, reason
        if reason and not before:
            self.losses += 1
        self._say("etcd", before, reason, f"watching etcd at {where}", f"etcd at {where}")
        self.show()

    def set_secretd(self, reason: str) -> None:
        """Note that secretd was lost, or is there again."""
        before, self.secretd = self.secretd, reason
        self._say("secretd", before, reason, "secretd is there again", "secretd")
        self.show()

    def set_fleet(self, fleet: dict[str, Any]) -> None:
        """Note what query-secret-fleet said."""
        known = (self.fleet["state"], self.fleet.get("reason", ""))
        self.fleet = fleet
        state, reason = fleet["state"], fleet.get("reason", "")
        if known != (state, reason):
            level = logging.INFO if state == "live" else logging.WARNING
            log.log(level, "the fleet is %s%s", state, f": {reason}" * bool(reason))
        self.show()

    def show(self) -> None:
        """Set systemd's status line, and write the figures."""
        text = self.words()
        if text != self._status:
            self._status = text
            if self._manager is not None:
                self._manager.status(text)
        self.write_metrics()

    def words(self) -> str:
        """Return the state in words."""
        troubles = [
            *([f"etcd: {self.etcd}"] if self.etcd else []),
            *([f"secretd: {self.secretd}"] if self.secretd else []),
        ]
        state = str(self.fleet["state"])
        if state == "none":
            state = "secretd has no fleet; 'secretd-fleet join' gives it one"
        missing = self.missing
        parts = [state, *([f"{missing} records missing"] if missing else []), *troubles]
        return "; ".join(parts)

    @property
    def missing(self) -> int:
        """The number of records that are missing."""
        return sum(each["missing"] for each in self.fleet["publishers"])

    def ack(self) -> bytes:
        """Return what goes into etcd, without the time."""
        fleet = self.fleet
        content = {
            "state": fleet["state"], "roster": fleet.get("roster", {}).get("number", 0),
            "publishers": {
                each["name"]: {k: each[k] for k in ("number", "digest", "missing", "pending")}
                for each in fleet["publishers"]
            },
        }  # fmt: skip
        refusals = sorted(self._carrier.refusals.items())
        if refusals:
            content["refused"] = ": ".join(refusals[0])[:_REASON_CHARACTERS]
        return json.dumps(content, sort_keys=True).encode()

    def check_certificate(self) -> float:
        """Return the time at which the certificate ends, and warn of it; 0.0 if that is unknown."""
        try:
            end = certificates.ends_at(self._config.certificate)
        except (OSError, ValueError) as error:
            log.warning("the certificate cannot be read: %s", error)
            return 0.0
        left = end - time.time()
        if left < _ENDING_SECONDS and time.time() - self._said_at.get("certificate", 0) > 86400:
            self._said_at["certificate"] = time.time()
            when = "has ended" if left < 0 else f"ends in {left / 86400:.1f} days"
            log.warning("the certificate %s %s", self._config.certificate, when)
        return end

    def write_metrics(self) -> None:
        """Write the figures for Prometheus, if there is a file for them."""
        path = self._config.metrics
        if path is None:
            return
        text = self.metrics()
        fresh = f"{path}.{os.getpid()}.new"
        try:
            with open(fresh, "w", encoding="ascii") as file:
                file.write(text)
            os.chmod(fresh, 0o644)
            os.rename(fresh, path)
        except OSError as error:
            self._say("metrics", "", f"{path}: {error.strerror}", "", "the figures")

    def metrics(self) -> str:
        """Return the figures in Prometheus' text format."""
        fleet, carrier = self.fleet, self._carrier
        states = ("live", "stale", "refused", "none")
        now = round(time.time())
        lines: list[str] = []
        for name, kind, text, value in (
            ("etcd_connected", "gauge", "1 while a node of etcd is watched.", not self.etcd),
            ("secretd_connected", "gauge", "1 while secretd answers.", not self.secretd),
            ("etcd_losses_total", "counter", "How often the watch was lost.", self.losses),
            ("state", "gauge", "1 for the state of the fleet.",
             {f'state="{each}"': each == fleet["state"] for each in states}),
            ("roster_number", "gauge", "The number of the roster.",
             fleet.get("roster", {}).get("number", 0)),
            ("manifest_number", "gauge", "The number of a publisher's manifest.",
             self._by_publisher("number")),
            ("manifest_signed_timestamp_seconds", "gauge", "When a publisher has signed it.",
             {name: now - age for name, age in self._by_publisher("age").items()}),
            ("missing_records", "gauge", "Records that have not arrived.",
             self._by_publisher("missing")),
            ("accepted_total", "counter", "What secretd has accepted.", carrier.accepted),
            ("refused_total", "counter", "What was refused.", carrier.refused),
            ("certificate_end_timestamp_seconds", "gauge", "When the certificate ends.",
             self.check_certificate()),
        ):  # fmt: skip
            full = f"secretd_fleet_{name}"
            lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
            if isinstance(value, dict):
                lines += [f"{full}{{{label}}} {each:.15g}" for label, each in value.items()]
            else:
                lines.append(f"{full} {value:.15g}")
        return "\n".join(lines) + "\n"

    def _by_publisher(self, member: str) -> dict[str, int]:
        return {
            f'publisher="{each["name"]}"': each[member] for each in self.fleet["publishers"]
        }  # fmt: skip

    def _say(self, about: str, before: str, now: str, well: str, what: str) -> None:
        """Log a change; while one comes after the other, now and then only."""
        if not now:
            if before == NEVER or self._said.pop(f"{about} is lost", ""):
                log.info(well)
            return
        ago = time.monotonic() - self._said_at.get(about, float("-inf"))
        if ago < (REPEAT_SECONDS if now == self._said.get(about) else QUIET_SECONDS):
            return
        self._said[about] = self._said[f"{about} is lost"] = now
        self._said_at[about] = time.monotonic()
        log.warning("%s: %s", what, now)
