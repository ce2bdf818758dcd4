# SPDX-License-Identifier: LGPL-2.1-or-later
"""Root's /proc/PID/mem finds nothing: 1,000 secrets over every path, scanned right after each
operation.

Twice: with memfd_secret, which a scan cannot see at all, and on a kernel without it, where the
arena is ordinary memory and must hold exactly one copy of each secret, and none after deletion.
"""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secretd.crypto.host_keys import public_keys, receiving_key, signing_key
from secretd.crypto.record import Head, make_offer, make_record, open_record, read_offer
from secretd.memory.arena import Arena
from secretd.qom.hosts import decoded, encoded
from tests.e2e.box import ROOT, wheels
from tests.e2e.conftest import SECRETCTL, SECRETD, Process
from tests.support.needs import ARENA_LEVEL, need_level, need_program, need_root
from tests.support.qmp import Client
from tests.support.scan import SECRET_BYTES, parts, scan, secret
from tests.support.service_manager import Manager, listening
from tests.support.transcript import add_key, keyctl
from tests.support.users import connect_as

KEY = secret(999_999).encode()
AUDIT_KEY = secret(999_998).encode()
IV = bytes(range(16))
IV64 = base64.b64encode(IV).decode()
EACH = 78
HERE = str(Path(__file__).parent.parent / "support")


def encrypt(content: bytes) -> bytes:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    padding = 16 - len(content) % 16
    encryptor = Cipher(algorithms.AES(KEY), modes.CBC(IV)).encryptor()
    return encryptor.update(content + bytes([padding]) * padding) + encryptor.finalize()


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_the_scanner_finds_planted_copies_in_every_encoding() -> None:
    """Otherwise the other tests here prove nothing."""
    plant = """
import base64, sys
sys.path.insert(0, sys.argv[1])
from scan import secret
text = secret(7)
shapes = [text[5:13].encode(), text.encode("utf-16-le")[10:34], text.encode("utf-32-le")[8:60]]
shapes += [base64.b64encode(b"x" * n + text.encode())[8:26] for n in range(3)]
kept = shapes[int(sys.argv[2])]
del text, shapes
import gc; gc.collect()
print("ready", flush=True)
sys.stdin.read()
"""
    found = []
    for number in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", plant, HERE, str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout.readline() == b"ready\n"
        found.append(bool(scan(process.pid).outside))
        process.stdin.close()
        process.wait()
        process.stdout.close()
    assert found == [True] * 6


def test_8_bytes_of_a_secret_are_found_and_5_random_are_not() -> None:
    """Wherever it was cut, and whatever stands beside it."""
    text = secret(7).encode()
    for start in range(4):
        for size in range(8, 20):
            assert parts(b"\0" * start + text[start : start + size] + b"\0")
    assert not parts(b"\0~5aq~\0" + text[:4])


class Scene:
    """A daemon, what it should hold, and a check that nothing else is to be found."""

    def __init__(self, process: Process, level: str, held: dict[str, bytes]) -> None:
        self.process = process
        self.client = process.connect()
        self.level = level
        self.held = held
        self.number = 10_000
        self.scans = 0

    def next(self) -> tuple[str, str]:
        """The next id and secret."""
        self.number += 1
        return f"s{self.number}", secret(self.number)

    def add(self, object_id: str, content: str, **options: str) -> None:
        """Add a secret that is expected to be there then."""
        assert self.client.add(object_id, **options) == {"return": {}}
        self.held[object_id] = content.encode()

    def check(self) -> None:
        """Scan now."""
        found = scan(self.process.pid)
        self.scans += 1
        assert found.outside == []
        assert found.scanned > 10 << 20
        inside = sorted(found.inside)
        assert inside == ([] if self.level == "secretmem" else sorted(self.held.values()))


@pytest.fixture(params=["secretmem", "mlock"])
def scene(request: pytest.FixtureRequest, start: Callable[..., Process], tmp_path: Path) -> Scene:
    """A daemon that has secrets from its command line: data=, a file, process substitution."""
    need_root()
    need_program("bash")
    level: str = request.param
    need_level(level)
    python = f"{Path(SECRETD).parent}/python"
    code = "import sys; from secretd.daemon.main import main; "
    if level == "mlock":
        code += f"sys.path.insert(0, {HERE!r}); from seccomp import refuse; refuse(447); "
    (tmp_path / "daemon.py").write_text(code + "sys.exit(main())\n")
    held, objects = {}, []
    for number in range(EACH):
        text = secret(number)
        object_id = f"o{number}"
        held[object_id] = text.encode()
        kind = number % 3
        if kind == 0:
            objects.append(f"--object secret,id={object_id},data={text}")
        elif kind == 1:
            (tmp_path / object_id).write_text(text)
            objects.append(f"--object secret,id={object_id},file={object_id}")
        else:
            objects.append(f"--object secret,id={object_id},file=<(printf %s '{text}')")
    held["key"] = KEY
    held["auditkey"] = AUDIT_KEY
    (tmp_path / "auditkey").write_bytes(AUDIT_KEY)
    objects.append("--object secret,id=auditkey,file=auditkey")
    (tmp_path / "key").write_text(b64(KEY) + "\n")
    objects.append("--object secret,id=key,format=base64,file=key")
    script = f'exec {python} daemon.py "$@" ' + " ".join(objects)
    (tmp_path / "start.sh").write_text(script)
    audit = ["--audit", str(tmp_path / "audit"), "--audit-key", "auditkey"]
    client = ["--client", str(tmp_path / "client.sock")]
    rpc = ["--control", f"{tmp_path}/rpc.sock,protocol=jsonrpc"]
    process = start(*audit, *client, *rpc, command=["bash", str(tmp_path / "start.sh")])
    return Scene(process, level, held)


def test_no_copy_of_any_secret_is_found_outside_of_the_arena(scene: Scene, tmp_path: Path) -> None:
    """After adding over every path, reading, sealing, failing and deleting."""
    client = scene.client
    assert {s["memory"] for s in client.ok("query-secrets")} == {scene.level}
    cmdline = Path(f"/proc/{scene.process.pid}/cmdline").read_bytes()
    assert secret(0).encode() not in cmdline
    scene.check()

    for add in (inline, escaped, by_hand, inline_base64, inline_aes, file_aes, path, path_base64,
    fdset,
                fdset_pipe, byte_by_byte, slowly, human_monitor, human_monitor_json, keyring,
                queued, rpc, rpc_escaped, rpc_batch,
                by_secretctl):  # fmt: skip
        for _ in range(EACH if add not in (keyring, by_secretctl) else 10):
            add(scene, tmp_path)
        scene.check()
    assert len(scene.held) >= 1000

    for mess in malformed(*scene.next()):
        client.send(mess + b'\n\xff\n{"execute":"query-name","id":"sync"}')
        while client.reply().get("id") != "sync":
            pass
        scene.check()

    for object_id in list(scene.held)[::40]:
        assert client.read(object_id) == scene.held[object_id]
        assert client.read(object_id, format="base64") == base64.b64encode(scene.held[object_id])
        read_into_memfd(client, object_id)
        client.ok("secret-seal", {"id": object_id, "keyid": "key"})
    scene.check()
    abandoned_reads(scene)
    scene.check()

    # The audit's key stays as long as the daemon.
    audit_key = scene.held.pop("auditkey")
    for object_id in list(scene.held)[::2]:
        assert client.cmd("object-del", {"id": object_id}) == {"return": {}}
        del scene.held[object_id]
    scene.held["auditkey"] = audit_key
    scene.check()
    for object_id in list(scene.held):
        if object_id != "auditkey":
            assert client.cmd("object-del", {"id": object_id}) == {"return": {}}
    scene.held = {"auditkey": audit_key}
    scene.check()
    print(f"\n{scene.level}: {scene.scans} scans, nothing found")


def inline(scene: Scene, _tmp_path: Path) -> None:
    object_id, text = scene.next()
    scene.add(object_id, text, data=text)


def escaped(scene: Scene, _tmp_path: Path) -> None:
    object_id, text = scene.next()
    data = text.replace("q", "\\u0071", 3)
    scene.client.send(
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"%s","data":"%s"}}'
        % (object_id.encode(), data.encode())
    )
    assert scene.client.reply() == {"return": {}}
    scene.held[object_id] = text.encode()


def called(tmp_path: Path, text: str) -> Any:
    """What a JSON-RPC socket answers to a text; the text leaves in one piece."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmp_path / "rpc.sock"))
        sock.sendall(text.encode())
        with sock.makefile("r") as file:
            return json.loads(file.readline())


def rpc_request(object_id: str, data: str) -> str:
    """object-add as JSON-RPC; ``data``: with its quotes."""
    return (
        '{"jsonrpc": "2.0", "method": "object-add", "params": {"qom-type": "secret", '
        f'"id": "{object_id}", "data": {data}}}, "id": 1}}'
    )


def rpc(scene: Scene, tmp_path: Path) -> None:
    """The fast path."""
    object_id, text = scene.next()
    assert "result" in called(tmp_path, rpc_request(object_id, f'"{text}"') + "\n")
    scene.held[object_id] = text.encode()


def rpc_escaped(scene: Scene, tmp_path: Path) -> None:
    """The reference, which decodes escapes in place."""
    object_id, text = scene.next()
    data = '"' + "".join(f"\\u{ord(c):04x}" for c in text) + '"'
    assert "result" in called(tmp_path, rpc_request(object_id, data))
    scene.held[object_id] = text.encode()


def rpc_batch(scene: Scene, tmp_path: Path) -> None:
    """Members wait as bytes; one of them fails."""
    (first, text), (second, other) = scene.next(), scene.next()
    failing = rpc_request("1", f'"{secret(scene.number + 500_000)}"')
    members = [rpc_request(first, f'"{text}"'), failing, rpc_request(second, f'"{other}"')]
    replies = called(tmp_path, f"[{', '.join(members)}]")
    assert ["result" in each for each in replies] == [True, False, True]
    scene.held[first], scene.held[second] = text.encode(), other.encode()


def by_hand(scene: Scene, _tmp_path: Path) -> None:
    object_id, text = scene.next()
    scene.client.send(
        b"{ 'execute': 'object-add',\n 'arguments': { 'qom-type': 'secret', 'id': '%s', 'data': "
        b"'%s' } }\n" % (object_id.encode(), text.encode())
    )
    assert scene.client.reply() == {"return": {}}
    scene.held[object_id] = text.encode()


def inline_base64(scene: Scene, _tmp_path: Path) -> None:
    object_id, text = scene.next()
    scene.add(object_id, text, data=b64(text.encode()), format="base64")


def inline_aes(scene: Scene, _tmp_path: Path) -> None:
    object_id, text = scene.next()
    data = b64(encrypt(text.encode()))
    scene.add(object_id, text, data=data, format="base64", keyid="key", iv=IV64)


def file_aes(scene: Scene, tmp_path: Path) -> None:
    object_id, text = scene.next()
    (tmp_path / "f").write_bytes(encrypt(text.encode()))
    scene.add(object_id, text, file=str(tmp_path / "f"), keyid="key", iv=IV64)


def path(scene: Scene, tmp_path: Path) -> None:
    object_id, text = scene.next()
    (tmp_path / "f").write_text(text)
    scene.add(object_id, text, file=str(tmp_path / "f"))


def path_base64(scene: Scene, tmp_path: Path) -> None:
    object_id, text = scene.next()
    encoded = b64(text.encode())
    (tmp_path / "f").write_text(encoded[:20] + "\n" + encoded[20:] + "\n")
    scene.add(object_id, text, file=str(tmp_path / "f"), format="base64")


def fdset(scene: Scene, _tmp_path: Path) -> None:
    object_id, text = scene.next()
    fd = os.memfd_create("x")
    os.write(fd, text.encode())
    added = scene.client.ok("add-fd", None, (fd,))
    os.close(fd)
    scene.add(object_id, text, file=f"/dev/fd/{added['fd']}")
    scene.client.ok("remove-fd", {"fdset-id": added["fdset-id"]})


def fdset_pipe(scene: Scene, _tmp_path: Path) -> None:
    object_id, text = scene.next()
    source, sink = os.pipe()
    added = scene.client.ok("add-fd", None, (source,))
    os.close(source)
    os.write(sink, text.encode())
    os.close(sink)
    scene.add(object_id, text, file=f"/dev/fdset/{added['fdset-id']}")
    scene.client.ok("remove-fd", {"fdset-id": added["fdset-id"]})


def message(object_id: str, text: str) -> bytes:
    return b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"%s","data":"%s"}}\n' % (
        object_id.encode(),
        text.encode(),
    )


def byte_by_byte(scene: Scene, _tmp_path: Path) -> None:
    object_id, text = scene.next()
    data = message(object_id, text)
    step = 1 if scene.number % 10 == 0 else 11
    for at in range(0, len(data), step):
        scene.client.send(data[at : at + step])
    assert scene.client.reply() == {"return": {}}
    scene.held[object_id] = text.encode()


def slowly(scene: Scene, _tmp_path: Path) -> None:
    """Half a message lies about while others are handled; it is in locked memory."""
    object_id, text = scene.next()
    data = message(object_id, text)
    other = Client(scene.process.control)
    other.send(data[:-20])
    assert scene.client.cmd("query-name") == {"return": {}}
    if scene.number % 26 == 0:
        assert scan(scene.process.pid).outside == []
    other.send(data[-20:])
    assert other.reply() == {"return": {}}
    other.close()
    scene.held[object_id] = text.encode()


def human_monitor(scene: Scene, _tmp_path: Path) -> None:
    object_id, text = scene.next()
    line = f"object_add secret,id={object_id},data={text.replace(',', ',,')}"
    assert scene.client.ok("human-monitor-command", {"command-line": line}) == ""
    scene.held[object_id] = text.encode()


def human_monitor_json(scene: Scene, _tmp_path: Path) -> None:
    object_id, text = scene.next()
    line = f"object_add {{'qom-type': 'secret', 'id': '{object_id}', 'data': '{text}'}}"
    assert scene.client.ok("human-monitor-command", {"command-line": line}) == ""
    scene.held[object_id] = text.encode()


def keyring(scene: Scene, _tmp_path: Path) -> None:
    need_program("keyctl")
    object_id, text = scene.next()
    serial = add_key(text.encode())
    options = {"qom-type": "secret_keyring", "id": object_id, "serial": serial}
    assert scene.client.ok("object-add", options) == {}
    keyctl("unlink", str(serial), "@u")
    scene.held[object_id] = text.encode()


def queued(scene: Scene, tmp_path: Path) -> None:
    """Behind a command that waits, on a connection with oob; it is in locked memory."""
    object_id, text = scene.next()
    other = Client(scene.process.control, negotiate=False)
    other.reply()
    other.cmd("qmp_capabilities", {"enable": ["oob"]})
    fifo = str(tmp_path / object_id)
    os.mkfifo(fifo)
    wait = {"qom-type": "secret", "id": "w", "file": fifo}
    other.send(json.dumps({"execute": "object-add", "arguments": wait}).encode())
    other.send(message(object_id, text))
    assert "return" in other.ask(b'{"exec-oob": "query-secrets"}')
    if scene.number % 26 == 0:
        assert scan(scene.process.pid).outside == []
    with open(fifo, "wb") as writer:
        writer.write(b"short")
    assert other.reply() == other.reply() == {"return": {}}
    assert other.cmd("object-del", {"id": "w"}) == {"return": {}}
    other.close()
    scene.held[object_id] = text.encode()


def by_secretctl(scene: Scene, _tmp_path: Path) -> None:
    object_id, text = scene.next()
    command = f"exec {SECRETCTL} --socket {scene.process.control} add {object_id} "
    command += f"--file <(printf %s '{text}')"
    subprocess.run(["bash", "-c", command], check=True, timeout=30)
    scene.held[object_id] = text.encode()


def malformed(object_id: str, text: str) -> list[bytes]:
    """Messages that carry a secret and fail, each in another way."""
    good = message(object_id, text)
    secret_bytes = text.encode()
    encoded = b64(secret_bytes).encode()
    head = b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"x",'
    return [
        good[:-20],
        good[: good.index(b"~") + 20] + b"\n",
        good.replace(b'"data"', b"data"),
        head + b'"data":' + secret_bytes + b"}}",
        head + b'"data":"' + secret_bytes + b'","data":"' + secret_bytes + b'"}}',
        head + b'"data":["' + secret_bytes + b'"]}}',
        head + b'"data":"' + secret_bytes + b'","format":"hex"}}',
        head + b'"data":"' + secret_bytes + b'","nope":1}}',
        head + b'"data":"' + secret_bytes + b'","file":"/x"}}',
        head + b'"data":"' + secret_bytes + b'","format":"base64"}}',
        head + b'"data":"' + encoded[:-2] + b'","format":"base64"}}',
        head + b'"data":"' + encoded[:24] + b"\\\\u0051" + encoded[24:] + b'","format":"base64"}}',
        head + b'"data":"' + secret_bytes + b'","keyid":"key","iv":"' + IV64.encode() + b'"}}',
        head + b'"data":"' + secret_bytes + b'","keyid":"nope"}}',
        head + b'"data":"' + secret_bytes + b'\\ud800"}}',
        head + b'"data":"' + secret_bytes + b'\xc3"}}',
        b'{"execute":"nope","arguments":{"data":"' + secret_bytes + b'"}}',
        b'{"execute":"qom-set","arguments":{"path":"key","property":"data","value":"'
        + secret_bytes
        + b'"}}',
        b"\xff".join(bytes([byte]) for byte in good),
        *(
            b'{"execute":"human-monitor-command","arguments":{"command-line":"%s"}}' % line
            for line in (
                *(
                    b"object_add secret,id=x,data=" + secret_bytes[:at] + b"," + secret_bytes[at:]
                    for at in range(0, 24, 4)
                ),
                secret_bytes,
                b"info " + secret_bytes,
                b"help " + secret_bytes,
                b"object_add {'data': '" + secret_bytes,
                b"object_add {'data': '" + secret_bytes + b"'}",
                b"object_add secret,id=x,nope=1,data=" + secret_bytes,
                b"object_add secret,id=x,data.x=" + secret_bytes,
            )
        ),
    ]


def read_into_memfd(client: Client, object_id: str) -> None:
    fd = os.memfd_create("x")
    assert client.ok("secret-read", {"id": object_id}, (fd,)) == {"size": SECRET_BYTES}
    os.close(fd)


def abandoned_reads(scene: Scene) -> None:
    """Deliveries in base64 that are ended by the reader's leaving."""
    object_id = next(iter(scene.held))
    for _ in range(5):
        source, sink = os.pipe()
        os.close(source)
        assert "Broken pipe" in scene.client.fail(
            "secret-read", {"id": object_id, "format": "base64"}, (sink,)
        )
        os.close(sink)


def test_deliveries_to_other_users(scene: Scene, tmp_path: Path) -> None:
    """By threads, to their end or withdrawn; and secrets that end by themselves."""
    qmp = scene.client
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": "a", "identity": "uid:1001"})
    qmp.ok("object-add", {"qom-type": "secret-grant", "id": "g", "secret": "*", "authz": "a"})
    path = str(tmp_path / "client.sock")
    client = Client(path, sock=connect_as(path, 1001, 1001))
    scene.process._clients.append(client)
    for form in ("raw", "base64"):
        object_id, text = scene.next()
        scene.add(object_id, text, data=text)
        data = client.read(object_id, format=form)
        assert data == (text.encode() if form == "raw" else base64.b64encode(text.encode()))
        scene.check()
        # Larger than the pipe: the first pieces are on their way when it is withdrawn.
        text = secret(scene.number + 5000)
        large = "l" + object_id
        fd = os.memfd_create("x")
        os.write(fd, text.encode() * (200_000 // len(text)))
        added = qmp.ok("add-fd", None, (fd,))
        os.close(fd)
        qmp.add(large, file=f"/dev/fdset/{added['fdset-id']}")
        qmp.ok("remove-fd", {"fdset-id": added["fdset-id"]})
        source, sink = os.pipe()
        arguments = {"id": large, "format": form}
        client.send(
            json.dumps({"execute": "secret-read", "arguments": arguments}).encode(), (sink,)
        )
        os.close(sink)
        assert os.read(source, 1)
        assert qmp.ok("object-del", {"id": large}) == {}
        assert client.reply()["error"]["desc"] == f"Secret '{large}' was withdrawn"
        while os.read(source, 1 << 16):
            pass
        os.close(source)
        scene.check()
    object_id, text = scene.next()
    scene.add(object_id, text, data=text)
    qmp.ok("secret-expire", {"id": object_id, "after": 1})
    while any(s["id"] == object_id for s in qmp.secrets()):
        pass
    del scene.held[object_id]
    scene.check()
    client.fail("secret-read", {"id": "nope"})
    scene.check()
    log = (tmp_path / "audit").read_bytes()
    assert AUDIT_KEY not in log
    assert b'"mac":"' in log


@pytest.mark.parametrize("level", ["secretmem", "mlock"])
def test_after_a_restart_there_is_one_copy_of_each_secret(level: str, tmp_path: Path) -> None:
    """Killed with secrets on their way in and out; of what was deleted, or half there, there is
    none.
    """
    need_root()
    need_level(level)
    python = str(Path(SECRETD).parent / "python")
    code = f"import os, sys; sys.path.insert(0, {HERE!r}); from seccomp import refuse; "
    code += "refuse(*map(int, sys.argv[1].split())); os.execv(sys.argv[2], sys.argv[2:])"
    refused = "447" if level == "mlock" else ""
    runner = [python, "-c", code, refused, "/usr/bin/env"]
    control = listening(tmp_path / "control.sock")
    held: dict[str, bytes] = {}
    number = 20_000
    with Manager(tmp_path) as manager:
        for _ in range(4):
            started = manager.start("--audit=none", sockets={"control": control}, prefix=runner)
            client = Client(control.getsockname())
            assert {s["id"] for s in client.secrets()} == set(held)
            for _ in range(100):
                number += 1
                text = secret(number)
                client.ok("object-add", {"qom-type": "secret", "id": f"s{number}", "data": text})
                held[f"s{number}"] = text.encode()
            for object_id in list(held)[::3]:
                client.ok("object-del", {"id": object_id})
                del held[object_id]
            found = scan(started.process.pid)
            assert found.outside == []
            assert sorted(found.inside) == ([] if level == "secretmem" else sorted(held.values()))
            # Killed with a message half read, and others on their way.
            client.send(message("half", secret(1))[:-20])
            for each in range(40):
                client.send(message(f"unanswered{each}", secret(each + 2)))
            client.close()
            started.end(signal.SIGKILL, -9)
            started = manager.start("--audit=none", sockets={"control": control}, prefix=runner)
            client = Client(control.getsockname())
            for object_id in {s["id"] for s in client.secrets()} - set(held):
                client.ok("object-del", {"id": object_id})
            for object_id, content in held.items():
                assert client.read(object_id) == content
            found = scan(started.process.pid)
            assert found.outside == []
            assert sorted(found.inside) == ([] if level == "secretmem" else sorted(held.values()))
            client.close()
            started.end()
    control.close()


def interpreters() -> list[str]:
    """Every CPython here that secretd runs on: two builds of one version bind functions
    differently.
    """
    places = [*os.get_exec_path(), *map(str, sorted(Path.home().glob(".pyenv/versions/*/bin")))]
    code = "import os, sys; print(sys.version_info >= (3, 11), os.path.realpath(sys.executable))"
    found: dict[str, str] = {}
    for place in places:
        for path in sorted(Path(place).glob("python3.[0-9][0-9]")):
            done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
            new, _, real = done.stdout.strip().partition(" ")
            if new == "True" and "/shims/" not in str(path) and ".venv" not in str(path):
                found.setdefault(real, str(path))
    return sorted(found.values()) or [sys.executable]


@pytest.mark.parametrize(
    "python", interpreters(), ids=lambda path: path.replace("/", "_").strip("_")
)
def test_no_python_leaves_a_copy_on_the_stack(
    start: Callable[..., Process],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    python: str,
) -> None:
    """Whether its C functions are bound at start or when they are first called."""
    need_root()
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    libraries = tmp_path / "libraries"
    subprocess.run(
        [
            python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index",
            f"--find-links={wheels(tmp_path_factory, version.stdout.strip())}",
            f"--target={libraries}", "click", "cryptography", "msgspec", "qemu.qmp", "rich",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    environment = {n: v for n, v in os.environ.items() if n not in ("LD_BIND_NOW", "PYTHONPATH")}
    environment["PYTHONPATH"] = f"{libraries}:{ROOT}"
    process = start("--audit=none", command=[python, "-m", "secretd.daemon.main"], env=environment)
    scene = Scene(process, scene_level(process), {})
    for add in (inline, escaped, inline_base64, by_hand, human_monitor, human_monitor_json, slowly):
        for _ in range(5):
            add(scene, tmp_path)
        scene.check()
    for object_id, content in list(scene.held.items()):
        assert scene.client.read(object_id) == content
        assert scene.client.ok("object-del", {"id": object_id}) == {}
    scene.held.clear()
    scene.check()


def scene_level(process: Process) -> str:
    """How that daemon protects its memory."""
    client = process.connect()
    client.add("level", data="x")
    (found,) = client.secrets()
    client.ok("object-del", {"id": "level"})
    return str(found["memory"])


def test_a_store_leaves_no_copy(scene: Scene, tmp_path: Path) -> None:
    """Adding, locking, unlocking, changing its key and encrypting everything anew; and reading all
    rows by the next process.
    """
    client = scene.client
    scene.add("store.key", KEY.decode(), data=KEY.decode())
    path = str(tmp_path / "store")
    store = {"qom-type": "secret-store", "id": "store", "path": path, "keyid": "store.key"}
    assert client.ok("object-add", {**store, "create": True, "secrets": "s1*"}) == {}
    assert client.ok("secret-store-unlock", {"id": "store"}) == {}
    for add in (inline, inline_aes, path_base64, fdset_pipe, rpc):
        for _ in range(EACH):
            add(scene, tmp_path)
    scene.check()
    replacement = secret(900_001)
    first = next(each for each in scene.held if each.startswith("s1"))
    replaced = {"qom-type": "secret", "id": first, "data": replacement}
    assert client.ok("secret-replace", replaced) == {}
    scene.held[first] = replacement.encode()
    assert client.ok("secret-store-verify", {"id": "store"})["rows"] >= 5 * EACH
    scene.check()

    def unlock() -> None:
        scene.add("store.key", KEY.decode(), data=KEY.decode())
        assert client.ok("secret-store-unlock", {"id": "store"}) == {}

    assert client.cmd("object-del", {"id": "store.key"}) == {"return": {}}
    del scene.held["store.key"]
    scene.check()
    scene.add("store.key", secret(900_002), data=secret(900_002))  # a wrong one
    assert "is not this store's" in client.fail("secret-store-unlock", {"id": "store"})
    scene.check()
    assert client.cmd("object-del", {"id": "store.key"}) == {"return": {}}
    unlock()
    scene.check()
    for number, more in ((900_003, {}), (900_003, {"only": True}), (900_004, {"data": True})):
        if "store.key.new" in scene.held:
            assert client.cmd("object-del", {"id": "store.key.new"}) == {"return": {}}
        scene.add("store.key.new", secret(number), data=secret(number))
        rekey = {"id": "store", "keyid": "store.key.new", **more}
        assert client.ok("secret-store-rekey", rekey) == {}
        scene.check()
    with open(tmp_path / "copy", "wb") as file:
        client.ok("getfd", {"fdname": "f"}, (file.fileno(),))
        client.ok("secret-store-backup", {"id": "store", "fdname": "f"})
    scene.check()

    # Another store's rows are taken over: all are read from the disk.
    assert client.cmd("object-del", {"id": "store.key"}) == {"return": {}}
    while "error" in client.cmd("object-del", {"id": "store"}):
        pass
    rows = {i: content for i, content in scene.held.items() if i.startswith("s1")}
    for object_id in rows:
        assert client.cmd("object-del", {"id": object_id}) == {"return": {}}
    scene.held = {i: c for i, c in scene.held.items() if i not in rows and i != "store.key"}
    scene.add("store.key", secret(900_004), data=secret(900_004))
    assert client.ok("object-add", {**store, "secrets": "s1*"}) == {}
    assert client.ok("secret-store-unlock", {"id": "store"}) == {}
    scene.held |= rows
    assert client.read(first) == replacement.encode()
    scene.check()
    assert client.ok("secret-store-destroy", {"id": "store"}) == {}
    scene.held = {i: c for i, c in scene.held.items() if i not in rows}
    scene.check()


def test_records_leave_no_copy(scene: Scene, tmp_path: Path) -> None:
    """Making offers, wrapping and accepting, refused ones too; neither of secrets, nor of the
    host's secret and the private keys that come from it.
    """
    client = scene.client
    scratch = Arena(ARENA_LEVEL)
    seed = scratch.allocate(32)
    seed.view[:] = bytes(range(1, 33))
    ours = public_keys(seed.view, scratch)
    scene.add("host.key", KEY.decode(), data=KEY.decode())
    host = {"qom-type": "secret-host", "id": "host", "name": "alpha", "keyid": "host.key"}
    assert client.ok("object-add", host) == {}
    scene.check()
    public = encoded(ours)
    peer = {"qom-type": "secret-peer", "id": "peer", "name": "beta", "public": public}
    assert client.ok("object-add", peer) == {}
    rules = [{"match": "host:beta", "policy": "allow"}]
    client.ok("object-add", {"qom-type": "authz-list", "id": "hosts", "rules": rules})
    grant = {"qom-type": "secret-grant", "id": "g", "secret": "*", "authz": "hosts"}
    client.ok("object-add", grant)
    theirs = decoded(client.ok("query-secret-host")[0]["public"])
    for number in range(8):
        # 1. From it: the test is the other host.
        nonce = number.to_bytes(32, "big")
        head = Head("alpha", "beta", f"o{number}", "", nonce, int(time.time()) + 600)
        offer = b64(make_offer(head, seed.view, scratch))
        wrapped = client.ok("secret-wrap", {"id": f"o{number}", "offer": offer})
        record = base64.b64decode(wrapped["record"])
        with open_record(record, seed.view, scratch, scratch) as content:
            assert bytes(content.view) == scene.held[f"o{number}"]
        scene.check()
        # 2. To it.
        object_id, text = scene.next()
        asked = client.ok("secret-offer", {"from": "beta", "id": object_id})
        head = read_offer(base64.b64decode(asked["offer"]))
        with scratch.allocate(len(text)) as plaintext:
            plaintext.view[:] = text.encode()
            record = make_record(head, plaintext.view, theirs, seed.view, scratch)
        changed = bytearray(record)
        changed[-70] ^= 1
        assert "cannot be accepted" in client.fail("secret-accept", {"record": b64(bytes(changed))})
        scene.check()
        if number % 2:
            assert client.ok("secret-accept", {"record": b64(record)})["id"] == object_id
        else:
            (tmp_path / "record").write_bytes(record)
            with open(tmp_path / "record", "rb") as file:
                added = client.ok("add-fd", None, (file.fileno(),))
            path = f"/dev/fdset/{added['fdset-id']}"
            assert client.ok("secret-accept", {"file": path})["id"] == object_id
        scene.held[object_id] = text.encode()
        scene.check()
    # 3. The private keys, which have no marker.
    with scratch.allocate(32) as own:
        own.view[:] = KEY
        for key in (receiving_key(own.view, scratch), signing_key(own.view, scratch)):
            assert key.private_bytes_raw() not in memory_of(scene.process.pid)
    assert client.cmd("object-del", {"id": "host"}) == {"return": {}}
    assert client.cmd("object-del", {"id": "host.key"}) == {"return": {}}
    del scene.held["host.key"]
    scene.check()
    seed.free()
    scratch.close()


def memory_of(pid: int) -> bytes:
    """All readable memory of a process."""
    parts = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            ends, rights = line.split()[:2]
            begin, end = (int(part, 16) for part in ends.split("-"))
            if rights.startswith("r") and "[v" not in line:
                with contextlib.suppress(OSError):
                    memory.seek(begin)
                    parts.append(memory.read(end - begin))
    return b"".join(parts)
