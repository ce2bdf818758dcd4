# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs stats, metrics and audit show."""

import asyncio
import gzip
import json
import subprocess
import time
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from secretd.ctl import times
from secretd.errors import UsageError
from tests.support.qmp import Client
from tests.support.secretctl import Ctl


def test_stats_are_a_table_of_use_and_limits(run: Ctl, qmp: Client) -> None:
    """With the hits of each; JSON is query-secret-stats."""
    qmp.add("s", data="letmein")
    lines = [line.split() for line in run("stats")[0].splitlines()]
    assert lines[0] == ["RESOURCE", "MOST", "OF", "ANY", "UID", "LIMIT", "HITS"]
    assert ["objects-per-uid", "1", "10,000", "0"] in lines
    assert ["objects", "1"] in lines
    parts = json.loads(run("stats", "--json")[0])
    assert [part["provider"] for part in parts] == ["limits", "audit", "daemon"]


def test_metrics_are_openmetrics(run: Ctl, qmp: Client, tmp_path: Path) -> None:
    """prometheus_client reads them; a file is replaced in one step."""
    qmp.add("s", data="letmein")
    out, _ = run("metrics")
    families = {family.name: family for family in text_string_to_metric_families(out)}  # type: ignore[no-untyped-call]
    used = {s.labels["resource"]: s.value for s in families["secretd_resource_used"].samples}
    assert used["objects-per-uid"] == 1
    assert families["secretd_objects"].samples[0].value == 1
    assert families["secretd_audit_records"].type == "counter"
    assert families["secretd_start_time_seconds"].samples[0].value <= time.time()
    assert families["secretd_build"].samples[0].labels["version"]
    path = tmp_path / "secretd.prom"
    path.write_text("old")
    assert run("metrics", "-o", str(path)) == ("", "")
    assert "# EOF" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in tmp_path.glob("secretd.prom*")] == ["secretd.prom"]
    assert "No such file" in run("metrics", "-o", str(tmp_path / "no/x"), status=1)[1]
    assert "Is a directory" in run("metrics", "-o", str(tmp_path), status=1)[1]
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}.*"))
    assert run("metrics", "-o", "-")[0].endswith("# EOF\n")


PEER = {"uid": 33, "gid": 33, "pid": 812, "unit": "unit:nginx.service"}
RECORDS = [
    {"seq": 1, "time": "2026-01-01T00:00:00.000000Z", "event": "start", "version": "0.1.0"},
    {"event": "add", "id": "disk0", "time": "2026-01-01T00:00:01Z", "size": 7, "peer": PEER},
    {"event": "read", "id": "disk1", "time": "2026-01-02T00:00:01Z", "decision": "deny",
     "peer": {"uid": 34}, "reason": "a\u001bb"},
    {"event": "stop", "time": "x"},
]  # fmt: skip


def test_records_are_shown_for_people(run: Ctl, tmp_path: Path) -> None:
    """All of them, or by id, peer, event and time; plain or compressed, with journald's
    priorities.
    """
    text = "".join(json.dumps(each, separators=(",", ":")) + "\n" for each in RECORDS)
    path, packed, odd = tmp_path / "audit", tmp_path / "audit.1.gz", tmp_path / "odd"
    path.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    odd.write_text("nothing\n<6>" + text)

    def shown(*words: str, status: int = 0) -> list[str]:
        return run("audit", "show", *words, status=status)[0].splitlines()

    for file in (path, packed, odd):
        lines = shown(str(file))
        assert len(lines) == 4
        assert "add               disk0" in lines[1]
        assert "unit:nginx.service, uid:33, pid 812" in lines[1]
        assert "read refused" in lines[2]
        assert "a\\x1bb" in lines[2]
    assert len(shown(str(path), str(packed), "--id", "disk*")) == 4
    assert [json.loads(line)["id"] for line in shown(str(path), "--peer", "nginx", "--json")] == [
        "disk0"
    ]
    assert len(shown(str(path), "--event", "read")) == 1
    assert len(shown(str(path), "--peer", "user:www-data")) == 1
    assert run("audit", "show", str(path), "--event", "nope")[1] == "secretctl: no record matches\n"
    assert len(shown(str(path), "--since", "2026-01-01T12:00:00Z")) == 1
    empty = tmp_path / "empty"
    empty.write_text("")
    assert shown(str(empty)) == []
    empty.write_text("no record\n")
    assert "holds no audit record" in run("audit", "show", str(empty), status=1)[1]
    assert "No such file" in run("audit", "show", str(tmp_path / "no"), status=1)[1]
    assert "Is a directory" in run("audit", "show", str(tmp_path), status=1)[1]


def test_options_of_one_action_are_not_those_of_the_other(run: Ctl, tmp_path: Path) -> None:
    """They are refused in words."""
    assert "show takes none" in run("audit", "show", "f", "--live", status=2)[1]
    assert "options of show" in run("audit", "verify", "f", "--id", "x", status=2)[1]


def test_audit_files_come_through_pipes_and_damaged(run: Ctl, audit_file: Path) -> None:
    """Nothing of a pipe is lost; a damaged file is named after its good part."""
    packed, damaged = audit_file.with_suffix(".gz"), audit_file.with_suffix(".bad.gz")
    packed.write_bytes(gzip.compress(audit_file.read_bytes()))
    for command in (f"cat {audit_file}", f"cat {packed}", f"zcat {packed}"):
        with subprocess.Popen(command.split(), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            path = f"/dev/fd/{process.stdout.fileno()}"
            out, _ = run("audit", "verify", path)
        assert out.startswith("2 records")
    whole = packed.read_bytes()
    for content, words in (
        (whole[:-12], "the compressed file is cut short"),
        (whole + b"JUNK", "the compressed file is damaged from here on"),
        (whole[:10] + b"\xff" * 20, "the compressed file is damaged from here on"),
    ):
        damaged.write_bytes(content)
        for action in ("verify", "show"):
            out, err = run("audit", action, str(damaged), status=1)
            assert f"{damaged}: {words}" in out + err


@pytest.fixture
def audit_file(tmp_path: Path) -> Path:
    """An audit file of a start and a stop."""
    from secretd.audit.log import Audit

    path = tmp_path / "audit"

    async def write() -> None:
        audit = Audit(str(path))
        audit.start("0.1.0", 0)
        audit.stop()

    asyncio.run(write())
    return path


def test_a_compressed_file_is_verified(run: Ctl, tmp_path: Path) -> None:
    """As logrotate leaves it."""
    from secretd.audit.log import Audit

    path = tmp_path / "audit"
    audit = Audit(str(path))
    audit._started = True
    audit.stop()
    packed = tmp_path / "audit.1.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    out, _ = run("audit", "verify", str(packed), "--continues", status=1)
    assert "1 records" in out


def test_times_are_durations_clock_times_or_dates() -> None:
    """Always in the future; for records in the past."""
    assert times.seconds("1d12h") == 36 * 3600
    assert 0 < times.seconds("00:00") <= 86400
    assert 0 < times.seconds("23:59") <= 86400
    assert times.seconds("2099-01-01") > 1e9
    assert times.seconds("2099-01-01T00:00:00+00:00") > 1e9
    for text in ("2001-01-01", "2001-01-01 10:00"):
        with pytest.raises(UsageError, match="in the past"):
            times.seconds(text)
    assert time.time() - 7300 < times.moment("2h") < time.time() - 7100
    assert time.time() - 86401 <= times.moment("12:00") <= time.time()
    with pytest.raises(UsageError, match="a time is expected"):
        times.moment("yesterday")
