# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows that grow with objects, grants or connections, if anything does.

Most of them are the daemon's processor time for one operation, which the load on the machine
changes least. The worst stall is a time that another client waits.
"""

import contextlib
import json
import os
import random
import resource
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from picture import Line, svg
from rig import CPU, HERE, ROOT, Machine, Row, Server, fill, wait_for

from tests.support.qmp import Client
from tests.support.service_manager import Manager, listening
from tests.support.users import connect_as

WINDOW = 64
PICTURE = ROOT / "docs/static/scaling.svg"


def many(client: Client, commands: Iterable[tuple[str, Mapping[str, object]]]) -> None:
    """Execute commands in windows; each must succeed."""
    waiting = 0
    lines: list[bytes] = []

    def flush() -> None:
        nonlocal waiting
        client.send(b"".join(lines))
        lines.clear()
        for _ in range(waiting):
            reply = client.reply()
            assert "return" in reply, reply
        waiting = 0

    for command, arguments in commands:
        lines.append(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        waiting += 1
        if waiting == WINDOW:
            flush()
    flush()


def secrets(ids: "Iterator[str] | list[str]") -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the commands that add secrets of 32 bytes."""
    for object_id in ids:
        yield "object-add", {"qom-type": "secret", "id": object_id, "data": "x" * 32}


def spent(server: Server, count: int, action: Callable[[int], object]) -> float:
    """Return the server's µs of processor time for each of some actions."""
    # A wake-up across processors costs more than a request.
    usual = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(CPU)})
    try:
        before = server.cpu()
        for number in range(count):
            action(number)
        return (server.cpu() - before) / count * 1e6
    finally:
        os.sched_setaffinity(0, usual)


def micro(name: str, value: float, goal: float, note: str = "") -> Row:
    """Return a row of the daemon's processor time in µs."""
    return Row(name, value, None, value, goal, False, "µs", "", note)


def stall(machine: Machine) -> Iterator[Row]:
    """How long another client waits at worst, while objects come and go without end."""
    sizes = ((100_000, 15.0), (1_000_000, 50.0)) if machine.rounds > 1 else ((20_000, 15.0),)
    for count, goal in sizes:
        server = machine.secretd()
        try:
            with contextlib.closing(Client(server.path)) as client:
                many(client, secrets(f"r{number}" for number in range(count)))
                seconds = 40 * machine.seconds
                alone = slowest(client, 4 * machine.seconds)
                words = ["taskset", "-c", "0", sys.executable, str(HERE / "churn.py")]
                with subprocess.Popen(
                    [*words, server.path, str(count)], stdout=subprocess.PIPE
                ) as churn:
                    assert churn.stdout is not None
                    churn.stdout.readline()
                    worst = slowest(client, seconds)
                    assert churn.poll() is None
                    churn.kill()
        finally:
            server.stop()
        name = f"worst stall of a client while objects come and go, {count:,} resident"
        note = f"{alone:.2g} ms without them"
        yield Row(name, worst, None, worst, goal, False, "ms", "", note)


def slowest(client: Client, seconds: float) -> float:
    """Return the longest time in ms that a request took."""
    worst, end = 0.0, time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        client.ok("query-name")
        worst = max(worst, time.monotonic() - began)
        time.sleep(0.0005)
    return worst * 1000


def listing(machine: Machine) -> Iterator[Row]:
    """A page of query-secrets after a change, among 100,000 random ids."""
    count = 100_000 if machine.rounds > 1 else 20_000
    rng = random.Random(2)
    server = machine.secretd()
    try:
        with contextlib.closing(Client(server.path)) as client:
            many(client, secrets(f"i{rng.getrandbits(64):x}" for _ in range(count)))

            def change(_number: int) -> None:
                client.add(f"i{rng.getrandbits(64):x}", data="x" * 32)

            def page(number: int) -> None:
                change(number)
                client.ok("query-secrets", {"after": f"i{rng.getrandbits(32):x}"})

            page(0)
            value = spent(server, 100, page) - spent(server, 100, change)
    finally:
        server.stop()
    yield micro(f"a page of query-secrets after a change, {count:,} random ids", value, 2000)


@contextlib.contextmanager
def served(machine: Machine) -> Iterator[tuple[Server, str, Client]]:
    """A daemon with a client socket that other users reach, and root's connection."""
    machine.directory.chmod(0o711)
    path = machine.path()
    server = machine.secretd("--client", path)
    try:
        wait_for(path)
        with contextlib.closing(Client(server.path)) as root:
            yield server, path, root
    finally:
        server.stop()


def reader(path: str, uid: int) -> Client:
    """Connect to the client socket as a user."""
    return Client(path, sock=connect_as(path, uid, uid))


def grants(machine: Machine) -> Iterator[Row]:
    """Reads and denials among many grants."""
    names = (
        "secret-read among 3,000 glob grants",
        "denial among 3,000 glob grants",
        "first question of a new identity among 10,000 grants",
    )
    if os.getuid() != 0:
        for name in names:
            yield Row(name, None, None, None, 0, False, "", "needs root")
        return
    source, sink = os.pipe()
    with served(machine) as (server, path, root):
        authz = {"qom-type": "authz-simple", "id": "a", "identity": "uid:4242"}
        root.ok("object-add", authz)
        many(root, secrets(f"vm{number}-disk" for number in range(3000)))
        globs = (
            ("object-add", {"qom-type": "secret-grant", "id": f"g{number}",
                            "secret": f"vm{number}-*", "authz": "a"})
            for number in range(3000)
        )  # fmt: skip
        many(root, globs)
        with contextlib.closing(reader(path, 4242)) as client:

            def read(number: int) -> None:
                client.ok("secret-read", {"id": f"vm{number}-disk"}, (sink,))
                os.read(source, 100)

            def deny(number: int) -> None:
                reply = client.cmd("secret-read", {"id": f"nn{number}-disk"}, (sink,))
                assert "error" in reply

            read(0)
            yield micro(names[0], spent(server, 1000, read), 100)
            yield micro(names[1], spent(server, 1000, deny), 100)
    with served(machine) as (server, path, root):
        root.ok("object-add", {"qom-type": "secret", "id": "s", "data": "x"})
        many(root, ten_thousand())
        clients = [reader(path, 200_000 + number) for number in range(50)]

        def ask(number: int) -> None:
            clients[number].ok("secret-read", {"id": "s"}, (sink,))
            os.read(source, 100)

        first = spent(server, 50, ask)
        again = spent(server, 50, ask)
        yield micro(names[2], first, 1000, f"{again:.0f} µs when asked again")
        for client in clients:
            client.close()
    os.close(source)
    os.close(sink)


def ten_thousand() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield 100 authz objects and 9,900 grants: to one user each, and globs."""
    for number in range(4950):
        identity = f"uid:{200_000 + number}"
        yield "object-add", {"qom-type": "authz-simple", "id": f"a{number}", "identity": identity}
        grant = {"qom-type": "secret-grant", "id": f"g{number}", "authz": f"a{number}"}
        yield "object-add", {**grant, "secret": "s" if number % 2 else f"s{number % 7}*"}
        yield "object-add", {**grant, "id": f"h{number}", "secret": "s"}


def watched(machine: Machine) -> Iterator[Row]:
    """An add and a delete, while many control connections receive events."""
    for count, goal in ((100, 60.0), (1000, 100.0)):
        server = machine.secretd()
        subscribers: list[Client] = []
        try:
            alone = machine.run(server, "pair", str(machine.seconds), "1", "1").cpu
            for _ in range(count):
                each = Client(server.path)
                each.watch()
                subscribers.append(each)
            with drained(subscribers):
                value = machine.run(server, "pair", str(4 * machine.seconds), "1", "1").cpu
        finally:
            for each in subscribers:
                each.close()
            server.stop()
        name = f"add+del with {count:,} connections that receive events"
        yield micro(name, value, goal, f"{alone:.0f} µs without them")


@contextlib.contextmanager
def drained(subscribers: list[Client]) -> Iterator[None]:
    """Empty the subscribers' sockets meanwhile, on another processor."""
    done = threading.Event()

    def drain() -> None:
        poll = select.epoll()
        socks = {each.sock.fileno(): each.sock for each in subscribers}
        for fd in socks:
            poll.register(fd, select.EPOLLIN)
        while not done.is_set():
            for fd, _ in poll.poll(0.1):
                socks[fd].recv(1 << 18)
        poll.close()

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def seconds_again(directory: Path, prepare: Callable[[str], object], object_id: str) -> float:
    """Return the seconds from kill -9, with what a service manager keeps, until a secret is read.

    ``prepare``: adds objects to the daemon on a socket; ``object_id``: a secret of 32 bytes.
    """
    directory.mkdir()
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    pinned = ["taskset", "-c", CPU]
    times = []
    with Manager(directory) as manager, listening(directory / "control.sock") as control:
        sockets = {"control": control}
        started = manager.start("--audit=none", sockets=sockets, prefix=pinned)
        path = control.getsockname()
        prepare(path)
        for _ in range(3):
            started.end(signal.SIGKILL, -9)
            began = time.monotonic()
            started = manager.start("--audit=none", sockets=sockets, prefix=pinned, ready=False)
            with contextlib.closing(Client(path)) as client:
                assert client.read(object_id) == b"x" * 32
            times.append(time.monotonic() - began)
            manager.wait("READY=1")
        started.end(signal.SIGKILL, -9)
    return statistics.median(times)


def again(machine: Machine) -> Iterator[Row]:
    """After kill -9, with what a service manager keeps, until a secret is read."""
    count = 100_000 if machine.rounds > 1 else 20_000

    def fill_all(path: str) -> None:
        subprocess.run(
            [machine.load, "qmp", path, "add", "600", "64", "1", f"COUNT={count}", "FROM=0"],
            check=True, capture_output=True,
        )  # fmt: skip

    value = seconds_again(machine.directory / "kept", fill_all, f"b{count - 1}")
    yield Row(f"{count:,} secrets again after kill -9", value, None, value, 0.3, False, "s", "")


def halved(machine: Machine) -> Iterator[Row]:
    """100,000 secrets after kill -9, where as many were deleted before."""
    count = 200_000 if machine.rounds > 1 else 40_000

    def fill_half(path: str) -> None:
        with contextlib.closing(Client(path)) as client:
            many(client, secrets(f"r{number:06}" for number in range(count)))
            gone = (("object-del", {"id": f"r{number:06}"}) for number in range(0, count, 2))
            many(client, gone)

    value = seconds_again(machine.directory / "halved", fill_half, f"r{count - 1:06}")
    name = f"{count // 2:,} secrets again after kill -9, as many deleted before"
    yield Row(name, value, None, value, 0.3, False, "s", "", "start included")


def scaling(machine: Machine) -> Iterator[Row]:
    """The cost of a pair as objects, connections and subscribers grow; it makes the picture."""
    sizes = (1, 10, 100, 1000, 10_000, 100_000) if machine.rounds > 1 else (1, 100, 10_000)
    seconds = str(machine.seconds)
    panels: dict[str, list[Line]] = {"resident objects": [], "connections": []}
    server = machine.secretd()
    points = []
    try:
        have = 0
        for count in sizes:
            fill(machine, server, count - have, first=have)
            have = count
            cost = min(
                machine.run(server, "pair", seconds, "1", "1", "FROM=9000000").cpu
                for _ in range(machine.rounds)
            )
            points.append((count, cost))
            yield micro(f"add+del with {count:,} resident objects", cost, 1.3 * points[0][1])
    finally:
        server.stop()
    panels["resident objects"].append(Line("", points))
    for title, watching in (("silent", False), ("with events", True)):
        points = []
        for count in sizes[: 4 if machine.rounds > 1 else 2]:
            server = machine.secretd()
            others: list[Client] = []
            try:
                for _ in range(count):
                    others.append(Client(server.path))
                    if watching:
                        others[-1].watch()
                with drained(others):
                    runs = [
                        machine.run(server, "pair", seconds, "1", "1").cpu
                        for _ in range(machine.rounds)
                    ]
            finally:
                for each in others:
                    each.close()
                server.stop()
            points.append((count, min(runs)))
            name = f"add+del with {count:,} other connections, {title}"
            yield micro(name, points[-1][1], (4 if watching else 1.3) * points[0][1])
        panels["connections"].append(Line(title, points))
    about = "Cost of a pair against resident objects and against connections"
    PICTURE.write_text(svg(list(panels.items()), about))


SCALE_GROUPS = {
    "stall": stall, "listing": listing, "grants": grants, "watched": watched, "halved": halved,
    "scaling": scaling, "again": again,
}  # fmt: skip
