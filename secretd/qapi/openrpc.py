# SPDX-License-Identifier: LGPL-2.1-or-later
"""The OpenRPC document of a JSON-RPC socket (https://spec.open-rpc.org), from commands' functions.

It has the methods with params by name, their results and the errors, as JSON Schema. Like
introspect it is derived from annotations; nothing is written twice. monitor asks once for each
socket.
"""

import inspect
import re
import typing
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypedDict, Union

import msgspec.structs
from msgspec import Raw, Struct, UnsetType

from secretd import __version__
from secretd.qapi.command import Command
from secretd.qapi.visitor import Int32, SensitiveAny, members
from secretd.wire import jsonrpc

OPENRPC: Final = "1.2.6"
"""The version of the specification."""

Schema = dict[str, Any]

_SIMPLE: Final[dict[Any, Schema]] = {
    str: {"type": "string"},
    Raw: {"type": "string", "writeOnly": True},
    int: {"type": "integer"},
    Int32: {"type": "integer", "minimum": -(1 << 31), "maximum": (1 << 31) - 1},
    bool: {"type": "boolean"},
    object: {},
    SensitiveAny: {"writeOnly": True},
    NoneType: {"type": "object", "maxProperties": 0},
}

_ERRORS: Final = {
    jsonrpc.PARSE_ERROR: "Parse error",
    jsonrpc.INVALID_REQUEST: "Invalid Request",
    jsonrpc.METHOD_NOT_FOUND: "Method not found",
    jsonrpc.INVALID_PARAMS: "Invalid params",
    jsonrpc.INTERNAL_ERROR: "Internal error",
    jsonrpc.SERVER_ERROR: "The command failed; data.class is QMP's class of the error",
}


OpenRPCDocument = TypedDict(
    "OpenRPCDocument",
    {
        "openrpc": str,
        "info": object,
        "methods": list[object],
        "components": object,
        "x-notifications": list[object],
    },
)
"""The result of rpc.discover."""


def openrpc(commands: Iterable[Command], events: Mapping[str, type]) -> OpenRPCDocument:
    """Return the document for these commands and events.

    ``events``: by name, the TypedDict of each event's data; they are notifications.
    """
    return {
        "openrpc": OPENRPC,
        "info": {
            "title": "secretd",
            "version": __version__,
            "license": {"name": "LGPL-2.1-or-later"},
        },
        "methods": [_method(command) for command in commands],
        "components": {
            "errors": {
                f"error{-code}": {"code": code, "message": words} for code, words in _ERRORS.items()
            }
        },
        "x-notifications": [
            {"name": name, "params": _schema(data)} for name, data in events.items()
        ],
    }


def _method(command: Command) -> dict[str, object]:
    errors = [{"$ref": f"#/components/errors/error{-code}"} for code in _ERRORS]
    return {
        "name": command.name,
        "summary": _summary(command.function),
        "paramStructure": "by-name",
        "params": _params(command),
        "result": {"name": "result", "schema": _schema(command.returns or NoneType)},
        "errors": errors[2:],
    }


def _params(command: Command) -> list[dict[str, object]]:
    """Return the params of a method; of one with alternatives, those of all of them."""
    found: dict[str, dict[str, object]] = {}
    structs = list(command.arguments.values())
    if command.tag_field:
        tag = {"type": "string", "enum": list(command.arguments)}
        found[command.tag_field] = {"name": command.tag_field, "required": True, "schema": tag}
    for struct in structs:
        hints = typing.get_type_hints(struct)
        for member in members(struct):
            everywhere = all(
                any(m.wire_name == member.wire_name and m.required for m in members(other))
                for other in structs
            )
            found.setdefault(
                member.wire_name,
                {
                    "name": member.wire_name,
                    "required": member.required and everywhere,
                    "schema": _schema(hints[member.name]),
                },
            )
    # As the specification demands, the required ones come first.
    return sorted(found.values(), key=lambda param: not param["required"])


def _schema(hint: Any) -> Schema:
    """Return the JSON Schema of an annotation."""
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        kinds = [_schema(each) for each in args if each is not UnsetType]
        return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    if origin is Literal:
        return {"type": "string", "enum": list(args)}
    if origin is list:
        return {"type": "array", "items": _schema(args[0])}
    if isinstance(hint, type) and issubclass(hint, Struct):
        hints = typing.get_type_hints(hint)
        known = msgspec.structs.fields(hint)
        properties = {each.encode_name: _schema(hints[each.name]) for each in known}
        return _object(properties, [each.encode_name for each in known if each.required])
    hints = typing.get_type_hints(hint)  # of a TypedDict
    properties = {name: _schema(each) for name, each in hints.items()}
    return _object(properties, sorted(hint.__required_keys__))


def _object(properties: Schema, required: list[str]) -> Schema:
    made: Schema = {"type": "object", "properties": properties}
    return made | {"required": required} if required else made


def _summary(function: Any) -> str:
    """Return the first sentence of a docstring."""
    text = " ".join((inspect.getdoc(function) or "").split("\n\n", maxsplit=1)[0].split())
    return re.sub(r"``([^`]*)``", r"\1", text)
