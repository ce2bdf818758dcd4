# SPDX-License-Identifier: LGPL-2.1-or-later
"""secretd as a service of a real systemd, as scripts/install puts it there: 252, and 257 with
Python 3.13.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from secretd import __version__
from secretd.audit import chain
from tests.e2e.box import TRIXIE, Box, wheels
from tests.support.needs import need

SOCKETS = ("secretd-control.socket", "secretd-client.socket", "secretd-credentials.socket")
CREDENTIALS = "/run/secretd/credentials.sock"
SHOW = ("sh", "-c", 'cat "$CREDENTIALS_DIRECTORY/$0"')
FAILED = 243
"""The exit status of a unit whose credentials could not be set up: EXIT_CREDENTIALS."""


def trixie(factory: pytest.TempPathFactory, name: str) -> Box:
    """A box of Debian 13, with secretd installed in it by scripts/install itself."""
    need(
        (TRIXIE / ".done").exists() or "SECRETD_NO_TRIXIE" in os.environ,
        "scripts/dev/trixie has not made Debian 13's root file system",
    )
    if not (TRIXIE / ".done").exists():
        pytest.skip("Debian 13's root file system cannot be had here (SECRETD_NO_TRIXIE)")
    box = Box(name, root=TRIXIE, wheels=wheels(factory, "3.13"))
    try:
        box.run(
            "env",
            "PIP_NO_INDEX=1",
            "PIP_FIND_LINKS=/wheels",
            "/secretd/scripts/install",
            "--prefix=/usr",
            "--fleet",
        )
    except BaseException:
        box.close()
        raise
    return box


@pytest.fixture(scope="module", params=[252, 257])
def booted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Box]:
    """A box in which secretd is installed and its sockets listen."""
    name = f"secretd-{request.param}-{os.getpid()}"
    if request.param == 252:
        box = Box(name, request.getfixturevalue("installed"))
    else:
        box = trixie(tmp_path_factory, name)
    try:
        box.run("systemd-sysusers")
        version = box.run("systemctl", "--version").stdout.split()[1]
        need(int(version) == request.param, f"systemd here is {version}, not {request.param}")
        box.run("systemctl", "daemon-reload")
        yield box
    finally:
        box.close()


@pytest.fixture
def box(booted: Box) -> Iterator[Box]:
    """The same, without objects, drop-ins or units of other tests."""
    booted.run("systemctl", "start", *SOCKETS)
    yield booted
    booted.hang_up()
    booted.run(
        "sh",
        "-c",
        "rm -rf /etc/systemd/system/*.service /etc/systemd/system/*.service.d /etc/credstore*",
    )
    booted.run("systemctl", "daemon-reload")
    booted.run("systemctl", "stop", *SOCKETS, "secretd.service")
    booted.run("systemctl", "reset-failed", check=False)
    booted.run("journalctl", "--rotate")
    booted.run("journalctl", "--vacuum-time=1s")


def drop_in(box: Box, text: str, unit: str = "secretd.service") -> None:
    """Change a unit as 'systemctl edit' does."""
    box.write(f"/etc/systemd/system/{unit}.d/test.conf", text)
    box.run("systemctl", "daemon-reload")


def arguments(box: Box, words: str, more: str = "") -> None:
    """Give secretd options, as docs/systemd.md says."""
    drop_in(box, f'[Service]\n{more}Environment="SECRETD_ARGS={words}"\n')


def add(box: Box, name: str, content: str, *grants: str) -> None:
    """Add a secret and grant it to units."""
    box.run("secretctl", "add", name, "--stdin", input=content)
    for unit in grants:
        grant = "g-" + re.sub(r"[^a-z.]", "-", f"{name}-{unit}")
        box.run("secretctl", "grant", name, "--to", f"unit:{unit}", "--id", grant)


def load(
    box: Box,
    unit: str,
    *names: str,
    command: tuple[str, ...] = (),
    properties: tuple[str, ...] = (),
) -> "subprocess.CompletedProcess[str]":
    """Run a unit that loads credentials, by default to print the first."""
    wanted = tuple(f"LoadCredential={name}:{CREDENTIALS}" for name in names)
    return box.unit(
        *(command or (*SHOW, names[0])), name=unit, properties=(*wanted, *properties), check=False
    )


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what


def log_of(box: Box, words: str) -> None:
    """Wait until secretd has logged something."""
    wait_for(
        lambda: any(words in line for line in box.journal("secretd")),
        f"{words!r} in\n" + "\n".join(box.journal("secretd")),
    )


# --- the units


def test_systemd_finds_nothing_wrong_with_the_units(box: Box) -> None:
    """Nor with the user's."""
    for where, option, count in (("system", "--system", 7), ("user", "--user", 4)):
        units = box.run(
            "sh", "-c", f"ls -d /usr/lib/systemd/{where}/secretd*.[s]*[et]"
        ).stdout.split()
        assert len(units) == count
        done = box.run(
            "env", "XDG_RUNTIME_DIR=/run/user/0", "sh", "-c",
            f"mkdir -p /run/user/0 && systemd-analyze verify {option} {' '.join(units)}",
            check=False,
        )  # fmt: skip
        ours = [line for line in (done.stdout + done.stderr).splitlines() if "secretd" in line]
        assert ours == []


def test_the_exposure_is_half_a_point(box: Box) -> None:
    """By systemd's own measure, of the unit as it is loaded."""
    out = box.run("systemd-analyze", "security", "--no-pager", "secretd.service").stdout
    match = re.search(r"Overall exposure level for secretd.service: ([0-9.]+)", out)
    assert match is not None
    print(f"\nexposure {match[1]}")
    assert float(match[1]) <= 0.5


def test_inside_the_unit_nothing_else_is_possible(box: Box) -> None:
    """Each refused thing is tried, and so is what secretd needs."""
    unit = box.run("cat", "/usr/lib/systemd/system/secretd.service").stdout
    python = re.search(r"^ExecPaths=\S+ (\S+)", unit, re.MULTILINE)
    assert python is not None
    unit = re.sub(
        r"^(ExecStart=).*$",
        rf"\g<1>{python[1]} -I /secretd/tests/e2e/probe.py",
        unit,
        flags=re.MULTILINE,
    )
    unit = re.sub(
        r"^(Type|Restart|NotifyAccess|WatchdogSec|RestartSec)=.*$", "", unit, flags=re.MULTILINE
    )
    box.write(
        "/etc/systemd/system/probe.service", unit.replace("[Service]", "[Service]\nType=oneshot")
    )
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "start", "probe.service")
    (line,) = (ln for ln in box.journal("probe") if ln.startswith("PROBE"))
    results = json.loads(line.removeprefix("PROBE"))
    print("\n" + json.dumps(results))
    works = {name for name, result in results.items() if result == "works"}
    assert works == {"memfd_secret", "peer lookup", "log", "keyring"}
    assert results["dumped"] == "00000000"


def test_everything_works_inside_the_unit(box: Box) -> None:
    """secret_keyring, memfd_secret, AES, files of the system, units as peers."""
    serial = box.run(
        "sh",
        "-c",
        "s=$(keyctl add user probe letmein @u) && keyctl setperm $s 0x3f3f3f3f && echo $s",
    ).stdout.strip()
    qmp = box.qmp()
    qmp.ok("object-add", {"qom-type": "secret_keyring", "id": "k", "serial": int(serial)})
    assert qmp.read("k") == b"letmein"
    box.write("/etc/secretd-test", "from a file")
    box.run("chmod", "644", "/etc/secretd-test")
    qmp.ok("object-add", {"qom-type": "secret", "id": "f", "file": "/etc/secretd-test"})
    assert qmp.read("f") == b"from a file"
    qmp.ok("secret-generate", {"id": "master", "size": 32})
    sealed = qmp.ok("secret-seal", {"id": "f", "keyid": "master"})
    assert qmp.add("again", keyid="master", format="base64", **sealed) == {"return": {}}
    assert qmp.read("again") == b"from a file"
    assert {s["memory"] for s in qmp.ok("query-secrets")} == {"secretmem"}
    box.run("secretctl", "grant", "f", "--to", "unit:webtest")
    read = ("secretctl", "--socket", "/run/secretd/client.sock", "read", "f")
    assert box.unit(*read, name="webtest").stdout == "from a file"
    assert box.unit(*read, name="othertest", check=False).returncode == 1
    qmp.close()


def test_what_is_installed_runs_from_where_it_was_put(installed: Path) -> None:
    """Under a DESTDIR too, before it is where it belongs."""
    for program in ("secretd", "secretctl"):
        out = subprocess.run(
            [str(installed / "usr/bin" / program), "--version"],
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        assert out == f"{program} {__version__}\n"


# --- activation


def test_the_first_connection_starts_it_and_loses_nothing(box: Box) -> None:
    """What is sent before it runs is answered; whatever socket it comes on."""
    assert box.show("secretd", "ActiveState") == "inactive"
    qmp = box.qmp()
    assert qmp.ok("query-version")["package"].startswith("secretd ")
    qmp.close()
    assert box.show("secretd", "ActiveState") == "active"
    box.run("systemctl", "stop", "secretd")
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(box.path("/run/secretd/control.sock"))
    sock.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-name","id":7}')
    sock.settimeout(30)
    answer = b""
    while b'"id": 7' not in answer:
        answer += sock.recv(4096)
    sock.close()


def test_sockets_are_known_by_name_all_or_some_of_them(box: Box) -> None:
    """In whatever order systemd passes them, which changes."""
    for masked in (None, "secretd-client.socket", "secretd-control.socket"):
        if masked is not None:
            box.run("systemctl", "stop", "secretd.service", masked)
            box.run("systemctl", "mask", "--runtime", masked)
        try:
            box.run("systemctl", "restart", "secretd")
            said = [
                ln
                for ln in box.journal("secretd", f"_PID={box.show('secretd', 'MainPID')}")
                if " socket " in ln
            ]
            sockets = {line.split()[0]: line.split()[-1] for line in said}
            names = {"control", "client", "credentials"}
            if masked is not None:
                names.remove(masked.removeprefix("secretd-").removesuffix(".socket"))
            assert sockets == {name: f"/run/secretd/{name}.sock" for name in names}
        finally:
            if masked is not None:
                box.run("systemctl", "unmask", "--runtime", masked)
                box.run("systemctl", "stop", "secretd.service")
                box.run("systemctl", "start", masked)


def test_a_socket_with_another_name_is_refused_in_words(box: Box) -> None:
    """The name is the .socket unit's if none was given."""
    box.write(
        "/etc/systemd/system/secretd-client.socket.d/test.conf",
        "[Socket]\nFileDescriptorName=client.sock\n",
    )
    box.run("systemctl", "daemon-reload")
    try:
        box.run("systemctl", "restart", "secretd-client.socket")
        box.run("systemctl", "start", "--no-block", "secretd")
        log_of(
            box,
            "the service manager passed a socket as 'client.sock': FileDescriptorName= of a "
            ".socket unit must be control, client, credentials, control-jsonrpc or "
            "client-jsonrpc",
        )
    finally:
        box.run("rm", "-r", "/etc/systemd/system/secretd-client.socket.d")
        box.run("systemctl", "daemon-reload")
        box.run("systemctl", "stop", "secretd.service", "secretd-client.socket")
        box.run("systemctl", "start", "secretd-client.socket")


def test_the_status_says_how_many_secrets_and_how_they_are_kept(box: Box) -> None:
    """A moment after each change."""
    qmp = box.qmp()
    status = "memory: secretmem, kept over restarts"
    assert box.show("secretd", "StatusText") == f"0 secrets, {status}"
    qmp.add("a", data="1")
    qmp.ok("object-add", {"qom-type": "authz-list", "id": "l"})
    wait_for(lambda: box.show("secretd", "StatusText") == f"1 secret, {status}", "the status")
    qmp.close()


def test_a_reload_reopens_the_audit(box: Box) -> None:
    """And `systemctl reload` waits for its end."""
    arguments(box, "--audit=/var/log/secretd/audit")
    box.run("systemctl", "start", "secretd")
    box.run("mv", "/var/log/secretd/audit", "/var/log/secretd/audit.1")
    box.run("systemctl", "reload", "secretd")
    box.run("test", "-s", "/var/log/secretd/audit")
    assert box.show("secretd", "ActiveState") == "active"
    out = box.run(
        "secretctl", "audit", "verify", "/var/log/secretd/audit.1", "/var/log/secretd/audit"
    ).stdout
    assert "missing" not in out
    box.run("systemctl", "stop", "secretd")
    box.run("sh", "-c", "rm /var/log/secretd/*")


def test_what_was_sent_before_a_stop_is_answered(box: Box, tmp_path: Path) -> None:
    """Also waiting requests: here a slow source, and the request behind it."""
    qmp = box.qmp()
    source, sink = os.pipe()
    added = qmp.ok("add-fd", None, (source,))
    os.close(source)
    words = {"qom-type": "secret", "id": "slow", "file": f"/dev/fdset/{added['fdset-id']}"}
    qmp.send(json.dumps({"execute": "object-add", "arguments": words, "id": 1}).encode())
    qmp.send(b'{"execute":"query-name","id":2}')
    other = box.qmp()
    stop = subprocess.Popen(
        ["nsenter", "-t", box._init(), "-m", "-p", "systemctl", "stop", "secretd"]
    )
    assert other.line() == b""  # it has nothing to wait for
    os.write(sink, b"letmein")
    os.close(sink)
    assert qmp.reply() == {"return": {}, "id": 1}
    assert qmp.reply() == {"return": {}, "id": 2}
    assert qmp.line() == b""
    stop.wait(30)
    qmp.close()
    other.close()


def test_log_lines_have_priorities_and_records_one_line(box: Box) -> None:
    """So `journalctl -p warning` shows what went wrong, and the chain can be verified."""
    add(box, "a", "1", "some.service")
    assert load(box, "other", "a").returncode == FAILED
    log_of(box, "credential 'a' of other.service refused")
    (warning,) = box.journal("secretd", "--priority=warning")
    assert warning == (
        "credential 'a' of other.service refused: no grant lets unit:other.service have it; the "
        "unit fails with 243/CREDENTIALS"
    )
    (notice,) = box.journal("secretd", "--priority=notice..notice")
    assert json.loads(notice)["decision"] == "deny"
    this_run = f"_PID={box.show('secretd', 'MainPID')}"
    records = [line for line in box.journal("secretd", this_run) if line.startswith("{")]
    assert len(records) >= 5
    verification = chain.Verification(None)
    assert list(verification.findings(f"{line}\n".encode() for line in records)) == []


# --- LoadCredential=


def test_a_unit_gets_the_secret_that_it_names(box: Box) -> None:
    """By the secret's id, or the name that a grant gives it; several; as any user."""
    add(box, "db.password", "letmein", "app.service")
    add(box, "s1", "first")
    box.run("secretctl", "grant", "s1", "--to", "unit:app.service", "--credential", "token")
    assert load(box, "app", "db.password").stdout == "letmein"
    assert load(box, "app", "token").stdout == "first"
    assert load(box, "app", "s1").stdout == "first"
    both = ("sh", "-c", "cat $CREDENTIALS_DIRECTORY/db.password $CREDENTIALS_DIRECTORY/token")
    assert load(box, "app", "db.password", "token", command=both).stdout == "letmeinfirst"
    for user in ("User=nobody", "DynamicUser=yes", "PrivateNetwork=yes", "PrivateUsers=yes"):
        assert load(box, "app", "db.password", properties=(user,)).stdout == "letmein"
    assert load(box, "app", "db.password", properties=("Slice=a-b.slice",)).stdout == "letmein"
    for content in ("x" * 300_000, "y" * 1_048_000):
        add(box, "large", content, "app.service")
        assert load(box, "app", "large").stdout == content
        box.run("secretctl", "del", "large")
        box.run("secretctl", "revoke", "g-large-app.service")
    add(box, "empty", "", "app.service")
    assert (
        load(
            box, "app", "empty", command=("sh", "-c", "wc -c < $CREDENTIALS_DIRECTORY/empty")
        ).stdout
        == "0\n"
    )


def test_a_unit_that_may_not_have_it_fails(box: Box) -> None:
    """Rather than start with nothing; the log says why."""
    add(box, "db.password", "letmein", "app.service")
    add(box, "x1", "1")
    add(box, "x2", "2")
    box.run(
        "secretctl", "grant", "x*", "--to", "unit:app.service", "--credential", "two", "--id", "two"
    )
    box.run("secretctl", "grant", "gone", "--to", "unit:app.service", "--id", "gone")
    box.run(
        "secretctl",
        "grant",
        "one",
        "--to",
        "unit:app.service",
        "--credential",
        "db.password",
        "--id",
        "o",
    )
    add(box, "huge", "y" * 1_048_573, "app.service")
    started = ("touch", "/run/started")
    for unit, name, words in (
        ("other", "db.password", "no grant lets unit:other.service have it"),
        ("app", "nope", "no grant lets unit:app.service have it"),
        ("app", "two", "it could be more than one secret: 'x1', 'x2'"),
        ("app", "gone", "there is no secret 'gone'"),
        (
            "app",
            "huge",
            "secret 'huge' has 1048573 bytes, which with the credential's name is more than the "
            "1048576",
        ),
    ):
        done = load(box, unit, name, command=started)
        assert done.returncode == FAILED, (unit, name, done)
        log_of(box, f"credential '{name}' of {unit}.service refused: {words}")
    assert box.run("test", "-e", "/run/started", check=False).returncode == 1
    assert load(box, "app", "db.password").stdout == "letmein"  # the other grant has no secret
    add(box, "one", "1")
    assert load(box, "app", "db.password").returncode == FAILED
    log_of(box, "it could be more than one secret: 'db.password', 'one'")


def test_units_made_of_templates_are_themselves(box: Box) -> None:
    """Each instance has its own name, escaped as systemd does."""
    add(box, "k", "letmein", "tpl@a\\x2db.service")
    box.write(
        "/etc/systemd/system/tpl@.service",
        f"[Service]\nType=oneshot\nLoadCredential=k:{CREDENTIALS}\nExecStart=systemd-creds cat k\n",
    )
    box.run("systemctl", "daemon-reload")
    box.run("systemctl", "start", "tpl@a\\x2db.service")
    assert "letmein" in box.journal("tpl@a\\x2db.service")
    assert box.run("systemctl", "start", "tpl@b.service", check=False).returncode
    log_of(box, "credential 'k' of tpl@b.service refused: no grant lets unit:tpl@b.service have it")


def test_each_process_of_a_unit_fetches_it_without_a_count(box: Box) -> None:
    """It is asked for again with every ExecStartPre=; max-reads is for the client socket."""
    add(box, "k", "letmein")
    box.run("secretctl", "grant", "k", "--to", "unit:pre.service", "--max-reads", "1")
    box.write(
        "/etc/systemd/system/pre.service",
        f"[Service]\nType=oneshot\nLoadCredential=k:{CREDENTIALS}\nExecStartPre=systemd-creds cat "
        "k\n"
        "ExecStartPre=systemd-creds cat k\nExecStart=systemd-creds cat k\n",
    )
    box.run("systemctl", "daemon-reload")
    before = 0
    for _ in range(2):
        box.run("systemctl", "start", "pre.service")
        records = [json.loads(ln) for ln in box.journal("secretd") if ln.startswith("{")]
        reads = [r for r in records if r["event"] == "credential"]
        assert (
            len(reads) >= before + 3
        )  # one for each process at least; systemd may have more of its own
        before = len(reads)
    assert {(r["decision"], r["id"], r["credential"], r["peer"]["unit"]) for r in reads} == {
        ("allow", "k", "k", "unit:pre.service")
    }


def test_the_journal_keeps_each_record_of_a_busy_hour(box: Box) -> None:
    """Its rate limit would drop what exceeds 10,000 lines in 30 seconds."""
    qmp = box.qmp()
    pair = (
        b'{"execute":"object-add","arguments":{"qom-type":"secret","id":"s","data":"x"}}\n'
        b'{"execute":"object-del","arguments":{"id":"s"}}\n'
    )
    pairs = 6500
    for _ in range(pairs // 50):
        qmp.send(pair * 50)
        for _ in range(100):
            assert qmp.reply() == {"return": {}}
    records = [json.loads(line) for line in box.journal("secretd") if line.startswith("{")]
    assert sum(r["event"] in ("add", "delete") for r in records) == 2 * pairs
    assert not any("dropped" in r for r in records)


def test_a_forged_address_is_refused_and_audited(box: Box) -> None:
    """Root outside of the unit, root in another unit, addresses of another form."""
    add(box, "k", "letmein", "app.service")
    forge = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(eval(sys.argv[1])); "
        f"s.connect({CREDENTIALS!r}); n = b''\n"
        "while d := s.recv(1 << 16): n += d\n"
        "print(len(n), len(n.strip(bytes(1))))"
    )

    def forged(address: bytes, *, unit: str | None = None) -> str:
        words = ("/usr/bin/python3", "-c", forge, repr(address))
        return (box.run(*words) if unit is None else box.unit(*words, name=unit)).stdout.strip()

    genuine = b"\0a425825acb4f5eb9/unit/app.service/k"
    assert forged(genuine, unit="app") == "7 7"
    refused = f"{(1 << 20) + (1 << 16)} 0"
    assert forged(genuine) == refused
    log_of(box, "credential 'k' of app.service refused: it claims to be app.service, and is in ")
    assert forged(genuine, unit="evil") == refused
    log_of(box, "it claims to be app.service, and is in unit:evil.service")
    for address in (
        b"\0a/unit/app.service",
        b"\0a/unit/app.service/k/x",
        b"\0/unit/app.service/k",
        b"\0x/y",
    ):
        assert forged(address, unit="app") == refused
    log_of(
        box,
        "a connection to the credentials socket was refused: the address it came from is not",
    )
    deny = [
        json.loads(ln)
        for ln in box.journal("secretd")
        if ln.startswith('{"seq"') and '"deny"' in ln
    ]
    assert deny[0]["event"] == "credential"
    assert deny[0]["credential"] == "k"
    assert deny[0]["peer"]["uid"] == 0
    assert deny[0]["reason"].startswith("it claims to be app.service, and is in ")


def test_others_than_the_service_manager_are_refused(box: Box) -> None:
    """Even where the socket's mode lets them in, and in a unit that may have it."""
    add(box, "k", "letmein", "app.service")
    box.run("chmod", "666", CREDENTIALS)
    forge = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.bind(b'\\0ab/unit/app.service/k'); "
        f"s.connect({CREDENTIALS!r}); print(s.recv(7))"
    )
    done = box.unit("/usr/bin/python3", "-c", forge, name="app", properties=("User=nobody",))
    assert done.stdout == f"{bytes(7)!r}\n"
    log_of(
        box, "credential 'k' of app.service refused: uid 65534 is not that of the service manager"
    )
    box.run("systemctl", "stop", "secretd-credentials.socket", "secretd")


def test_names_that_are_too_long_are_caught_before_and_after(box: Box) -> None:
    """There are 83 bytes for the unit's and the credential's; what it says is "Protocol error"."""
    unit, name = "u" * 40 + ".service", "c" * 36
    done = box.run(
        "secretctl", "grant", "k", "--to", f"unit:{unit}", "--credential", name, check=False
    )
    assert done.returncode == 1
    assert (
        "have 84 bytes together, and systemd can ask for 83: choose a shorter --credential"
        in done.stderr
    )
    add(box, "k", "letmein")
    box.run("secretctl", "grant", "k", "--to", f"unit:{unit}", "--credential", name[:-1])
    assert load(box, unit.removesuffix(".service"), name[:-1]).stdout == "letmein"
    assert load(box, unit.removesuffix(".service"), name + "c").returncode == FAILED
    while not any("Protocol error" in line for line in box.journal(unit)):
        pass  # systemd may log it after it has reported the failure


def test_a_unit_started_before_secretd_waits_for_it(box: Box) -> None:
    """Its secret comes from secretd's own command line."""
    box.write("/etc/secretd-test", "letmein")
    box.run("chmod", "644", "/etc/secretd-test")
    arguments(
        box,
        "--object secret,id=k,file=/etc/secretd-test --object "
        "authz-simple,id=a,identity=unit:app.service --object secret-grant,id=g,secret=k,authz=a",
    )
    assert box.show("secretd", "ActiveState") == "inactive"
    began = time.monotonic()
    assert load(box, "app", "k").stdout == "letmein"
    print(f"\ncold start included: {time.monotonic() - began:.2f} s")


def test_a_users_own_manager_has_one_of_its_own(box: Box) -> None:
    """`systemctl --user`: sockets, LoadCredential=, restart without loss; for that user's units."""
    box.run("sh", "-c", "id tester || useradd -m tester")
    uid = box.run("id", "-u", "tester").stdout.strip()
    box.run("systemctl", "start", f"user@{uid}.service")

    def as_user(*words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return box.run(
            "setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "env", "HOME=/home/tester",
            f"XDG_RUNTIME_DIR=/run/user/{uid}", "sh", "-c", 'cd / && exec "$@"', "sh", *words,
            check=check,
        )  # fmt: skip

    try:
        as_user("systemctl", "--user", "start", *SOCKETS)
        as_user("sh", "-c", "printf letmein | secretctl add k --stdin")
        as_user("secretctl", "grant", "k", "--to", f"user-unit:{uid}/app.service")
        run = ("systemd-run", "--user", "--quiet", "--wait", "--pipe", "--collect")
        wanted = f"--property=LoadCredential=k:/run/user/{uid}/secretd/credentials.sock"
        assert as_user(*run, "--unit=app", wanted, *SHOW, "k").stdout == "letmein"
        assert as_user(*run, "--unit=other", wanted, *SHOW, "k", check=False).returncode == FAILED
        as_user("systemctl", "--user", "restart", "secretd")
        as_user("systemctl", "--user", "kill", "--signal=KILL", "secretd")
        assert as_user("secretctl", "read", "k").stdout == "letmein"
        as_user("systemctl", "--user", "reload", "secretd")
        status = as_user(
            "systemctl", "--user", "show", "--value", "--property=StatusText", "secretd"
        ).stdout
        assert status == "1 secret, memory: secretmem, kept over restarts\n"
        as_user("systemctl", "--user", "stop", "secretd")
        assert as_user("secretctl", "list", "--json").stdout == "[]\n"
    finally:
        box.run("systemctl", "stop", f"user@{uid}.service")


# --- restart without loss


def test_objects_grants_and_expiry_survive(box: Box) -> None:
    """A restart, kill -9, and a hang that the watchdog ends; not a stop."""
    drop_in(box, "[Service]\nWatchdogSec=2\n")
    qmp = box.qmp()
    qmp.add("a", data="letmein")
    qmp.add("b", data="bG9uZw==", format="base64")
    qmp.ok("object-add", {"qom-type": "authz-simple", "id": "z", "identity": "uid:65534"})
    qmp.ok(
        "object-add",
        {"qom-type": "secret-grant", "id": "g", "secret": "a", "authz": "z", "max-reads": 5},
    )
    qmp.ok("secret-expire", {"id": "b", "after": 3000})
    qmp.close()
    read = (
        "setpriv",
        "--reuid",
        "65534",
        "--clear-groups",
        "secretctl",
        "--socket",
        "/run/secretd/client.sock",
    )
    for how in ("restart", "kill", "hang"):
        before = box.processes("secretd.service")
        if how == "restart":
            box.run("systemctl", "restart", "secretd")
        elif how == "kill":
            os.kill(before[0], signal.SIGKILL)
        else:
            os.kill(before[0], signal.SIGSTOP)
            wait_for(lambda b=before: box.processes("secretd.service") != b, "the watchdog")  # type: ignore[misc]
        qmp = box.qmp()
        assert qmp.read("a") == b"letmein"
        secrets = {s["id"]: s for s in qmp.ok("query-secrets")}
        assert set(secrets) == {"a", "b"}
        assert 2900 < secrets["b"]["expires-in"] <= 3000
        assert qmp.ok("qom-get", {"path": "b", "property": "format"}) == "base64"
        qmp.close()
        assert box.run(*read, "read", "a").stdout == "letmein"
        assert box.processes("secretd.service") != before
    # The reads that a grant allowed were counted on.
    assert box.run(*read, "read", "a").stdout == "letmein"
    assert box.run(*read, "read", "a").stdout == "letmein"
    assert box.run(*read, "read", "a", check=False).returncode == 1
    box.run("systemctl", "stop", "secretd")
    qmp = box.qmp()
    assert qmp.ok("query-secrets") == []
    qmp.close()


def test_an_upgrade_loses_nothing(box: Box) -> None:
    """Another version's files are put in place, and secretd is restarted."""
    qmp = box.qmp()
    qmp.add("a", data="letmein")
    before = qmp.ok("query-version")["package"]
    there = f"s/{__version__}/99.1/"
    box.run("sed", "-i", there, "/usr/lib/secretd/secretd/__init__.py")
    box.run("systemctl", "restart", "secretd")
    qmp = box.qmp()
    assert (before, qmp.ok("query-version")["package"]) == (
        f"secretd {__version__}",
        "secretd 99.1",
    )
    assert qmp.read("a") == b"letmein"
    back = f"sed -i 's/99.1/{__version__}/' /usr/lib/secretd/secretd/__init__.py"
    box.run("sh", "-c", back)


def test_a_secret_that_expired_meanwhile_stays_away(box: Box) -> None:
    """It is wiped before anything is answered."""
    drop_in(box, "[Service]\nRestartSec=1500ms\n")
    qmp = box.qmp()
    qmp.add("a", data="letmein")
    qmp.ok("secret-expire", {"id": "a", "after": 1})
    os.kill(box.processes("secretd.service")[0], signal.SIGKILL)
    qmp.close()
    qmp = box.qmp()
    assert "No secret with id 'a'" in qmp.fail("secret-seal", {"id": "a", "keyid": "a"})
    assert qmp.ok("query-secrets") == []
    qmp.close()


def test_quit_ends_the_secrets_too(box: Box) -> None:
    """As QEMU's do; the unit then starts anew, with nothing."""
    qmp = box.qmp()
    qmp.add("a", data="letmein")
    assert qmp.cmd("quit")["event"] == "SHUTDOWN"
    qmp.close()
    log_of(box, "stopped; all secrets are wiped")
    qmp = box.qmp()
    assert qmp.ok("query-secrets") == []
    qmp.close()


def test_an_administrator_may_keep_them_over_a_stop(box: Box) -> None:
    """From systemd 254 on, while a socket of secretd is active."""
    drop_in(box, "[Service]\nFileDescriptorStorePreserve=yes\n")
    qmp = box.qmp()
    qmp.add("a", data="letmein")
    qmp.close()
    box.run("systemctl", "stop", "secretd")
    preserved = int(box.run("systemctl", "--version").stdout.split()[1]) >= 254
    qmp = box.qmp()
    assert [s["id"] for s in qmp.ok("query-secrets")] == (["a"] if preserved else [])
    qmp.close()


def test_command_line_objects_are_renewed_if_they_changed(box: Box) -> None:
    """A start with what an earlier one left is no duplicate; another content replaces."""
    box.write("/etc/secretd-test", "one")
    box.run("chmod", "644", "/etc/secretd-test")
    arguments(box, "--object secret,id=k,file=/etc/secretd-test")
    qmp = box.qmp()
    qmp.ok("secret-expire", {"id": "k", "after": 3000})
    qmp.close()
    box.run("systemctl", "restart", "secretd")
    qmp = box.qmp()
    assert qmp.ok("query-secrets")[0]["expires-in"] <= 3000
    qmp.close()
    box.write("/etc/secretd-test", "two")
    box.run("systemctl", "restart", "secretd")
    qmp = box.qmp()
    assert qmp.read("k") == b"two"
    assert "expires-in" not in qmp.ok("query-secrets")[0]
    qmp.close()


def test_where_nothing_is_kept_it_is_said(box: Box) -> None:
    """At start, as an error, and in the status: the store has no room, or there is none."""
    for room in (0, 2):
        drop_in(box, f"[Service]\nFileDescriptorStoreMax={room}\n")
        box.run("systemctl", "restart", "secretd")
        qmp = box.qmp()
        qmp.add("a", data="letmein")
        qmp.close()
        log_of(
            box,
            "the service manager keeps no descriptors, so secrets end with this process; "
            "FileDescriptorStoreMax=512 and NotifyAccess=main in the unit change that",
        )
        assert box.journal("secretd", "--priority=err")
        wait_for(
            lambda: box.show("secretd", "StatusText").endswith("not kept over restarts"), "status"
        )
        box.run("systemctl", "restart", "secretd")
        qmp = box.qmp()
        assert qmp.ok("query-secrets") == []
        qmp.close()
        box.run("systemctl", "stop", "secretd")


def test_too_little_locked_memory_at_a_restart_loses_nothing(box: Box) -> None:
    """The start is refused with what to do; when that is done all is there again."""
    qmp = box.qmp()
    for number in range(40):
        qmp.add(f"s{number}", data=str(number) * 60000)
    qmp.close()
    drop_in(box, "[Service]\nLimitMEMLOCK=1M\n")
    box.run("systemctl", "restart", "secretd", check=False)
    log_of(box, "what secretd held before cannot be taken over: No locked memory left for another ")
    log_of(box, "LimitMEMLOCK= in the unit or 'ulimit -l'. It stays with the service manager: ")
    drop_in(box, "[Service]\n")
    qmp = box.qmp()
    assert len(qmp.ok("query-secrets")) == 40
    assert qmp.read("s7") == b"7" * 60000
    qmp.close()


def test_an_unknown_format_is_refused_kept_and_said(box: Box) -> None:
    """As after a downgrade; with the right version all is there again."""
    qmp = box.qmp()
    qmp.add("a", data="letmein")
    qmp.close()
    init = box._init()
    mine = [
        path
        for path in Path(f"/proc/{init}/fd").iterdir()
        if "secretd-journal" in os.readlink(path) and path.stat().st_size
    ]
    (kept,) = mine
    with open(kept, "r+b", buffering=0) as journal:
        os.pwrite(journal.fileno(), b"\7", 8)
        box.run("systemctl", "restart", "secretd", check=False)
        log_of(
            box,
            "what secretd held before cannot be taken over: the journal has format 7, not 1. It "
            "stays",
        )
        os.pwrite(journal.fileno(), b"\1", 8)
    qmp = box.qmp()
    assert qmp.read("a") == b"letmein"
    qmp.close()


def test_a_unit_whose_credential_was_cut_off_by_a_kill_fails(box: Box) -> None:
    """It does not start with nothing: the next process refuses what it cannot know."""
    add(box, "k", "letmein", "app.service")
    drop_in(box, "[Service]\nRestartSec=1\n")
    # The service manager as it would be between accept and answer: ask for it while secretd is
    # stopped, let it accept, and kill it there.
    (pid,) = box.processes("secretd.service")
    os.kill(pid, signal.SIGSTOP)
    asked = subprocess.Popen(
        [
            "nsenter", "-t", box._init(), "-m", "-u", "-i", "-n", "-p", "-C", "--", "systemd-run",
            "--quiet",
            "--wait", "--pipe", "--unit=app", f"--property=LoadCredential=k:{CREDENTIALS}", *SHOW,
            "k",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with contextlib.suppress(subprocess.TimeoutExpired):
        asked.wait(0.5)
    os.kill(pid, signal.SIGKILL)
    out, _ = asked.communicate(timeout=60)
    # It had not accepted yet: the connection waited in the socket, and the next process answered.
    assert (asked.returncode, out) == (0, "letmein")


# --- the master key


def test_a_master_key_comes_encrypted_by_the_hosts_key(box: Box) -> None:
    """The recipe of docs/systemd.md; a secret under it; what is said where it is missing."""
    box.run(
        "sh", "-c",
        "mkdir -p /etc/credstore.encrypted && head -c 32 /dev/urandom > /run/key && systemd-creds "
        "encrypt --name=master-key --with-key=host /run/key /etc/credstore.encrypted/master-key",
    )  # fmt: skip
    more = "LoadCredentialEncrypted=master-key:/etc/credstore.encrypted/master-key\n"
    words = "--object secret,id=master0,file=%d/master-key"
    arguments(box, words, more)
    qmp = box.qmp()
    assert qmp.read("master0") == Path(box.path("/run/key")).read_bytes()
    assert qmp.ok("query-secrets")[0]["size"] == 32
    qmp.close()
    box.run("systemctl", "stop", "secretd")
    # Without LoadCredentialEncrypted= there is no such file.
    arguments(box, words, "SetCredential=other:x\n")
    box.run("systemctl", "start", "--no-block", "secretd")
    log_of(box, "Unable to read ")
    log_of(
        box,
        "systemd has set up no credential 'master-key' for this unit: see "
        "LoadCredentialEncrypted= there",
    )
    box.run("systemctl", "stop", "secretd")
    arguments(box, f"{words} --object-policy=best-effort", "SetCredential=other:x\n")
    box.run("systemctl", "start", "secretd")
    log_of(box, "; started without it (--object-policy=best-effort)")
    qmp = box.qmp()
    assert qmp.ok("query-secrets") == []
    qmp.close()
    box.run("systemctl", "stop", "secretd")
    # One that cannot be decrypted is systemd's affair: it does not start the unit.
    box.run("sh", "-c", "echo rubbish > /etc/credstore.encrypted/master-key")
    arguments(box, words, more)
    box.run("systemctl", "start", "--no-block", "secretd")
    wait_for(
        lambda: any("status=243/CREDENTIALS" in line for line in box.journal("secretd")),
        "\n".join(box.journal("secretd")),
    )
    box.run("systemctl", "stop", "secretd")
