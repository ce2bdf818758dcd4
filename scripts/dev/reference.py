# SPDX-License-Identifier: LGPL-2.1-or-later
"""The reference pages' tables, made from the code that decides them, so that they cannot drift.

conf.py calls `write`; the pages in reference/ and man/ include what it writes.
"""

import ast
import importlib
import inspect
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
from secretd.limits import Tuning
from secretd.monitor.commands import COMMANDS
from secretd.monitor.events import EVENTS
from secretd.qapi.command import Command
from secretd.qapi.visitor import members
from secretd.qom.registry import TYPES

LIMITS = {
    "Messages and replies": [
        "wire.lexer",
        "wire.connection",
        "monitor.monitor",
        "monitor.core",
        "monitor.session",
        "net.sender",
        "net.receive_space",
    ],
    "What each uid may have": ["limits", "descriptors.threads"],
    "Secrets and objects": [
        "qom.secret",
        "qom.identifiers",
        "qom.sorted_ids",
        "qom.paths",
        "descriptors.source",
        "qom.deadlines",
        "monitor.commands.listing",
        "monitor.commands.grants",
    ],
    "Descriptors and hand-over": ["descriptors.passed", "descriptors.threaded_delivery"],
    "Events": ["monitor.broadcast"],
    "Access and the audit": ["access.grant_list", "access.uses", "audit.records", "access.peer"],
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


def _arguments(command: Command) -> Iterator[str]:
    if command.tag_field:
        yield f"An object of a type, by `{command.tag_field}`: its members are those of that type."
        yield ""
        return
    (struct,) = command.arguments.values()
    if members(struct):
        yield from _table("argument", struct)


def _table(title: str, struct: Any) -> Iterator[str]:
    """Return a table of a Struct's members."""
    hints = typing.get_type_hints(struct)
    yield f"| {title} | type | required |"
    yield "|---|---|---|"
    for m in members(struct):
        required = "yes" if m.required else ""
        yield f"| `{m.wire_name}` | {cell(kind(hints[m.name]))} | {required} |"
    yield ""


def commands() -> Iterator[str]:
    """Return a section for each command."""
    for command in COMMANDS.by_name.values():
        yield f"## `{command.name}`"
        yield ""
        sockets = "control and client" if command.client else "control"
        oob = ", out of band too" if command.oob else ""
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
        yield from _table("property", struct)
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
    yield "## Times and sizes"
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
    "credential": "the name that a unit asked by",
    "type": "of the object",
    "size": "of the secret, in bytes",
    "door": "by which socket; or the command line",
    "peer": "uid, gid, pid and unit of the peer, as the kernel reported them at connect time",
    "reason": "in words",
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
            command = cli.commands[name]
            context = click.Context(command, info_name=f"secretctl {name}")
            yield f"### secretctl {name}"
            yield ""
            yield "```none"
            yield " ".join([f"secretctl {name}", *command.collect_usage_pieces(context)])
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
