# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd under a service manager: what it takes over, what it tells, what it leaves."""

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from secretd.daemon.sockets import is_listening
from secretd.journal.journal import Journal
from secretd.qom.deadlines import now
from tests.support.memfds import memfd
from tests.support.needs import ARENA_LEVEL, need_root
from tests.support.qmp import Client
from tests.support.service_manager import (
    Manager,
    Started,
    ask,
    listening,
)

pytestmark = pytest.mark.slow  # it starts processes, or tries many cases

WITHOUT_IPC_LOCK = ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock")
KEPT = ("arena", "journal")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(tmp_path) as made:
        yield made


@pytest.fixture
def role(tmp_path: Path) -> Iterator[Callable[[str], socket.socket]]:
    """Make sockets as the service manager has them."""
    made: list[socket.socket] = []

    def make(name: str) -> socket.socket:
        made.append(listening(tmp_path / f"{name}.sock"))
        return made[-1]

    yield make
    for sock in made:
        sock.close()


def qmp(sock: socket.socket) -> Client:
    return ask(sock)


def records(said: str) -> list[dict]:
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_secrets_survive_what_ends_the_process(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """A stop, whose next start may be a restart's; and kill -9. Deadlines and grants too."""
    control, client = role("control"), role("client")
    sockets = {"client": client, "control": control}
    started = manager.start(sockets=sockets)
    manager.wait_for_store(*KEPT)
    with_client = qmp(control)
    with_client.add("a", data="letmein")
    with_client.add("b", data="short-lived")
    with_client.ok("object-add", {"qom-type": "authz-list", "id": "l", "policy": "allow"})
    with_client.ok(
        "object-add", {"qom-type": "secret-grant", "id": "g", "secret": "a", "authz": "l"}
    )
    with_client.ok("secret-expire", {"id": "b", "after": 500})
    with_client.close()
    said = started.end()
    assert said.endswith("secretd: stopped; the service manager keeps 4 objects\n")
    for number in (signal.SIGKILL, signal.SIGTERM):
        started = manager.start(sockets=sockets)
        reader = qmp(client)
        assert reader.read("a") == b"letmein"
        reader.close()
        with_client = qmp(control)
        assert [(s["id"], s.get("expires-in", 0) > 490) for s in with_client.secrets()] == [
            ("a", False), ("b", True),
        ]  # fmt: skip
        with_client.close()
        said = started.end(number, -9 if number == signal.SIGKILL else 0)
        assert "4 objects, 4 of them kept from before" in said
        assert ("restore", 4) in [(r["event"], r.get("count")) for r in records(said)]
        assert not [r for r in records(said) if r["event"] == "add"]
    manager.wait_for_store(*KEPT)


def test_quit_leaves_nothing(manager: Manager, role: Callable[[str], socket.socket]) -> None:
    """Neither here nor there."""
    control = role("control")
    started = manager.start(sockets={"control": control})
    client = qmp(control)
    client.add("a", data="letmein")
    waiting = qmp(control)  # the end itself has to wait for it
    source, sink = os.pipe()
    added = waiting.ok("add-fd", None, (source,))
    os.close(source)
    words = {"qom-type": "secret", "id": "s", "file": f"/dev/fdset/{added['fdset-id']}"}
    waiting.send(json.dumps({"execute": "object-add", "arguments": words}).encode())
    assert client.cmd("quit")["event"] == "SHUTDOWN"
    assert client.reply() == {"return": {}}
    assert manager.store == []  # before it was answered
    client.close()
    os.close(sink)
    waiting.close()
    assert started.end().endswith("secretd: stopped; all secrets are wiped\n")
    manager.wait_for_store()
    assert os.path.exists(control.getsockname())  # it is not ours to remove


@pytest.mark.parametrize("late", [False, True])
def test_a_store_without_room_is_an_error_that_is_logged(
    tmp_path: Path, role: Callable[[str], socket.socket], late: bool
) -> None:
    """And secrets end with the process then; also where it turns out a little later."""
    control = role("control")
    with Manager(tmp_path, room=2, late=late) as manager:
        started = manager.start(sockets={"control": control})
        manager.wait(f"STATUS=0 secrets, memory: {ARENA_LEVEL}, not kept over restarts")
        said = started.end()
        assert (
            "secretd: the service manager keeps no descriptors, so secrets end with this process"
            in said
        )
        assert said.endswith("secretd: stopped; all secrets are wiped\n")
        manager.wait_for_store()


def test_a_store_that_was_emptied_gets_everything_again(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """As by a daemon-reload while the unit's file was missing for a moment."""
    control = role("control")
    started = manager.start(sockets={"control": control}, watchdog=0.1)
    client = qmp(control)
    client.add("a", data="letmein")
    client.close()
    manager.wait_for_store(*KEPT)  # and the probe has gone
    manager.empty()
    manager.wait_for_store("probe", *KEPT)
    # And where there is no room, it is said; and when there is again.
    manager.room = 0
    manager.empty()
    manager.wait(f"STATUS=1 secret, memory: {ARENA_LEVEL}, not kept over restarts")
    manager.room = 16
    manager.wait(f"STATUS=1 secret, memory: {ARENA_LEVEL}, kept over restarts")
    manager.wait_for_store(*KEPT)
    said = started.end()
    assert said.count("the service manager has no room for another descriptor") == 1
    started = manager.start(sockets={"control": control})
    client = qmp(control)
    assert client.read("a") == b"letmein"
    client.close()
    started.end()


def test_a_service_manager_that_is_slow_at_start_is_asked_again(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """What was not kept then is kept later."""
    control = role("control")
    manager.room = 0
    started = manager.start(sockets={"control": control}, watchdog=0.1)
    manager.wait(f"STATUS=0 secrets, memory: {ARENA_LEVEL}, not kept over restarts")
    manager.room = 16
    manager.wait(f"STATUS=0 secrets, memory: {ARENA_LEVEL}, kept over restarts")
    assert started.end().endswith("secretd: stopped; the service manager keeps 0 objects\n")


def test_expired_objects_end_before_the_command_line_is_read(
    manager: Manager, role: Callable[[str], socket.socket], tmp_path: Path
) -> None:
    """A key whose time has passed meanwhile is made anew, and what needs it has it."""
    control = role("control")
    (tmp_path / "key").write_bytes(bytes(32))
    (tmp_path / "data").write_bytes(b"x" * 16)
    options = ["--object", "secret,id=m,file=key"]
    started = manager.start(*options, sockets={"control": control})
    client = qmp(control)
    client.add("other", data="x")
    for name in ("m", "other"):
        client.ok("secret-expire", {"id": name, "after": 1})
    sealed = client.ok("secret-seal", {"id": "m", "keyid": "m"})
    client.close()
    started.end(signal.SIGKILL, -9)
    (tmp_path / "data").write_text(sealed["data"])
    ends = now() + 1_000_000_000
    while now() < ends:  # nothing runs that could report it
        os.sched_yield()
    options += ["--object", f"secret,id=s,keyid=m,format=base64,iv={sealed['iv']},file=data"]
    started = manager.start(*options, sockets={"control": control})
    client = qmp(control)
    assert [s["id"] for s in client.secrets()] == ["m", "s"]
    client.close()
    said = started.end()
    assert sorted(r["id"] for r in records(said) if r["event"] == "expire") == ["m", "other"]


def test_an_object_that_there_is_no_room_to_compare_stays(
    manager: Manager, role: Callable[[str], socket.socket], tmp_path: Path
) -> None:
    """It is said, and the start goes on."""
    control = role("control")
    (tmp_path / "f").write_bytes(b"x" * 200_000)
    options = ["--object", "secret,id=s,file=f"]
    limit = ["prlimit", "--memlock=2500000:2500000", *WITHOUT_IPC_LOCK]
    started = manager.start(*options, sockets={"control": control}, prefix=limit)
    client = qmp(control)
    number = 0
    while client.cmd("secret-generate", {"id": f"s{number}", "size": 200_000}) == {"return": {}}:
        number += 1
    client.close()
    started.end()
    started = manager.start(*options, sockets={"control": control}, prefix=limit)
    said = started.end()
    assert "secretd: object 's' stays as it was: No locked memory left for another " in said
    said = refused(
        manager.start(
            "--object",
            "secret,id=new,file=f",
            sockets={"control": control},
            prefix=limit,
            ready=False,
        )
    )
    assert "No locked memory left" in said


def test_the_audits_key_does_not_end_by_itself(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """Nor does its deadline of an earlier run stop others from ending."""
    control = role("control")
    started = manager.start(sockets={"control": control})
    client = qmp(control)
    client.add("k", data="x" * 16)
    client.add("other", data="x")
    client.ok("secret-expire", {"id": "k", "after": 7})
    client.ok("secret-expire", {"id": "other", "after": 8})
    client.close()
    started.end()
    started = manager.start("--audit-key=k", sockets={"control": control})
    client = qmp(control)
    while [s["id"] for s in client.secrets()] != ["k"]:
        pass
    assert "expires-in" not in client.secrets()[0]
    client.close()
    started.end()


def test_the_service_manager_gets_status_and_watchdog(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """That the loop turns, how many secrets there are, of a reload and of the end."""
    control = role("control")
    started = manager.start(sockets={"control": control}, watchdog=0.1)
    rest = f"memory: {ARENA_LEVEL}, kept over restarts"
    manager.wait(f"STATUS=0 secrets, {rest}")
    for _ in range(3):
        manager.wait("WATCHDOG=1")
    client = qmp(control)
    for name in ("a", "b"):
        client.add(name, data="letmein")
    manager.wait(f"STATUS=2 secrets, {rest}")
    client.ok("object-del", {"id": "a"})
    manager.wait(f"STATUS=1 secret, {rest}")
    started.process.send_signal(signal.SIGHUP)
    manager.wait("RELOADING=1")
    manager.wait("READY=1")
    client.ok("object-del", {"id": "b"})  # its status is due when the end comes
    client.close()
    started.end()
    manager.wait("STOPPING=1")
    manager.wait(f"STATUS=0 secrets, {rest}")


def test_a_failed_status_is_sent_again(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """The service manager may be busy."""
    from secretd.daemon import fd_store, status
    from secretd.memory.arena import Arena
    from secretd.qom.registry import TYPES
    from secretd.qom.tree import ObjectTree
    from secretd.systemd.notify import NotifySocket as Ours

    async def main() -> None:
        import asyncio

        journal = Journal(Arena(ARENA_LEVEL))
        tree = ObjectTree(journal, journal.arena, TYPES)
        ours = Ours(manager.path)
        reports = status.StatusReporter(
            fd_store.DescriptorStore(ours, journal, restored=False), tree
        )
        reports.start()
        reports._tell()
        assert reports._due is None
        assert reports._store.kept
        ours._address = "/nowhere"
        reports._tell()
        assert reports._due is not None
        reports._store.close()
        reports._store.again(reports._changed)
        assert not reports._store.kept
        reports.stopping()
        await asyncio.sleep(0)
        reports._store.close()
        ours.close()
        journal.close()
        journal.arena.close()

    import asyncio

    asyncio.run(main())
    manager.wait("READY=1")


def test_command_line_sockets_open_beside_passed_ones(
    manager: Manager, role: Callable[[str], socket.socket], tmp_path: Path
) -> None:
    """What an option says of a passed socket's path is about that socket."""
    need_root()
    control = role("control")
    path = control.getsockname()
    started = manager.start(
        "--control", f"{path},authz=z", "--client", str(tmp_path / "own.sock"),
        "--object", "authz-simple,id=z,identity=uid:1001",
        sockets={"control": control},
    )  # fmt: skip
    from tests.support.users import connect_as

    os.chmod(path, 0o666)
    other = Client(path, sock=connect_as(path, 1001, 1001))
    assert other.ok("query-name") == {}
    other.close()
    Client(str(tmp_path / "own.sock")).close()
    started.end()
    assert not (tmp_path / "own.sock").exists()
    assert os.path.exists(path)


def refused(started: Started) -> str:
    """What a secretd says that does not start."""
    return started.end(0, 1)


def test_a_socket_has_the_role_that_its_name_says(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """Another name, another kind of descriptor, or an option that says otherwise ends the start."""
    control = role("control")
    said = refused(manager.start(sockets={"control.sock": control}, ready=False))
    assert said == (
        "secretd: the service manager passed a socket as 'control.sock': FileDescriptorName= of a "
        ".socket unit must be control, client, credentials, control-jsonrpc or client-jsonrpc\n"
    )
    one, two = socket.socketpair()
    null = os.open("/dev/null", os.O_RDONLY)
    for fd in (one.fileno(), null):
        said = refused(manager.start(extra=[("client", fd)], ready=False))
        assert (
            said == "secretd: what the service manager passed as 'client' is no listening AF_UNIX "
            "stream socket\n"
        )
    assert not is_listening(null)
    one.close()
    two.close()
    os.close(null)
    said = refused(
        manager.start("--client", control.getsockname(), sockets={"control": control}, ready=False)
    )
    path = control.getsockname()
    assert said.splitlines()[-1] == (
        f"secretd: --client {path}: the service manager passed this socket as 'control'"
    )


def test_an_abstract_socket_is_taken_too(manager: Manager) -> None:
    """Shown with an @."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"\0secretd-test-{os.getpid()}")
        sock.listen()
        said = manager.start(sockets={"client": sock}).end()
    assert f"secretd: client socket      @secretd-test-{os.getpid()}\n" in said


def test_what_is_unknown_stays_with_the_service_manager(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """It may be another version's."""
    control = role("control")
    null = os.open("/dev/null", os.O_RDONLY)
    started = manager.start(
        sockets={"control": control}, extra=[("new-thing", null), ("probe", null)]
    )
    said = started.end()
    assert (
        "secretd: the service manager keeps 'new-thing', which this secretd does not know\n" in said
    )
    assert "probe" not in said
    os.close(null)


def test_what_was_left_and_cannot_be_taken_over_stays(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """A format that is unknown, a part that is missing; each said, and nothing lost."""
    control = role("control")
    started = manager.start(sockets={"control": control})
    client = qmp(control)
    client.add("a", data="letmein")
    client.close()
    started.end()
    kept = dict(manager.store)
    journal = next(fd for name, fd in manager.store if name == "journal" and os.fstat(fd).st_size)
    os.pwrite(journal, b"\7", 8)
    said = refused(manager.start(sockets={"control": control}, ready=False))
    assert said == (
        "secretd: what secretd held before cannot be taken over: the journal has format 7, not 1. "
        "It stays with the service manager: repair this and the next start takes it over, or give "
        "all secrets up with 'systemctl stop'\n"
    )
    os.pwrite(journal, b"\1", 8)
    arena = [each for each in manager.store if each[0] == "arena"]
    manager.store.remove(arena[0])
    said = refused(manager.start(sockets={"control": control}, ready=False))
    assert "cannot be taken over: the arena is missing" in said
    manager.store += arena
    spare = memfd(b"")
    started = manager.start(
        sockets={"control": control}, extra=[("arena", spare), ("journal", spare)]
    )
    client = qmp(control)
    assert client.read("a") == b"letmein"
    client.close()
    started.end()
    os.close(spare)
    assert kept == dict(manager.store)


def test_an_arena_without_a_journal_is_nothing(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """Of a process that was killed before it had both."""
    control = role("control")
    manager.store.append(("arena", memfd(b"x" * 5000)))
    started = manager.start(sockets={"control": control})
    manager.wait_for_store(*KEPT)
    started.end()


def test_memory_that_is_not_locked_is_refused_where_it_must_be(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """What an earlier process left without locking it does not become locked."""
    from secretd.memory.arena import Arena

    journal = Journal(Arena("none"))
    manager.store += [("arena", os.dup(journal.arena.fileno()))]
    manager.store += [("journal", os.dup(journal.fileno()))]
    journal.leave()
    control = role("control")
    said = refused(
        manager.start("--memory-lock=require", sockets={"control": control}, ready=False)
    )
    assert said.startswith(
        "secretd: the secrets that secretd held before are not in locked memory, and "
    )
    started = manager.start(sockets={"control": control})
    assert "MEMORY IS NOT LOCKED" in started.end()


def test_too_little_memory_at_a_start_loses_nothing(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """What was kept stays, whatever the start fails at."""
    control = role("control")
    started = manager.start(sockets={"control": control})
    client = qmp(control)
    client.add("a", data="letmein")
    client.close()
    started.end()
    limit = ["prlimit", "--memlock=262144:262144", *WITHOUT_IPC_LOCK]
    said = refused(manager.start(sockets={"control": control}, prefix=limit, ready=False))
    assert said.startswith("secretd: No locked memory left for another 65536 bytes")
    started = manager.start(sockets={"control": control})
    client = qmp(control)
    assert client.read("a") == b"letmein"
    client.close()
    started.end()


def test_a_start_that_fails_keeps_what_was_kept(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """A mistake on the command line is no loss; help is none either."""
    control = role("control")
    started = manager.start(sockets={"control": control})
    client = qmp(control)
    client.add("a", data="letmein")
    client.close()
    started.end()
    said = refused(
        manager.start(
            "--object", "secret,id=b,file=/nope", sockets={"control": control}, ready=False
        )
    )
    assert "--object secret,id=b,file=/nope: Unable to read /nope" in said
    manager.start("--object", "help", sockets={"control": control}, ready=False).end(0, 0)
    started = manager.start(sockets={"control": control})
    client = qmp(control)
    assert client.read("a") == b"letmein"
    client.close()
    started.end()


def test_command_line_objects_do_not_duplicate_themselves(
    manager: Manager, role: Callable[[str], socket.socket], tmp_path: Path
) -> None:
    """They stay as they are, with what was counted, unless something about them is new."""
    control = role("control")
    (tmp_path / "f").write_text("one")
    options = [
        "--object", "secret,id=s,file=f", "--object", "secret,id=d,data=hidden",
        "--object", "authz-list,id=l,policy=allow",
        "--object", "secret-grant,id=g,secret=s,authz=l,max-reads=9,expires-after=900",
    ]  # fmt: skip
    client_socket = role("client")
    sockets = {"control": control, "client": client_socket}

    def state() -> tuple[int, int, bytes]:
        reader = qmp(client_socket)
        content = reader.read("s")
        reader.close()
        client = qmp(control)
        reads = client.ok("qom-get", {"path": "g", "property": "reads"})
        left = [s.get("expires-in", -1) for s in client.secrets() if s["id"] == "s"]
        client.close()
        return reads, left[0], content

    started = manager.start(*options, sockets=sockets)
    client = qmp(control)
    client.ok("secret-expire", {"id": "s", "after": 800})
    client.close()
    assert state() == (1, 800, b"one")
    said = started.end()
    assert [r["id"] for r in records(said) if r["event"] == "add"] == ["s", "d", "l", "g"]
    started = manager.start(*options, sockets=sockets)
    reads, left, _ = state()
    assert (reads, 790 < left <= 800) == (2, True)
    said = started.end()
    assert not [r for r in records(said) if r["event"] == "add"]
    (tmp_path / "f").write_text("two")
    options[-1] = options[-1].replace("max-reads=9", "max-reads=8")
    started = manager.start(*options, sockets=sockets)
    assert state() == (1, -1, b"two")
    said = started.end()
    assert [r["id"] for r in records(said) if r["event"] == "add"] == ["s", "g"]
    said = refused(
        manager.start(*options, "--object", "secret,id=s,file=f", sockets=sockets, ready=False)
    )
    assert "attempt to add duplicate property 's' to object (type 'container')" in said


def test_best_effort_starts_without_what_cannot_be_had(
    manager: Manager,
    role: Callable[[str], socket.socket],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the reason; what an earlier process had of it stays.

    Mistakes in the words are still errors.
    """
    control = role("control")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    options = ["--object", f"secret,id=master0,file={tmp_path}/master-key"]
    said = refused(manager.start(*options, sockets={"control": control}, ready=False))
    assert said == (
        f"secretd: --object secret,id=master0,file={tmp_path}/master-key: Unable to read "
        f"{tmp_path}/master-key: Failed to open file “{tmp_path}/master-key”: No such file or "
        "directory\n"
        "systemd has set up no credential 'master-key' for this unit: see "
        "LoadCredentialEncrypted= there and /etc/credstore.encrypted/master-key; "
        "--object-policy=best-effort starts without this object\n"
    )
    (tmp_path / "master-key").write_bytes(bytes(32))
    started = manager.start(*options, sockets={"control": control})
    started.end()
    (tmp_path / "master-key").unlink()
    options.append("--object-policy=best-effort")
    under = "secret,id=x,keyid=nope,iv=AAAAAAAAAAAAAAAAAAAAAA==,data=AAAA"
    started = manager.start(*options, "--object", under, sockets={"control": control})
    client = qmp(control)
    assert [s["id"] for s in client.secrets()] == ["master0"]
    client.close()
    said = started.end()
    assert "No such file or directory; started without it (--object-policy=best-effort)" in said
    assert (
        "--object secret,id=x,keyid=nope,iv=AAAAAAAAAAAAAAAAAAAAAA==,data=…: No secret with id "
        "'nope'" in said
    )
    said = refused(
        manager.start(
            *options,
            "--object",
            "secret,id=1,format=hex",
            sockets={"control": control},
            ready=False,
        )
    )
    assert "Parameter 'format' does not accept value 'hex'" in said


def test_without_a_service_manager_nothing_is_sent(tmp_path: Path) -> None:
    """Sockets may be passed all the same, as systemd-socket-activate does."""
    with Manager(tmp_path) as manager:
        manager.path = ""
        sock = listening(tmp_path / "c")
        started = manager.start(sockets={"control": sock}, ready=False)
        client = qmp(sock)
        client.add("a", data="x")
        client.close()
        started.process.send_signal(signal.SIGHUP)
        assert started.end().endswith("secretd: stopped; all secrets are wiped\n")
        sock.close()
        manager.path = str(tmp_path / "notify.sock")
        assert manager.said == []


def test_a_connection_that_was_cut_off_is_refused_by_the_next(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """It gets more than a credential may have, never an end."""
    credentials = role("credentials")
    started = manager.start(sockets={"credentials": credentials})
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0{os.getpid():x}/unit/a.service/x")
    sock.connect(credentials.getsockname())
    manager.wait_for_store(*KEPT, "credential-1")
    started.end(signal.SIGKILL, -9)
    started = manager.start(sockets={"credentials": credentials})
    size = 0
    while data := sock.recv(1 << 16):
        size += len(data)
    assert size > 1 << 20
    sock.close()
    manager.wait_for_store(*KEPT)
    said = started.end()
    assert (
        "secretd: a unit's LoadCredential= was cut off by the end of secretd; the unit fails\n"
        in said
    )


def test_one_that_takes_nothing_is_left_to_the_next_at_a_stop(
    manager: Manager, role: Callable[[str], socket.socket]
) -> None:
    """Not ended, since an end would be taken for all there is."""
    credentials = role("credentials")
    started = manager.start(sockets={"credentials": credentials})
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0{os.getpid():x}/unit/a.service/x")
    sock.connect(credentials.getsockname())
    manager.wait_for_store(*KEPT, "credential-1")
    started.process.send_signal(signal.SIGTERM)
    manager.wait("STOPPING=1")
    started.end()  # the second time it does not wait
    manager.wait_for_store(*KEPT, "credential-1")
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        while sock.recv(1 << 16):
            pass
    started = manager.start(sockets={"credentials": credentials})
    started.process.send_signal(signal.SIGTERM)
    manager.wait("STOPPING=1")
    started.end()
    sock.close()
