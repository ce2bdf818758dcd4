# SPDX-License-Identifier: LGPL-2.1-or-later
"""Overwriting a bytes object that a library has returned with a key in it.

CPython keeps the content of a bytes object in the object itself, behind a header of
``bytes.__basicsize__ - 1`` bytes (Include/cpython/bytesobject.h). No other part of the program may
use the object.
"""

import ctypes
from typing import Final

_HEADER_BYTES: Final = bytes.__basicsize__ - 1


def wipe_bytes(data: bytes) -> None:
    """Overwrite the content of a bytes object with zeros. Short ones, of which CPython has one
    each, stay.
    """
    if len(data) > 1:
        ctypes.memset(id(data) + _HEADER_BYTES, 0, len(data))
