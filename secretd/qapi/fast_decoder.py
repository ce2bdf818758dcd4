# SPDX-License-Identifier: LGPL-2.1-or-later
"""An optimisation: decode one request straight from its bytes, or decline.

The reference is wire.lexer and wire.parser, followed by qapi.command.check. FastDecoder builds the
same Struct, and accepts a line only if the reference provably would; a property test holds them
equal. usual_lines calls it, and wire.connection falls back to the reference.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Final, Union

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from secretd.qapi.visitor import alternatives, members

_FAST_ID: Final = re.compile(rb'(?:0|-?[1-9][0-9]{0,17}|"[ !#-\[\]-~]{0,1024}")')
_FAST_SENSITIVE: Final = re.compile(rb'"[ !#-\[\]-~]*"')
_ORDINARY = rb'[^"\\\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xff]*'
_EMPTY: Final = Raw(b"")


class FastDecoder:
    """Decodes the line of a request where the result provably equals the reference's.

    It declines everything in doubt: escapes, bytes outside ASCII, duplicate members (the line then
    has more quotes than the decoded request written again), and ids that QEMU prints differently.
    """

    def __init__(self, requests: Mapping[type[Struct], Iterable[type[Struct]]]) -> None:
        """``requests``: the Structs of whole messages, each with those of its arguments."""
        structs = {struct for arguments in requests.values() for struct in arguments}
        self._sensitive: dict[type, str | None] = {struct: _sensitive(struct) for struct in structs}
        self._sensitive[UnsetType] = None
        self._from_json = msgspec.json.Decoder(Union[tuple(requests)]).decode  # noqa: UP007 - built at run time
        self._encode = msgspec.json.Encoder().encode
        self._shapes: dict[int, re.Pattern[bytes]] = {}

    def decode(self, line: memoryview) -> Struct | None:
        """Return the request Struct of a line in locked memory, or None to decline.

        It raises nothing, since msgspec's errors quote the text. Views in the Struct are valid
        until the caller moves or wipes the line.
        """
        try:
            request = self._from_json(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        arguments, request_id = request.arguments, request.id
        quotes = aside = 0
        if request_id is not UNSET:
            id_text = memoryview(request_id)
            if not _FAST_ID.fullmatch(id_text):
                return None
            quotes = 2 if id_text[0] == 0x22 else 0
            aside = len(id_text)
            request.id = _EMPTY
        secret: Raw | UnsetType = UNSET
        name = self._sensitive.get(type(arguments), "")
        if name == "":  # no request can name this type
            return None
        if name is not None:
            secret = getattr(arguments, name)
            if secret is not UNSET:
                text = memoryview(secret)
                if not _FAST_SENSITIVE.fullmatch(text):
                    return None
                quotes += 2
                aside += len(text)
                setattr(arguments, name, _EMPTY)
        encoded = self._encode(request)
        # Repeats, escapes, spaces and members that the encoder omits only make the line longer than
        # its re-encoding, so equal lengths prove that there are none.
        whole = len(encoded) + aside + 1 == len(line) and line[-1] == 0x0A
        if (
            not (whole and encoded.isascii() and b"\x7f" not in encoded)
            and not self._shape(quotes + encoded.count(b'"')).fullmatch(line)
        ):  # fmt: skip
            return None
        if aside:
            request.id = request_id
            if name is not None:
                setattr(arguments, name, secret)
        return request  # type: ignore[no-any-return]

    def _shape(self, quotes: int) -> re.Pattern[bytes]:
        """Return the pattern of a plain line with so many quotes."""
        shape = self._shapes.get(quotes)
        if shape is None:
            shape = re.compile(_ORDINARY + rb'(?:"' + _ORDINARY + b"){%d}" % quotes)
            self._shapes[quotes] = shape
        return shape


def _sensitive(struct: type[Struct]) -> str | None:
    """Return the name of the member that carries a secret; there is at most one."""
    names = [member.name for member in members(struct) if Raw in alternatives(member.hint)]
    assert len(names) < 2, struct
    return names[0] if names else None
