# SPDX-License-Identifier: LGPL-2.1-or-later
"""What tests share: an arena, a running server, a raw QMP client, and what real parts there are."""

import asyncio
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import resource
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from secretd.access.peer import SocketRole
from secretd.audit.log import Audit
from secretd.daemon import initial_objects
from secretd.descriptors.source import CommandLineSources
from secretd.errors import CommandError, UsageError
from secretd.journal.journal import Journal
from secretd.limits import Tuning
from secretd.linux.locked_pages import Level
from secretd.memory.arena import (
    SCRATCH_RESERVE,
    SCRATCH_WINDOW,
    Arena,
)
from secretd.memory.level import choose_level
from secretd.monitor.commands import COMMANDS
from secretd.net.listener import listen
from secretd.net.loop import Loop
from secretd.qom.identifiers import with_hint
from secretd.qom.object_type import ObjectOptions
from secretd.qom.registry import TYPES
from secretd.qom.tree import ObjectTree
from secretd.server.server import Server

# As the daemon does: 1024 descriptors, the usual soft limit, are few where messages bring 253.
_hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (_hard_limit, _hard_limit))

settings.register_profile("secretd", deadline=None)  # no timing assertions
settings.load_profile("secretd")

REQUIRE_REAL = bool(os.environ.get("SECRETD_REQUIRE_REAL"))
ARENA_LEVEL = choose_level(require=False)


def pytest_collection_modifyitems(items: "list[pytest.Item]") -> None:
    """The tests that need no other process come first, so that progress shows from the first
    seconds.
    """
    items.sort(key=lambda item: "/e2e/" in str(item.path))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count what was skipped by reason."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    )
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"skipped {count:4}: {reason}")


def need(condition: bool, reason: str) -> None:
    """Skip a test that needs a real part; fail it where all real parts are required."""
    if not condition:
        if REQUIRE_REAL:
            pytest.fail(f"required here: {reason}")
        pytest.skip(reason)


def need_program(*names: str) -> None:
    """Skip or fail without these programs."""
    missing = [name for name in names if shutil.which(name) is None]
    need(not missing, f"not installed: {', '.join(missing)}")


def need_level(level: str) -> None:
    """Skip or fail where the kernel has no memfd_secret (5.14, and not switched off)."""
    need(level != "secretmem" or ARENA_LEVEL == "secretmem", "this kernel gives no memfd_secret")


def need_root() -> None:
    """Skip or fail without root."""
    need(os.getuid() == 0, "needs root")


def need_locked_memory(size: int) -> None:
    """Skip or fail where this process, daemon and client in one, may not lock so many bytes."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    enough = os.getuid() == 0 or soft == resource.RLIM_INFINITY or soft >= size
    need(enough, f"RLIMIT_MEMLOCK is {soft}, less than {size}")


def open_fds() -> set[str]:
    """The descriptors of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return found


@pytest.fixture(autouse=True)
def _no_leaked_fds() -> Iterator[None]:
    before = open_fds()
    yield
    if open_fds() - before:
        gc.collect()  # what only waits for it is no leak of the product
    leaked = open_fds() - before
    leaked = {name for name in leaked if "/.coverage" not in name and "/.hypothesis" not in name}
    assert not leaked


def add_object(tree: ObjectTree, text: str) -> ObjectOptions | None:
    """Make the object of ``--object TEXT``; UsageError has QEMU's words and nothing else."""
    options = initial_objects.parse(tree, text)
    if options is not None:
        try:
            tree.add(options, tree.loading(CommandLineSources(tree.scratch)))
        except CommandError as error:
            raise UsageError(with_hint(error.desc)) from None
    return options


@pytest.fixture
def arena() -> Iterator[Arena]:
    """An arena in the best memory there is; it must be empty at the end."""
    made = Arena(ARENA_LEVEL)
    yield made
    held = made.held
    made.close()
    assert held == 0


class Client:
    """A QMP client of few words: blocking, sees every byte."""

    def __init__(
        self, path: str, *, negotiate: bool = True, sock: socket.socket | None = None
    ) -> None:
        self.sock = sock or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        try:
            if sock is None:
                self.sock.connect(path)
        except OSError:
            self.sock.close()
            raise
        self._buffer = b""
        self.events: list[dict] = []
        if negotiate:
            self.greeting = self.reply()
            assert self.cmd("qmp_capabilities") == {"return": {}}

    def line(self) -> bytes:
        """The next line; b"" at the end."""
        while b"\n" not in self._buffer:
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:  # the end, where the daemon has left something unread
                return b""
            if not data:
                return b""
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"

    def message(self) -> dict:
        """The next reply or event."""
        line = self.line()
        assert line.endswith(b"\r\n"), line
        assert line.isascii()
        return json.loads(line)

    def reply(self) -> dict:
        """The next reply; events about secrets are put aside."""
        while "event" in (message := self.message()) and message["event"] != "SHUTDOWN":
            self.events.append(message)
        return message

    def event(self) -> dict:
        """The next event."""
        if not self.events:
            self.events.append(self.message())
        return self.events.pop(0)

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send bytes, with descriptors."""
        if fds:
            assert socket.send_fds(self.sock, [data], list(fds)) == len(data)
        else:
            self.sock.sendall(data)

    def ask(self, data: bytes, fds: tuple[int, ...] = ()) -> dict:
        """Send bytes, return the next reply."""
        self.send(data, fds)
        return self.reply()

    def cmd(self, command: str, arguments: dict | None = None, fds: tuple[int, ...] = ()) -> dict:
        """Execute a command; return the whole reply."""
        message: dict = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments
        return self.ask(json.dumps(message).encode() + b"\n", fds)

    def ok(self, command: str, arguments: dict | None = None, fds: tuple[int, ...] = ()) -> Any:
        """Execute a command that succeeds; return what it returns."""
        reply = self.cmd(command, arguments, fds)
        assert "return" in reply, reply
        return reply["return"]

    def fail(self, command: str, arguments: dict | None = None, fds: tuple[int, ...] = ()) -> str:
        """Execute a command that fails; return the words."""
        reply = self.cmd(command, arguments, fds)
        assert "error" in reply, reply
        return reply["error"]["desc"]

    def watch(self, *names: str) -> "Client":
        """Turn events on, only those of some names if there are any."""
        arguments: dict = {"enable": True}
        if names:
            arguments["events"] = list(names)
        self.ok("secret-events", arguments)
        return self

    def add(self, object_id: str, **options: str) -> dict:
        """Add a secret; return the whole reply."""
        return self.cmd("object-add", {"qom-type": "secret", "id": object_id, **options})

    def secrets(self) -> list[dict]:
        """All of query-secrets."""
        found: list[dict] = []
        while page := self.ok("query-secrets", {"after": found[-1]["id"]} if found else {}):
            found += page
        return found

    def read(self, object_id: str, **options: str) -> bytes:
        """Read a secret through a pipe."""
        source, sink = os.pipe()
        try:
            with contextlib.suppress(PermissionError):
                fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, 1 << 20)
            size = self.ok("secret-read", {"id": object_id, **options}, (sink,))["size"]
            os.close(sink)
            sink = -1
            with open(source, "rb", closefd=False) as pipe:
                data = pipe.read()
            assert len(data) == size
            return data
        finally:
            os.close(source)
            if sink >= 0:
                os.close(sink)

    def close(self) -> None:
        """Disconnect."""
        self.sock.close()


_SETID = {"x86_64": (117, 119, 116, 122), "aarch64": (147, 149, 159, 151)}


def connect_as(path: str, uid: int, gid: int, groups: tuple[int, ...] = ()) -> socket.socket:
    """Connect as another user: this thread becomes it for as long as that takes (setresuid(2) as
    the kernel has it is for one thread). Files are still opened as root.
    """
    need_root()
    libc = ctypes.CDLL(None, use_errno=True)
    setresuid, setresgid, setgroups, setfsuid = _SETID[os.uname().machine]
    sock = socket.socket(socket.AF_UNIX)

    def call(*arguments: object) -> None:
        if libc.syscall(*arguments):
            raise OSError(ctypes.get_errno(), "set*id")

    before = os.getgroups()

    def as_user() -> None:
        call(setgroups, len(groups), (ctypes.c_uint32 * len(groups))(*groups))
        call(setresgid, -1, gid, -1)
        call(setresuid, -1, uid, -1)
        libc.syscall(setfsuid, 0)
        try:
            sock.connect(path)
        finally:
            call(setresuid, -1, 0, -1)
            call(setresgid, -1, 0, -1)
            call(setgroups, len(before), (ctypes.c_uint32 * len(before))(*before))

    as_user()
    return sock


class Daemon:
    """A server in a thread of this process, with all sockets, and a control socket with
    authz=admins.
    """

    def __init__(
        self,
        directory: Path,
        level: Level = ARENA_LEVEL,
        make_audit: Callable[[], Audit] = Audit,
        tuning: Tuning = Tuning(),  # noqa: B008 - it cannot be changed
    ) -> None:
        self._make_audit = make_audit
        self._tuning = tuning
        self.control = str(directory / "control.sock")
        self.client = str(directory / "client.sock")
        self.admins = str(directory / "admins.sock")
        self.credentials = str(directory / "credentials.sock")
        self._level = level
        self._clients: list[Client] = []
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._main)
        self._thread.start()
        self._ready.result(20)

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=Loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            else:
                raise

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.errors: list[dict] = []
        self.loop.set_exception_handler(lambda _loop, context: self.errors.append(context))
        self.scratch = Arena(self._level, window=SCRATCH_WINDOW, reserve=SCRATCH_RESERVE)
        self.journal = Journal(Arena(self._level))
        self.tree = ObjectTree(self.journal, self.scratch, TYPES)
        self.server = Server(
            self.tree,
            COMMANDS.by_name.values(),
            "secretd test",
            self._make_audit(),
            tuning=self._tuning,
        )
        try:
            self.server.add(listen(self.control, SocketRole.CONTROL, 0o600))
            self.server.add(listen(self.client, SocketRole.CLIENT, 0o666))
            self.server.add(listen(self.admins, SocketRole.CONTROL, 0o666, authz="admins"))
            self.server.add(listen(self.credentials, SocketRole.CREDENTIALS, 0o666))
            await self.server.run(lambda: self._ready.set_result(None))
            self.held = self.scratch.held
        finally:
            self.journal.close()
            self.journal.arena.close()
            self.scratch.close()

    def call(self, function: Callable[[], object]) -> object:
        """Run a function in the server's thread; return its result."""
        done: Future[object] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self.loop.call_soon_threadsafe(run)
        return done.result(20)

    def empty(self) -> None:
        """Delete all objects."""
        self.call(lambda: [self.tree.delete(object_id) for object_id in list(self.journal)])

    def connect(
        self,
        *,
        role: str = "control",
        negotiate: bool = True,
        uid: int | None = None,
        gid: int | None = None,
        groups: tuple[int, ...] = (),
    ) -> Client:
        """Connect, as another user if there is a uid; the client is closed with the daemon."""
        path = {"control": self.control, "client": self.client, "admins": self.admins}[role]
        sock = None if uid is None else connect_as(path, uid, uid if gid is None else gid, groups)
        client = Client(path, negotiate=negotiate, sock=sock)
        self._clients.append(client)
        return client

    def stop(self) -> None:
        """Stop; nothing may be left over."""
        for client in self._clients:
            client.close()
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(20)
        assert not self._thread.is_alive()
        while not self.server.core.threads.idle():  # the listeners are closed in a thread
            pass
        assert self.errors == []
        assert self.held == 0, "scratch memory was not freed"
        assert not os.path.exists(self.control)


def pytest_asyncio_loop_factories(
    config: pytest.Config,
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Asynchronous tests run on the daemon's own event loop."""
    return {"secretd": Loop}


@pytest.fixture
def tuning(request: pytest.FixtureRequest) -> Tuning:
    """The times and sizes that the test's marker `tuning` asks for."""
    marker = request.node.get_closest_marker("tuning")
    return Tuning(**marker.kwargs) if marker else Tuning()


@pytest.fixture
def daemon(tmp_path: Path, tuning: Tuning) -> Iterator[Daemon]:
    """A running server."""
    made = Daemon(tmp_path, tuning=tuning)
    yield made
    made.stop()


@pytest.fixture
def qmp(daemon: Daemon) -> Client:
    """A client on the control socket."""
    return daemon.connect()
