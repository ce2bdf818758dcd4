# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reference pages' tables, made from the code that decides them, so that they cannot drift.

conf.py calls `write`; the pages in reference/ and man/ include what it writes.
"""

import ast
import importlib
import inspect
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
from msgspec import UNSET, Raw, UnsetType

from secretd.audit.records import AuditRecord
from secretd.ctl.frame import SECTIONS, cli
from secretd.ctl.output import EXIT_STATUS
from secretd.daemon.options import parser as daemon_parser
from secretd.fleet import cli as _  # noqa: F401 - it names the verbs
from secretd.fleet.options import commands as fleet
from secretd.limits import Tuning
from secretd.monitor.commands import COMMANDS
from secretd.monitor.events import EVENTS
from secretd.qapi.command import Command
from secretd.qapi.visitor import members
from secretd.qom.registry import TYPES

LIMITS = {
    "For every client: messages and replies": [
        "wire.lexer",
        "wire.connection",
        "monitor.monitor",
        "monitor.tables",
        "wire.jsonrpc",
        "monitor.session",
        "net.sender",
        "net.receive_space",
    ],
    "For the programs of one user: what a uid may have": ["limits", "descriptors.threads"],
    "For administrators: secrets, objects and grants": [
        "qom.secret",
        "qom.identifiers",
        "qom.sorted_ids",
        "qom.paths",
        "descriptors.source",
        "qom.deadlines",
        "monitor.commands.listing",
        "monitor.commands.grants",
    ],
    "For clients that pass descriptors": ["descriptors.passed", "descriptors.threaded_delivery"],
    "For clients that watch: events": ["monitor.broadcast"],
    "For readers of the audit and of grants": [
        "access.grant_list",
        "access.uses",
        "audit.records",
        "access.peer",
    ],
}
"""Which modules have limits, under which heading."""


def write(directory: Path) -> None:
    """Write all tables into a directory, a Markdown file each; what has not changed stays as it
    is.
    """
    directory.mkdir(exist_ok=True)
    for name, lines in {
        "commands": commands(),
        "objects": objects(),
        "events": events(),
        "limits": limits(),
        "audit": audit(),
        "secretd": options(),
        "secretctl": verbs(),
        "secretd-fleet": fleet_verbs(),
        "exit-status": exit_status(),
    }.items():
        text = "\n".join(lines) + "\n"
        path = directory / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def cell(text: str) -> str:
    """Return text as a cell of a table."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def doc(thing: object) -> str:
    """Return a docstring, its literals in Markdown."""
    return re.sub(r"``([^`]+)``", r"`\1`", inspect.getdoc(thing) or "")


def kind(hint: Any) -> str:
    """Return what a JSON type is called."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(kind(a) for a in args if a not in (UnsetType, NoneType))
    if origin is Literal:
        return ", ".join(f'"{a}"' for a in args)
    if origin is list:
        return f"array of {kind(args[0])}"
    if origin in (typing.NotRequired, typing.Annotated):
        return kind(args[0])
    names = {
        str: "string",
        int: "int",
        bool: "bool",
        Raw: "string (sensitive)",
        object: "any",
        dict: "object",
    }
    if hint in names:
        return names[hint]
    name = getattr(hint, "__name__", str(hint))
    return {"Int32": "int32", "SensitiveAny": "any (sensitive)"}.get(name, f"`{name}`")


def shape(hint: Any) -> str:
    """Return a TypedDict's members in short, or what else is returned."""
    if get_origin(hint) is typing.NotRequired:
        return shape(get_args(hint)[0])
    if get_origin(hint) is list:
        return f"array of {shape(get_args(hint)[0])}"
    fields = getattr(hint, "__annotations__", None)
    if fields is None or not hasattr(hint, "__required_keys__"):
        return kind(hint)
    hints = typing.get_type_hints(hint)
    optional = hint.__optional_keys__
    parts = (f"{n}{'?' if n in optional else ''}: {shape(h)}" for n, h in hints.items())
    return "{" + ", ".join(parts) + "}"


MEANINGS = {
    "abstract": "list abstract types, too",
    "after": "list what comes after this id",
    "secret-expire.after": "seconds from now",
    "authz": "the id of the authz object that allows clients",
    "command-line": "the line",
    "consumers": "the identities that are to read the current version",
    "cpu-index": "ignored, as there is no CPU",
    "current": "the version that readers get",
    "create": "make an empty store where there is none",
    "credential": "the name by which systemd's units know the secret",
    "data": "the value, or its ciphertext",
    "secret-store-rekey.data": "encrypt everything anew, under a new data key",
    "enable": "turn events on or off",
    "qmp_capabilities.enable": "capabilities that the greeting offered",
    "events": "only events of these names",
    "for": "what it is for, such as a guest",
    "from": "the name of the host that has the secret",
    "name": "the name of the host",
    "offer": "an offer of another host, in base64",
    "to": "the name of the host that the offer must be from, or of a host of the fleet",
    "publisher": "the name of a publisher of the fleet",
    "secret-fleet.name": "the name of the fleet",
    "secret-fleet.root": "the public half of the key that signs rosters, 32 bytes in base64",
    "secret-fleet.carrier": "the id of an authz object: who may bring what was signed",
    "secret-fleet.max-age": "seconds after which secrets need another manifest to be read",
    "secret-fleet-accept.data": "a roster or manifest in base64",
    "secret-fleet-accept.file": "`/dev/fdset/N` of a passed descriptor with its bytes",
    "host": "the name of a host of the fleet",
    "secret-fleet-sign.expect": "the number of the last manifest for this host, 0 for none",
    "ids": "what the host is to have: ids, and the digests of their records",
    "aliases": "the aliases that the host is to have, and their versions",
    "public": "the public half of its keys, 64 bytes in base64",
    "record": "a record in base64",
    "secret-accept.file": "`/dev/fdset/N` of a passed descriptor with the record's bytes",
    "secret-host.keyid": "the id of the secret of 32 bytes from which its keys are derived",
    "expect": "the versions that the alias has now",
    "expires-after": "seconds until the grant ends",
    "fd": "the number of the descriptor, as add-fd returned it",
    "fdname": "the name of a passed descriptor",
    "fdset-id": "the number of the set",
    "file": "a file that holds the value; `/dev/fdset/N` for a passed descriptor",
    "filename": "the absolute path of a JSON file with policy and rules",
    "format": "the encoding of the value",
    "id": "the id of the object",
    "identity": "the identity that is allowed, such as `unit:nginx.service`",
    "implements": "only types that implement this one",
    "iv": "the initialisation vector, 16 bytes in base64",
    "keyid": "the id of the secret of 32 bytes that it is encrypted under",
    "secret-store.keyid": "the id of the secret of 32 bytes that opens the store",
    "secret-store-rekey.keyid": "the id of the secret of 32 bytes that opens the store, too",
    "max-reads": "how many reads the grant permits",
    "note": "a text of the program that rotates",
    "only": "no other key opens the store from then on",
    "opaque": "a text that query-fdsets returns",
    "path": "an object's id, or its path",
    "secret-store.path": "an absolute directory that only secretd's user can enter",
    "peer": "the client's identities",
    "policy": "what counts where no rule matches",
    "previous": "the version that was current before",
    "property": "the name of the property",
    "qom-type": "the type of the object",
    "refresh": "read the file again whenever it has changed",
    "rules": "the first rule that matches an identity decides",
    "secret": "an id of secrets, or a pattern with * and ?",
    "secrets": "the pattern of the ids that the store keeps",
    "sequence": "the number of the last transaction",
    "state": "locked, open or failed",
    "query-secret-grants.secret": "only grants that name this id",
    "serial": "the serial number of a key of the kernel",
    "size": "how many bytes",
    "staged": "the version that is to become current",
    "typename": "the name of a type",
    "unlock-timeout": "seconds for which units wait for a locked store",
    "value": "the new value",
}
"""What arguments and properties mean; COMMAND.NAME where a name has several meanings."""

SAMPLES = {
    "id": "disk0",
    "authz": "backup",
    "command-line": "info version",
    "qmp_capabilities.enable": ["oob"],
    "enable": True,
    "events": ["SECRET_READ"],
    "data": "letmein",
    "fd": 3,
    "fdname": "key",
    "fdset-id": 1,
    "filename": "/etc/secretd/backup.json",
    "identity": "unit:backup.service",
    "keyid": "master0",
    "current": "disk0.v2",
    "from": "alpha",
    "name": "alpha",
    "offer": "c2VjcmV0ZCBvZmZlciAx...",
    "public": "q83vEjRWeJCrze8S...",
    "record": "c2VjcmV0ZCByZWNvcmQgMQ...",
    "secret-host.keyid": "host.key",
    "publisher": "web",
    "secret-fleet.name": "trial",
    "secret-fleet.root": "q83vEjRWeJCrze8S...",
    "secret-fleet-accept.data": "c2VjcmV0ZCByb3N0ZXIgMQ...",
    "host": "alpha",
    "secret-fleet-sign.expect": 0,
    "ids": [{"id": "web.tls.v1", "digest": "e3b0c44298fc1c14..."}],
    "expect": {"current": "disk0.v1", "staged": "disk0.v2"},
    "secret-alias.current": "disk0.v1",
    "secret-store.path": "/var/lib/secretd/store",
    "secret-store.keyid": "store.key",
    **dict.fromkeys(
        (f"secret-store-{verb}.id" for verb in ("unlock", "verify", "backup", "rekey", "destroy")),
        "store",
    ),
    "secret-store-rekey.keyid": "store.key.new",
    "path": "/objects/disk0",
    "peer": ["unit:backup.service"],
    "property": "format",
    "secret": "disk0",
    "serial": 305419896,
    "size": 32,
    "typename": "secret",
    "value": "base64",
    "secret-expire.after": 3600,
    "rules": [{"match": "unit:backup.service", "policy": "allow"}],
}
"""Arguments in examples, by the same names."""

ALSO_SHOWN = {"secret": ["data"], "authz-list": ["rules"], "secret-expire": ["after"],
              "secret-events": ["events"], "qmp_capabilities": ["enable"],
              "secret-replace": ["data"]}  # fmt: skip
"""Optional arguments that an example has, by command or type."""


def meaning(owner: str, name: str) -> str:
    """Return what an argument or property means. Raises KeyError for one that is not described."""
    return MEANINGS.get(f"{owner}.{name}") or MEANINGS[name]


def example(command: str, struct: Any, qom_type: str = "") -> str:
    """Return a line of QMP with the required arguments, and a few more."""
    arguments = {"qom-type": qom_type} if qom_type else {}
    for m in members(struct):
        if m.required or m.wire_name in ALSO_SHOWN.get(qom_type or command, ()):
            place = f"{qom_type or command}.{m.wire_name}"
            sample = SAMPLES.get(place, SAMPLES.get(m.wire_name))
            assert sample is not None, (command, m.wire_name)
            arguments[m.wire_name] = sample
    if command == "rpc.discover":  # which no QMP socket has
        return json.dumps({"jsonrpc": "2.0", "method": command, "id": 1})
    message = {"execute": command, "arguments": arguments} if arguments else {"execute": command}
    return json.dumps(message)


def _example(command: str, struct: Any, qom_type: str = "") -> Iterator[str]:
    text = example(command, struct, qom_type)
    if len(text) > 88:  # as a page shows it without a scroll bar
        text = text.replace(', "arguments": {', ',\n "arguments": {', 1)
    yield "```json"
    yield text
    yield "```"
    yield ""


def _arguments(command: Command) -> Iterator[str]:
    if command.tag_field:
        yield f"An object of a type, by `{command.tag_field}`: its members are those of that type."
        yield ""
        yield from _example(command.name, command.arguments["secret"], "secret")
        return
    ((tag, struct),) = command.arguments.items()
    if members(struct):
        yield from _table("argument", struct, command.name)
    yield from _example(command.name, struct, tag or _tag_of(struct))


def _tag_of(struct: Any) -> str:
    tag = struct.__struct_config__.tag
    return tag if isinstance(tag, str) else ""


def _table(title: str, struct: Any, owner: str) -> Iterator[str]:
    """Return a table of a Struct's members; ``owner``: the command or type that has them."""
    hints = typing.get_type_hints(struct)
    yield f"| {title} | type | meaning |"
    yield "|---|---|---|"
    for m in members(struct):
        words = meaning(owner, m.wire_name) + ("" if m.required else " (optional)")
        yield f"| `{m.wire_name}` | {cell(kind(hints[m.name]))} | {cell(words)} |"
    yield ""


def commands() -> Iterator[str]:
    """Return a section for each command."""
    for command in COMMANDS.by_name.values():
        yield f"## `{command.name}`"
        yield ""
        sockets = "control and client" if command.client else "control"
        oob = ", out of band too" if command.oob else ""
        oob += " with protocol=jsonrpc" if command.only == "jsonrpc" else ""
        yield f"*On the {sockets} socket{oob}.* {doc(command.function)}"
        yield ""
        yield from _arguments(command)
        returned = "an empty object"
        if command.returns is not None:
            returned = "`" + shape(command.returns).replace("`", "") + "`"
        yield f"Returns {returned}."
        yield ""


def objects() -> Iterator[str]:
    """Return a section for each type of objects that can be made."""
    for options in COMMANDS.by_name["object-add"].arguments.items():
        name, struct = options
        yield f"## `{name}`"
        yield ""
        yield doc(struct)
        yield ""
        yield from _table("property", struct, name)
        yield from _example("object-add", struct, name)
    yield "## Types that `qom-list-types` lists"
    yield ""
    yield "| type | parent | abstract |"
    yield "|---|---|---|"
    for info in TYPES.listed(None, abstract=True):
        parent = f"`{info['parent']}`" if "parent" in info else ""
        yield f"| `{info['name']}` | {parent} | {'yes' if info.get('abstract') else ''} |"
    yield ""


def events() -> Iterator[str]:
    """Return a table of all events."""
    yield "| event | data | |"
    yield "|---|---|---|"
    for name, data in EVENTS.items():
        yield f"| `{name}` | `{cell(shape(data)).replace('`', '')}` | {cell(doc(data))} |"
    yield ""
    peer = {"uid": 0, "gid": 0, "pid": 812, "unit": "unit:vmm.service"}
    time = {"seconds": 1893456000, "microseconds": 4711}
    data = {"id": "disk0", "peer": peer}
    message = {"timestamp": time, "event": "SECRET_READ", "data": data}
    yield "```json"
    yield json.dumps(message).replace(', "data"', ',\n "data"')
    yield "```"
    yield ""


def constants(module: Any) -> Iterator[tuple[str, Any, str]]:
    """Return name, value and documentation of a module's constants that are numbers."""
    tree = ast.parse(inspect.getsource(module))
    for before, behind in zip(tree.body, tree.body[1:], strict=False):
        target = before.target if isinstance(before, ast.AnnAssign) else None
        if not isinstance(target, ast.Name) or target.id.startswith("_"):
            continue
        value = getattr(module, target.id)
        words = (
            behind.value.value
            if isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant)
            else None
        )
        if isinstance(value, (int, float)) and isinstance(words, str):
            yield target.id, value, words


def tuning() -> Iterator[tuple[str, Any, str]]:
    """Return name, value and documentation of the fields of limits.Tuning."""
    (tree,) = ast.parse(inspect.getsource(Tuning)).body
    assert isinstance(tree, ast.ClassDef)
    for before, behind in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            assert isinstance(behind, ast.Expr)
            assert isinstance(behind.value, ast.Constant)
            name = before.target.id
            yield name.upper(), getattr(Tuning, name), behind.value.value


def limits() -> Iterator[str]:
    """Return a table for each group of limits."""
    for title, modules in LIMITS.items():
        yield f"## {title}"
        yield ""
        yield "| limit | value | |"
        yield "|---|---|---|"
        for name in modules:
            for constant, value, words in constants(importlib.import_module(f"secretd.{name}")):
                shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
                yield f"| `{constant}` | {shown} | {cell(words)} |"
        yield ""
    yield "## For all: times and sizes"
    yield ""
    yield "| limit | value | |"
    yield "|---|---|---|"
    for constant, value, words in tuning():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        yield f"| `{constant}` | {shown} | {cell(words)} |"
    yield ""


_AUDIT = {
    "seq": "the record's number, from 1 on; it goes on in the same file when secretd is started "
    "again",
    "time": "when, in UTC",
    "event": "what happened",
    "decision": "allow or deny, where something was asked for",
    "rule": "what decided: the control socket, or which grant",
    "id": "of the object, 128 characters of it; ? where what was asked for is no id",
    "alias": "the alias by which the secret was read",
    "host": "the host that it was wrapped for, or came from",
    "origin": "the publisher that it came from",
    "number": "of a roster or manifest",
    "credential": "the name that a unit asked by",
    "type": "of the object",
    "size": "of the secret, in bytes",
    "door": "by which socket; or the command line",
    "peer": "uid, gid, pid and unit of the peer, as the kernel reported them at connect time",
    "reason": "in words",
    "state": "of a store",
    "current": "the version that an alias has as the current one",
    "staged": "the version that is to become the current one",
    "previous": "the version that was the current one",
    "count": "how many",
    "of": "the number of the record that this one takes back",
    "version": "secretd's",
    "objects": "how many there were at the start",
    "prev": "of the first record of a run or a file: the last member of the record before",
    "dropped": "how many records could not be written before this one",
    "hash": "SHA-256 of the line before and of this one without its last member; `mac` with "
    "`--audit-key`",
}


def audit() -> Iterator[str]:
    """Return a table of the members of a record."""
    names = {"seq", "time", "hash", *(n.replace("_", "-") for n in AuditRecord.__struct_fields__)}
    if names != _AUDIT.keys():
        raise ValueError(
            f"scripts/dev/reference.py does not say what these are: {names ^ _AUDIT.keys()}"
        )
    yield "| member | |"
    yield "|---|---|"
    for name, words in _AUDIT.items():
        yield f"| `{name}` | {words} |"
    yield ""


def options() -> Iterator[str]:
    """Return the options of the daemon."""
    parser = daemon_parser()
    for action in parser._actions:  # noqa: SLF001
        if "--help" in action.option_strings:
            continue
        value = action.metavar or ("|".join(action.choices) if action.choices else None)
        shown = f"{action.option_strings[-1]}{f'={value}' if value and action.nargs != 0 else ''}"
        yield f"`{shown}`"
        yield f": {(action.help or '').replace('%(default)s', str(action.default))}"
        yield ""
    yield parser.epilog.strip() if parser.epilog else ""
    yield ""


def verbs() -> Iterator[str]:
    """Return a section for each verb of secretctl."""
    for title, names in SECTIONS.items():
        yield f"## {title}"
        yield ""
        for name in names:
            yield from _verb("###", f"secretctl {name}", cli.commands[name])


def fleet_verbs() -> Iterator[str]:
    """Return a section for each verb of secretd-fleet."""
    for title, names in FLEET_SECTIONS.items():
        yield f"## {title}"
        yield ""
        for name in names:
            yield from _verb("###", f"secretd-fleet {name}", fleet.commands[name])
    missing = set(fleet.commands) - {name for names in FLEET_SECTIONS.values() for name in names}
    assert not missing, missing


FLEET_SECTIONS = {
    "The operator": ("init", "enrol", "revoke"),
    "A publisher": ("publish", "withdraw", "renew", "status"),
    "Every host": ("join", "agent"),
}


def _verb(level: str, name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=name)
    yield f"{level} {name}"
    yield ""
    yield "```none"
    yield " ".join([name, *command.collect_usage_pieces(context)])
    yield "```"
    yield ""
    yield inspect.cleandoc(command.help or "")
    yield ""
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record and record[1] and record[0] not in _COMMON:
            yield f"`{record[0]}`"
            yield f": {record[1]}"
            yield ""
    if command.epilog:
        yield "```none"
        yield from (line.strip() for line in command.epilog.split("\n")[2:])
        yield "```"
        yield ""


_COMMON = ("-h, --help", "--help", "--json", "--socket PATH")


def exit_status() -> Iterator[str]:
    """Return the exit statuses of secretctl."""
    yield "| status | |"
    yield "|---|---|"
    for number, words in EXIT_STATUS.items():
        yield f"| {number} | {words} |"
    yield ""


__all__ = ["UNSET", "write"]
