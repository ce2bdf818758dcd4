# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of `secretd-fleet`, and its errors.

Its operator has a fleet's directory (init, enrol, revoke). A publisher's host has secretd with the
secrets (publish, withdraw, renew), and every host an agent (join, agent). Secrets are no arguments.
"""

import sys
from typing import Final

import click
from qemu.qmp import ConnectError, ExecuteError, QMPError

from secretd.errors import SecretdError
from secretd.fleet import host_verbs, operator_verbs, publisher_verbs
from secretd.fleet.etcd import Refused, Unreachable
from secretd.fleet.options import commands

__all__ = ["host_verbs", "operator_verbs", "publisher_verbs", "run"]

FAILED: Final = 1


def run() -> int:
    """Run `secretd-fleet`; return the exit status."""
    try:
        ended = commands.main(standalone_mode=False, prog_name="secretd-fleet")
    except click.UsageError as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ExecuteError as error:
        return _failed(str(error))
    except ConnectError as error:
        return _failed(f"cannot connect to secretd: {error}")
    except Refused as error:
        return _failed(f"etcd refuses: {error}")
    except Unreachable as error:
        return _failed(f"etcd cannot be reached: {error}")
    except (SecretdError, QMPError) as error:
        return _failed(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}")
    return ended if isinstance(ended, int) else 0


def _failed(message: str) -> int:
    print(f"secretd-fleet: {message}", file=sys.stderr)
    return FAILED
