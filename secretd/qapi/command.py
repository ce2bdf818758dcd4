# SPDX-License-Identifier: LGPL-2.1-or-later
"""Typed arguments: from a command's annotated function to checks in QEMU's words.

The function is the single source. Its signature yields a msgspec Struct of its arguments and one of
the whole request. `check` fills the first from the reference parser's values through qapi.visitor;
`FastDecoder` fills the second straight from the bytes. Both build the same Struct, so handlers see
one type. monitor.commands defines the commands; this module knows none.

What an annotation means:

    str              a string
    Literal["a","b"] an enumeration
    int, Int32       an int64, an int32
    bool             true or false
    list[...]        an array of one of these
    a Struct         an object with such members
    msgspec.Raw      a string that carries a secret: the JSON text of its content in locked memory,
                     between double quotes, valid until the handler returns or awaits
    object           any JSON, undecoded (wire.parser.JSON)
    SensitiveAny     the same, where it may carry a secret
    … | UnsetType    optional; UNSET when not given
"""

import collections.abc
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Union

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from secretd.errors import ArgumentError
from secretd.qapi.visitor import (
    JSON_VISITOR,
    Visitor,
    alternatives,
    check_enum,
    check_members,
    members,
)
from secretd.wire.encoder import JSONText
from secretd.wire.parser import JSON


class Command(NamedTuple):
    """A QMP command.

    ``function(monitor, *arguments)`` executes it and returns JSON or a coroutine of it.
    ``arguments``: the alternative Structs by the value of ``tag_field``; an untagged Struct stands
    under "". ``request``: the Struct that the fast path may decode, None if it must decline;
    ``rpc_request``: the same for JSON-RPC. ``only``: the one dialect that has it, "" for all.
    ``boxed``: the function takes the Struct itself. ``client``: allowed on the client socket.
    ``oob``: may run out of band. ``waits``: may have to wait. ``returns``: the annotation of the
    result, None for nothing.
    """

    name: str
    function: Callable[..., Any]
    tag_field: str
    arguments: dict[str, type[Struct]]
    request: type[Struct] | None
    boxed: bool
    client: bool
    oob: bool
    waits: bool
    returns: Any
    rpc_request: type[Struct] | None
    only: str = ""


class Commands:
    """Commands by name, in order: those of ``parts``, then those of decorated functions."""

    def __init__(self, *parts: "Commands") -> None:
        self.by_name: dict[str, Command] = {}
        for part in parts:
            self.by_name |= part.by_name

    def __call__(
        self,
        *,
        name: str | None = None,
        client: bool = False,
        oob: bool = False,
        waits: bool = False,
        only: str = "",
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator for a function whose first parameter is the monitor, and the others
        the arguments.

        ``name``: the command's, by default the function's with '-' for '_'. ``client``, ``oob``,
        ``waits``, ``only``: see `Command`. A sole parameter ``arguments`` gets the Struct itself.
        The decorator raises TypeError for an annotation that QAPI does not have.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            wire_name = name or function.__name__.replace("_", "-")
            made = _command(function, wire_name, client=client, oob=oob, waits=waits)
            self.by_name[wire_name] = made._replace(only=only)
            return function

        return register


def _command(
    function: Callable[..., Any], name: str, *, client: bool, oob: bool, waits: bool
) -> Command:
    # 1. The Structs of the arguments, given as one parameter or made from several.
    hints = typing.get_type_hints(function)
    parameters: list[inspect.Parameter] = list(inspect.signature(function).parameters.values())[1:]
    boxed = len(parameters) == 1 and parameters[0].name == "arguments"
    if boxed:
        structs = list(typing.get_args(hints["arguments"])) or [hints["arguments"]]
    else:
        fields: list[Any] = [
            (p.name, hints[p.name]) if p.default is p.empty else (p.name, hints[p.name], p.default)
            for p in parameters
        ]
        structs = [
            msgspec.defstruct(
                _camel(name) + "Arguments",
                fields,
                forbid_unknown_fields=True,
                rename="kebab",
                omit_defaults=True,
            )
        ]
    # 2. The command.
    return Command(
        name=name,
        function=function,
        tag_field=structs[0].__struct_config__.tag_field or "",
        arguments={struct.__struct_config__.tag or "": struct for struct in structs},
        # A type that QAPI does not have is an error at definition, not at the first request.
        request=_request(name, list(filter(_is_fast, structs)), "execute"),
        rpc_request=_request(name, list(filter(_is_fast, structs)), "method"),
        boxed=boxed,
        client=client,
        oob=oob,
        waits=waits,
        returns=_returned(hints["return"]),
    )


def _camel(name: str) -> str:
    return "".join(map(str.capitalize, re.split("[-_]", name)))


def _request(
    name: str, structs: list[type[Struct]], tag_field: Literal["execute", "method"]
) -> type[Struct] | None:
    """Return the Struct of the whole message, for the alternatives that the fast path may
    decode.

    ``tag_field``: the member that names the command: QMP's, or JSON-RPC's.
    """
    if not structs:
        return None
    config = structs[0].__struct_config__
    arguments: Any = structs[0]
    if config.tag is not None:
        # msgspec accepts the tag only in a union: with one type, add one that no request can name.
        nothing = msgspec.defstruct("Nothing", [], tag_field=config.tag_field, tag="\0")
        arguments = Union[(*structs, nothing)]
    optional = all(not member.required for struct in structs for member in members(struct))
    fields: list[Any] = [
        ("arguments", arguments | UnsetType, UNSET) if optional else ("arguments", arguments),
        ("id", Raw | UnsetType, UNSET),
    ]
    if tag_field == "method":
        fields.insert(0, ("jsonrpc", Literal["2.0"]))
        fields = [*[f for f in fields if len(f) == 2], *[f for f in fields if len(f) == 3]]
    return msgspec.defstruct(
        _camel(name) + ("Request" if tag_field == "execute" else "Call"),
        fields,
        tag_field=tag_field,
        tag=name,
        rename=None if tag_field == "execute" else {"arguments": "params"},
        forbid_unknown_fields=True,
        omit_defaults=True,
    )


def _returned(hint: Any) -> Any:
    """Return the annotated result of a handler, at once or after waiting; None for nothing."""
    is_union = typing.get_origin(hint) in (types.UnionType, Union)
    for kind in typing.get_args(hint) if is_union else [hint]:
        origin = typing.get_origin(kind)
        if origin not in (collections.abc.Awaitable, collections.abc.Coroutine):
            if origin is JSONText:
                return typing.get_args(kind)[0]
            return None if kind is types.NoneType else kind
    raise TypeError(f"{hint} does not say what is returned at once")


def _is_fast(struct: type[Struct]) -> bool:
    """Return True if the fast path may decode such arguments.

    msgspec and QEMU judge some spellings of numbers, arrays and objects differently, so these need
    the reference.
    """
    for member in members(struct):
        (kind,) = alternatives(member.hint)
        if kind is not str and kind is not Raw and typing.get_origin(kind) is not Literal:
            return False
    return True


def check(command: Command, arguments: dict[str, JSON], visitor: Visitor = JSON_VISITOR) -> Struct:
    """Return the Struct of a command's arguments.

    ``arguments``: the members by name, as wire.parser returns them. ``visitor``: the input visitor,
    for JSON or keyval. Raises CommandError in the words of QEMU's qapi-visit-core.c and
    qobject-input-visitor.c.
    """
    struct = command.arguments.get("")
    if struct is not None:
        return check_members(visitor, "", arguments, struct, ())
    tag_field = command.tag_field
    if tag_field not in arguments:
        raise ArgumentError(f"Parameter '{tag_field}' is missing")
    tag = visitor.text(tag_field, arguments[tag_field]).to_str()
    struct = command.arguments[check_enum(tag_field, tag, tuple(command.arguments))]
    return check_members(visitor, "", arguments, struct, (tag_field,))


def text_of(raw: Raw) -> memoryview:
    """Return the content of a sensitive string, a borrowed view in locked memory, with its quotes
    removed.
    """
    return memoryview(raw)[1:-1]
