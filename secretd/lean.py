# SPDX-License-Identifier: LGPL-2.1-or-later
"""asyncio and msgspec, imported without what they only import where they find it.

asyncio can do TLS if there is ssl, msgspec knows the types of typing_extensions if that is installed; neither
is of use here, and together they take a tenth of the daemon's start. Who wants them later still gets them.
daemon imports this before all else; it has nothing to call.
"""

import sys

_UNUSED = ("ssl", "typing_extensions")

_hidden = [name for name in _UNUSED if name not in sys.modules]
for _name in _hidden:
    sys.modules[_name] = None  # type: ignore[assignment]  # which is how an import is made to fail
try:
    import asyncio  # noqa: F401

    import msgspec  # noqa: F401
finally:
    for _name in _hidden:
        del sys.modules[_name]
