# SPDX-License-Identifier: LGPL-2.1-or-later
"""query-qmp-schema: the same as QEMU's where the command or event is."""

import copy
import json
from typing import TypedDict

from msgspec import Raw

from secretd.monitor.commands import COMMANDS
from secretd.monitor.events import EVENTS
from secretd.qapi.command import Commands
from secretd.qapi.introspect import schema
from tests.support.daemon import Daemon
from tests.support.qmp import Client
from tests.support.transcript import SCHEMA, expanded

QMP = [command for command in COMMANDS.by_name.values() if command.only != "jsonrpc"]
OURS = schema(QMP, EVENTS)
QEMUS = json.loads(SCHEMA.read_text())

# Each a command, where in its schema, and what secretd says there. docs/protocol.md has the
# reasons.
SENSITIVE = ["sensitive"]
DIFFERENCES = [
    (
        "object-add",
        ["arg-type", "variants", "secret", "type", "members", "data", "features"],
        SENSITIVE,
    ),
    ("qom-set", ["arg-type", "members", "value", "features"], SENSITIVE),
    ("human-monitor-command", ["arg-type", "members", "command-line", "features"], SENSITIVE),
    ("human-monitor-command", ["features"], None),
]


def changed(name: str) -> dict:
    """QEMU's schema of a command, with what is known to be different."""
    wanted = copy.deepcopy(QEMUS[name])
    for command, path, value in DIFFERENCES:
        if command == name:
            node = wanted
            for key in path[:-1]:
                if isinstance(node, list):
                    (node,) = (n for n in node if key in (n.get("name"), n.get("case")))
                else:
                    node = node[key]
            assert node.get(path[-1]) != value
            node.pop(path[-1], None)
            if value is not None:
                node[path[-1]] = value
    return wanted


def without_ours(entry: dict) -> dict:
    """The schema of object-add without our own types."""
    if entry["name"] == "object-add":
        arguments = entry["arg-type"]
        tags = arguments["members"][0]["type"]
        for name in (
            "secret-grant",
            "secret-store",
            "secret-alias",
            "secret-host",
            "secret-peer",
            "secret-fleet",
        ):
            (ours,) = [v for v in arguments["variants"] if v["case"] == name]
            arguments["variants"].remove(ours)
            tags["members"].remove({"name": name})
            tags["values"].remove(name)
    return entry


def test_shared_commands_and_events_have_qemus_schema() -> None:
    """Members, their order, types, defaults, features, variants; type numbers aside."""
    for name in QEMUS:
        assert without_ours(expanded(OURS, name)) == changed(name), name
    assert len(QEMUS) >= 20


def test_the_schema_has_all_commands_events_and_types() -> None:
    """Also our own; and no name leads nowhere."""
    names = [entry["name"] for entry in OURS]
    assert len(names) == len(set(names))
    assert {*(command.name for command in QMP), *EVENTS} <= set(names)
    for name in names:
        expanded(OURS, str(name))
    (listing,) = (entry for entry in OURS if entry["name"] == "query-secrets")
    assert listing["allow-oob"] is True
    (add,) = (entry for entry in OURS if entry["name"] == "object-add")
    assert "allow-oob" not in add


def test_every_member_that_may_carry_a_secret_is_marked() -> None:
    """By its annotation, which is what keeps it in locked memory too."""
    commands = Commands()

    @commands()
    def do_it(_monitor: object, word: str, secret: Raw) -> None:
        """Do it."""

    members = expanded(schema(commands.by_name.values(), {}), "do-it")["arg-type"]["members"]
    assert [m.get("features") for m in members] == [None, SENSITIVE]


def test_a_typed_dict_may_have_optional_members() -> None:
    """As query-fdsets' opaque."""

    class Data(TypedDict, total=True):
        """Data."""

        number: int

    (event, *_) = schema([], {"HAPPENED": Data})
    assert event == {"name": "HAPPENED", "meta-type": "event", "arg-type": "0"}
    opaque = expanded(OURS, "query-fdsets")["ret-type"]["element-type"]["members"][1]
    assert opaque["type"]["element-type"]["members"][1]["default"] is None


def test_each_socket_has_the_schema_of_its_own_commands(daemon: Daemon, qmp: Client) -> None:
    """No line is longer than 64 KiB; what a client may not execute it does not see."""
    qmp.send(b'{"execute": "query-qmp-schema"}')
    line = qmp.line()
    assert len(line) < 1 << 16
    assert json.loads(line)["return"] == OURS
    names = {e["name"] for e in daemon.connect(role="client").ok("query-qmp-schema")}
    assert "secret-read" in names
    assert "object-add" not in names
