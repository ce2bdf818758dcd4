# SPDX-License-Identifier: LGPL-2.1-or-later
"""argparse that does not print what it cannot place: a secret may stand in a mistyped argument.

daemon and ctl make their command lines with it.
"""

import argparse
from collections.abc import Sequence


class QuietParser(argparse.ArgumentParser):
    """Names an unknown option without its value, and an unknown argument not at all."""

    def parse_args(  # type: ignore[override]  # the overload with a namespace is not used
        self, args: Sequence[str] | None = None
    ) -> argparse.Namespace:
        """Return the options, or end the process with status 2 and a usage message."""
        options, unknown = self.parse_known_args(args)
        if unknown:
            name = unknown[0].partition("=")[0]
            shown = f"option {name}" if name.startswith("-") else "argument"
            self.error(f"unknown {shown} (secrets are not given as arguments)")
        return options
