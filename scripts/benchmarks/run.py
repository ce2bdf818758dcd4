# SPDX-License-Identifier: LGPL-2.1-or-later
"""What scripts/bench measures, in groups of rows, and the table that it prints.

rig starts the servers and their load; scale has the rows for many objects, grants and connections.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from compare import compared
from fleet import reaching
from records import carrying
from rig import CPU, ROOT, Machine, Result, Row, Server, fill, master, ratio_row, wait_for
from scale import SCALE_GROUPS
from store import storing

from tests.support.qmp import Client
from tests.support.users import connect_as


def against_qemu(machine: Machine) -> Iterator[Row]:
    """Requests, one by one and pipelined, of 32 bytes and of 4 KiB."""
    qemu = machine.qemu()
    ours = machine.secretd()
    servers = [ours] if qemu is None else [ours, qemu]
    limits = [machine.least(), machine.bare()]
    name = "QEMU" if qemu is None else qemu.name
    seconds = str(machine.seconds)
    aes, large = (f"DATA={machine.sealed}", f"IV={machine.iv}"), f"DATA={machine.sealed_large}"
    try:
        for server in servers:
            master(server)

        def both(*words: str) -> tuple[Result, Result | None, str]:
            """What secretd and QEMU reach, and in words what is the most that could be reached
            here.
            """
            plain = words[0] in {"pair", "version"}
            found = machine.compare([*servers, *(limits if plain else [])], *words)
            its = found.get(name)
            most = [
                f"{limit.name} {found[limit.name].rate / its.rate:.3g}"
                for limit in limits
                if plain and its is not None
            ]
            return found[ours.name], its, "".join(f", {each}" for each in most)

        for title, words, goal in (
            ("object-add + object-del, 32 bytes", ("pair", seconds, "1", "1"), 14.0),
            ("the same, AES-256-CBC by keyid", ("aes", seconds, "1", "1", *aes), 14.0),
            ("query-version", ("version", seconds, "1", "1"), 6.0),
            ("getfd + closefd", ("fd", seconds, "1", "1"), 8.0),
            ("pipelined, window 64, pairs", ("pair", seconds, "64", "1"), 70.0),
            ("4 KiB secret, inline", ("pair", seconds, "1", "1", "SIZE=4096"), 180.0),
            ("4 KiB secret, AES", ("aes", seconds, "1", "1", large, aes[1]), 150.0),
        ):
            mine, its, most = both(*words)
            note = f"{mine.cpu:.1f} µs of processor time each"
            if its is not None:
                note += f", QEMU {its.cpu:.0f}{most}"
            yield ratio_row(title, mine.rate, its and its.rate, goal, "/s", name, note=note)
            if title.startswith("object-add"):
                yield ratio_row(
                    "p99 of object-add", mine.p99, its and its.p99, 1 / 12, "µs", name,
                    at_least=False,
                    note=f"p50 {mine.p50:.1f} µs",
                )  # fmt: skip
                yield ratio_row(
                    "processor time of a pair",
                    mine.cpu,
                    its and its.cpu,
                    1 / 20,
                    "µs",
                    name,
                    at_least=False,
                )
    finally:
        for server in (*servers, *limits):
            server.stop()


def crowd(machine: Machine) -> Iterator[Row]:
    """A hundred clients at once; QEMU serves one on each of its monitors, so four monitors are
    compared.
    """
    ours, least, qemu = machine.secretd(), machine.least(), machine.qemu(4)
    seconds = str(machine.seconds * 2)
    try:
        found = machine.compare([ours, least], "pair", seconds, "1", "100")
        mine, limit = found[ours.name], found[least.name]
        theirs = None
        if qemu is not None:
            for number in range(1, 4):
                wait_for(f"{qemu.path}{number}")
            words = ["taskset", "-c", CPU, machine.load, "qmp"]
            totals = []
            for _ in range(machine.rounds):
                running = [
                    subprocess.Popen(
                        [
                            *words,
                            f"{qemu.path}{n or ''}",
                            "pair",
                            seconds,
                            "1",
                            "1",
                            f"FROM={n * 10_000_000}",
                        ],
                        stdout=subprocess.PIPE,
                    )
                    for n in range(4)
                ]
                outs = [json.loads(r.communicate()[0]) for r in running]
                totals.append(sum(o["ops"] / o["seconds"] for o in outs))
            theirs = statistics.median(totals)
        against = "QEMU" if qemu is None else f"{qemu.name}, 4 monitors"
        name = "100 clients at once, pairs"
        yield ratio_row(name, mine.rate, theirs, 7.0, "/s", against)
        yield ratio_row(name, mine.rate, limit.rate, 0.35, "/s", least.name)
        yield ratio_row(
            "p99 with 100 clients", mine.p99 / 1000, limit.p99 / 1000, 2.0, "ms", least.name,
            at_least=False,
        )  # fmt: skip
    finally:
        ours.stop()
        least.stop()
        if qemu is not None:
            qemu.stop()


def resident(machine: Machine) -> Iterator[Row]:
    """With 100,000 secrets: what a delete costs, what memory they take, how soon they are there
    again.
    """
    many = 100_000 if machine.rounds > 1 else 20_000
    few, ours, qemu = machine.secretd(), machine.secretd(), machine.qemu()
    servers = [few, ours] if qemu is None else [few, ours, qemu]
    name = "QEMU" if qemu is None else qemu.name
    memory: dict[str, float] = {}
    took: dict[int, list[float]] = {number: [] for number in range(3)}
    try:
        for server in servers:
            count = 1000 if server is few else many
            empty = server.memory()
            fill(machine, server, count)
            memory[server.name] = (server.memory() - empty) / count
        for _ in range(machine.rounds):
            for number, server in enumerate(servers):
                # QEMU finds those with the shortest names sooner than others.
                first = 500 if server is few else 1000
                words = ("del", "60", "1", "1", "COUNT=300", f"FROM={first}")
                took[number].append(machine.run(server, *words).p50)
                fill(machine, server, 300, first)
    finally:
        for server in servers:
            server.stop()
    with_few, mine, *others = (statistics.median(each) for each in took.values() if each)
    theirs = others[0] if others else None
    yield ratio_row(
        f"object-del with {many:,} resident", 1e6 / mine, theirs and 1e6 / theirs, 350.0,
        "/s", name, note=f"{mine:.1f} µs",
    )  # fmt: skip
    yield ratio_row(
        "the same against 1,000 resident", mine, with_few, 1.3, "µs", "itself", at_least=False
    )
    yield ratio_row(
        "resident memory of a secret",
        memory[ours.name],
        memory.get(name),
        0.45,
        "bytes",
        name,
        at_least=False,
    )


def delivery(machine: Machine) -> Iterator[Row]:
    """A secret into a pipe: against the least a server can do, gpg-agent and libvirt."""
    servers = [machine.secretd(), machine.least()]
    kinds = {}
    agent = gpg_agent(machine)
    if agent is not None:
        servers.append(agent)
        kinds[agent.name] = "gpg"
    try:
        for server in servers:
            if server.name.startswith("secretd"):
                with contextlib.closing(Client(server.path)) as client:
                    client.add("held", data="x" * 32)
        found = machine.compare(servers, "read", str(machine.seconds), "1", "1", kinds=kinds)
        mine = found["secretd"]
        yield ratio_row(
            "secret-read into a pipe",
            mine.rate,
            found["C epoll"].rate,
            0.5,
            "/s",
            "C epoll",
            note=f"{mine.cpu:.1f} µs of processor time",
        )
        theirs = found["gpg-agent"].rate if agent is not None else None
        yield ratio_row("secret-read", mine.rate, theirs, 0.5, "/s", "gpg-agent")
        libvirt = libvirt_rate(machine)
        yield ratio_row(
            "secret-read", found["secretd"].rate, libvirt, 1.3, "/s", "libvirt get-value",
            note="" if libvirt else "there is no libvirt that answers",
        )  # fmt: skip
    finally:
        for server in servers:
            server.stop()


def gpg_agent(machine: Machine) -> Server | None:
    """A gpg-agent that holds a passphrase."""
    if not shutil.which("gpg-agent"):
        return None
    home = machine.directory / "gnupg"
    home.mkdir(mode=0o700)
    environment = os.environ | {"GNUPGHOME": str(home)}
    path = subprocess.run(
        ["gpgconf", "--list-dirs", "agent-socket"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    words = [
        "gpg-agent",
        "--allow-preset-passphrase",
        "--max-cache-ttl",
        "9999",
        "--daemon",
        "sleep",
        "3600",
    ]
    server = Agent("gpg-agent", words, path, env=environment)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        sock.recv(1000)
        sock.sendall(b"PRESET_PASSPHRASE secretd-bench -1 " + (b"78" * 32) + b"\n")
        assert sock.recv(1000).startswith(b"OK")
    return server


class Agent(Server):
    """gpg-agent puts itself into the background."""

    @property
    def pid(self) -> int:
        """The one that listens on the socket."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self.path)
            data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(data[:4], sys.byteorder)

    def stop(self) -> None:
        """End both."""
        os.kill(self.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def libvirt_rate(machine: Machine) -> float | None:
    """Values that libvirt gives a second, of its session daemon; None where there is none."""
    if not shutil.which("libvirtd") or not shutil.which("virsh"):
        return None
    home = machine.directory / "libvirt"
    home.mkdir()
    # Root's libvirtd is the system's; any other user has one of its own.
    as_user: list[str] = []
    if os.getuid() == 0:
        as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        os.chown(home, 65534, 65534)
        machine.directory.chmod(0o711)
    environment = os.environ | {
        name: str(home) for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
    }
    uri = f"secret:///session?socket={home}/libvirt/libvirt-sock"
    daemon = subprocess.Popen(
        ["taskset", "-c", CPU, *as_user, "libvirtd", "--timeout", "600"], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    uuid = "11111111-2222-3333-4444-555555555555"
    try:
        wait_for(f"{home}/libvirt/libvirt-sock", 10)
        xml = home / "secret.xml"
        xml.write_text(f"<secret ephemeral='yes' private='no'><uuid>{uuid}</uuid></secret>")
        virsh = [*as_user, "virsh", "-q", "-c", uri]
        subprocess.run(
            [*virsh, "secret-define", str(xml)], env=environment, check=True, capture_output=True
        )
        value = home / "value"
        value.write_text("x" * 32)
        os.chmod(value, 0o644)
        os.chmod(xml, 0o644)
        subprocess.run(
            [*virsh, "secret-set-value", uuid, "--file", str(value), "--plain"],
            env=environment, check=True, capture_output=True,
        )  # fmt: skip
        rates = []
        for _ in range(machine.rounds):
            done = subprocess.run(
                ["taskset", "-c", CPU, *as_user, machine.load, "libvirt", uri, uuid,
                str(machine.seconds)],
                env=environment, capture_output=True, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout)
            rates.append(found["ops"] / found["seconds"])
        return statistics.median(rates)
    except (TimeoutError, subprocess.CalledProcessError) as error:
        print(f"scripts/bench: libvirt: {error}", file=sys.stderr)
        return None
    finally:
        daemon.kill()
        daemon.wait()


def starting(machine: Machine) -> Iterator[Row]:
    """From the start to the first answer, and what it takes to be there and do nothing."""

    def first(make: Callable[[], Server | None]) -> tuple[float, float] | None:
        times, sizes = [], []
        for _ in range(3 * machine.rounds):
            began = time.monotonic()
            server = make()
            if server is None:
                return None
            with contextlib.closing(Client(server.path)) as client:
                assert client.add("a", data="x" * 32) == {"return": {}}
            times.append(time.monotonic() - began)
            sizes.append(server.memory())
            server.stop()
        return statistics.median(times), statistics.median(sizes)

    mine = first(machine.secretd)
    theirs = first(machine.qemu)
    assert mine is not None
    yield ratio_row(
        "start to the first answered object-add", mine[0] * 1000, theirs and theirs[0] * 1000, 3.0,
        "ms",
        "QEMU", at_least=False,
    )  # fmt: skip
    yield ratio_row(
        "idle memory", mine[1] / 1e6, theirs and theirs[1] / 1e6, 1.0, "MB", "QEMU", at_least=False
    )


def steady(machine: Machine) -> Iterator[Row]:
    """A million secrets come, are read and go, of sizes from 1 byte to 1 MiB, a thousand at a time:
    what is left of them.
    """
    total = 1_000_000 if machine.rounds > 1 else 20_000
    first = total // 5
    server = machine.secretd()
    try:
        machine.run(server, "cycle", "3600", "1", "1", f"COUNT={first}", "FROM=0")
        before = server.memory()
        result = machine.run(
            server, "cycle", "3600", "1", "1", f"COUNT={total - first}", f"FROM={first}"
        )
        after = server.memory()
    finally:
        server.stop()
    name = f"memory after {total:,} cycles of add, read, delete, against after {first:,}"
    note = f"{result.rate:,.0f} cycles/s"
    yield Row(name, after / 1e6, before / 1e6, after / before, 1.05, False, "MB", "itself", note)


def fair(machine: Machine) -> Iterator[Row]:
    """One client asks one thing at a time while another sends all it can. Both are on another
    processor than the server, which then has no time to let others run.
    """
    server = machine.secretd()
    seconds = str(2 * machine.seconds)
    alone, beside = [], []
    try:
        for _ in range(machine.rounds):
            alone.append(machine.run(server, "version", seconds, "1", "1", cpu="0").p99)
            words = [
                "taskset",
                "-c",
                "0",
                machine.load,
                "qmp",
                server.path,
                "pair",
                "60",
                "64",
                "1",
            ]
            with subprocess.Popen(
                words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ) as flood:
                beside.append(machine.run(server, "version", seconds, "1", "1", cpu="0").p99)
                flood.kill()
            with contextlib.closing(Client(server.path)) as client:
                for each in client.ok("query-secrets"):
                    client.ok("object-del", {"id": each["id"]})
    finally:
        server.stop()
    name, mine = "p99 of query-version while another client floods", statistics.median(beside)
    yield ratio_row(name, mine, statistics.median(alone), 5.0, "µs", "alone", at_least=False)


@contextlib.contextmanager
def flooding(path: str, kind: str, connections: int) -> Iterator[None]:
    """A uid without any grant that floods the client socket."""
    program = str(Path(__file__).parent / "flood.py")
    words = ["taskset", "-c", "0", sys.executable, program, path, kind, str(connections), "4242"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as flood:
        assert flood.stdout is not None
        assert flood.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            flood.kill()


def flooded(machine: Machine) -> Iterator[Row]:
    """What root and a subscriber notice of a uid that does its worst; what 4,000 connected clients
    cost.
    """
    names = (
        "slowest new connection of root while 500 of one uid send costly messages",
        "slowest event while one uid is refused without end",
        "secret-read among 4,000 connected clients with a grant each, of the daemon's time",
    )
    if os.getuid() != 0:
        for name in names:
            yield Row(name, None, None, None, 0, False, "", "needs root")
        return
    machine.directory.chmod(0o711)
    client = str(machine.directory / "flooded.sock")
    server = machine.secretd("--client", client)
    try:
        wait_for(client)
        times = []
        with flooding(client, "costly", 500):
            end = time.monotonic() + 5 * machine.seconds
            while time.monotonic() < end:
                began = time.monotonic()
                with contextlib.closing(Client(server.path)) as fresh:
                    fresh.ok("query-name")
                times.append(time.monotonic() - began)
        yield Row(names[0], max(times), None, max(times), 0.1, False, "s", f"{len(times)} tries")
        delays = []
        with (
            contextlib.closing(Client(server.path)) as watching,
            contextlib.closing(Client(server.path)) as acting,
        ):
            watching.watch("SECRET_ADDED")
            with flooding(client, "refused", 1):
                for number in range(round(20 * machine.seconds)):
                    began = time.monotonic()
                    acting.ok("secret-generate", {"id": f"e{number}", "size": 32})
                    assert watching.event()["data"]["id"] == f"e{number}"
                    delays.append(time.monotonic() - began)
        yield Row(
            names[1], max(delays), None, max(delays), 1.0, False, "s", f"{len(delays)} events"
        )
        yield reading_among_many(server, client, names[2], round(4000 * min(1, machine.seconds)))
    finally:
        server.stop()


def reading_among_many(server: Server, path: str, name: str, count: int) -> Row:
    """Clients of as many uids, each with a grant of its own, take turns in reading."""
    clients: list[Client] = []
    source, sink = os.pipe()
    try:
        with contextlib.closing(Client(server.path)) as root:
            root.ok("secret-generate", {"id": "read", "size": 32})
            for number in range(count):
                uid = 100_000 + number
                authz = {"qom-type": "authz-simple", "id": f"a{number}", "identity": f"uid:{uid}"}
                root.ok("object-add", authz)
                grant = {"qom-type": "secret-grant", "id": f"g{number}", "secret": "read"}
                root.ok("object-add", {**grant, "authz": f"a{number}"})
                clients.append(Client(path, sock=connect_as(path, uid, uid)))
            for each in clients[: min(100, count)]:
                each.ok("secret-read", {"id": "read"}, (sink,))
                os.read(source, 100)
            before = server.cpu()
            for each in clients[: min(1000, count)]:
                each.ok("secret-read", {"id": "read"}, (sink,))
                os.read(source, 100)
            spent = (server.cpu() - before) / min(1000, count)
    finally:
        for each in clients:
            each.close()
        os.close(source)
        os.close(sink)
    return Row(name, spent * 1e6, None, spent * 1e6, 1000, False, "µs", f"{count} clients")


def idle(machine: Machine) -> Iterator[Row]:
    """How often a daemon wakes up that has a connection and a secret, and nothing to do."""

    def switches(server: Server) -> int:
        status = Path(f"/proc/{server.pid}/status").read_text()
        return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])

    server = machine.secretd()
    try:
        with contextlib.closing(Client(server.path)) as client:
            client.add("held", data="x" * 32)
            time.sleep(1)
            before = switches(server)
            time.sleep(10 * machine.seconds)
            count = switches(server) - before
    finally:
        server.stop()
    yield Row(
        "wake-ups of an idle daemon", count, None, count, 0, False, "", "none but the watchdog's"
    )


def unit(machine: Machine) -> Iterator[Row]:
    """A unit that loads a credential, and secretd not running yet, in a box with a systemd of its
    own.
    """
    name = "LoadCredential=, cold start included"
    if os.getuid() or not shutil.which("systemd-nspawn"):
        yield Row(
            name, None, None, None, 0.35, False, "s", "0.35 s", "it needs root and systemd-nspawn"
        )
        return
    from tests.e2e.box import Box

    directory = machine.directory / "installed"
    subprocess.run(
        [str(ROOT / "scripts/install"), "--prefix=/usr"],
        env=os.environ | {"DESTDIR": str(directory)},
        check=True, capture_output=True,
    )  # fmt: skip
    box = Box("secretd-bench", directory)
    try:
        box.run("systemd-sysusers")
        box.write("/etc/key", "letmein")
        box.write(
            "/etc/systemd/system/secretd.service.d/bench.conf",
            '[Service]\nEnvironment="SECRETD_ARGS=--object secret,id=k,file=/etc/key '
            "--object authz-simple,id=a,identity=unit:app.service "
            '--object secret-grant,id=g,secret=k,authz=a"\n',
        )
        box.write(
            "/etc/systemd/system/app.service",
            "[Service]\nType=oneshot\nLoadCredential=k:/run/secretd/credentials.sock\n"
            "ExecStart=test -s ${CREDENTIALS_DIRECTORY}/k\n",
        )
        box.run("systemctl", "daemon-reload")
        box.run("systemctl", "start", "secretd-credentials.socket")
        times = []
        for _ in range(2 + machine.rounds):
            box.run("systemctl", "stop", "secretd.service")
            done = box.run(
                "bash",
                "-c",
                "a=${EPOCHREALTIME/./}; systemctl start app.service; echo "
                "$((${EPOCHREALTIME/./} - a))",
            )
            times.append(int(done.stdout) / 1e6)
        value = statistics.median(times)
        version = box.run("systemctl", "--version").stdout.split()[1]
        yield Row(name, value, None, value, 0.35, False, "s", "", f"systemd {version}")
    finally:
        box.close()


GROUPS = {
    "requests": against_qemu, "crowd": crowd, "resident": resident, "delivery": delivery,
    "start": starting,
    "unit": unit, "idle": idle, "fair": fair, "flooded": flooded, "steady": steady,
    **SCALE_GROUPS, "store": storing, "records": carrying, "fleet": reaching,
}  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| measure | secretd | other | ratio | goal | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = {True: "reached", False: "**missed**", None: "not measured"}[row.met]
        sign = "≥" if row.at_least else "≤"
        theirs = "" if row.theirs is None else f"{row.theirs:,.4g} {row.unit}, {row.against}"
        if row.theirs is None:
            theirs = row.against if row.ratio is not None else f"{row.against}: not measured"
        lines.append(
            f"| {row.name} | {number(row.ours)} {row.unit} | {theirs} | {number(row.ratio)} "
            f"| {sign} {number(row.goal)} | {mark}{'; ' if row.note else ''}{row.note} |"
        )
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Three digits, or so."""
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def build() -> str:
    """Say how this Python was built: without PGO and LTO it is 10 to 20 % slower."""
    given = str(sysconfig.get_config_var("CONFIG_ARGS") or "")
    flags = [flag for flag in ("--enable-optimizations", "--with-lto") if flag in given]
    how = " ".join(flags) or "neither --enable-optimizations nor --with-lto"
    if not flags and os.path.realpath(sys.executable).startswith("/usr/bin/"):
        how = "the distribution's own rules"
    return f"{platform.python_version()} ({platform.python_compiler()}, configured with {how})"


def main() -> int:
    """Run it; return 1 if a goal was missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument(
        "--quick", action="store_true", help="one short round: to see that it works"
    )
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; default: all"
    )
    parser.add_argument(
        "--compare", metavar="REV", help="compare with an older commit of this repository instead"
    )
    options = parser.parse_args()
    rows: list[Row] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        machine = Machine(Path(directory), 0.3 if options.quick else 1)
        groups: Mapping[str, Callable[[Machine], Iterator[Row]]] = GROUPS
        if options.compare:
            groups = {"compare": partial(compared, revision=options.compare)}
        for name in (not options.compare and options.groups) or groups:
            print(f"scripts/bench: {name} ...", file=sys.stderr, flush=True)
            for row in groups[name](machine):
                rows.append(row)
                print(f"  {table([row]).splitlines()[-1]}", file=sys.stderr, flush=True)
    facts = {
        "date": time.strftime("%Y-%m-%d"), "kernel": platform.release(), "python": build(),
        "processors": os.cpu_count(), "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    if options.json:
        print(
            json.dumps(
                {**facts, "rows": [row._asdict() | {"met": row.met} for row in rows]}, indent=1
            )
        )
    else:
        print(table(rows))
        print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))
    return int(any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
