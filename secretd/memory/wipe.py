# SPDX-License-Identifier: LGPL-2.1-or-later
"""Overwriting plaintext in place.

Every package that holds plaintext for a moment calls it: memory, crypto, net and descriptors. Both
functions keep the object in place: nothing is reallocated, so no copy stays behind.
"""

_ZEROS = bytes(4096)


def wipe(view: memoryview) -> None:
    """Overwrite a writable memoryview of bytes with zeros."""
    size = len(view)
    if size <= 4096:
        view[:] = _ZEROS[:size]
        return
    for start in range(0, size - 4095, 4096):
        view[start : start + 4096] = _ZEROS
    rest = size & 4095
    if rest:
        view[size - rest :] = _ZEROS[:rest]


def wipe_bytearray(data: bytearray) -> None:
    """Overwrite a bytearray with zeros in place, without moving it."""
    data[:] = bytes(len(data))
