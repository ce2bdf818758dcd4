# SPDX-License-Identifier: LGPL-2.1-or-later
"""What secretd says once it is ready: its sockets, its memory, its audit, and the next step.

daemon.process calls it, before the first connection.
"""

import logging
import os
import shutil
import sys

from secretd import __version__, paths
from secretd.access.peer import SocketRole
from secretd.audit.log import Audit
from secretd.linux.locked_pages import limit_text
from secretd.linux.user_namespace import unmapped_words
from secretd.net.listener import Listener
from secretd.qom.tree import ObjectTree

log = logging.getLogger("secretd")


def objects_in_words(count: int) -> str:
    """Return a number of objects in words."""
    return f"{count} object{'' if count == 1 else 's'}"


_MEMORY = {
    "secretmem": "secretmem (memfd_secret(2), unseen even by root's /proc/PID/mem)",
    "mlock": "mlock (not in swap or a core dump while secretd runs; root can read one copy of "
    "each secret)",
    "none": "none: MEMORY IS NOT LOCKED, secrets may reach swap (--memory-lock=require refuses "
    "this)",
}


def _audit_words(audit: Audit) -> str:
    """Return where the audit goes, and how a person reads it."""
    if audit.on_terminal:
        return "here, a line of JSON for each use of a secret; --audit=FILE keeps it elsewhere"
    if audit.target == "-":
        return "stderr, a line of JSON for each event"
    if audit.target == "none":
        return "none"
    return f"{audit.target} (secretctl audit show {audit.target})"


def say_ready(tree: ObjectTree, listeners: list[Listener], before: int, audit: Audit) -> None:
    """Log version, sockets, memory, audit and store, and the next step for a person.

    ``before``: the number of objects that an earlier process left.
    """
    kept = f", {before} of them kept from before" if before else ""
    lines = [f"version {__version__}, {objects_in_words(len(tree.journal))}{kept}"]
    lines += [f"{listener.role.value + ' socket':<18} {listener.path}" for listener in listeners]
    level = tree.journal.arena.level
    lines.append(f"{'memory':<18} {_MEMORY[level]}")
    lines.append(f"{'audit':<18} {_audit_words(audit)}")
    if tree.keeper is not None:
        words = tree.keeper.reason or f"keeps {tree.keeper.pattern}"
        lines.append(f"{'store':<18} {tree.keeper.path} ({tree.keeper.state}; {words})")
    for line in lines:
        log.info("%s", line)
    if words := unmapped_words():
        log.warning("%s; such peers are refused, and no rule can name them", words)
    if level == "none":
        log.warning("%s", limit_text())
    control = next((ln for ln in listeners if ln.role is SocketRole.CONTROL), None)
    if control is not None and control.owned:
        tool = "secretctl"
        if shutil.which(tool) is None:
            tool = os.path.join(os.path.dirname(sys.executable), tool)
        option = "" if control.path == paths.control_path() else f" --socket {control.path}"
        log.info("try: %s%s add disk0 --prompt   or: %s --help", tool, option, tool)
