# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of secretctl by name; a verb's module is imported when the verb is needed."""

import importlib
from typing import Final, cast

from secretd.ctl.verb import Verb

MODULES: Final = {
    **dict.fromkeys(("add", "read", "list", "del", "generate", "expire"), "secrets"),
    "rotate": "rotate",
    **dict.fromkeys(("host", "peer"), "hosts"),
    **dict.fromkeys(("offer", "wrap", "accept", "handover"), "transfer"),
    **dict.fromkeys(("run", "push", "seal"), "handover"),
    **dict.fromkeys(("grant", "revoke", "grants", "access", "explain"), "access"),
    "libvirt": "libvirt",
    "store": "store",
    "show": "show",
    "audit": "audit",
    **dict.fromkeys(("import", "export"), "bulk"),
    "watch": "watch",
    **dict.fromkeys(("stats", "metrics"), "figures"),
    **dict.fromkeys(("status", "shell", "check-config"), "daemon"),
    "doctor": "doctor",
}
"""The module of each verb."""

_FUNCTIONS: Final = {
    "del": "delete",
    "list": "list_secrets",
    "import": "import_",
    "check-config": "check_config",
}
"""The names of functions whose verbs' names Python has taken."""


def find(name: str) -> Verb:
    """Return the verb of a name in MODULES."""
    module = importlib.import_module(f"secretd.ctl.{MODULES[name]}")
    return cast(Verb, getattr(module, _FUNCTIONS.get(name, name)))
