# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's start, made shorter: its modules are imported without what they do not need.

asyncio can do TLS if there is ssl, msgspec knows the types of typing_extensions if that is installed, shutil
(which argparse wants) unpacks what bz2 and lzma have packed; none of it is of use here, and who wants them
later still gets them. Nor is garbage looked for meanwhile, of which importing leaves next to none, nor among
what was imported later. Together that is a quarter of the start. daemon imports this before all else, and
calls `imported` after.
"""

import gc
import sys

gc.disable()

_UNUSED = ("bz2", "lzma", "ssl", "typing_extensions")

_hidden = [name for name in _UNUSED if name not in sys.modules]
for _name in _hidden:
    sys.modules[_name] = None  # type: ignore[assignment]  # which is how an import is made to fail
try:
    import asyncio  # noqa: F401
    import shutil  # noqa: F401

    import msgspec  # noqa: F401
finally:
    for _name in _hidden:
        del sys.modules[_name]


def imported() -> None:
    """Everything is imported: garbage is looked for again, in what is made from now on."""
    gc.freeze()
    gc.enable()
