# SPDX-License-Identifier: LGPL-2.1-or-later
"""Speed up start-up by blocking imports of optional modules (ssl, bz2, lzma, typing_extensions).

asyncio supports TLS if ssl can be imported, msgspec knows the types of typing_extensions, and
shutil, which argparse imports, unpacks with bz2 and lzma; the daemon needs none of it. Code that
imports such a module later still gets it. The garbage collector is off meanwhile, since imports
make next to no garbage, and it never examines the imported objects. Together this saves a quarter
of the start. daemon.main uses it.
"""

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import Final

_UNUSED: Final = ("bz2", "lzma", "ssl", "typing_extensions")


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Import the daemon's modules inside this context."""
    blocked = [name for name in _UNUSED if name not in sys.modules]
    gc.disable()
    for name in blocked:
        sys.modules[name] = None  # type: ignore[assignment]  # this makes an import fail
    try:
        yield
    finally:
        for name in blocked:
            del sys.modules[name]
        gc.freeze()
        gc.enable()
