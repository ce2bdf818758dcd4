# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parts of secretd-fleet that need no etcd: files, names, certificates, figures and words."""

import base64
import json
import os
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from prometheus_client.parser import text_string_to_metric_families

from secretd.client.record_client import RecordClient
from secretd.crypto.host_keys import PublicKeys
from secretd.crypto.record import Malformed, verify
from secretd.crypto.roster import Publisher, Roster, read_roster
from secretd.errors import UsageError
from secretd.fleet import certificates, config, directory, enrolment, messages, status
from secretd.fleet.carrier import Carrier
from secretd.fleet.etcd import Endpoint, endpoint, prefix_end, range_request
from secretd.fleet.health import Health
from secretd.fleet.keyspace import Keyspace

NODES = {"node1": Endpoint("192.0.2.1", 2379), "node2": Endpoint("2001:db8::1", 2379)}
KEYS = PublicKeys(bytes(range(32)), bytes(range(32, 64)))


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """An operator's directory."""
    enrolment.init(str(tmp_path / "fleet"), "trial", NODES, 30)
    return tmp_path / "fleet"


def roster(number: int = 1) -> Roster:
    """With two hosts, one of which publishes."""
    publishers = {"pub": Publisher(KEYS, "web.*")}
    return Roster("trial", number, 0, {"alpha": KEYS, "pub": KEYS}, publishers)


def test_only_its_owner_reads_a_fleets_directory(fleet: Path) -> None:
    """Nor is anything half made."""
    for path in [fleet, *fleet.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert [each.name for each in fleet.parent.iterdir()] == ["fleet"]
    text = (fleet / "etcd" / "node2.yml").read_text()
    assert "listen-client-urls: https://[2001:db8::1]:2379\n" in text
    assert "initial-cluster: node1=https://192.0.2.1:2380,node2=https://[2001:db8::1]:2380" in text


def test_an_init_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key lies about."""
    monkeypatch.setattr(directory.certificates, "issue", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        enrolment.init(str(tmp_path / "fleet"), "trial", NODES, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_used_by_one_program_at_a_time(fleet: Path) -> None:
    """The second is refused in words."""
    with (
        directory.opened(str(fleet)),
        pytest.raises(UsageError, match="another secretd-fleet is using"),
        directory.opened(str(fleet)),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("root.key", b"garbage", "root.key: this is no Ed25519 key in PEM"),
        ("roster", b"garbage", "roster: its signature does not fit"),
        ("fleet.toml", b"nodes = 1", "fleet.toml: "),
        ("fleet.toml", b"[", "fleet.toml: "),
    ],
)
def test_a_damaged_directory_is_named(fleet: Path, name: str, content: bytes, said: str) -> None:
    """By its file."""
    (fleet / name).write_bytes(content)
    with pytest.raises(UsageError, match=said), directory.opened(str(fleet)) as opened:
        opened.roster()


def test_rosters_are_signed_with_later_numbers_and_an_end(fleet: Path) -> None:
    """Each host gets a line of its own, and publishers get all."""
    with directory.opened(str(fleet)) as opened:
        data = opened.save_roster(roster(4))
        root = base64.b64decode(opened.root)
        verify(data, root)
        found = read_roster(data)
        assert found.number == 5
        assert 29 * 86400 < found.until - time.time() < 31 * 86400
        assert opened.for_host("pub") == data
        own = opened.for_host("alpha")
        verify(own, root)
        assert read_roster(own) == found._replace(hosts={"alpha": KEYS})
        with pytest.raises(Malformed):
            verify(own[:-1] + bytes([own[-1] ^ 1]), root)


def test_a_later_roster_of_the_same_root_is_taken_over(fleet: Path) -> None:
    """And no other."""
    with directory.opened(str(fleet)) as opened:
        later = opened.save_roster(roster(8))
        opened.save_roster(roster(5))
        for other in (None, b"", later[:-1] + bytes([later[-1] ^ 1])):
            opened.adopt(other)
            assert opened.roster()[0].number == 6
        opened.adopt(later)
        assert opened.roster()[0].number == 9


def test_what_a_host_gets_can_be_used(fleet: Path) -> None:
    """Its file and certificate; what was added to the file by hand stays."""
    with directory.opened(str(fleet)) as opened:
        where = Path(opened.save_host("alpha", 1))
        with open(where / "fleet.toml", "a") as file:
            file.write('metrics = "figures"\n')
        opened.save_host("alpha", 2)
        root = opened.root
    found = config.read(str(where / "fleet.toml"))
    assert (found.fleet, found.host, found.root) == ("trial", "alpha", root)
    assert found.metrics == str(where / "figures")
    assert found.nodes == list(NODES.values())
    assert 1.9 < (certificates.ends_at(found.certificate) - time.time()) / 86400 < 2.1
    certificate = x509.load_pem_x509_certificate((where / "host.crt").read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=alpha"
    context = ssl.create_default_context(cafile=found.ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_cert_chain(found.certificate, found.key)
    data = (fleet / "roster").read_bytes()
    assert found.checked_roster(data).fleet == "trial"
    for wrong in (None, b"", data[:-1] + b"x"):
        with pytest.raises(UsageError):
            found.checked_roster(wrong)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('root = "x"', "'root' expects a key of 32 bytes|Incorrect padding|Invalid base64"),
        ("endpoints = []", "'endpoints' is empty"),
        ('endpoints = ["http://x"]', "is no endpoint such as https://"),
        ('color = "red"', "unknown field `color`"),
        ("host = 7", "Expected `str`, got `int`"),
    ],
)
def test_a_wrong_line_of_a_file_is_named(tmp_path: Path, line: str, said: str) -> None:
    """With the file."""
    values = {
        "fleet": "trial", "host": "alpha", "root": base64.b64encode(bytes(32)).decode(),
        "endpoints": ["https://x"], "ca": "ca.crt", "certificate": "a", "key": "b",
    }  # fmt: skip
    text = config.written({k: v for k, v in values.items() if k != line.partition(" ")[0]})
    path = tmp_path / "fleet.toml"
    path.write_text(text + line + "\n")
    with pytest.raises(UsageError, match=said) as caught:
        config.read(str(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_keys_are_told_apart_by_what_stands_before_them() -> None:
    """Also for hosts and fleets with the names of parts."""
    keys = Keyspace("record")
    manifest = keys.manifest("manifest", "pub")
    assert manifest == b"/secretd/v1/record/to/manifest/manifest/pub"
    assert keys.publisher_of("manifest", manifest) == "pub"
    assert keys.digest_of("manifest", manifest) == ""
    record = keys.record("manifest", "ab" * 32)
    assert keys.digest_of("manifest", record) == "ab" * 32
    assert keys.publisher_of("other", manifest) == ""
    assert keys.publisher_of("manifest", manifest + b"\n") == ""
    assert keys.publisher_of("manifest", keys.manifest("manifest", "a/b")) == ""


def test_an_empty_end_is_not_sent() -> None:
    """To etcd it would be the end of all keys, and to its rights one key."""
    assert not range_request(b"k", b"").HasField("range_end")
    assert range_request(b"k", b"l").range_end == b"l"
    assert prefix_end(b"/to/a/") == b"/to/a0"
    compare = messages.Compare(target=messages.MOD, key=b"k", mod_revision=0)
    assert compare.HasField("mod_revision")


@pytest.mark.parametrize("text", ["http://a", "a:2379", "https://", "https://a/b", "https://a:x"])
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    """Only https, a host and a port."""
    with pytest.raises(ValueError, match=r"is no endpoint such as|Port could not be cast"):
        endpoint(text)


@pytest.mark.parametrize(
    "ack",
    [
        b"", b"[]", b"{}", b"[" * 100_000, b'{"time": Infinity}', b"\xff",
        b'{"time":1,"publishers":{"p":{"digest":"","missing":1e400}},"state":"live","roster":1}',
        b'{"time":1,"publishers":{},"state":"live\\u001b[2J","roster":1}',
    ],
)  # fmt: skip
def test_an_ack_cannot_break_the_status(ack: bytes) -> None:
    """Nor write to the terminal."""
    found = status._status("alpha", {}, ack, 1)
    assert found.state == "damaged"
    assert found.reason.isprintable()


def test_an_acks_reason_is_shown_in_printable_form() -> None:
    """It comes from another host."""
    ack = {"time": 1, "publishers": {}, "state": "refused", "roster": 1, "refused": "a\x1b[2J\nb"}
    found = status._status("alpha", {}, json.dumps(ack).encode(), 1)
    assert (found.state, found.reason) == ("refused", "a?[2J?b")


@pytest.fixture
def health(fleet: Path) -> Health:
    """Of an agent that has not begun."""
    with directory.opened(str(fleet)) as opened:
        where = opened.save_host("alpha", 1)
    found = config.read(os.path.join(where, "fleet.toml"))
    found.metrics = os.path.join(where, "figures.prom")
    carrier = Carrier(RecordClient("/nonexistent"), Keyspace("trial"), "alpha")
    return Health(found, carrier, None)


def test_figures_are_prometheus(health: Health, caplog: pytest.LogCaptureFixture) -> None:
    """By its own parser; the end of the certificate is warned of once."""
    health.set_etcd("", "https://x")
    health.set_fleet({
        "state": "live", "roster": {"number": 3},
        "publishers": [{"name": "pub", "number": 2, "digest": "d", "age": 5, "missing": 1}],
    })  # fmt: skip
    assert health.words() == "live; 1 records missing"
    path = Path(health._config.metrics or "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }
    assert found["secretd_fleet_etcd_connected",] == 1
    assert found["secretd_fleet_state", "live"] == 1
    assert found["secretd_fleet_state", "stale"] == 0
    assert found["secretd_fleet_missing_records", "pub"] == 1
    signed = found["secretd_fleet_manifest_signed_timestamp_seconds", "pub"]
    assert abs(signed + 5 - time.time()) < 5
    assert caplog.text.count("ends in 1.0 days") == 1


def test_a_trouble_is_logged_now_and_then_only(
    health: Health, caplog: pytest.LogCaptureFixture
) -> None:
    """A node may come and go many times a second."""
    caplog.set_level("INFO")
    for number in range(50):
        health.set_etcd(f"reason {number}", "https://x")
        health.set_etcd("", "https://x")
    assert caplog.text.count("reason") == 1
    assert caplog.text.count("watching etcd") == 1
    assert health.losses == 49  # the first time there was nothing to lose


def test_a_missing_extra_is_said() -> None:
    """With the command that brings it."""
    program = (
        "import sys; sys.modules['grpclib'] = None\n"
        "from secretd.fleet.main import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "status"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("secretd-fleet: the package 'grpclib")
    assert "pip install secretd[fleet]" in done.stderr
