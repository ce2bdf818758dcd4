# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command `secretd-fleet`: secrets for many hosts, through etcd. cli has its verbs.

Its packages are an extra, so they may be missing.
"""

import sys


def main() -> int:
    """Run `secretd-fleet`; return the exit status."""
    try:
        from secretd.fleet.cli import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("grpclib", "google", "h2", "multidict"):
            raise
        print(
            f"secretd-fleet: the package '{error.name}' is missing; 'pip install secretd[fleet]' "
            "or 'scripts/install --fleet' brings it",
            file=sys.stderr,
        )
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
