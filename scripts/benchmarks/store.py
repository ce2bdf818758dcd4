# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows about the store: durable additions, an import, a cold start, and what others pay."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rig import Machine, Row, Server, ratio_row
from scale import many, secrets

from tests.support.qmp import Client

SECRETCTL = Path(sys.executable).with_name("secretctl")
IMPORTED = 10_000


def storing(machine: Machine) -> Iterator[Row]:
    """All rows."""
    yield from _alone(machine)
    yield from _windows(machine)
    yield from _import_and_start(machine)
    yield from _outside(machine)


def _with_store(machine: Machine, directory: str, pattern: str = "*") -> Server:
    """A daemon with a store in a directory, in which it is made at the first time."""
    os.makedirs(directory, 0o700, exist_ok=True)
    key = Path(directory, "key")
    if not key.exists():
        key.write_bytes(os.urandom(32))
    store = f"secret-store,id=store,path={directory}/store,keyid=store.key,create=on"
    return machine.secretd(
        "--object", f"secret,id=store.key,file={key}", "--object", f"{store},secrets={pattern}"
    )


def _bare(machine: Machine, count: int) -> float:
    """The median time in ms of an append and its fdatasync(2) on the same disk."""
    times = []
    fd = os.open(machine.path("bare"), os.O_WRONLY | os.O_CREAT, 0o600)
    for _ in range(count):
        began = time.perf_counter()
        os.write(fd, bytes(4096))
        os.fdatasync(fd)
        times.append((time.perf_counter() - began) * 1000)
    os.close(fd)
    return statistics.median(times)


def _alone(machine: Machine) -> Iterator[Row]:
    server = _with_store(machine, machine.path("d"))
    count = 300 * machine.rounds
    times = []
    try:
        with contextlib.closing(Client(server.path)) as client:
            for number in range(count):
                began = time.perf_counter()
                assert client.add(f"s{number}", data="x" * 32) == {"return": {}}
                times.append((time.perf_counter() - began) * 1000)
    finally:
        server.stop()
    times.sort()
    p50, p99 = statistics.median(times), times[int(len(times) * 0.99)]
    note = f"p99 {p99:.2g} ms; a bare fdatasync {_bare(machine, count):.2g} ms"
    yield Row("durable object-add, p50", p50, None, p50, 5.0, False, "ms", "", note)


def _windows(machine: Machine) -> Iterator[Row]:
    server = _with_store(machine, machine.path("d"))
    count = 10_000 * machine.rounds
    try:
        with contextlib.closing(Client(server.path)) as client:
            began = time.perf_counter()
            many(client, secrets(f"s{number}" for number in range(count)))
            rate = count / (time.perf_counter() - began)
    finally:
        server.stop()
    note = "in windows of 64, of which each waits for its last reply"
    yield Row(
        "durable object-adds of one connection", rate, None, rate, 5000.0, True, "/s", "", note
    )


def _import_and_start(machine: Machine) -> Iterator[Row]:
    directory = machine.path("d")
    server = _with_store(machine, directory)
    lines = machine.path("import")
    with open(lines, "w") as file:
        for number in range(IMPORTED):
            member = {"id": f"s{number}", "data": "x" * 64}
            file.write(json.dumps(member) + "\n")
    try:
        began = time.perf_counter()
        subprocess.run(
            [SECRETCTL, "--socket", server.path, "import", lines], check=True, capture_output=True
        )
        rate = IMPORTED / (time.perf_counter() - began)
    finally:
        server.stop()
    note = f"{IMPORTED:,} secrets of 64 bytes, the start of secretctl included"
    yield Row("secretctl import into a store", rate, None, rate, 5000.0, True, "/s", "", note)
    times = []
    for _ in range(machine.rounds):
        began = time.perf_counter()
        server = _with_store(machine, directory)
        try:
            with contextlib.closing(Client(server.path)) as client:
                assert client.read(f"s{IMPORTED - 1}") == b"x" * 64
            times.append(time.perf_counter() - began)
        finally:
            server.stop()
    took = statistics.median(times)
    name = f"start until the last of {IMPORTED:,} stored secrets was read"
    yield Row(name, took, None, took, 0.6, False, "s", "")


def _outside(machine: Machine) -> Iterator[Row]:
    plain = machine.secretd()
    stored = _with_store(machine, machine.path("d"), "stored.*")
    stored.name = "with a store"
    try:
        # In both orders: of two equal servers the second one is slower.
        load = ("pair", str(machine.seconds), "1", "1")
        found = [machine.compare(each, *load) for each in ([plain, stored], [stored, plain])]
    finally:
        plain.stop()
        stored.stop()
    mine, other = ([each[name] for each in found] for name in ("with a store", "secretd"))
    rate, theirs = (statistics.mean(each.rate for each in results) for results in (mine, other))
    cpu, its = (statistics.mean(each.cpu for each in results) for results in (mine, other))
    yield ratio_row(
        "pairs outside of a store's pattern", rate, theirs, 0.97, "/s", "without a store",
        note=f"{cpu:.1f} µs of processor time each, and {its:.1f}",
    )  # fmt: skip
